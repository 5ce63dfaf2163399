"""``torch.ops.fouroversix.*``: one schema for every device, fakes, and what runs where.

The dispatcher chooses by device; a device has one implementation in a process, whichever can be had there. Operators
are opaque to torch.compile, so no compiler can fuse their arithmetic into other bytes.
``torch.ops.fouroversix_triton.*`` are the quantizers of CUDA tensors once more, always by the Triton kernels.

- ``quantize``: x [M, K] to packed [M, K/2], block scales [M, K/16] and a decode scale ([] or, per token, [M]), scaled
  for ``amax`` ([] or [M]) or for the largest magnitude of the tensor or row.
- ``quantize_values``: e2m1 * block_scale in the dtype of x, and token_scale [M]; ``amax`` [] is a static one.
- ``quantize_to_layout``: ``quantize`` with block scales in the order that block-scaled GEMMs read ("128x4", "8x4":
  flat, padding 0; see :func:`fouroversix_plugin.nvfp4.scales_to_layout`).
- ``quantize_experts``: rows sorted by expert, int32 offsets [E + 1] on the device, a decode scale per expert [E]; see
  :func:`fouroversix_plugin.reference.expert_amax` and :func:`~fouroversix_plugin.reference.expert_scales_to_layout`.
- ``silu_and_mul_*``: x is [gate, up] [M, 2K], and what is quantized is
  :func:`fouroversix_plugin.reference.silu_and_mul` of it.

- ``linear_w4a4``: both operands packed, with block scales in the layout 128x4: what ``quantize_to_layout`` makes of
  activations, and weights prepared for FP4 units.

A weight reaches an operator packed (uint8 with its ``block_scale``), or expanded to e2m1 * block_scale (without one),
as :func:`prepare_weight` left it; its decode scale is always one per row. Block scales cross the boundary as the uint8
bytes of their E4M3 numbers: too little of torch (``allclose`` in ``opcheck`` for one) knows float8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fouroversix_plugin.kernels import blackwell, cpu, cuda, hopper, reference_operators, triton, triton_gemm
from fouroversix_plugin.nvfp4 import NVFP4Tensor, ScaleLayout, padded_scale_shape
from fouroversix_plugin.recipe import BLOCK_SIZE, Granularity, Recipe

_QUANTIZER_SCHEMAS = (
    "quantize(Tensor x, Tensor? amax, str granularity, str recipe) -> (Tensor, Tensor, Tensor)",
    "quantize_values(Tensor x, Tensor? amax, str recipe) -> (Tensor, Tensor)",
    "quantize_to_layout(Tensor x, Tensor? amax, str granularity, str recipe, str layout) -> (Tensor, Tensor, Tensor)",
    "quantize_experts(Tensor x, Tensor expert_offsets, Tensor? amax, str recipe, str layout) "
    "-> (Tensor, Tensor, Tensor)",
    "silu_and_mul_quantize(Tensor x, Tensor? amax, str granularity, str recipe, str layout) "
    "-> (Tensor, Tensor, Tensor)",
    "silu_and_mul_quantize_values(Tensor x, Tensor? amax, str recipe) -> (Tensor, Tensor)",
    "silu_and_mul_quantize_experts(Tensor x, Tensor expert_offsets, Tensor? amax, str recipe, str layout) "
    "-> (Tensor, Tensor, Tensor)",
    "dequantize(Tensor packed, Tensor block_scale, Tensor decode_scale, ScalarType dtype) -> Tensor",
)
_SCHEMAS = (
    *_QUANTIZER_SCHEMAS,
    "linear(Tensor x, Tensor weight, Tensor? block_scale, Tensor decode_scale, Tensor? token_scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    "linear_w4a4(Tensor x, Tensor x_block_scale, Tensor token_scale, Tensor weight, Tensor block_scale, "
    "Tensor decode_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    "moe(Tensor x, Tensor w13, Tensor? w13_block_scale, Tensor w13_decode_scale, Tensor w2, Tensor? w2_block_scale, "
    "Tensor w2_decode_scale, Tensor topk_weights, Tensor topk_ids, str? activations, str activation, "
    "bool apply_router_weight_on_input, Tensor? input_amax, Tensor? inner_amax) -> Tensor",
)

_library = torch.library.Library("fouroversix", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)

# The Triton kernels by name, also where the device's operators are the compiled ones.
_triton_library = torch.library.Library("fouroversix_triton", "DEF")
for _schema in _QUANTIZER_SCHEMAS:
    _triton_library.define(_schema)


@dataclass(frozen=True, slots=True)
class PreparedWeight:
    """A weight [..., N, K] as its device's operators want it.

    Args:
        weight: packed uint8 [..., N, K/2]; or as a backend's ``prepare`` left it: two more dimensions in tiles for
            Hopper, three in strips for the CPU, int32 for Triton; or, without block scales, e2m1 * block_scale
            [..., N, K].
        block_scale: those of a packed weight, E4M3 bytes [..., N, K/16] or as prepared (flat for FP4 units); else None.
        decode_scale: float32 [..., N].
        columns: K, which tiles fill up.
        gated: that rows of tiles are 8 of gate and 8 of up in turn.
    """

    weight: Tensor
    block_scale: Tensor | None
    decode_scale: Tensor
    columns: int = 0
    gated: bool = False

    @property
    def is_for_fp4_units(self) -> bool:
        """Whether only quantized activations multiply it, packed as it is."""
        return self.block_scale is not None and self.block_scale.ndim == 1


def prepare_weight(q: NVFP4Tensor, dtype: torch.dtype, gated: bool = False, scheme: str = "") -> PreparedWeight:
    """One-time change of a weight for a model of ``dtype``: shuffled for the device (or expanded, on CPU alone).

    Args:
        q: [..., N, K].
        dtype: of the activations.
        gated: for the first product of a mixture of experts, whose rows are those of gate, then those of up.
        scheme: "W4A4" or "W4A16" for activations that are all quantized or none; "" keeps to what multiplies both.
    """
    stored = as_stored(q)
    assert stored.block_scale is not None
    if q.device.type == "cpu":
        weight, block_scale = cpu.prepare(stored.weight, stored.block_scale, dtype)
    elif q.device.type == "cuda":
        weight, block_scale = cuda.prepare(stored.weight, stored.block_scale, dtype, gated, scheme)
    else:
        return stored
    return PreparedWeight(weight, block_scale, stored.decode_scale, q.shape[-1], gated)


def prepare_experts(
    w13: NVFP4Tensor, w2: NVFP4Tensor, dtype: torch.dtype, scheme: str = ""
) -> tuple[PreparedWeight, PreparedWeight]:
    """:func:`prepare_weight` of what :func:`moe` multiplies: w13 [E, 2I, H] and w2 [E, H, I]."""
    return prepare_weight(w13, dtype, gated=True, scheme=scheme), prepare_weight(w2, dtype, scheme=scheme)


def unprepare_weight(w: PreparedWeight) -> NVFP4Tensor:
    """The weight that :func:`prepare_weight` was given, with a decode scale per row.

    On Hopper, codes under a block scale of 0 come back without their magnitude.

    Raises:
        ValueError: an expanded weight: its codes are gone.
    """
    if w.block_scale is None:
        raise ValueError(f"weight: got {w.weight.dtype} without block scales, needed packed codes")
    packed, block_scale, rows = w.weight, w.block_scale, w.decode_scale.shape[-1]
    if w.is_for_fp4_units:
        block_scale = blackwell.restore(block_scale, rows, packed.shape[-1] * 2)
    elif packed.dtype == torch.int32:
        packed, block_scale = triton_gemm.restore(packed, block_scale, rows, w.columns)
    elif packed.ndim == w.decode_scale.ndim + 3:
        packed, block_scale = cpu.from_strips(packed, block_scale, rows)
    elif packed.ndim == w.decode_scale.ndim + 2:
        packed, block_scale = hopper.restore(packed, block_scale, rows, w.columns, w.gated)
    return NVFP4Tensor(packed, block_scale.view(torch.float8_e4m3fn), w.decode_scale)


def as_stored(q: NVFP4Tensor) -> PreparedWeight:
    """A weight as it is: every device's operators take it, at the price of unpacking it in the call."""
    return PreparedWeight(q.packed, q.block_scale.view(torch.uint8), q.row_decode_scale.contiguous(), q.shape[-1])


