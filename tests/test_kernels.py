"""The quantizer of every backend against the specification: the same bytes from each operator."""

import math
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import DTYPES, RECIPES, assert_same_tensor, golden_cases, mixed_magnitudes
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, cpu, cuda, native, reference_operators, triton
from fouroversix_plugin.nvfp4 import scales_to_layout
from fouroversix_plugin.recipe import Recipe

LAYOUTS: tuple[Any, ...] = ("row_major", "128x4", "8x4")
# The default, the other metrics, error domains and range, and plain NVFP4.
SOME = [
    Recipe(),
    Recipe("mae", 448, error="decode_scale"),
    Recipe("mse", 448, error="scaled"),
    Recipe("abs_max", 256),
    Recipe("mse", 448, adaptive=False),
]
by_some = pytest.mark.parametrize("recipe", SOME, ids=lambda recipe: recipe.key)
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


class Implementation:
    """One backend's operators, given and giving CPU tensors."""

    def __init__(self, operators: ModuleType, device: str) -> None:
        self.operators, self.device = operators, torch.device(device)

    def quantize(
        self,
        x: Tensor,
        recipe: Recipe = SOME[0],
        granularity: Any = "tensor",
        amax: Tensor | None = None,
        layout: Any = "row_major",
        gated: bool = False,
        expert_offsets: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        placed = (t if t is None else t.to(self.device) for t in (x, amax, expert_offsets))
        x_, amax_, offsets_ = placed
        return self._home(self.operators.quantize(x_, recipe, granularity, amax_, layout, gated, offsets_))

    def quantize_values(
        self, x: Tensor, recipe: Recipe = SOME[0], amax: Tensor | None = None, gated: bool = False
    ) -> tuple[Tensor, ...]:
        amax = None if amax is None else amax.to(self.device)
        return self._home(self.operators.quantize_values(x.to(self.device), recipe, amax, gated))

    def dequantize(self, packed: Tensor, scale: Tensor, decode: Tensor, dtype: torch.dtype) -> Tensor:
        on = (t.to(self.device) for t in (packed, scale, decode))
        return self._home((self.operators.dequantize(*on, dtype),))[0]

    def _home(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(result.cpu() for result in results)


COMPILED = (
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=[pytest.mark.gpu, no_cuda]),
    pytest.param("triton", id="triton", marks=[pytest.mark.gpu, no_cuda]),
)


def implementation(name: Any) -> Implementation:
    reason = triton.reason() if name == "triton" else build.load(name)
    assert reason is None, "the kernels must compile where tests run"
    return Implementation({"cpu": cpu, "cuda": cuda, "triton": triton}[name], "cpu" if name == "cpu" else "cuda")


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest) -> Implementation:
    return implementation(request.param)


@pytest.fixture(params=[*COMPILED, pytest.param("torch", id="cpu-without-compiler")])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Implementation:
    if request.param == "torch":
        monkeypatch.setattr(build, "load", lambda name: "no compiler, says the test")
        # Or the test would test the wrong thing.
        monkeypatch.setattr(native, "_of", lambda tensor: pytest.fail("the compiled kernels ran"))
        return Implementation(cpu, "cpu")
    return implementation(request.param)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    names = ("packed", "block_scale", "decode_scale") if len(expected) == 3 else ("values", "token_scale")
    for name, a, e in reversed(list(zip(names, actual, expected, strict=True))):
        # A NaN scale makes NaN values; which of the NaNs is no promise.
        if name == "values":
            assert_same_tensor("NaN", a.isnan(), e.isnan())
            a, e = a.nan_to_num(nan=9.0), e.nan_to_num(nan=9.0)
        assert_same_tensor(name, a, e)


def check(kernels: Implementation, x: Tensor, recipe: Recipe, granularity: Any, amax: Tensor | None = None) -> None:
    expected = reference_operators.quantize(x, recipe, granularity, amax, "row_major", False, None)
    assert_same(kernels.quantize(x, recipe, granularity, amax), expected)
    if granularity == "token":
        assert_same(kernels.quantize_values(x, recipe, amax), reference.quantize_values(x, recipe, amax))


