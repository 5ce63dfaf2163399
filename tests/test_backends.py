"""Every backend against the specification: the same bytes where bytes are promised, the same numbers elsewhere."""

import gc
import hashlib
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import DTYPES, RECIPES, assert_close, assert_same_bytes, assert_same_tensor, mixed_magnitudes
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import kernels, reference
from fouroversix_plugin.kernels import build, cpu, cpu_torch, ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe
from fouroversix_plugin.weights import quantize_weight

by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
# The default, the other metrics, error domains and range, and plain NVFP4.
SOME = [
    Recipe(),
    Recipe("mae", 448, error="decode_scale"),
    Recipe("mse", 448, error="scaled"),
    Recipe("abs_max", 256, error="amax"),
    Recipe("mse", 448, adaptive=False),
]
by_some = pytest.mark.parametrize("recipe", SOME, ids=lambda recipe: recipe.key)
by_scheme = pytest.mark.parametrize("activations", [None, Recipe()], ids=["W4A16", "W4A4"])
ROWS = (0, 1, 7, 128, 129)


def assert_cpu_is_reference(x: Tensor, recipe: Recipe, granularity: Any = "tensor", amax: Tensor | None = None) -> None:
    expected = reference.quantize(x, recipe, granularity, amax)
    assert_same_bytes(fos.quantize(x, recipe, granularity, amax, backend="cpu"), expected)


def weight(rows: int, columns: int, seed: int = 0) -> NVFP4Tensor:
    """W [rows, columns] with a decode scale per row of its own."""
    return reference.quantize(mixed_magnitudes(rows, columns, seed, spread=2), Recipe(), "token")


def experts(E: int = 4, inner: int = 48, hidden: int = 64, seed: int = 0) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp2(torch.arange(E) - 5.0).view(-1, 1, 1)
    return (
        quantize_weight("w13", torch.randn(E, 2 * inner, hidden, generator=generator) * magnitude, Recipe()),
        quantize_weight("w2", torch.randn(E, hidden, inner, generator=generator) * magnitude, Recipe()),
    )