def _check_columns(name: str, x: Tensor, w: PreparedWeight) -> None:
    """Tiles are filled up: the operators would not notice a K that only they make fit."""
    if w.columns and x.shape[-1] != w.columns:
        raise ValueError(f"{name}: got {x.shape[-1]} columns, needed the weight's {w.columns}")


def quantize(
    x: Tensor,
    recipe: Recipe,
    granularity: Granularity = "tensor",
    amax: Tensor | None = None,
    operators: Any = torch.ops.fouroversix,
) -> NVFP4Tensor:
    """``torch.ops.fouroversix.quantize``; see :func:`fouroversix_plugin.reference.quantize`."""
    packed, block_scale, decode_scale = operators.quantize(x, amax, granularity, recipe.key)
    return NVFP4Tensor(packed, block_scale.view(torch.float8_e4m3fn), decode_scale)


def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32, operators: Any = torch.ops.fouroversix) -> Tensor:
    """``torch.ops.fouroversix.dequantize``; see :func:`fouroversix_plugin.reference.dequantize`."""
    out: Tensor = operators.dequantize(q.packed, q.block_scale.view(torch.uint8), q.row_decode_scale, dtype)
    return out


def linear(
    x: Tensor,
    w: PreparedWeight,
    activations: Recipe | None,
    bias: Tensor | None,
    input_amax: Tensor | None = None,
    operators: Any = torch.ops.fouroversix,
) -> Tensor:
    """x [M, K] times a prepared weight; see :func:`fouroversix_plugin.reference.linear`.

    Raises:
        ValueError: another K than the weight's; activations that are not quantized, for a weight that FP4 units want.
    """
    _check_columns("x", x, w)
    if w.is_for_fp4_units:
        return _linear_w4a4(x, w, activations, bias, input_amax, operators)
    values, token_scale = x, None
    if activations is not None:
        values, token_scale = operators.quantize_values(x, input_amax, activations.key)
    out: Tensor = torch.ops.fouroversix.linear(
        values, w.weight, w.block_scale, w.decode_scale, token_scale, bias, x.dtype
    )
    return out


