"""``torch.ops.fouroversix.*``: one schema for every device, fakes, and what runs where.

The dispatcher chooses by device: the CPU kernels for CPU tensors, the reference for all others. Operators are opaque to
torch.compile, so no compiler can fuse their arithmetic into other bytes.

A weight reaches an operator packed (uint8 with its ``block_scale``), or expanded to e2m1 * block_scale (without one),
as :func:`prepare_weight` left it; its decode scale is always one per row. Block scales cross the boundary as the uint8
bytes of their E4M3 numbers: too little of torch (``allclose`` in ``opcheck`` for one) knows float8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import cpu
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import BLOCK_SIZE, Granularity, Recipe

_SCHEMAS = (
    "quantize(Tensor x, Tensor? amax, str granularity, str recipe) -> (Tensor, Tensor, Tensor)",
    "quantize_values(Tensor x, Tensor? amax, str recipe) -> (Tensor, Tensor)",
    "dequantize(Tensor packed, Tensor block_scale, Tensor decode_scale, ScalarType dtype) -> Tensor",
    "linear(Tensor x, Tensor weight, Tensor? block_scale, Tensor decode_scale, Tensor? token_scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    "moe(Tensor x, Tensor w13, Tensor? w13_block_scale, Tensor w13_decode_scale, Tensor w2, Tensor? w2_block_scale, "
    "Tensor w2_decode_scale, Tensor topk_weights, Tensor topk_ids, str? activations, str activation, "
    "bool apply_router_weight_on_input, Tensor? input_amax, Tensor? inner_amax) -> Tensor",
)

_library = torch.library.Library("fouroversix", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


@dataclass(frozen=True, slots=True)
class PreparedWeight:
    """A weight [..., N, K] as its device's operators want it.

    Args:
        weight: packed uint8 [..., N, K/2], or e2m1 * block_scale [..., N, K].
        block_scale: E4M3 bytes, uint8 [..., N, K/16], of a packed weight, else None.
        decode_scale: float32 [..., N].
    """

    weight: Tensor
    block_scale: Tensor | None
    decode_scale: Tensor


def prepare_weight(q: NVFP4Tensor, dtype: torch.dtype) -> PreparedWeight:
    """One-time change of a weight for a model of ``dtype``: expanded on CPU, packed elsewhere."""
    stored = as_stored(q)
    if q.device.type != "cpu":
        return stored
    weight = cpu.unscaled(q.packed, q.block_scale, cpu.held_dtype(dtype))
    return PreparedWeight(weight, None, stored.decode_scale)


def as_stored(q: NVFP4Tensor) -> PreparedWeight:
    """A weight as it is: every device's operators take it, at the price of unpacking it in the call."""
    return PreparedWeight(q.packed, q.block_scale.view(torch.uint8), q.row_decode_scale.contiguous())


def quantize(x: Tensor, recipe: Recipe, granularity: Granularity = "tensor", amax: Tensor | None = None) -> NVFP4Tensor:
    """``torch.ops.fouroversix.quantize``; see :func:`fouroversix_plugin.reference.quantize`."""
    packed, block_scale, decode_scale = torch.ops.fouroversix.quantize(x, amax, granularity, recipe.key)
    return NVFP4Tensor(packed, block_scale.view(torch.float8_e4m3fn), decode_scale)