def routing(tokens: int, E: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and ids [tokens, 2], some slots belonging to another rank."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(tokens)] or [torch.zeros(2).long()])
    ids = ids[:tokens].int()
    ids[1::5, 0] = -1
    return torch.rand(tokens, 2, generator=generator) + 0.1, ids


# --- quantize: the reference's bytes ---


@by_recipe
def test_cpu_quantizes_to_the_bytes_of_the_reference(recipe: Recipe) -> None:
    x32 = mixed_magnitudes(33, 128, seed=1)
    x32[3], x32[4, 16:32], x32[5, ::2] = 0, -0.0, 0
    x32[6] = torch.arange(128) / 8 - 8  # ties
    for dtype in DTYPES:
        x = x32.to(dtype)
        assert_cpu_is_reference(x, recipe, "tensor")
        assert_cpu_is_reference(x, recipe, "token")
        for factor in (1.0, 0.25, 3.0):  # an amax below the input's saturates, one above it is another rank's
            assert_cpu_is_reference(x, recipe, "tensor", x.abs().max().float() * factor)
            assert_cpu_is_reference(x, recipe, "token", reference.row_amax(x) * factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@by_recipe
def test_cpu_pins_non_finite_input_as_the_reference_does(recipe: Recipe, bad: float) -> None:
    clean = mixed_magnitudes(9, 64, seed=2)
    for dtype in DTYPES:
        x = clean.to(dtype)
        tensor_amax, row_amax = x.abs().max().float(), reference.row_amax(x)
        x[2, 17], x[7, 63], x[8] = bad, bad, 0
        for granularity, amax in (("tensor", tensor_amax), ("token", row_amax)):
            assert_cpu_is_reference(x, recipe, granularity)
            assert_cpu_is_reference(x, recipe, granularity, amax)
        row_amax[4] = bad
        assert_cpu_is_reference(x, recipe, "token", row_amax.abs())
        assert_cpu_is_reference(x, recipe, "tensor", torch.tensor(bad).abs())


@by_some
@pytest.mark.parametrize("spread", [0, 12, 40], ids=["normal", "mixed-magnitudes", "scales-that-underflow"])
def test_cpu_quantizes_a_million_values_to_the_bytes_of_the_reference(recipe: Recipe, spread: int) -> None:
    x = mixed_magnitudes(977, 1024, seed=3, spread=spread)  # rows that are no multiple of a chunk's
    assert_cpu_is_reference(x, recipe, "tensor")
    assert_cpu_is_reference(x.bfloat16(), recipe, "token")


@pytest.mark.parametrize("others", ["of-its-magnitude", "normal"])
def test_no_bf16_value_is_rounded_otherwise_by_the_cpu(others: str) -> None:
    first = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    first = first[first.isfinite()]
    assert len(first) == 2 * 0x7F80
    x = torch.randn(len(first), 16, generator=torch.Generator().manual_seed(4)).clamp(-3, 3) / 3
    if others == "of-its-magnitude":
        x *= first.float().unsqueeze(1)
    x = x.bfloat16()
    x[:, 0] = first
    assert_cpu_is_reference(x, Recipe(), "token")
    assert_cpu_is_reference(x, Recipe(), "tensor")


@pytest.mark.parametrize("rows", ROWS)
@by_some
def test_no_number_of_rows_is_special(rows: int, recipe: Recipe) -> None:
    x = mixed_magnitudes(rows, 48, seed=5)
    for granularity in ("tensor", "token"):
        assert_cpu_is_reference(x, recipe, granularity)
    values, token_scale = ops_quantize_values(x, recipe)
    assert values.shape == x.shape
    assert token_scale.shape == (rows,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows_are_dequantized_to_no_rows(backend: str) -> None:
    q = reference.quantize(torch.empty(0, 48), Recipe())
    assert fos.dequantize(q, torch.bfloat16, backend=backend).shape == (0, 48)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="every-other-column"),
        pytest.param(lambda x: x[1::3], id="every-third-row"),
        pytest.param(lambda x: x.flatten()[5 : 5 + 16 * 112].view(16, 112), id="odd-offset"),
        pytest.param(lambda x: x[:1].expand(5, -1), id="expanded"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_offsets_change_nothing(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = view(mixed_magnitudes(64, 128, seed=6, spread=2).to(dtype))
    contiguous = x.contiguous().clone()
    for granularity in ("tensor", "token"):
        expected = reference.quantize(contiguous, Recipe(), granularity)
        for backend in ("cpu", "reference"):
            assert_same_bytes(fos.quantize(x, Recipe(), granularity, backend=backend), expected)
    w = weight(32, x.shape[1])
    for activations in (None, Recipe()):
        y, expected_y = (fos.linear(each, w, activations, backend="cpu") for each in (x, contiguous))
        assert_same_tensor("linear", y, expected_y)


def test_the_callers_tensors_are_not_written_to() -> None:
    x, w = mixed_magnitudes(8, 64, seed=7, spread=2), weight(32, 64)
    w13, w2 = experts()
    tokens = torch.randn(8, 64)
    topk_weights, topk_ids = routing(8)
    bias = torch.randn(32)
    given = (x, tokens, topk_weights, topk_ids, bias, *parts(w), *parts(w13), *parts(w2))
    before = [tensor.clone() for tensor in given]
    for backend in ("cpu", "reference"):
        fos.quantize(x, amax=x.abs().max(), backend=backend)
        fos.dequantize(w, backend=backend)
        for activations in (None, Recipe()):
            fos.linear(x, w, activations, bias, backend=backend)
            fos.moe(tokens, w13, w2, topk_weights, topk_ids, activations, backend=backend)
    prepared = ops.prepare_weight(w, torch.float32)
    held = prepared.weight.clone()
    ops.linear(x, prepared, Recipe(), bias)
    assert_same_tensor("prepared weight", prepared.weight, held)
    for tensor, copy in zip(given, before, strict=True):
        assert_same_tensor("input", tensor, copy)


@pytest.mark.parametrize(
    "x",
    [torch.ones(1, 16), torch.ones(8193, 16), torch.ones(16, 3).t()],
    ids=["one row", "a row past a chunk", "by columns"],
)
def test_without_a_compiler_the_callers_tensor_is_written_to(x: Tensor) -> None:
    """Where blocks in the order of columns would be x itself."""
    x[-1, 0], x[-1, 3] = -0.0, torch.nan
    before = x.clone()
    cpu_torch.quantize(x, Recipe(), "token")
    cpu_torch.quantize_values(x, Recipe())
    assert_same_tensor("x", x, before)


def test_what_is_quantized_is_kept_or_asks_for_gradients() -> None:
    """As parameters are given, whose graph would hold them, and whose results could be neither copied nor NumPy's."""
    x, w13, w2 = torch.nn.Parameter(torch.randn(3, 64)), *experts()
    for backend in ("cpu", "reference"):
        source = torch.nn.Parameter(torch.randn(32, 64))
        kept, q = weakref.ref(source), fos.quantize(source, backend=backend)
        del source
        gc.collect()
        assert kept() is None
        bias = torch.nn.Parameter(torch.randn(32))
        results = (
            *parts(q),
            fos.dequantize(q, backend=backend),
            fos.linear(x, q, Recipe(), bias, backend),
            fos.moe(x, w13, w2, *routing(3), Recipe(), backend=backend),
        )
        assert not any(result.requires_grad for result in results)


def parts(q: NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.packed, q.block_scale, q.decode_scale


# --- quantize_values and dequantize ---


def ops_quantize_values(x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    values, token_scale = torch.ops.fouroversix.quantize_values(x, None, recipe.key)
    return values, token_scale


@by_recipe
def test_values_for_a_product_are_those_of_the_codes(recipe: Recipe) -> None:
    clean = mixed_magnitudes(9, 128, seed=8)
    clean[3], clean[4, :16], clean[5, 9] = 0, -0.0, math.nan
    for dtype in DTYPES:
        x = clean.to(dtype)
        q = reference.quantize(x, recipe, "token")
        expected = reference.unscaled(q.packed, q.block_scale).to(dtype)
        for values, token_scale in (ops_quantize_values(x, recipe), reference.quantize_values(x, recipe)):
            assert_same_tensor("values", values, expected)
            assert_same_tensor("token_scale", token_scale, q.decode_scale)


@by_recipe
@pytest.mark.parametrize("amax", [0.5, 20.0, 0.0])
def test_a_static_amax_scales_every_row_alike(recipe: Recipe, amax: float) -> None:
    # Calibrated scales do not see the live rows: some are larger than the amax, and saturate.
    clean, static = mixed_magnitudes(9, 128, seed=18), torch.tensor(amax)
    clean[3], clean[5, 9] = 0, math.nan
    for dtype in DTYPES:
        x = clean.to(dtype)
        q = reference.quantize(x, recipe, "tensor", static)
        expected = reference.unscaled(q.packed, q.block_scale).to(dtype)
        for values, token_scale in (
            torch.ops.fouroversix.quantize_values(x, static, recipe.key),
            reference.quantize_values(x, recipe, static),
        ):
            assert_same_tensor("NaN", values.isnan(), expected.isnan())
            assert_same_tensor("values", values.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
            assert_same_tensor("token_scale", token_scale, q.decode_scale.expand(9))


def random_bytes(*rows: int, per_row: bool = False) -> NVFP4Tensor:
    """Every code and every block scale, NaN included, for weights of 128 columns."""
    generator = torch.Generator().manual_seed(9)
    return NVFP4Tensor(
        torch.randint(256, (*rows, 64), generator=generator, dtype=torch.uint8),
        torch.randint(256, (*rows, 8), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.rand(rows if per_row else rows[:-1], generator=generator),
    )


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("per_row", [False, True])
def test_cpu_dequantizes_every_byte_as_the_reference_does(lead: tuple[int, ...], per_row: bool) -> None:
    q = random_bytes(*lead, 270, per_row=per_row)  # more rows than one of the pieces the CPU works in
    for dtype in DTYPES:
        expected = reference.dequantize(q, dtype)
        # A NaN scale makes NaN values; which of the NaNs is no promise.
        actual = fos.dequantize(q, dtype, backend="cpu")
        assert_same_tensor("NaN", actual.isnan(), expected.isnan())
        assert_same_tensor("values", actual.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("rows", [16, 270])
def test_a_prepared_weight_cannot_be_taken_back(lead: tuple[int, ...], rows: int) -> None:
    q = random_bytes(*lead, rows)
    prepared = ops.prepare_weight(q, torch.bfloat16)
    assert prepared.block_scale is not None
    assert prepared.weight.shape == (*lead, -(-rows // 16), 8, 8, 16)
    back = ops.unprepare_weight(prepared)
    assert_same_bytes(back, NVFP4Tensor(q.packed, q.block_scale, q.row_decode_scale.contiguous()))
    assert_same_bytes(ops.unprepare_weight(ops.as_stored(q)), back)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_a_weight_held_without_a_compiler_has_other_values(
    lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load", lambda name: "no compiler, says the test")
    q = random_bytes(*lead, 270)
    held = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
    for dtype, held_dtype in held.items():
        prepared = ops.prepare_weight(q, dtype)
        assert prepared.block_scale is None
        expected = reference.unscaled(q.packed, q.block_scale).to(held_dtype).nan_to_num(nan=9.0)
        assert_same_tensor("expanded", prepared.weight.nan_to_num(nan=9.0), expected)
        assert_same_tensor("decode_scale", prepared.decode_scale, q.row_decode_scale.contiguous())
        with pytest.raises(ValueError, match=r"without block scales, needed packed codes"):
            ops.unprepare_weight(prepared)


# --- linear and moe: the reference's numbers ---

# The CPU rounds a bf16 product once more than the reference, to bf16 before it is scaled: two roundings of 2^-9 at most
# in bf16. Elsewhere only the order of sums differs; fp16 rounds the result to 2^-12.
LINEAR = {torch.bfloat16: (8e-6, 1e-3), torch.float16: (1e-7, 1e-4), torch.float32: (1e-12, 1e-6)}


def moe_limits(dtype: torch.dtype, activations: Recipe | None, rows: int) -> tuple[float, float]:
    """calc_diff and mean ratio for experts of 192 and 128 columns."""
    if dtype != torch.bfloat16:
        return {torch.float16: (2e-5, 1e-3), torch.float32: (1e-6, 1e-4)}[dtype]
    if activations is None:
        return 1e-4, 6e-3
    # The CPU's second rounding moves many values of the intermediate by a place, and about 2 % of them across a
    # midpoint of NVFP4: a quarter of the format's own error (calc_diff 0.0045), and more by chance in a single token.
    return (2e-3, 6e-3) if rows > 100 else (1.5e-2, 0.06)


@by_scheme
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_cpu_linear_has_the_numbers_of_the_reference(rows: int, dtype: torch.dtype, activations: Recipe | None) -> None:
    x, w = mixed_magnitudes(rows, 256, seed=10, spread=2).to(dtype), weight(48, 256)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(11)).to(dtype)
    for b in (None, bias):
        expected = reference.linear(x, w, activations, b)
        packed = fos.linear(x, w, activations, b, backend="cpu")
        expanded = ops.linear(x, ops.prepare_weight(w, dtype), activations, b)
        assert packed.dtype == expected.dtype
        assert_same_tensor("packed and expanded", packed, expanded)
        if rows:
            assert_close(packed, expected, *LINEAR[dtype])
        else:
            assert packed.shape == (0, 48)


@by_scheme
def test_leading_dimensions_are_only_a_shape(activations: Recipe | None) -> None:
    x, w = mixed_magnitudes(12, 64, seed=12, spread=2), weight(32, 64)
    flat = fos.linear(x, w, activations)
    assert_same_tensor("linear", fos.linear(x.view(3, 4, 64), w, activations), flat.view(3, 4, 32))
    assert_same_tensor("vector", fos.linear(x[0], w, activations), fos.linear(x[:1], w, activations)[0])
    assert fos.linear(x.view(3, 4, 64)[:, :0], w, activations).shape == (3, 0, 32)
    w13, w2 = experts()
    topk_weights, topk_ids = routing(12)
    flat = fos.moe(x, w13, w2, topk_weights, topk_ids, activations)
    y = fos.moe(x.view(3, 4, 64), w13, w2, topk_weights.view(3, 4, 2), topk_ids.view(3, 4, 2), activations)
    assert_same_tensor("moe", y, flat.view(3, 4, 64))


@by_scheme
@pytest.mark.parametrize("on_input", [False, True], ids=["weight-on-output", "weight-on-input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_cpu_moe_has_the_numbers_of_the_reference(
    rows: int, dtype: torch.dtype, on_input: bool, activations: Recipe | None
) -> None:
    w13, w2 = experts(inner=192, hidden=128)
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(13)).to(dtype)
    topk_weights, topk_ids = routing(rows)
    expected = reference.moe(x, w13, w2, topk_weights, topk_ids, activations, "silu", on_input)
    rest = (topk_weights, topk_ids, activations, "silu", on_input)
    packed = ops.moe(x, ops.as_stored(w13), ops.as_stored(w2), *rest)
    expanded = ops.moe(x, ops.prepare_weight(w13, dtype), ops.prepare_weight(w2, dtype), *rest)
    assert packed.dtype == expected.dtype
    assert_same_tensor("packed and expanded", packed, expanded)
    if rows:
        assert_close(packed, expected, *moe_limits(dtype, activations, rows))
    else:
        assert packed.shape == (0, 128)


def test_narrow_ids_are_those_of_other_experts() -> None:
    """-1 in eight bits is 255 to whoever cuts the number of an expert to them, and 5 is 261."""
    w13, w2 = (quantize_weight(name, torch.randn(300, rows, 16), Recipe()) for name, rows in (("w13", 32), ("w2", 16)))
    x, ids = torch.ones(2, 16), torch.tensor([[-1], [5]])
    expected = reference.moe(x, w13, w2, torch.ones(2, 1), ids)
    assert not expected[0].any()
    for backend in ("cpu", "reference"):
        y = fos.moe(x, w13, w2, torch.ones(2, 1), ids.to(torch.int8), backend=backend)
        assert_close(y, expected, 1e-6, 1e-5)


def test_scales_after_silu_are_others_on_the_cpu() -> None:
    # Weights with a single 1 a row: sums are of one product, the same in any order, and bring every bit to the result.
    # Gates around 0.3 decide rows' scales: there the exponentials of libraries differ most often.
    def picking(rows: int, columns: int) -> NVFP4Tensor:
        codes = torch.eye(columns, dtype=torch.uint8).repeat(-(-rows // columns), 1)[:rows] * 2
        packed = (codes[:, ::2] | (codes[:, 1::2] << 4)).expand(2, -1, -1).contiguous()
        return NVFP4Tensor(packed, torch.ones(2, rows, columns // 16).to(torch.float8_e4m3fn), torch.ones(2))

    w13, w2 = picking(96, 64), picking(64, 48)
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(18)) * 0.3
    topk_weights, ids = routing(2000)
    prepared = (ops.prepare_weight(w, torch.float32) for w in (w13, w2))
    y = ops.moe(x, *prepared, topk_weights, ids % 2, Recipe(), "silu", False)
    assert_same_tensor("y", y, reference.moe(x, w13, w2, topk_weights, ids % 2, Recipe()))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_cpu_moe_has_every_activation(activation: str) -> None:
    w13, w2 = experts()
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(14)) / 4
    y, expected = (
        fos.moe(x, w13, w2, *routing(7), activation=activation, backend=backend) for backend in ("cpu", "reference")
    )
    assert_close(y, expected, 1e-11, 1e-5)


@by_scheme
@pytest.mark.parametrize("on_input", [False, True], ids=["weight-on-output", "weight-on-input"])
def test_an_expert_named_twice_counts_once_a_slot_everywhere(on_input: bool, activations: Recipe | None) -> None:
    w13, w2 = experts()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(15))
    ids, topk_weights = torch.tensor([[1, 1], [2, 3]]), torch.tensor([[0.25, 0.5], [0.5, 0.5]])
    y, expected = (
        fos.moe(x, w13, w2, topk_weights, ids, activations, "silu", backend, on_input)
        for backend in ("cpu", "reference")
    )
    assert_close(y, expected, 1e-6, 1e-4)


def test_a_nan_token_reaches_no_other_token_on_the_cpu() -> None:
    w, (w13, w2), routes = weight(32, 64), experts(), routing(6)
    for activations in (None, Recipe()):
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(16)).bfloat16()
        clean = fos.linear(x, w, activations), fos.moe(x, w13, w2, *routes, activations)
        x[2, 5] = math.nan
        for y, other in zip(
            (fos.linear(x, w, activations), fos.moe(x, w13, w2, *routes, activations)), clean, strict=True
        ):
            assert y[2].isnan().all()
            rest = [0, 1, 3, 4, 5]
            assert_same_tensor("other tokens", y[rest], other[rest])


# --- the operators as torch sees them ---


def as_arguments(w: ops.PreparedWeight) -> tuple[Tensor, Tensor | None, Tensor]:
    return w.weight, w.block_scale, w.decode_scale


SHAPES = [(0, 32), (1, 16), (5, 64)]


def check(op: str, *arguments: object) -> None:
    torch.library.opcheck(getattr(torch.ops.fouroversix, op).default, arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantize_operators_keep_their_schemas_and_fakes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = mixed_magnitudes(*shape, seed=17, spread=2).to(dtype)
    check("quantize", x, None, "tensor", Recipe().key)
    check("quantize", x.t().contiguous().t(), None, "token", Recipe().key)
    check("quantize", x, torch.tensor(4.0), "tensor", Recipe(scale_max=448).key)
    check("quantize_values", x, None, Recipe().key)
    check("quantize_values", x.t().contiguous().t(), torch.tensor(2.0), Recipe().key)
    q = reference.quantize(x, Recipe(), "token")
    check("dequantize", q.packed, q.block_scale.view(torch.uint8), q.decode_scale, dtype)


@by_scheme
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "expanded"])
@pytest.mark.parametrize("rows", [0, 3])
def test_linear_and_moe_operators_keep_their_schemas_and_fakes(
    rows: int, packed: bool, activations: Recipe | None
) -> None:
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(18)).bfloat16()

    def prepare(q: NVFP4Tensor) -> ops.PreparedWeight:
        return ops.as_stored(q) if packed else ops.prepare_weight(q, x.dtype)

    values, token_scale = (x, None) if activations is None else ops_quantize_values(x, activations)
    bias = torch.randn(32)
    for dtype in (x.dtype, torch.float32):
        check("linear", values, *as_arguments(prepare(weight(32, 64))), token_scale, bias, dtype)
    w13, w2 = (as_arguments(prepare(w)) for w in experts())
    key = None if activations is None else activations.key
    static = None if activations is None else torch.tensor(3.0)
    check("moe", x, *w13, *w2, *routing(rows), key, "silu", False, static, static)


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_what_marks_a_constant_is_no_longer_what_torch_marks_it_with() -> None:
    assert vars(torch.compiler.assume_constant_result(lambda: None)) == vars(kernels._cuda_reason)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_has_the_bytes_of_eager_code() -> None:
    w, recipe = weight(32, 64), Recipe("mae", 448)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2  # something for the compiler to fuse with, if it could
        q = fos.quantize(x, recipe, "token")
        return (
            q.packed,
            q.block_scale.view(torch.uint8),
            q.decode_scale,
            fos.linear(x, w),
            fos.linear(x, w, recipe),
            fos.dequantize(q, torch.bfloat16),
        )

    compiled = torch.compile(run, fullgraph=True)
    for rows in (7, 7, 130):
        x = mixed_magnitudes(rows, 64, seed=rows, spread=2).bfloat16()
        for actual, expected in zip(compiled(x), run(x), strict=True):
            assert_same_tensor(f"{rows} rows", actual, expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_another_number_of_rows_is_not_compiled_again() -> None:
    graphs, w = [], weight(32, 64)

    def count(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def run(x: Tensor) -> Tensor:
        return fos.dequantize(fos.quantize(x, granularity="token")) + fos.linear(x, w).sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for rows in range(2, 20):
        compiled(torch.ones(rows, 64))
    assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_takes_one_number_of_rows(strict: bool) -> None:
    w, (w13, w2) = weight(64, 64), experts()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            q = fos.quantize(fos.linear(x, w, Recipe()), granularity="token")
            return fos.moe(fos.dequantize(q), w13, w2, topk_weights, topk_ids)

    def given(rows: int) -> tuple[Tensor, ...]:
        return mixed_magnitudes(rows, 64, seed=rows), *routing(rows)

    rows = {0: torch.export.Dim("rows", min=2, max=4096)}
    exported = torch.export.export(Model(), given(5), dynamic_shapes=(rows,) * 3, strict=strict)
    assert_same_tensor("y", exported.module()(*given(9)), Model()(*given(9)))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_given_amax_does_not_break_the_graph() -> None:
    def run(x: Tensor, amax: Tensor) -> Tensor:
        return fos.quantize(x, amax=amax).packed

    x = mixed_magnitudes(4, 64, seed=19, spread=2)
    amax = x.abs().max() * 2
    assert_same_tensor("packed", torch.compile(run, fullgraph=True, backend="eager")(x, amax), run(x, amax))


# --- choosing ---


def test_public_backends_and_their_reasons() -> None:
    available = fos.backends()
    assert list(available) == ["reference", "cpu", "cuda", "triton", "flashinfer"]
    assert [name for name, reason in available.items() if reason is None] == ["reference", "cpu"]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("cpu", "tensors are on meta, not on the CPU"),
        ("cuda", "tensors are on meta, not on a CUDA device"),
        ("triton", "tensors are on meta, not on a CUDA device"),
        ("flashinfer", "planned, not in this release"),
        ("marlin", "no such backend; there are cpu, cuda, triton, reference"),
        ("", "no such backend"),
    ],
)
def test_a_named_backend_that_cannot_is_an_error_with_its_reason(backend: str, reason: str) -> None:
    needed = rf"backend '{backend}' cannot do linear W4A4 \(32, 64\) on meta: {reason}"
    with pytest.raises(ValueError, match=needed):
        kernels.select("linear", "W4A4", torch.Size((32, 64)), torch.device("meta"), backend)
    if backend not in ("cpu", "cuda", "triton"):
        with pytest.raises(ValueError, match=rf"backend '{backend}' cannot do quantize \(1, 16\) on cpu: {reason}"):
            fos.quantize(torch.ones(1, 16), backend=backend)


def test_the_named_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the other backend ran")

    x, w = torch.ones(2, 32), weight(16, 32)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "quantize", refuse)
        patch.setattr(cpu, "unscaled", refuse)
        fos.linear(x, fos.quantize(x, backend="reference"), Recipe(), backend="reference")
        with pytest.raises(AssertionError, match="the other backend ran"):
            fos.quantize(x)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_block_scale", refuse)
        patch.setattr(reference, "unscaled", refuse)
        fos.dequantize(fos.quantize(x))
        fos.linear(x, w, Recipe())


def test_each_choice_is_logged_once_with_the_reasons_of_those_passed_over(log: pytest.LogCaptureFixture) -> None:
    kernels._log_choice.cache_clear()
    for _ in range(3):
        fos.quantize(torch.ones(2, 16))
        fos.quantize(torch.ones(5, 32))
        kernels.select("linear", "W4A4", (32, 64), torch.device("meta"))
        kernels.select("linear", "W4A16", (32, 64), torch.device("cpu"), "reference")  # named: nothing was chosen
    assert log.messages == [
        "fouroversix: quantize on cpu by the cpu backend",
        "fouroversix: linear W4A4 on meta by the reference backend "
        "(passed over: cpu: tensors are on meta, not on the CPU; cuda: tensors are on meta, not on a CUDA device; "
        "triton: tensors are on meta, not on a CUDA device)",
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_does_not_round_operands(backend: str) -> None:
    x, q = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), weight(32, 64)
    for activations in (None, Recipe()):
        expected = fos.linear(x, q, activations, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_tensor(str(activations), fos.linear(x, q, activations, backend=backend), expected)


# --- arguments ---

W = weight(32, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fos.quantize(torch.ones(2, 3, 16)), r"x: got shape \(2, 3, 16\), needed \[M, K\]"),
        (lambda: fos.quantize(torch.ones(2, 24)), "x: got K = 24, needed a positive multiple of 16"),
        (lambda: fos.quantize(torch.ones(2, 0)), "x: got K = 0"),
        (lambda: fos.quantize(torch.ones(2, 16).double()), "x: got torch.float64, needed bfloat16, float16 or float32"),
        (lambda: fos.quantize(torch.ones(2, 16).int()), "x: got torch.int32"),
        (
            lambda: fos.quantize(torch.ones(2, 16), granularity="row"),
            "granularity: got 'row', needed 'tensor' or 'token'",
        ),
        (lambda: fos.quantize(torch.ones(2, 16), amax=torch.ones(2)), r"amax: got shape \(2,\), needed \(\)"),
        (lambda: fos.quantize(torch.ones(2, 16), None, "token", 1.0), r"amax: got shape \(\), needed \(2,\)"),
        (lambda: fos.quantize(torch.ones(2, 16), amax=-1.0), "amax: got -1.0, needed magnitudes of 0 or more"),
        (lambda: fos.quantize(torch.ones(2, 16), "mse"), "recipe: got str, needed a Recipe"),  # type: ignore[arg-type]
        (lambda: fos.dequantize(W, torch.float64), "dtype: got torch.float64, needed bfloat16, float16 or float32"),
        (
            lambda: fos.linear(torch.ones(2, 64), W, fos.preset("nvfp4")),  # type: ignore[arg-type]
            r"activations: got Scheme, needed a Recipe; a Scheme has two: \.weights and \.activations",
        ),
        (lambda: fos.linear(torch.ones(2, 32), W), r"q: got \(32, 64\) on cpu, needed \[N, K\] with K = 32 on cpu"),
        (lambda: fos.linear(torch.ones(2, 64), W, bias=torch.ones(2)), r"bias: got shape \(2,\), needed \(32,\)"),
        (lambda: fos.linear(torch.ones(2, 64), W, bias=torch.ones(32, device="meta")), "bias: got a tensor on meta"),
        (lambda: fos.linear(torch.ones(2, 64), W, bias=torch.ones(32).int()), "bias: got torch.int32, needed floating"),
        (lambda: fos.linear(torch.ones(2, 64), W, bias=[0.0] * 32), "bias: got list, needed a dense torch.Tensor"),  # type: ignore[arg-type]
        (lambda: fos.linear(W, torch.ones(2, 64)), "x: got NVFP4Tensor, needed a dense torch.Tensor"),  # type: ignore[arg-type]
        (lambda: fos.quantize([[1.0] * 16]), "x: got list, needed a dense torch.Tensor"),  # type: ignore[arg-type]
        (lambda: fos.quantize(torch.ones(2, 16).numpy()), "x: got ndarray, needed a dense torch.Tensor"),  # type: ignore[arg-type]
        (lambda: fos.quantize(torch.ones(2, 16).to_sparse()), "x: got a tensor of layout torch.sparse_coo, needed"),
        (lambda: fos.linear(torch.ones(2, 64), torch.ones(32, 64)), "q: got Tensor, needed an NVFP4Tensor"),  # type: ignore[arg-type]
        (lambda: fos.dequantize(torch.ones(32, 64)), "q: got Tensor, needed an NVFP4Tensor"),  # type: ignore[arg-type]
        (lambda: fos.linear(torch.ones(()), W), "x: got a 0-d tensor"),
        (lambda: fos.linear(torch.ones(2, 64), experts()[0]), r"q: got \(4, 96, 64\) on cpu, needed \[N, K\]"),
        (lambda: moe(w2=experts(inner=32)[1]), r"w2: got \(4, 64, 32\) on cpu, needed \(4, 64, 48\) on cpu"),
        (lambda: moe(w2=torch.ones(4, 64, 48)), "w2: got Tensor, needed an NVFP4Tensor"),
        (
            lambda: moe(topk_weights=torch.ones(3, 2, device="meta")),
            "topk_weights: got a tensor on meta, needed .* cpu",
        ),
        (lambda: moe(topk_ids=torch.ones(3, 2, device="meta").int()), "topk_ids: got a tensor on meta"),
        (lambda: moe(w13=W), r"w13: got \(32, 64\) on cpu, needed \[E, 2I, K\]"),
        (lambda: moe(activation="relu"), "activation: got 'relu', needed 'silu', 'gelu' or 'gelu_tanh'"),
        (lambda: moe(topk_ids=torch.zeros(3, 1).int()), r"topk_weights \(3, 2\) and topk_ids \(3, 1\)"),
        (lambda: moe(topk_ids=torch.zeros(3, 2).bool()), r"topk_ids \(3, 2\) torch.bool: needed .* integer ids"),
        (lambda: moe(w13=quantize_weight("w13", torch.ones(4, 97, 64), Recipe())), "w13: got 97 rows"),
        (lambda: moe(topk_weights=torch.ones(3, 2).int()), "topk_weights: got torch.int32, needed floating point"),
        (lambda: moe(topk_ids=torch.zeros(3, 2)), r"topk_ids \(3, 2\) torch.float32: needed .* integer ids"),
        (lambda: moe(x=torch.ones(4, 64)), r"one row per token \(4\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def moe(**changes: Any) -> Tensor:
    w13, w2 = experts()
    topk_weights, topk_ids = routing(3)
    arguments = {"x": torch.ones(3, 64), "w13": w13, "w2": w2, "topk_weights": topk_weights, "topk_ids": topk_ids}
    return fos.moe(**{**arguments, **changes})


def test_an_amax_may_be_a_number() -> None:
    x = mixed_magnitudes(3, 32, seed=20)
    assert_same_bytes(fos.quantize(x, amax=3.5), reference.quantize(x, Recipe(), "tensor", torch.tensor(3.5)))


# --- nothing around a call changes a byte ---


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_default_dtype_changes_no_byte(backend: str, default: torch.dtype) -> None:
    # vLLM builds and loads models under a default dtype of bf16.
    x, w = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)), weight(64, 2048)
    recipes = [*SOME, Recipe("mae")]
    expected = [reference.quantize(x, recipe) for recipe in recipes]
    product = fos.linear(x[:9], w, Recipe(), backend=backend)
    torch.set_default_dtype(default)
    try:
        actual = [fos.quantize(x, recipe, backend=backend) for recipe in recipes]
        again = fos.linear(x[:9], w, Recipe(), backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for q, needed in zip(actual, expected, strict=True):
        assert_same_bytes(q, needed)
    assert_same_tensor("linear", again, product)


def test_threads_with_different_recipes_do_not_meet() -> None:
    x = mixed_magnitudes(64, 512, seed=22, spread=3)
    two = (Recipe("mse", 256), Recipe("mae", 448, error="decode_scale"))
    expected = [reference.quantize(x, recipe) for recipe in two]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: fos.quantize(x, two[i % 2]), range(64)))
    for i, q in enumerate(results):
        assert_same_bytes(q, expected[i % 2])


DIGEST = """
import hashlib, os, sys
if sys.argv[1] == "before":
    os.environ.update(dict.fromkeys(sys.argv[2:], "1"))
import torch
torch.set_num_threads(1)
if sys.argv[1] == "bf16":
    torch.set_default_dtype(torch.bfloat16)
import fouroversix_plugin as fos
import fouroversix_plugin.kernels
torch.set_default_dtype(torch.float32)
if sys.argv[1] == "after":
    os.environ.update(dict.fromkeys(sys.argv[2:], "1"))
"""
DIGESTED = """
x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
digest = hashlib.sha256()
for backend in ("cpu", "reference"):
    for key in ("mse_256_amax", "mae_448_decode_scale", "mse_448_amax_plain"):
        for granularity in ("tensor", "token"):
            q = fos.quantize(x, fos.Recipe.from_key(key), granularity, backend=backend)
            for part in (q.packed, q.block_scale.view(torch.uint8), q.decode_scale):
                digest.update(part.numpy().tobytes())
"""
# What FlashInfer, TensorRT-LLM and TransformerEngine read to choose their FP4 numerics.
VARIABLES = (
    "FLASHINFER_NVFP4_4OVER6",
    "FLASHINFER_NVFP4_4OVER6_E4M3_USE_256",
    "FLASHINFER_NVFP4_4OVER6_ERR_MODE",
    "FLASHINFER_NVFP4_4OVER6_ERR_USE_FAST_MATH",
    "FLASHINFER_NVFP4_FAST_SCALE",
    "FLASHINFER_FP4_FAST_MATH",
    "TRTLLM_NVFP4_4OVER6",
    "TRTLLM_FP4_FAST_MATH",
    "NVTE_NVFP4_4OVER6",
    "NVTE_NVFP4_4OVER6_E4M3_USE_256",
    "NVTE_NVFP4_4OVER6_ERR_MODE",
    "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH",
    "NVTE_NVFP4_DISABLE_2D_QUANTIZATION",
    "NVTE_USE_FAST_MATH",
)


@pytest.mark.parametrize("when", ["before", "after", "bf16"])
def test_nothing_outside_a_call_changes_a_byte(when: str) -> None:
    # "before" and "after" the import: environment variables. "bf16": the package is first imported while an engine
    # builds a model under its default dtype.
    here: dict[str, Any] = {"fos": fos, "torch": torch, "hashlib": hashlib}
    exec(DIGESTED, here)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = DIGEST + DIGESTED + "print(digest.hexdigest())"
    command = [sys.executable, "-c", script, when, *VARIABLES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here["digest"].hexdigest()