def check_golden(kernels: Implementation, case: dict[str, Any], golden: Mapping[str, Tensor]) -> None:
    recipe = Recipe(case["metric"], case["scale_max"], case["adaptive"], case["error"])
    packed, scale, decode = kernels.quantize(golden[case["input"]], recipe, case["scope"])
    assert_same_tensor("packed", packed, golden[f"{case['case']}/packed"])
    assert_same_tensor("block_scale", scale, golden[f"{case['case']}/block_scale"].view(torch.uint8))
    assert_same_tensor("decode_scale", decode, golden[f"{case['case']}/decode_scale"].reshape(decode.shape))


def hard_rows(dtype: torch.dtype) -> Tensor:
    """Zeros, negative zeros, ties, values beside everything that is rounded, and magnitudes across the whole range."""
    x = mixed_magnitudes(40, 128, seed=1)
    x[3], x[4, 16:32], x[5, ::2] = 0, -0.0, 0
    x[6] = torch.arange(128) / 8 - 8
    x[7] = torch.tensor([24.0, 20, 16, 12, 10, 7, 5, 3]).repeat(16)
    x[8] = 1.0
    x[9, 1:] = 0
    x[10] *= 1e-30
    x[11] *= 2e-38 if dtype != torch.float16 else 1e-7
    x[12] = torch.finfo(dtype).max * torch.linspace(-1, 1, 128)
    x[13] = torch.finfo(dtype).tiny
    x[14] = torch.finfo(dtype).smallest_normal / 4
    x[15, 16:] *= 1e-12
    return x.to(dtype)


@by_recipe
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_values_become_other_bytes(kernels: Implementation, dtype: torch.dtype, recipe: Recipe) -> None:
    x = hard_rows(dtype)
    for granularity in ("tensor", "token"):
        check(kernels, x, recipe, granularity)
    for factor in (1.0, 0.25, 3.0, 1e9, 1e-9, 0.0):
        check(kernels, x, recipe, "tensor", x.abs().max().float() * factor)
        check(kernels, x, recipe, "token", reference.row_amax(x) * factor)
    check(kernels, x[:12], recipe, "tensor")


@by_recipe
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_not_what_is_pinned(kernels: Implementation, bad: float, recipe: Recipe) -> None:
    for dtype in DTYPES:
        x = mixed_magnitudes(9, 64, seed=2, spread=2).to(dtype)
        tensor_amax, row_amax = x.abs().max().float(), reference.row_amax(x)
        x[2, 17], x[7, 63], x[8] = bad, bad, 0
        for granularity, amax in (("tensor", tensor_amax), ("token", row_amax)):
            check(kernels, x, recipe, granularity)
            check(kernels, x, recipe, granularity, amax)
        row_amax[4] = abs(bad)
        check(kernels, x, recipe, "token", row_amax)
        check(kernels, x, recipe, "tensor", torch.tensor(abs(bad)))


@by_recipe
def test_one_of_a_million_values_is_rounded_otherwise(compiled: Implementation, recipe: Recipe) -> None:
    for spread in (0, 12):
        x = mixed_magnitudes(977, 1024, seed=3, spread=spread)
        check(compiled, x, recipe, "tensor")
        check(compiled, x.bfloat16(), recipe, "token")
        check(compiled, (x / 2**spread).half(), recipe, "token")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lane", range(16))
def test_a_bit_pattern_is_rounded_otherwise_in_some_lane(
    compiled: Implementation, lane: int, dtype: torch.dtype
) -> None:
    pattern = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    pattern = pattern[pattern.isfinite()]
    x = torch.randn(len(pattern), 16, generator=torch.Generator().manual_seed(lane)).clamp(-3, 3) / 3
    if lane % 2:
        x *= pattern.float().unsqueeze(1)
    x = x.to(dtype)
    x[:, lane] = pattern
    check(compiled, x, Recipe(), "token")
    check(compiled, x, Recipe(), "tensor", torch.tensor(6.0))


@by_some
def test_rows_beyond_a_chunk_are_rounded_otherwise(kernels: Implementation, recipe: Recipe) -> None:
    x = mixed_magnitudes(977, 1024, seed=3)  # rows that are no multiple of what it works on at a time
    check(kernels, x, recipe, "tensor")
    check(kernels, x.bfloat16(), recipe, "token")