def _linear_w4a4(
    x: Tensor,
    w: PreparedWeight,
    activations: Recipe | None,
    bias: Tensor | None,
    input_amax: Tensor | None,
    operators: Any,
) -> Tensor:
    if activations is None:
        raise ValueError("activations: got None (W4A16), needed a recipe: the weight was prepared for W4A4")
    amax = None if input_amax is None else input_amax.expand(x.shape[0])
    packed, block_scale, token_scale = operators.quantize_to_layout(x, amax, "token", activations.key, blackwell.LAYOUT)
    out: Tensor = torch.ops.fouroversix.linear_w4a4(
        packed, block_scale, token_scale, w.weight, w.block_scale, w.decode_scale, bias, x.dtype
    )
    return out


def moe(
    x: Tensor,
    w13: PreparedWeight,
    w2: PreparedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: Recipe | None,
    activation: str,
    apply_router_weight_on_input: bool,
    input_amax: Tensor | None = None,
    inner_amax: Tensor | None = None,
) -> Tensor:
    """Mixture of experts on prepared weights; see :func:`fouroversix_plugin.reference.moe`."""
    _check_columns("x", x, w13)
    out: Tensor = torch.ops.fouroversix.moe(
        x,
        w13.weight,
        w13.block_scale,
        w13.decode_scale,
        w2.weight,
        w2.block_scale,
        w2.decode_scale,
        topk_weights,
        topk_ids,
        None if activations is None else activations.key,
        activation,
        apply_router_weight_on_input,
        input_amax,
        inner_amax,
    )
    return out


