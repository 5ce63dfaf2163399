"""On a GPU: many values, and the operators captured and compiled (run by hand, not in CI; see also test_kernels.py)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import RECIPES, assert_same_tensor, mixed_magnitudes, repeated
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.kernels import build, cpu, cuda, reference_operators
from fouroversix_plugin.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

VALUES = 100_000_000
ROWS, COLUMNS = 2048, 4096
OFFSETS = torch.tensor([0, 5, 5, 20, 33], dtype=torch.int32)


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert build.load("cuda") is None


def random_values(index: int) -> Tensor:
    """Normal values, normal ones with a magnitude for each block, or bit patterns of any finite number."""
    generator = torch.Generator("cuda").manual_seed(index)
    x = torch.randn(ROWS, COLUMNS, device="cuda", generator=generator)
    if index % 3 == 1:
        exponents = torch.randint(-20, 21, (ROWS, COLUMNS // 16), device="cuda", generator=generator)
        x *= torch.exp2(exponents.float()).repeat_interleave(16, dim=1)
    if index % 3 == 2:
        bits = torch.randint(-(1 << 31), 1 << 31, x.shape, device="cuda", generator=generator).int()
        x = bits.view(torch.float32).nan_to_num(1.0, 1.0, 1.0)
    return x.to((torch.bfloat16, torch.float16, torch.float32)[index // 3 % 3]).nan_to_num(1.0, 1.0, 1.0)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_one_of_a_hundred_million_values_is_rounded_otherwise(recipe: Recipe) -> None:
    for index in range(-(-VALUES // (ROWS * COLUMNS))):
        x = random_values(index)
        granularity: Any = "token" if index % 2 else "tensor"
        actual = cuda.quantize(x, recipe, granularity, None, "row_major", False, None)
        expected = reference_operators.quantize(x, recipe, granularity, None, "row_major", False, None)
        on_cpu = cpu.quantize(x.cpu(), recipe, granularity)
        for a, e, c in zip(actual, expected, on_cpu, strict=True):
            assert_same_tensor(f"{index}: cuda and reference", a, e)
            assert_same_tensor(f"{index}: cuda and cpu", a.cpu(), c)


def calls() -> list[Any]:
    ops, key = torch.ops.fouroversix, Recipe().key
    offsets = OFFSETS.cuda() if torch.cuda.is_available() else OFFSETS
    return [
        pytest.param(lambda x: ops.quantize(x, None, "tensor", key), id="quantize-tensor"),
        pytest.param(lambda x: ops.quantize(x, None, "token", key), id="quantize-token"),
        pytest.param(lambda x: ops.quantize_values(x, None, key), id="quantize_values"),
        pytest.param(lambda x: ops.quantize_to_layout(x, None, "token", key, "128x4"), id="quantize_to_layout"),
        pytest.param(lambda x: ops.quantize_experts(x, offsets, None, key, "8x4"), id="quantize_experts"),
        pytest.param(lambda x: ops.silu_and_mul_quantize(x, None, "token", key, "row_major"), id="silu_and_mul"),
        pytest.param(lambda x: ops.silu_and_mul_quantize_values(x, None, key), id="silu_and_mul_values"),
        pytest.param(lambda x: dequantized(fos.quantize(x, granularity="token")), id="public"),
    ]


def dequantized(q: fos.NVFP4Tensor) -> tuple[Tensor, ...]:
    return q.packed, fos.dequantize(q, torch.bfloat16)


@pytest.mark.parametrize("call", calls())
def test_graph_replay_or_compilation_changes_a_byte(call: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    first, second = (mixed_magnitudes(33, 576, seed=seed, spread=2).bfloat16().cuda() for seed in (0, 1))
    x = first.clone()
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x)
    for values in (second, first):
        x.copy_(values)
        graph.replay()
        for actual, expected in zip(captured, call(values), strict=True):
            assert_same_tensor("replayed", actual, expected)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=False)
    for actual, expected in zip(compiled(second), call(second), strict=True):
        assert_same_tensor("compiled", actual, expected)


SHAPES = [
    *((1, 16), (1, 14336), (3, 16384), (3, 16400), (17, 1040), (40, 6160), (64, 14336), (264, 528), (265, 528)),
    # Rows that end within a warp: of 16, 48, 144 and 176 threads, the last row's warp without another one.
    *((9001, 768), (301, 768), (1001, 4352), (301, 2816)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_how_a_row_is_spread_over_threads_changes_a_byte(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = mixed_magnitudes(rows, columns, seed=3, spread=2).to(dtype).cuda()
    if rows > 2:  # the first and the last value a row has, which different CTAs find
        x[0, -1], x[1, 0], x[2] = torch.nan, -torch.inf, 0
    for recipe in (Recipe(), Recipe("mae", 448), Recipe("abs_max"), Recipe("mse", 448, adaptive=False)):
        for layout in ("row_major", "128x4", "8x4"):
            check_operator("quantize", x, recipe, "token", None, layout, False, None)
        check_operator("quantize_values", x, recipe, None, False)
        if columns % 32 == 0:
            check_operator("quantize", x, recipe, "token", None, "row_major", True, None)
            check_operator("quantize_values", x, recipe, None, True)


def with_ties(largest: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Few numbers, so that the errors of 4 and 6 are often equal, or as near as their additions round."""
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randint(-largest, largest + 1, (rows, columns), device="cuda", generator=generator) * 0.25
    return (x * torch.exp2(torch.arange(rows, device="cuda") % 9 - 4).unsqueeze(1)).to(dtype)