@by_some
def test_block_scales_at_the_midpoints_of_e4m3_go_elsewhere(kernels: Implementation, recipe: Recipe) -> None:
    # With global scales of 1, b is v / 6: every midpoint of E4M3, times 1 or 2/3 for the other candidate, and beside.
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    v = torch.cat((numbers, middle)) * 6
    v = torch.cat((v, v / 1.5))
    v = torch.cat((v, v.nextafter(torch.tensor(0.0)), v.nextafter(torch.tensor(9e9))))
    x = torch.randn(len(v), 16, generator=torch.Generator().manual_seed(4)).clamp(-1, 1) * v.unsqueeze(1)
    x[:, 5] = v
    check(kernels, x, recipe, "tensor", torch.tensor(recipe.encoded_amax))


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ for x86-64")
def test_a_quotient_by_the_inverse_is_another_number(tmp_path: Path) -> None:
    if "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor divides")
    program, source = tmp_path / "every_quotient", Path(__file__).with_name("every_quotient.cpp")
    flags = ["-std=c++20", "-O2", *build._STRICT, "-mavx2", "-mfma", "-DFOS_ISA=avx2"]
    subprocess.run(["g++", *flags, "-o", str(program), str(source)], check=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == "0\n"


@pytest.mark.parametrize("rows", [0, 1, 7, 129])
@pytest.mark.parametrize("columns", [16, 48, 576, 4096, 14336])
def test_some_shape_is_special(compiled: Implementation, rows: int, columns: int) -> None:
    x = mixed_magnitudes(rows, columns, seed=5, spread=2).bfloat16()
    for granularity in ("tensor", "token"):
        check(compiled, x, Recipe(), granularity)
    static = torch.tensor(3.0)
    assert_same(compiled.quantize_values(x, Recipe(), static), reference.quantize_values(x, Recipe(), static))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "silu_and_mul"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 64), (1, 16), (7, 96), (128, 64), (130, 576), (257, 2048)], ids=str)
def test_scales_lie_elsewhere_or_padding_is_not_zero(
    kernels: Implementation, shape: tuple[int, int], layout: Any, gated: bool
) -> None:
    for dtype in DTYPES:
        x = mixed_magnitudes(shape[0], shape[1] * (2 if gated else 1), seed=6, spread=1).to(dtype)
        for granularity in ("tensor", "token"):
            expected = reference_operators.quantize(x, Recipe(), granularity, None, layout, gated, None)
            assert_same(kernels.quantize(x, Recipe(), granularity, None, layout, gated), expected)
            plain = reference.quantize(reference.silu_and_mul(x) if gated else x, Recipe(), granularity)
            scales = scales_to_layout(plain.block_scale, layout).view(torch.uint8)
            assert_same_tensor("layout", expected[1], scales)


@by_some
def test_silu_and_mul_is_another_function(kernels: Implementation, recipe: Recipe) -> None:
    gates = torch.cat(
        (torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 88.8, 89.5, -103.5, -104.5, 1e30, -1e30]))
    )
    gates = torch.cat((gates, gates.new_zeros(-len(gates) % 64))).view(-1, 64)
    ups = mixed_magnitudes(*gates.shape, seed=7, spread=1)
    for dtype in DTYPES:
        x = torch.cat((gates, ups), dim=1).to(dtype)
        x[3, 5], x[4, 70], x[5, 6] = math.nan, math.inf, -math.inf
        assert_same(
            kernels.quantize_values(x, recipe, None, True), reference_operators.quantize_values(x, recipe, None, True)
        )


def test_the_pinned_silu_is_no_silu() -> None:
    # Within 4 units in the last place of the function itself, wherever that is not subnormal.
    x = torch.cat((torch.linspace(-80, 100, 1 << 16), torch.randn(1 << 16)))
    actual = reference.silu_and_mul(torch.stack((x, torch.ones_like(x)), dim=1)).squeeze(1)
    expected = torch.nn.functional.silu(x.double())
    assert ((actual.double() - expected).abs() <= 4 * 2.0**-24 * 2 * expected.abs()).all()


