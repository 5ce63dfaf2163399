"""Products of packed weights on the CPU: every product exact, the sum in fp32, on whatever processor."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_tensor
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, cpu, native
from fouroversix_plugin.nvfp4 import NVFP4Tensor

pytestmark = pytest.mark.skipif(build.load("cpu") is not None, reason=str(build.reason("cpu")))

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows that fill strips and that do not; blocks in pairs and not; more columns than a panel of tiles holds.
SHAPES = [(16, 16), (48, 576), (129, 48), (300, 4112), (17, 14336)]
# Alone, in most widths of a unit, and as bf16 (from 5 or 8 on), groups of 16 whole and not.
TOKENS = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 33, 130]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multiply(
    x: Tensor,
    q: NVFP4Tensor,
    token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    strips = cpu.to_strips(q.packed, q.block_scale.view(torch.uint8))
    return native.linear(x, *strips, q.row_decode_scale.contiguous(), token_scale, bias, dtype)


def exact(x: Tensor, q: NVFP4Tensor) -> tuple[Tensor, Tensor]:
    """x W^T and |x| |W|^T in fp64."""
    weight = reference.dequantize(q).double()
    return x.double() @ weight.T, x.double().abs() @ weight.abs().T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_is_off_by_more_than_fp32_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    q = fos.quantize(randn(*shape, seed=1))
    longest = torch.finfo(torch.float32).eps * (
        shape[1] / 8 + 16
    )  # of a chain of additions: two a block, 16 within one
    for tokens in TOKENS:
        x, token_scale = randn(tokens, shape[1], seed=tokens).to(dtype), torch.rand(tokens) + 0.5
        y = multiply(x, q, token_scale)
        expected, magnitude = exact(x, q)
        error = (y.double() - expected * token_scale.double()[:, None]).abs()
        assert bool((error <= longest * magnitude * token_scale.double()[:, None] + 1e-30).all()), (tokens, error.max())


@pytest.mark.parametrize("tokens", [1, 7, 8, 40])
def test_whole_numbers_do_not_come_out_whole(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Codes and scales whose products are whole, summed below 2^24: fp32 makes no error at all.
    packed = torch.randint(256, (50, 48), generator=generator, dtype=torch.uint8)
    scales = torch.tensor([2.0, 4.0, 8.0])[torch.randint(3, (50, 6), generator=generator)].to(torch.float8_e4m3fn)
    q = NVFP4Tensor(packed, scales, torch.tensor(1.0))
    x = torch.randint(-64, 64, (tokens, 96), generator=generator)
    for dtype in DTYPES:
        y = multiply(x.to(dtype), q)
        assert_same_tensor(str(dtype), y, exact(x, q)[0].float())


def test_scales_of_other_rows_and_the_smallest_ones_are_lost() -> None:
    # Twelve orders of magnitude between rows, and block scales down to the smallest subnormal, which Marlin flushes.
    q = fos.quantize(randn(64, 64, seed=2))
    scales = torch.arange(1, 127, dtype=torch.uint8).repeat(3)[:256].view(64, 4).view(torch.float8_e4m3fn)
    q = NVFP4Tensor(q.packed, scales, torch.logspace(-9, 3, 64))
    for tokens in (1, 20):
        x = randn(tokens, 64, seed=3).bfloat16()
        y, (expected, magnitude) = multiply(x, q), exact(x, q)
        assert bool(((y.double() - expected).abs() <= 3e-6 * magnitude).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 7, 12, 24])
def test_the_result_is_rounded_more_than_once(dtype: torch.dtype, tokens: int) -> None:
    q, x, bias = fos.quantize(randn(40, 128, seed=4)), randn(tokens, 128, seed=5).bfloat16(), randn(40, seed=6)
    token_scale = torch.rand(tokens)
    in_fp32 = multiply(x, q, token_scale, bias)
    assert_same_tensor("y", multiply(x, q, token_scale, bias, dtype), in_fp32.to(dtype))
    assert_same_tensor("bias", in_fp32, multiply(x, q, token_scale) + bias)
    one = NVFP4Tensor(q.packed, q.block_scale, torch.ones(40))
    scaled = (multiply(x, one) * token_scale[:, None]) * q.decode_scale
    assert_same_tensor("scales", multiply(x, q, token_scale), scaled)


def test_overflow_and_nan_do_not_reach_the_result() -> None:
    q = fos.quantize(randn(20, 64, seed=7))
    for tokens in (2, 20):
        x = randn(tokens, 64, seed=8).bfloat16()
        x[1, 5] = torch.nan
        y = multiply(x, q)
        assert bool(y[1].isnan().all())
        assert bool(y[0].isfinite().all()), "another token is not touched"
        huge = NVFP4Tensor(q.packed, q.block_scale, torch.tensor(1e6))
        assert bool(multiply(x[:1], huge, dtype=torch.float16).isinf().any())
    broken = q.block_scale.view(torch.uint8).clone()
    broken[3, 2], broken[4, 1] = 0x7F, 0xFF
    q = NVFP4Tensor(q.packed, broken.view(torch.float8_e4m3fn), q.decode_scale)
    for tokens in (2, 20):
        rows = multiply(randn(tokens, 64, seed=9).bfloat16(), q).isnan().any(dim=0).nonzero().flatten()
        assert rows.tolist() == [3, 4]
    negative = NVFP4Tensor(q.packed, (q.block_scale.view(torch.uint8) | 0x80).view(torch.float8_e4m3fn), q.decode_scale)
    x = randn(2, 64, seed=9).bfloat16()
    assert_same_tensor("sign", multiply(x, negative)[:, 5:], -multiply(x, q)[:, 5:])


@pytest.mark.parametrize("columns", [576, 592])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_its_neighbours(dtype: torch.dtype, columns: int) -> None:
    q, x = fos.quantize(randn(100, columns, seed=10)), randn(40, columns, seed=11).to(dtype)
    alone, many = torch.cat([multiply(x[i : i + 1], q) for i in range(7)]), multiply(x, q)
    for tokens in range(2, 8):
        y = multiply(x[:tokens], q)
        # From 5 tokens on, or from 8, a processor may have something better for bf16.
        as_many = tokens >= 5 and torch.equal(y, many[:tokens])
        assert_same_tensor(f"{tokens} tokens", y, (many if as_many else alone)[:tokens])
    for tokens in (8, 9, 16, 17, 32):
        assert_same_tensor(f"{tokens} tokens", multiply(x[:tokens], q), many[:tokens])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_same_tensor("one thread", multiply(x, q), many)
    finally:
        torch.set_num_threads(threads)


def test_a_view_is_read_as_if_it_were_whole() -> None:
    q = fos.quantize(randn(32, 64, seed=12))
    wide = randn(20, 128, seed=13).bfloat16()
    for x in (wide[:, :64], wide[:, ::2], wide[3:, 64:], wide.t()[:64].t()):
        assert_same_tensor("y", multiply(x, q), multiply(x.contiguous(), q))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 48)}, "codes and block_scale: got"),
        ({"x": torch.zeros(2, 40)}, "K a positive multiple of 16"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "needed bfloat16, float16 or float32"),
        ({"decode_scale": torch.ones(64)}, "codes and block_scale: got"),
        ({"decode_scale": torch.ones(32, dtype=torch.float64)}, "decode_scale: got dtype"),
        ({"token_scale": torch.ones(3)}, "token_scale: got 3, needed 2"),
        ({"bias": torch.ones(31)}, "bias: got 31, needed 32"),
    ],
    ids=str,
)
def test_memory_is_read_past_its_end(change: dict[str, Any], message: str) -> None:
    q = fos.quantize(randn(32, 64))
    codes, scales = cpu.to_strips(q.packed, q.block_scale.view(torch.uint8))
    arguments = {"x": torch.zeros(2, 64), "codes": codes, "block_scale": scales, "decode_scale": torch.ones(32)}
    arguments |= {"token_scale": None, "bias": None, "dtype": torch.float32}
    with pytest.raises(RuntimeError, match=message):
        native.linear(**{**arguments, **change})


# --- experts ---

# Experts with no, one, a few and, of 8 tokens and more, many slots, multiplied as bf16 where a processor does that.
EXPERTS, TOP_K = 5, 3


def strips_of_experts(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    q = fos.quantize(randn(EXPERTS, rows, columns, seed=15).flatten(0, 1))
    packed, scales = (t.unflatten(0, (EXPERTS, rows)) for t in (q.packed, q.block_scale.view(torch.uint8)))
    return *cpu.to_strips(packed, scales), torch.rand(EXPERTS, rows) + 0.5


def ids(tokens: int) -> Tensor:
    """Expert 3 has no slot, expert 0 one of each token, and some slots are nobody's."""
    others = torch.tensor([-1, 1, 2, 4, EXPERTS])
    chosen = others[torch.randint(5, (tokens, TOP_K), generator=torch.Generator().manual_seed(tokens))]
    chosen[:, 1] = 0
    return chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_slot", [False, True], ids=["token", "slot"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 20])