# A cluster a row; a group of threads a row, whole warps and others.
@pytest.mark.parametrize(("rows", "columns"), [(264, 2048), (2000, 768), (700, 4096)])
# With 24 the scales of 256 * 6 are powers of two, with 21 those of 448 * 6: nothing is rounded, and ties are ties.
@pytest.mark.parametrize("largest", [21, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_errors_that_are_near_are_compared_otherwise(
    recipe: Recipe, dtype: torch.dtype, largest: int, rows: int, columns: int
) -> None:
    x = with_ties(largest, rows, columns, dtype)
    for gated in (False, True):
        check_operator("quantize_values", x, recipe, None, gated)
        check_operator("quantize", x, recipe, "token", None, "row_major", gated, None)
    check_operator("quantize_values", x, recipe, torch.tensor(90.0, device="cuda"), False)


def check_operator(name: str, *arguments: Any) -> None:
    actual, expected = getattr(cuda, name)(*arguments), getattr(reference_operators, name)(*arguments)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if name == "quantize_values" and number == 0:  # which of the NaNs is no promise
            assert_same_tensor("NaN", a.isnan(), e.isnan())
            a, e = a.nan_to_num(nan=9.0), e.nan_to_num(nan=9.0)
        assert_same_tensor(f"{name} {arguments[1:]}, result {number}", a, e)


@pytest.mark.parametrize("rows", [4, 300])
@pytest.mark.parametrize("captured", [False, True])
def test_a_call_begins_before_its_input_is_there_or_is_overtaken(captured: bool, rows: int) -> None:
    values = [mixed_magnitudes(rows, 4096, seed=seed, spread=2).cuda() for seed in range(3)]
    expected = [cuda.quantize(x, Recipe(), "token", None, "128x4", False, None) for x in values]
    x, side = torch.zeros_like(values[0]), torch.cuda.Stream()

    def calls() -> list[tuple[Tensor, ...]]:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000)
            x.copy_(values[0])
        main.wait_stream(side)  # after another stream's work and this one's
        found = [cuda.quantize(x, Recipe(), "token", None, "128x4", False, None)]
        torch.cuda._sleep(200_000)
        x.copy_(values[1])  # after a copy
        found.append(cuda.quantize(x, Recipe(), "token", None, "128x4", False, None))
        torch.cuda._sleep(200_000)
        torch.add(values[2], 0, out=x)  # after a kernel, and another call after it
        found += [cuda.quantize(x, Recipe(), "token", None, "128x4", False, None) for _ in range(2)]
        x.zero_()
        return found

    for found in repeated(calls, captured):
        for results, number in zip(found, (0, 1, 2, 2), strict=True):
            for a, e in zip(results, expected[number], strict=True):
                assert_same_tensor(f"call {number}", a, e)


def test_a_call_waits_for_the_gpu() -> None:
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 10, 64], device="cuda", dtype=torch.int32)
    cuda.quantize(x, Recipe(), "tensor", None, "8x4", False, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for granularity in ("tensor", "token"):
            cuda.quantize(x, Recipe(), granularity, None, "128x4", False, None)
        cuda.quantize(x, Recipe(), "tensor", None, "8x4", False, offsets)
        cuda.quantize_values(x, Recipe(), None, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_or_device_index_is_ignored() -> None:
    x = mixed_magnitudes(512, 4096, seed=2, spread=2).cuda()
    expected = cuda.quantize(x, Recipe(), "tensor", None, "row_major", False, None)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on the default stream would run before the input below is there
        y = torch.zeros_like(x).copy_(x)
        actual = cuda.quantize(y, Recipe(), "tensor", None, "row_major", False, None)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert_same_tensor("other stream", a, e)


def test_the_choice_of_backends_names_the_kernels() -> None:
    assert fos.backends()["cuda"] is None
    x = torch.randn(4, 64, device="cuda")
    q = fos.quantize(x, backend="cuda")
    assert q.packed.is_cuda
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot do quantize .* on cpu: tensors are on cpu"):
        fos.quantize(x.cpu(), backend="cuda")