SPLITS = [[0, 10, 10, 40, 64], [0, 0, 3, 5, 60], [5, 9, 9, 30, 41], [0, 64], [0] * 9, [0, 1, 2, 3, 64], [0]]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "silu_and_mul"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_an_expert_gets_anothers_scale_or_place(
    kernels: Implementation, split: list[int], layout: Any, gated: bool
) -> None:
    offsets = torch.tensor(split, dtype=torch.int32)
    magnitude = torch.exp2(torch.arange(64.0) // 5 - 6).unsqueeze(1)
    for recipe, dtype in zip(SOME, (*DTYPES, torch.bfloat16, torch.bfloat16), strict=True):
        x = (mixed_magnitudes(64, 192 if gated else 96, seed=8, spread=1) * magnitude).to(dtype)
        for amax in (None, torch.arange(1.0, len(split))):
            expected = reference_operators.quantize(x, recipe, "tensor", amax, layout, gated, offsets)
            assert_same(kernels.quantize(x, recipe, "tensor", amax, layout, gated, offsets), expected)
    # One expert is one tensor.
    if split == [0, 64] and layout == "row_major" and not gated:
        q = reference.quantize(x, recipe, "tensor")
        packed, scales, decode = kernels.quantize(x, recipe, expert_offsets=offsets)
        assert_same((packed, scales, decode[0]), (q.packed, q.block_scale.view(torch.uint8), q.decode_scale))


def test_a_nan_token_reaches_no_other_expert(kernels: Implementation) -> None:
    offsets = torch.tensor([0, 4, 8], dtype=torch.int32)
    x = mixed_magnitudes(8, 64, seed=9, spread=1)
    clean = kernels.quantize(x, expert_offsets=offsets)
    x[1, 3] = math.nan
    packed, scales, decode = kernels.quantize(x, expert_offsets=offsets)
    assert decode.isnan().tolist() == [True, False]
    assert not packed[:4].any()
    assert not scales[:4].any()
    assert_same((packed[4:], scales[4:], decode[1:]), (clean[0][4:], clean[1][4:], clean[2][1:]))


def test_every_byte_is_dequantized_otherwise(kernels: Implementation) -> None:
    generator = torch.Generator().manual_seed(10)
    # 256 block scales beside 256 bytes of codes, in every position.
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 8).view(256, 256, 8)
    packed = packed[:, torch.randperm(256, generator=generator)].reshape(256, -1)
    scale = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, 256).contiguous()
    for decode in (torch.rand(256, generator=generator), torch.full((256,), 1e-40), torch.full((256,), 1e36)):
        for dtype in DTYPES:
            expected = reference_operators.dequantize(packed, scale, decode, dtype)
            actual = kernels.dequantize(packed, scale, decode, dtype)
            assert_same((actual, decode), (expected, decode))
    # A view that begins at an odd byte.
    views = packed.flatten()[1 : 1 + 16 * 24].view(16, 24), scale.flatten()[1 : 1 + 16 * 3].view(16, 3), decode[:16]
    expected = reference_operators.dequantize(*views, torch.bfloat16)
    moved = [t.to(kernels.device) for t in (packed, scale, decode)]
    views = (
        moved[0].flatten()[1 : 1 + 16 * 24].view(16, 24),
        moved[1].flatten()[1 : 1 + 16 * 3].view(16, 3),
        moved[2][:16],
    )
    assert_same((kernels.dequantize(*views, torch.bfloat16), decode), (expected, decode))


@pytest.mark.parametrize("case", golden_cases())
def test_bytes_of_the_public_references(
    case: dict[str, Any], golden: Mapping[str, Tensor], kernels: Implementation
) -> None:
    check_golden(kernels, case, golden)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="every-other-column"),
        pytest.param(lambda x: x[1::3], id="every-third-row"),
        pytest.param(lambda x: x[:1].expand(5, -1), id="expanded"),
        pytest.param(lambda x: x.flatten()[5 : 5 + 16 * 112].view(16, 112), id="odd-offset"),
    ],
)
def test_strides_change_something(kernels: Implementation, view: Callable[[Tensor], Tensor]) -> None:
    x = mixed_magnitudes(64, 128, seed=11, spread=2).bfloat16().to(kernels.device)
    expected = reference_operators.quantize(
        view(x).contiguous().cpu(), Recipe(), "token", None, "row_major", False, None
    )
    assert_same(tuple(kernels.quantize(view(x), Recipe(), "token")), expected)