def test_a_slot_is_not_the_product_of_its_expert(tokens: int, by_slot: bool, dtype: torch.dtype) -> None:
    codes, scales, decode = strips_of_experts(50, 112)
    rows = tokens * TOP_K if by_slot else tokens
    x, token_scale, topk_ids = randn(rows, 112, seed=16).to(dtype), torch.rand(rows), ids(tokens)
    y = native.linear_experts(x, codes, scales, decode, token_scale, topk_ids, dtype)
    assert y.shape == (tokens * TOP_K, 50)
    assert_same_tensor("int32", native.linear_experts(x, codes, scales, decode, token_scale, topk_ids.int(), dtype), y)
    expert_of, row_of = topk_ids.flatten(), torch.arange(tokens * TOP_K) // (1 if by_slot else TOP_K)
    for e in range(EXPERTS):
        slots = (expert_of == e).nonzero().squeeze(-1)
        own = row_of[slots]
        alone = native.linear(x[own], codes[e], scales[e], decode[e], token_scale[own], None, dtype)
        assert_same_tensor(f"expert {e}", y[slots], alone)
    assert not y[(expert_of < 0) | (expert_of >= EXPERTS)].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("shape", [(0, 2, 48), (1, 8, 576), (7, 1, 16), (40, 3, 100)], ids=str)