def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.ops.fouroversix.dequantize``; see :func:`fouroversix_plugin.reference.dequantize`."""
    out: Tensor = torch.ops.fouroversix.dequantize(q.packed, q.block_scale.view(torch.uint8), q.row_decode_scale, dtype)
    return out


def linear(
    x: Tensor, w: PreparedWeight, activations: Recipe | None, bias: Tensor | None, input_amax: Tensor | None = None
) -> Tensor:
    """x [M, K] times a prepared weight; see :func:`fouroversix_plugin.reference.linear`."""
    values, token_scale = x, None
    if activations is not None:
        values, token_scale = torch.ops.fouroversix.quantize_values(x, input_amax, activations.key)
    out: Tensor = torch.ops.fouroversix.linear(
        values, w.weight, w.block_scale, w.decode_scale, token_scale, bias, x.dtype
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


# --- what runs: CPU tensors ---


def _cpu_quantize(x: Tensor, amax: Tensor | None, granularity: Granularity, recipe: str) -> tuple[Tensor, ...]:
    q = cpu.quantize(x, Recipe.from_key(recipe), granularity, amax)
    return q.packed, q.block_scale.view(torch.uint8), q.decode_scale


def _cpu_quantize_values(x: Tensor, amax: Tensor | None, recipe: str) -> tuple[Tensor, Tensor]:
    return cpu.quantize_values(x, Recipe.from_key(recipe), amax)


def _cpu_dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return cpu.dequantize(packed, block_scale.view(torch.float8_e4m3fn), decode_scale, dtype)


def _cpu_linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    y = cpu.scaled_matmul(x, _cpu_expanded(weight, block_scale, dtype), token_scale, decode_scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _cpu_moe(
    x: Tensor,
    w13: Tensor,
    w13_block_scale: Tensor | None,
    w13_decode_scale: Tensor,
    w2: Tensor,
    w2_block_scale: Tensor | None,
    w2_decode_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: str | None,
    activation: str,
    apply_router_weight_on_input: bool,
    input_amax: Tensor | None,
    inner_amax: Tensor | None,
) -> Tensor:
    return cpu.moe(
        x,
        _cpu_expanded(w13, w13_block_scale, x.dtype),
        w13_decode_scale,
        _cpu_expanded(w2, w2_block_scale, x.dtype),
        w2_decode_scale,
        topk_weights,
        topk_ids,
        None if activations is None else Recipe.from_key(activations),
        activation,
        apply_router_weight_on_input,
        input_amax,
        inner_amax,
    )


def _cpu_expanded(weight: Tensor, block_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (
        weight
        if block_scale is None
        else cpu.unscaled(weight, block_scale.view(torch.float8_e4m3fn), cpu.held_dtype(dtype))
    )


# --- what runs: every other device ---


def _tensor(packed: Tensor, block_scale: Tensor, decode_scale: Tensor) -> NVFP4Tensor:
    return NVFP4Tensor(packed, block_scale.view(torch.float8_e4m3fn), decode_scale)


def _quantize(x: Tensor, amax: Tensor | None, granularity: Granularity, recipe: str) -> tuple[Tensor, ...]:
    q = reference.quantize(x, Recipe.from_key(recipe), granularity, amax)
    return q.packed, q.block_scale.view(torch.uint8), q.decode_scale


def _quantize_values(x: Tensor, amax: Tensor | None, recipe: str) -> tuple[Tensor, Tensor]:
    return reference.quantize_values(x, Recipe.from_key(recipe), amax)


def _dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(_tensor(packed, block_scale, decode_scale), dtype)


def _linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    values = weight if block_scale is None else reference.unscaled(weight, block_scale.view(torch.float8_e4m3fn))
    y = reference.scaled_matmul(x, values, token_scale, decode_scale)
    return (y if bias is None else y + bias.float()).to(dtype)


def _moe(
    x: Tensor,
    w13: Tensor,
    w13_block_scale: Tensor | None,
    w13_decode_scale: Tensor,
    w2: Tensor,
    w2_block_scale: Tensor | None,
    w2_decode_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: str | None,
    activation: str,
    apply_router_weight_on_input: bool,
    input_amax: Tensor | None,
    inner_amax: Tensor | None,
) -> Tensor:
    if w13_block_scale is None or w2_block_scale is None:
        raise ValueError(f"moe: got expanded experts on {x.device}, needed packed ones; only the CPU expands them")
    return reference.moe(
        x,
        _tensor(w13, w13_block_scale, w13_decode_scale),
        _tensor(w2, w2_block_scale, w2_decode_scale),
        topk_weights,
        topk_ids,
        None if activations is None else Recipe.from_key(activations),
        activation,
        apply_router_weight_on_input,
        input_amax,
        inner_amax,
    )


for _name, _on_cpu, _elsewhere in (
    ("quantize", _cpu_quantize, _quantize),
    ("quantize_values", _cpu_quantize_values, _quantize_values),
    ("dequantize", _cpu_dequantize, _dequantize),
    ("linear", _cpu_linear, _linear),
    ("moe", _cpu_moe, _moe),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _elsewhere, "CompositeExplicitAutograd")


# --- shapes and dtypes of the results ---


@torch.library.register_fake("fouroversix::quantize", lib=_library)
def _fake_quantize(x: Tensor, amax: Tensor | None, granularity: str, recipe: str) -> tuple[Tensor, Tensor, Tensor]:
    M, K = x.shape
    decode_shape = (M,) if granularity == "token" else ()
    return (
        x.new_empty(M, K // 2, dtype=torch.uint8),
        x.new_empty(M, K // BLOCK_SIZE, dtype=torch.uint8),
        x.new_empty(decode_shape, dtype=torch.float32),
    )


@torch.library.register_fake("fouroversix::quantize_values", lib=_library)
def _fake_quantize_values(x: Tensor, amax: Tensor | None, recipe: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("fouroversix::dequantize", lib=_library)
def _fake_dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=dtype)


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
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.register_fake("fouroversix::moe", lib=_library)
def _fake_moe(x: Tensor, *operands: object) -> Tensor:
    return x.new_empty(x.shape)