# --- the operators as torch sees them ---


OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize("shape", [(0, 32), (5, 64)], ids=str)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("quantize_to_layout", (None, "token", Recipe().key, "128x4")),
        ("quantize_to_layout", (torch.tensor(2.0), "tensor", Recipe().key, "8x4")),
        ("quantize_to_layout", (None, "tensor", Recipe().key, "row_major")),
        ("silu_and_mul_quantize", (None, "token", Recipe().key, "128x4")),
        ("silu_and_mul_quantize_values", (torch.tensor(2.0), Recipe().key)),
        ("quantize_values", (torch.tensor(2.0), Recipe().key)),
        ("quantize_experts", (OFFSETS, None, Recipe().key, "8x4")),
        ("quantize_experts", (OFFSETS, torch.ones(2), Recipe().key, "row_major")),
        ("silu_and_mul_quantize_experts", (OFFSETS, None, Recipe().key, "128x4")),
    ],
)
def test_operators_break_their_schemas_and_fakes(
    name: str, arguments: tuple[object, ...], shape: tuple[int, int]
) -> None:
    x = mixed_magnitudes(*shape, seed=12, spread=2).bfloat16()
    if shape[0] == 0 and "experts" in name:
        arguments = (torch.zeros(3, dtype=torch.int32), *arguments[1:])
    torch.library.opcheck(getattr(torch.ops.fouroversix, name).default, (x, *arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: n.quantize(torch.ones(2, 24), *RAW, 0), "x: got 24 columns, needed a positive multiple of 16"),
        (lambda n: n.quantize(torch.ones(16), *RAW, 0), r"x: got 1 dimensions, needed \[M, K\]"),
        (lambda n: n.quantize(torch.ones(2, 16).double(), *RAW, 0), "needed bfloat16, float16 or float32"),
        (lambda n: n.quantize(torch.ones(2, 16), torch.ones(2), *RAW[1:], 0), "amax: got 2 numbers, needed 1"),
        (lambda n: n.quantize(torch.ones(2, 16), torch.ones(()).double(), *RAW[1:], 0), "amax: got dtype"),
        (
            lambda n: n.quantize(torch.ones(2, 16), None, OFFSETS, *RAW[2:], 0),
            "expert_offsets: needed for experts alone",
        ),
        (
            lambda n: n.quantize(torch.ones(2, 16), None, OFFSETS, False, 2, *RAW[4:], 0),
            r"expert_offsets: got 2 and 5 for expert 1, needed ascending numbers within 0..2",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_taken(call: Callable[[Any], object], message: str) -> None:
    assert build.load("cpu") is None
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.fouroversix_cpu)


# amax, expert_offsets, gated, scope, metric, domain, adaptive, encoded_amax
RAW = (None, None, False, 0, 0, 0, True, 1536.0)


# --- nothing around a call changes a byte ---


def test_flushing_subnormals_changes_a_byte() -> None:
    assert build.load("cpu") is None
    x = hard_rows(torch.float32)
    expected = cpu.quantize(x, Recipe(), "token")
    assert torch.set_flush_denormal(True)
    try:
        actual = cpu.quantize(x, Recipe(), "token")
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_a_byte(threads: int) -> None:
    x = mixed_magnitudes(301, 1040, seed=13).bfloat16()
    offsets = torch.tensor([0, 100, 290], dtype=torch.int32)
    for arguments in (("tensor", None, "row_major"), ("token", None, "128x4"), ("tensor", None, "8x4", False, offsets)):
        expected = cpu.quantize(x, Recipe(), *arguments)  # type: ignore[arg-type]
        torch.set_num_threads(threads)
        try:
            actual = cpu.quantize(x, Recipe(), *arguments)  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(1)
        assert_same(actual, expected)


def test_values_are_named_by_public_functions() -> None:
    x = mixed_magnitudes(5, 64, seed=14, spread=2)
    q = fos.quantize(x, granularity="token", backend="cpu")
    assert_same((q.packed, q.block_scale.view(torch.uint8), q.decode_scale), cpu.quantize(x, Recipe(), "token"))