def test_slots_are_summed_otherwise(shape: tuple[int, ...], on_input: bool, dtype: torch.dtype) -> None:
    slots, weights = randn(*shape, seed=17), torch.rand(shape[:2])
    expected = reference.combine(slots, weights, on_input).to(dtype)
    assert_same_tensor("sum", cpu.combine(slots, weights, on_input, dtype), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 48)}, "codes and block_scale: got"),
        ({"x": torch.zeros(5, 112)}, "one for each token or each slot"),
        ({"topk_ids": torch.zeros(2, 3, dtype=torch.int16)}, "needed int32 or int64"),
        ({"topk_ids": torch.zeros(6, dtype=torch.int32)}, "one for each token or each slot"),
        ({"token_scale": torch.ones(3)}, "token_scale: got 3, needed 2"),
        ({"decode_scale": torch.ones(250)}, r"needed \[E, N\]"),
        ({"decode_scale": torch.ones(4, 50)}, "codes and block_scale: got"),
    ],
    ids=str,
)
def test_memory_of_other_experts_is_read(change: dict[str, Any], message: str) -> None:
    codes, scales, decode = strips_of_experts(50, 112)
    arguments = {"x": torch.zeros(2, 112), "codes": codes, "block_scale": scales, "decode_scale": decode}
    arguments |= {"token_scale": None, "topk_ids": ids(2), "dtype": torch.float32}
    with pytest.raises(RuntimeError, match=message):
        native.linear_experts(**{**arguments, **change})
    with pytest.raises(RuntimeError, match="topk_weights: got 5 numbers, needed 6"):
        native.combine(torch.zeros(2, 3, 16), torch.ones(5), torch.float32)


# --- instruction sets this processor would not choose ---

SHIM = """
#include "cpu.h"
extern "C" void run(const float* x, long tokens, long columns, long outputs, const unsigned char* codes,
                    const unsigned char* scales, const float* decode, float* out) {
  fos::Linear l = {};
  l.x = x, l.x_dtype = l.out_dtype = fos::Dtype::fp32;
  l.tokens = tokens, l.columns = columns, l.outputs = outputs;
  l.codes = codes, l.block_scale = scales, l.decode_scale = decode, l.out = out;
  fos::FOS_ISA::linear_strips(l, x, 0, (outputs + 15) / 16);
}
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_a_smaller_processor_computes_something_else(isa: str, tmp_path: Path) -> None:
    """The kernels of an instruction set that this processor has as well, but would not choose."""
    commands = [command for command in build._recipe("cpu").compile if "cpu_linear.cpp" in command[-1]]
    command = next((command for command in commands if f"-DFOS_ISA={isa}" in command), None)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if command is None or (isa == "avx2" and not (" avx2 " in flags and " fma " in flags)):
        pytest.skip(f"{isa} is not for this processor")
    shim = tmp_path / "shim.cpp"
    shim.write_text(SHIM)
    library = tmp_path / "linear.so"
    options = [option for option in command[1:-2] if option != "-c"]
    sources = [command[-1], str(shim), f"-I{build.csrc()}"]
    subprocess.run([command[0], *options, "-shared", *sources, "-o", str(library)], check=True, timeout=120)
    run = ctypes.CDLL(str(library)).run
    q = fos.quantize(randn(50, 112, seed=14))
    codes, scales = cpu.to_strips(q.packed, q.block_scale.view(torch.uint8))
    decode = q.row_decode_scale.contiguous()
    for tokens in (1, 2, 3, 4, 5, 6, 7, 9):
        x, y = randn(tokens, 112, seed=tokens).bfloat16().float(), torch.full((tokens, 50), torch.nan)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (codes, scales, decode, y)]
        run(ctypes.c_void_p(x.data_ptr()), *map(ctypes.c_long, (tokens, 112, 50)), *pointers)
        expected, magnitude = exact(x, q)
        assert bool(((y.double() - expected).abs() <= 4e-6 * magnitude).all()), tokens