# --- what runs: the quantizers, on every device ---


class _Quantizer(Protocol):
    """What a backend brings: :mod:`fouroversix_plugin.kernels.native` says what each means."""

    def quantize(
        self,
        x: Tensor,
        recipe: Recipe,
        granularity: Granularity,
        amax: Tensor | None,
        layout: ScaleLayout,
        gated: bool,
        expert_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def quantize_values(self, x: Tensor, recipe: Recipe, amax: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]: ...

    def dequantize(self, packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor: ...


def _register(key: str, backend: _Quantizer, library: torch.library.Library = _library) -> None:
    """Make ``backend`` what runs for tensors of a dispatch key."""

    def quantize(x: Tensor, amax: Tensor | None, granularity: Granularity, recipe: str) -> tuple[Tensor, ...]:
        return backend.quantize(x, Recipe.from_key(recipe), granularity, amax, "row_major", False, None)

    def to_layout(gated: bool) -> Callable[..., tuple[Tensor, ...]]:
        def run(
            x: Tensor, amax: Tensor | None, granularity: Granularity, recipe: str, layout: ScaleLayout
        ) -> tuple[Tensor, ...]:
            return backend.quantize(x, Recipe.from_key(recipe), granularity, amax, layout, gated, None)

        return run

    def experts(gated: bool) -> Callable[..., tuple[Tensor, ...]]:
        def run(
            x: Tensor, expert_offsets: Tensor, amax: Tensor | None, recipe: str, layout: ScaleLayout
        ) -> tuple[Tensor, ...]:
            return backend.quantize(x, Recipe.from_key(recipe), "tensor", amax, layout, gated, expert_offsets)

        return run

    def values(gated: bool) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, amax: Tensor | None, recipe: str) -> tuple[Tensor, ...]:
            return backend.quantize_values(x, Recipe.from_key(recipe), amax, gated)

        return run

    for name, run in (
        ("quantize", quantize),
        ("quantize_to_layout", to_layout(gated=False)),
        ("quantize_experts", experts(gated=False)),
        ("quantize_values", values(gated=False)),
        ("silu_and_mul_quantize", to_layout(gated=True)),
        ("silu_and_mul_quantize_experts", experts(gated=True)),
        ("silu_and_mul_quantize_values", values(gated=True)),
        ("dequantize", backend.dequantize),
    ):
        library.impl(name, run, key)


_register("CPU", cpu)
_register("CUDA", cuda)
_register("CUDA", triton, _triton_library)
_register("CompositeExplicitAutograd", reference_operators)


# --- what runs: the products, on every device ---


def _moe_of(backend: Any) -> Callable[..., Tensor]:
    def run(*operands: Any) -> Tensor:
        recipe = None if operands[9] is None else Recipe.from_key(operands[9])
        out: Tensor = backend.moe(*operands[:9], recipe, *operands[10:])
        return out

    return run


for _key, _backend in (("CPU", cpu), ("CUDA", cuda), ("CompositeExplicitAutograd", reference_operators)):
    _library.impl("linear", _backend.linear, _key)
    _library.impl("moe", _moe_of(_backend), _key)
_library.impl("linear_w4a4", cuda.linear_w4a4, "CUDA")
_library.impl("linear_w4a4", reference_operators.linear_w4a4, "CompositeExplicitAutograd")


# --- shapes and dtypes of the results ---


def _fake(
    x: Tensor, columns: int, layout: ScaleLayout, decode_shape: Sequence[int], experts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    tile = padded_scale_shape(layout, 1, 1)[0]
    rows = M if experts is None else (M + experts * (tile - 1)) // tile * tile
    scales: tuple[int, ...] = padded_scale_shape(layout, rows, columns // BLOCK_SIZE)
    return (
        x.new_empty(M, columns // 2, dtype=torch.uint8),
        x.new_empty(scales if layout == "row_major" else scales[0] * scales[1], dtype=torch.uint8),
        x.new_empty(decode_shape, dtype=torch.float32),
    )


def _decode_shape(x: Tensor, granularity: str) -> tuple[int, ...]:
    return (x.shape[0],) if granularity == "token" else ()


@torch.library.register_fake("fouroversix::quantize", lib=_library)
def _fake_quantize(x: Tensor, amax: Tensor | None, granularity: str, recipe: str) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(x, x.shape[1], "row_major", _decode_shape(x, granularity))


@torch.library.register_fake("fouroversix::quantize_to_layout", lib=_library)
def _fake_quantize_to_layout(
    x: Tensor, amax: Tensor | None, granularity: str, recipe: str, layout: ScaleLayout
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(x, x.shape[1], layout, _decode_shape(x, granularity))


@torch.library.register_fake("fouroversix::silu_and_mul_quantize", lib=_library)
def _fake_silu_and_mul_quantize(
    x: Tensor, amax: Tensor | None, granularity: str, recipe: str, layout: ScaleLayout
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake(x, x.shape[1] // 2, layout, _decode_shape(x, granularity))


@torch.library.register_fake("fouroversix::quantize_experts", lib=_library)
def _fake_quantize_experts(
    x: Tensor, expert_offsets: Tensor, amax: Tensor | None, recipe: str, layout: ScaleLayout
) -> tuple[Tensor, Tensor, Tensor]:
    E = expert_offsets.shape[0] - 1
    return _fake(x, x.shape[1], layout, (E,), E)


@torch.library.register_fake("fouroversix::silu_and_mul_quantize_experts", lib=_library)
def _fake_silu_and_mul_quantize_experts(
    x: Tensor, expert_offsets: Tensor, amax: Tensor | None, recipe: str, layout: ScaleLayout
) -> tuple[Tensor, Tensor, Tensor]:
    E = expert_offsets.shape[0] - 1
    return _fake(x, x.shape[1] // 2, layout, (E,), E)


@torch.library.register_fake("fouroversix::quantize_values", lib=_library)
def _fake_quantize_values(x: Tensor, amax: Tensor | None, recipe: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("fouroversix::silu_and_mul_quantize_values", lib=_library)
def _fake_silu_and_mul_quantize_values(x: Tensor, amax: Tensor | None, recipe: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[1] // 2), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("fouroversix::dequantize", lib=_library)
def _fake_dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=dtype)


for _name, _fake_of in (
    ("quantize", _fake_quantize),
    ("quantize_to_layout", _fake_quantize_to_layout),
    ("quantize_experts", _fake_quantize_experts),
    ("quantize_values", _fake_quantize_values),
    ("silu_and_mul_quantize", _fake_silu_and_mul_quantize),
    ("silu_and_mul_quantize_experts", _fake_silu_and_mul_quantize_experts),
    ("silu_and_mul_quantize_values", _fake_silu_and_mul_quantize_values),
    ("dequantize", _fake_dequantize),
):
    torch.library.register_fake(f"fouroversix_triton::{_name}", _fake_of, lib=_triton_library)


@torch.library.register_fake("fouroversix::linear", lib=_library)
def _fake_linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], decode_scale.shape[0], dtype=dtype)


@torch.library.register_fake("fouroversix::linear_w4a4", lib=_library)
def _fake_linear_w4a4(
    x: Tensor,
    x_block_scale: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], decode_scale.shape[0], dtype=dtype)


@torch.library.register_fake("fouroversix::moe", lib=_library)
def _fake_moe(x: Tensor, *operands: object) -> Tensor:
    return x.new_empty(x.shape)
