"""Triton's products of packed weights against the specification: interpreted here, compiled where there is a GPU.

The interpreter knows neither PTX nor bf16 products: kernels unpack in plain operations there, and multiply in fp32. The
PTX is held to the format by an interpreter of its own (:func:`test_assembly_makes_other_numbers`).
"""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DTYPES, assert_close, assert_same_tensor
from test_kernels import no_cuda
from test_triton import disassembled, machine_code
from torch import Tensor
from triton_interpreter import INTERPRETED_OR_CUDA, Interpreted, interpreted

import fouroversix_plugin as fos
from fouroversix_plugin import kernels, reference
from fouroversix_plugin.kernels import routing, triton_gemm, triton_gemm_kernels
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe


class Products:
    """linear and moe on CPU tensors and weights as stored, by the interpreter's process or on the GPU."""

    def __init__(self, worker: Interpreted | None) -> None:
        self._worker = worker

    def linear(
        self,
        x: Tensor,
        w: NVFP4Tensor,
        token_scale: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return self._call("linear", x, *prepared(w), w.row_decode_scale.contiguous(), token_scale, bias, dtype)

    def moe(self, x: Tensor, w13: NVFP4Tensor, w2: NVFP4Tensor, *rest: Any) -> Tensor:
        scales = w13.row_decode_scale.contiguous(), w2.row_decode_scale.contiguous()
        return self._call("moe", x, *prepared(w13), scales[0], *prepared(w2), scales[1], *rest)

    def _call(self, name: str, *arguments: Any) -> Tensor:
        if self._worker is not None:
            result: Tensor = self._worker.call(name, arguments)
            return result
        on_gpu = (a.cuda() if isinstance(a, Tensor) else a for a in arguments)
        on_cpu: Tensor = getattr(triton_gemm, name)(*on_gpu).cpu()
        return on_cpu


@pytest.fixture(params=INTERPRETED_OR_CUDA)
def products(request: pytest.FixtureRequest) -> Products:
    return Products(interpreted() if request.param == "interpreted" else None)


def prepared(w: NVFP4Tensor) -> tuple[Tensor, Tensor]:
    return triton_gemm.prepare(w.packed, w.block_scale.view(torch.uint8))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_numbers(*shape: int, seed: int) -> NVFP4Tensor:
    """A weight [..., N, K] whose values are whole, with any decode scales; sums with small whole numbers are exact."""
    *leading, N, K = shape
    packed = torch.randint(256, (*leading, N, K // 2), generator=seeded(seed), dtype=torch.uint8)
    scales = torch.tensor([0.0, 2.0, 4.0, 8.0])[torch.randint(4, (*leading, N, K // 16), generator=seeded(seed + 1))]
    decode = torch.rand((*leading, N), generator=seeded(seed + 2)) + 0.1
    return NVFP4Tensor(packed, scales.to(torch.float8_e4m3fn), decode)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


# --- the prepared weight ---


@pytest.mark.parametrize("shape", [(16, 16), (64, 128), (65, 144), (2, 3, 48, 576)], ids=str)
def test_restore_does_not_undo_prepare(shape: tuple[int, ...]) -> None:
    packed = torch.randint(256, (*shape[:-1], shape[-1] // 2), generator=seeded(1), dtype=torch.uint8)
    scales = torch.randint(256, (*shape[:-1], shape[-1] // 16), generator=seeded(2), dtype=torch.uint8)
    weight, block_scale = triton_gemm.prepare(packed, scales)
    N, K = -(-shape[-2] // 64), -(-shape[-1] // 128)
    assert (weight.dtype, weight.shape) == (torch.int32, (*shape[:-2], N, K, 64, 16))
    assert (block_scale.dtype, block_scale.shape) == (torch.int32, (*shape[:-2], N, K, 2, 64))
    restored = triton_gemm.restore(weight, block_scale, *shape[-2:])
    assert_same_tensor("packed", restored[0], packed)
    assert_same_tensor("block_scale", restored[1], scales)
    # Padding takes part in every product.
    whole = triton_gemm.restore(weight, block_scale, N * 64, K * 128)
    assert sum(int(t.count_nonzero()) for t in whole) == int(packed.count_nonzero() + scales.count_nonzero())


def test_preparing_depends_on_where_an_engine_makes_its_tensors() -> None:
    packed, scales = torch.zeros(64, 1024, dtype=torch.uint8), torch.arange(128, dtype=torch.uint8).expand(64, -1)
    with torch.device("meta"):
        weight, block_scale = triton_gemm.prepare(packed, scales)
        restored = triton_gemm.restore(weight, block_scale, 64, 2048)
    assert_same_tensor("block_scale", restored[1], scales)


def test_two_scales_are_stored_alike() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(16, 16)
    stored = triton_gemm.prepare(torch.zeros(16, 128, dtype=torch.uint8), scales)[1].view(torch.uint8)
    assert len(stored.unique()) == 256


def run_assembly(text: str, words: list[int], scales: list[int], dtype: torch.dtype) -> list[int]:
    """What PTX of :func:`triton_gemm_kernels._assembly` leaves in $0..$7: two numbers of ``dtype`` each."""

    def product(a: int, b: int) -> int:
        factors = torch.tensor([a, b], dtype=torch.int32).to(torch.uint16).view(dtype)
        exact = factors[0].double() * factors[1].double()
        assert exact.to(dtype).double() == exact, "a product is not exact"
        bits: int = exact.to(dtype).view(torch.int16).item() & 0xFFFF  # type: ignore[assignment,operator]
        return bits

    registers = {f"${8 + i}": word for i, word in enumerate([*words, *scales])}
    written: set[str] = set()

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for line in text.strip("{} \n").split(";"):
        if not line.strip() or line.strip().startswith("."):
            continue
        operation, *names = line.replace(",", " ").split()
        target, a, *more = names[0], value(names[1]), *(value(name) for name in names[2:])
        if operation == "mov.b32":
            result = a
        elif operation == "prmt.b32":
            source = (a | more[0] << 32).to_bytes(8, "little")
            result = sum(source[(more[1] >> (4 * i)) & 7] << (8 * i) for i in range(4))
        elif operation == "and.b32":
            result = a & more[0]
        elif operation == "shl.b32":
            result = (a << more[0]) & 0xFFFFFFFF
        elif operation == "shr.u32":
            result = a >> more[0]
        elif operation == "lop3.b32":
            assert more[2] == 0xEA
            result = a & more[0] | more[1]
        else:
            assert re.fullmatch(r"fma\.rn\.b?f16x2", operation)
            assert more[1] == 0x80008000
            result = product(a & 0xFFFF, more[0] & 0xFFFF) | product(a >> 16, more[0] >> 16) << 16
            written.add(target)
        registers[target] = result
    assert written == {f"${i}" for i in range(8)}
    return [registers[f"${i}"] for i in range(8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_assembly_makes_other_numbers(dtype: torch.dtype) -> None:
    # Every code in each plane and half of a word, other codes around it, under scales from 2^-9 to 448, and 0.
    text = triton_gemm_kernels._assembly("bf16" if dtype == torch.bfloat16 else "f16")
    codes = torch.stack([torch.arange(16, dtype=torch.uint8).roll(plane) for plane in range(8)])
    packed = (codes[:, ::2] | (codes[:, 1::2] << 4)).view(1, 64)
    for first in range(0, 0x7F, 4):
        scales = ((first + torch.arange(8) * 17) % 0x7F).to(torch.uint8).view(1, 8)
        weight, block_scale = triton_gemm.prepare(packed, scales)
        stored = block_scale[0, 0, :, 0].contiguous().view(torch.uint8).tolist()
        numbers = [byte << 7 if dtype == torch.float16 else byte and byte * 16 + 0x7000 for byte in stored]
        words = [word & 0xFFFFFFFF for word in weight[0, 0, 0].tolist()]
        expected = reference.unscaled(packed, scales.view(torch.float8_e4m3fn)).view(8, 16) / 256
        for j in range(0, 16, 2):
            planes = run_assembly(text, words[j : j + 2], [bits | bits << 16 for bits in numbers], dtype)
            got = torch.tensor([[bits & 0xFFFF, bits >> 16] for bits in planes], dtype=torch.int32)
            assert torch.equal(got.to(torch.uint16).view(dtype).float(), expected[:, j : j + 2]), (first, j)


# --- linear ---

# One word and nine halves; with 1536 columns, split sums, which the interpreter takes longest for.
CASES = [
    *itertools.product([0, 1, 7, 63, 65, 129], [(16, 16), (48, 576)]),
    *itertools.product([1, 7, 65], [(16, 1536)]),
]


def check_whole_numbers(products: Products, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = whole_numbers(*shape, seed=3)
    x = torch.randint(-64, 65, (tokens, shape[1]), generator=seeded(tokens)).to(dtype)
    token_scale = torch.rand(tokens, generator=seeded(4)) + 0.1
    values = reference.unscaled(w.packed, w.block_scale)
    bias = randn(shape[0], seed=5)
    for scale, b, out in ((token_scale, bias.bfloat16(), torch.bfloat16), (None, bias, torch.float32)):
        y = reference.scaled_matmul(x, values, scale, w.decode_scale) + b.float()
        assert_same_tensor("y", products.linear(x, w, scale, b, out), y.to(out))


@pytest.mark.parametrize(("tokens", "shape"), CASES, ids=str)
def test_whole_numbers_have_another_product(products: Products, tokens: int, shape: tuple[int, int]) -> None:
    check_whole_numbers(products, tokens, shape, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 65])
def test_whole_numbers_have_another_product_in_other_types(products: Products, tokens: int, dtype: torch.dtype) -> None:
    check_whole_numbers(products, tokens, (48, 576), dtype)


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 64, 129, 1000])
def test_many_rows_have_another_product(tokens: int, dtype: torch.dtype) -> None:
    check_whole_numbers(Products(None), tokens, (4112, 1552), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 65])
def test_a_sum_is_off_by_more_than_fp32_rounding(products: Products, tokens: int, dtype: torch.dtype) -> None:
    for N, K in ((48, 576), (16, 1536)):
        w, x = fos.quantize(randn(N, K, seed=6)), randn(tokens, K, seed=7).to(dtype)
        exact = reference.dequantize(w).double()
        limit = torch.finfo(torch.float32).eps * (K / 4 + 16) * (x.double().abs() @ exact.abs().T)
        assert bool(((products.linear(x, w).double() - x.double() @ exact.T).abs() <= limit).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_not_exact(products: Products, dtype: torch.dtype) -> None:
    # Rows of the identity pick columns: every code, every scale from 0 over 2^-9 to 448 beside any others, in every
    # plane of a word and every word of a row, and decode scales that span twelve orders of magnitude.
    N, K = 48, 272
    packed = torch.randint(256, (N, K // 2), generator=seeded(8), dtype=torch.uint8)
    scales = (torch.arange(N * K // 16) * 5 % 0x7F).to(torch.uint8).view(N, -1).view(torch.float8_e4m3fn)
    w = NVFP4Tensor(packed, scales, torch.logspace(-9, 3, N))
    y = products.linear(torch.eye(K, dtype=dtype), w)
    assert_same_tensor("W", y + 0.0, reference.dequantize(w).T.contiguous() + 0.0)  # a sum has no -0.0


def test_nan_or_infinity_leaves_its_row(products: Products) -> None:
    w, x = whole_numbers(48, 144, seed=9), torch.ones(20, 144).bfloat16()
    clean = products.linear(x, w)
    x[3, 5], x[17, 143] = torch.nan, torch.inf
    y = products.linear(x, w)
    assert bool(y[3].isnan().all())
    others = [i for i in range(20) if i not in (3, 17)]
    assert_same_tensor("others", y[others], clean[others])
    scales = w.block_scale.view(torch.uint8).clone()
    scales[7, 2] = 0x7F
    broken = NVFP4Tensor(w.packed, scales.view(torch.float8_e4m3fn), w.decode_scale)
    assert products.linear(torch.ones(3, 144).half(), broken).isnan().any(dim=0).nonzero().flatten().tolist() == [7]


def test_a_row_depends_on_its_neighbours_or_the_run(products: Products) -> None:
    # 48 x 1536 for one token is a sum in three parts.
    assert triton_gemm.choose(1, 48, 1536, torch.bfloat16).splits == 3
    for K, most, fewer in ((1536, 16, (1, 7)), (576, 128, (65, 100))):
        w, x = fos.quantize(randn(48, K, seed=10)), randn(most, K, seed=11).bfloat16()
        many = products.linear(x, w)
        assert_same_tensor("again", products.linear(x, w), many)
        for tokens in fewer:
            assert_same_tensor(f"{tokens} of {most}", products.linear(x[:tokens], w), many[:tokens])
        backwards = torch.arange(most - 1, -1, -1)
        assert_same_tensor("backwards", products.linear(x[backwards], w), many[backwards])


def test_strides_change_something(products: Products) -> None:
    w, wide = whole_numbers(32, 64, seed=12), torch.randint(-9, 9, (70, 128), generator=seeded(13)).bfloat16()
    for x in (wide[:20, :64], wide[:20, ::2], wide[3:, 64:], wide[:64, :20].t(), wide.flatten()[5:133].view(2, 64)):
        assert_same_tensor("y", products.linear(x, w), products.linear(x.contiguous(), w))


@pytest.mark.parametrize("rows", [16, 48, 576, 4096, 28672])
@pytest.mark.parametrize("columns", [16, 576, 1536, 4096, 14336])
def test_a_launch_leaves_columns_out_or_depends_on_a_single_token(rows: int, columns: int) -> None:
    words = -(-columns // 128)
    for power, dtype in itertools.product(range(4, 14), DTYPES):
        bucket = 1 << power
        launch = triton_gemm.choose(bucket, rows, columns, dtype)
        beside = {triton_gemm.choose(tokens, rows, columns, dtype) for tokens in (bucket // 2 + 1, bucket - 1)}
        assert beside == {launch}
        of_split = -(-words // launch.splits)
        assert (launch.splits - 1) * of_split < words <= launch.splits * of_split, "an empty split, or one too few"
        assert triton_gemm.choose(0, rows, columns, dtype) == triton_gemm.choose(16, rows, columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_invariant_launch_depends_on_the_number_of_tokens(dtype: torch.dtype) -> None:
    tokens = (1, 7, 64, 1000, 70000)
    with kernels.batch_invariant(True):
        (linear,) = {triton_gemm.choose(n, 48, 14336, dtype) for n in tokens}
        assert len({triton_gemm.choose_for_experts(8 * n, 16, dtype, True) for n in tokens}) == 1
    assert linear.splits == 1  # of more, many tokens' sums would want gigabytes
    assert len({triton_gemm.choose(n, 48, 14336, dtype) for n in tokens}) > 1


# --- experts ---


def test_no_id_is_as_large_as_nobodys() -> None:
    slots, offsets = routing.sort_by_expert(torch.tensor([[255], [0], [255]], dtype=torch.uint8), 256)
    assert (slots.tolist(), offsets[[0, 1, 255, 256]].tolist()) == ([1, 0, 2], [0, 1, 1, 3])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_slots_are_sorted_otherwise(dtype: torch.dtype) -> None:
    ids = torch.randint(-2, 9, (40, 3), generator=seeded(14)).to(dtype)
    ids[ids == 4] = 5  # nobody asks for expert 4
    slots, offsets = routing.sort_by_expert(ids, 7)
    assert (slots.dtype, offsets.dtype, offsets.shape) == (torch.int32, torch.int32, (8,))
    by_hand = [[s for s, e in enumerate(ids.flatten().tolist()) if e == expert] for expert in range(7)]
    assert [slots[offsets[e] : offsets[e + 1]].tolist() for e in range(7)] == by_hand
    assert sorted(slots.tolist()) == list(range(120))
    many = routing.sort_by_expert(torch.tensor([[40000, 3]], dtype=torch.int64), 50000)
    assert (many[0].tolist(), many[1][[3, 4, 40000, 40001]].tolist()) == ([1, 0], [0, 1, 1, 2])
    assert [t.tolist() for t in routing.sort_by_expert(torch.zeros(0, 2, dtype=dtype), 2)] == [[], [0, 0, 0]]


def test_more_tiles_can_be_filled() -> None:
    for slots in range(12):
        for experts in range(1, 5):
            splits = [(i,) for i in range(slots + 1)]
            for _ in range(experts - 1):
                splits = [(*s, i) for s in splits for i in range(slots + 1 - sum(s))]
            for tile in (1, 4, 16):
                most = max(sum(-(-count // tile) for count in split) for split in splits)
                assert routing.most_tiles(slots, experts, tile) == most


def picking(*shape: int, seed: int) -> NVFP4Tensor:
    """A weight [E, N, K] with a single 1 a row: sums of one product, the same in any order."""
    E, N, K = shape
    codes = torch.zeros(shape, dtype=torch.uint8)
    codes.scatter_(-1, torch.randint(K, (E, N, 1), generator=seeded(seed)), 2)
    scales = torch.ones(E, N, K // 16).to(torch.float8_e4m3fn)
    decode = torch.rand(E, N, generator=seeded(seed + 1)) + 0.5
    return NVFP4Tensor(codes[..., ::2] | (codes[..., 1::2] << 4), scales, decode)


def routes(tokens: int, experts: int, kind: str) -> tuple[Tensor, Tensor]:
    """(weights, ids) of two experts a token."""
    ids = torch.randn(tokens, experts, generator=seeded(15)).topk(2).indices
    if kind == "all to one":
        ids[:] = torch.tensor([2, 2])
    elif kind == "none":
        ids[:] = -1
    elif kind == "elsewhere":
        ids[::3, 0], ids[1::4, 1] = -1, experts
    return torch.rand(tokens, 2, generator=seeded(16)), ids


@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["W4A16", "W4A4"])
@pytest.mark.parametrize("on_input", [False, True], ids=["weight-on-output", "weight-on-input"])
@pytest.mark.parametrize(
    ("tokens", "kind", "dtype"),
    [
        (1, "any", torch.bfloat16),
        (9, "elsewhere", torch.bfloat16),
        (33, "all to one", torch.float16),
        (5, "none", torch.bfloat16),
        (33, "any", torch.float32),
    ],
)
def test_experts_have_another_result(
    products: Products, tokens: int, kind: str, dtype: torch.dtype, on_input: bool, recipe: Recipe | None
) -> None:
    # Bit for bit through SiLU, the second quantization, and the sum over slots: sums are of one product.
    w13, w2 = picking(5, 96, 144, seed=17), picking(5, 144, 48, seed=18)
    x = (randn(tokens, 144, seed=19) * 3).to(dtype)
    arguments = (*routes(tokens, 5, kind), recipe, "silu", on_input)
    assert_same_tensor("y", products.moe(x, w13, w2, *arguments), reference.moe(x, w13, w2, *arguments))
    static = () if recipe is None else (torch.tensor(2.0), torch.tensor(3.0))
    y = products.moe(x, w13, w2, *arguments, *static)
    assert_same_tensor("static", y, reference.moe(x, w13, w2, *arguments, *static))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_an_activation_is_another(products: Products, activation: str) -> None:
    # Gates from far below to far above 0, where terms overflow and cancel.
    w13, w2 = picking(2, 96, 144, seed=20), picking(2, 144, 48, seed=21)
    w13.decode_scale[:, :48], w13.decode_scale[:, 48:] = 1.0, 2.0**-8
    x = torch.cat((torch.linspace(-12, 12, 144 * 6), torch.linspace(-300, 300, 144 * 2))).view(8, 144)
    x = torch.cat((x, torch.tensor([-1e30, 1e30, -0.0, 1e-30]).repeat(36).view(1, 144)))
    arguments = (*routes(9, 2, "any"), None, activation, False)
    y, expected = products.moe(x, w13, w2, *arguments), reference.moe(x, w13, w2, *arguments)
    assert torch.equal(y.isfinite(), expected.isfinite())
    close = (y - expected).abs() <= 2e-6 * expected.abs() + 1e-6
    assert bool((close | ~expected.isfinite()).all())


@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["W4A16", "W4A4"])
def test_experts_of_a_model_are_off(products: Products, recipe: Recipe | None) -> None:
    w13, w2 = (
        NVFP4Tensor.stack([fos.quantize(randn(*shape, seed=22 + e)) for e in range(5)])
        for shape in ((224, 144), (144, 112))
    )
    x = randn(40, 144, seed=40).bfloat16() / 12
    arguments = (*routes(40, 5, "elsewhere"), recipe, "silu", False)
    y = products.moe(x, w13, w2, *arguments)
    # Where the order of a sum moves a value of the intermediate by a place, its code may be another.
    limits = (1e-5, 1e-3) if recipe is None else (1e-3, 1e-2)
    assert_close(y, reference.moe(x, w13, w2, *arguments), *limits)
    assert_same_tensor("again", products.moe(x, w13, w2, *arguments), y)


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("tokens", [1, 40, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_experts_have_another_result(tokens: int, dtype: torch.dtype) -> None:
    # Tiles of every size, more of them than processors, and rows and columns that fill none.
    for experts in (6, 130):
        w13, w2 = picking(experts, 2 * 1040, 528, seed=23), picking(experts, 528, 1040, seed=24)
        x = randn(tokens, 528, seed=25).to(dtype)
        weights, ids = torch.rand(tokens, 6, generator=seeded(26)), randn(tokens, experts, seed=27).topk(6).indices
        on_gpu = [t.to("cuda") for t in (w13, w2)]
        for recipe in (None, Recipe()):
            arguments = (recipe, "silu", False)
            expected = reference.moe(x.cuda(), *on_gpu, weights.cuda(), ids.cuda(), *arguments).cpu()
            assert_same_tensor("y", Products(None).moe(x, w13, w2, weights, ids, *arguments), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 272)}, r"weight: got \(1, 1, 64, 16\) .*, needed \(1, 3, 64, 16\) torch.int32"),
        ({"x": torch.zeros(64)}, r"x: got shape \(64,\), needed \[M, K\]"),
        ({"x": torch.zeros(2, 64).double()}, "x: got torch.float64, needed bfloat16, float16 or float32"),
        ({"x": torch.zeros(2, 40)}, "x: got K = 40"),
        ({"decode_scale": torch.ones(80)}, r"weight: got \(1, 1, 64, 16\) .* needed \(2, 1, 64, 16\)"),
        ({"decode_scale": torch.ones(32).double()}, "decode scale: got"),
        ({"block_scale": torch.zeros(1, 1, 64, 8)}, "weight's block scales: got"),
        ({"weight": torch.zeros(1, 1, 16, 64, dtype=torch.int32).mT}, "weight: got a view"),
        ({"token_scale": torch.ones(3)}, r"token_scale: got \(3,\) .*, needed \(2,\)"),
        ({"bias": torch.ones(31)}, r"bias: got \(31,\) .*, needed \(32,\)"),
        ({"bias": torch.ones(32, dtype=torch.int32)}, "dtype: got torch.int32"),
        ({"dtype": torch.float64}, "dtype: got torch.float64"),
    ],
    ids=str,
)
def test_memory_is_read_past_its_end(change: dict[str, Any], message: str) -> None:
    weight, block_scale = prepared(fos.quantize(randn(32, 64, seed=41)))
    arguments = {"x": torch.zeros(2, 64), "weight": weight, "block_scale": block_scale, "decode_scale": torch.ones(32)}
    arguments |= {"token_scale": None, "bias": None, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        triton_gemm.linear(**{**arguments, **change})


def test_experts_take_what_does_not_fit() -> None:
    w13, w2 = picking(2, 64, 32, seed=42), picking(2, 32, 32, seed=43)
    weights, ids = routes(3, 2, "any")
    for x, some_weights, some_ids, activation, message in (
        (torch.ones(3, 32), weights, ids, "relu", "activation: got 'relu'"),
        (torch.ones(4, 32), weights, ids, "silu", r"topk_ids: got \(3, 2\) .*, needed \(4, 2\)"),
        (torch.ones(3, 32), weights[:, :1], ids, "silu", "topk_weights: got"),
        (torch.ones(3, 160), weights, ids, "silu", "w13: got"),
    ):
        parts = *prepared(w13), w13.decode_scale, *prepared(w2), w2.decode_scale
        with pytest.raises(ValueError, match=message):
            triton_gemm.moe(x, *parts, some_weights, some_ids, None, activation, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES], ids=str)
def test_sums_of_another_product_are_scaled_otherwise(
    products: Products, bias_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    sums, decode_scale, token_scale = randn(5, 300, seed=44), randn(300, seed=45), randn(5, seed=46)
    bias = None if bias_dtype is None else randn(300, seed=47).to(bias_dtype)
    expected = (sums * token_scale[:, None]) * decode_scale
    expected = (expected if bias is None else expected + bias.float()).to(dtype)
    y = products._call("scale_sums", sums, decode_scale, token_scale, bias, dtype)
    assert_same_tensor("y", y, expected)


def test_sums_that_do_not_fit_are_scaled() -> None:
    good = torch.ones(3, 16), torch.ones(16), torch.ones(3), None, torch.float32
    for place, other, message in (
        (0, torch.ones(3, 16).bfloat16(), "sums: got"),
        (1, torch.ones(3), "decode_scale: got"),
        (2, torch.ones(16), "token_scale: got"),
        (3, torch.ones(3), "bias: got"),
        (4, torch.float64, "dtype: got"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_gemm.scale_sums(*good[:place], other, *good[place + 1 :])  # type: ignore[arg-type]


# --- what the compiler makes of it ---

LINEAR = {"weight": "*i32", "block_scale": "*i32", "decode_scale": "*fp32", "token_scale": "*fp32"}
LINEAR |= {"TILES_TOGETHER": 8, "SPLIT": False, "WHOLE": True, "COMPILED": True}
EXPERTS = {"slots": "*i32", "offsets": "*i32", "EXPERTS": 128}


BF16, FP16, FP32 = DTYPES
TYPES = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32"}


def compiled(
    capability: int, activation: str | None, dtype: torch.dtype, launch: triton_gemm.Launch, stages: int, folder: Path
) -> tuple[dict[str, int], str]:
    """What :func:`disassembled` says of a product; ``activation`` is None for linear and "" for the second product."""
    kernel = triton_gemm_kernels.multiply if activation is None else triton_gemm_kernels.multiply_experts
    arguments: dict[str, Any] = {
        **LINEAR,
        "ROWS": launch.rows,
        "TOKENS": launch.tokens,
        "CHAINED": capability // 10 not in (9, 10),
    }
    if activation is not None:
        arguments |= EXPERTS | {"ACTIVATION": activation, "TOGETHER": dtype != FP32}
    arguments["out"] = "*fp32" if activation == "" else "*i16"
    options = {"num_warps": launch.warps, "num_stages": stages, "enable_fp_fusion": False}
    return disassembled(machine_code(kernel, capability, options, x=TYPES[dtype], **arguments), folder)


# Instructions that a thread issues for each weight it unpacks: two for its number and one and a half for scales; where
# warps multiply by themselves, those of the products too.
@pytest.mark.parametrize(
    ("capability", "activation", "dtype", "launch", "stages", "most"),
    [
        (90, None, BF16, triton_gemm.choose(16, 4096, 4096, BF16), 5, 4.9),
        (90, None, FP16, triton_gemm.choose(16, 4096, 4096, FP16), 5, 4.6),
        (90, None, BF16, triton_gemm.choose(4096, 4096, 4096, BF16), 3, 6.0),
        (90, "silu", BF16, triton_gemm.choose_for_experts(64, 1, BF16, True).for_two_weights(), 3, 5.2),
        (90, "", BF16, triton_gemm.choose_for_experts(128, 1, BF16, True), 3, 6.3),
        (80, None, BF16, triton_gemm.choose(16, 4096, 4096, BF16), 5, 5.0),
        (80, None, FP16, triton_gemm.choose(64, 4096, 4096, FP16), 4, 8.2),
    ],
    ids=str,
)
def test_machine_code_spills_unpacks_twice_or_moves_weights_between_threads(
    capability: int,
    activation: str | None,
    dtype: torch.dtype,
    launch: triton_gemm.Launch,
    stages: int,
    most: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    used, code = compiled(capability, activation, dtype, launch, stages, tmp_path)
    assert used == {"STACK": 0, "LOCAL": 0}
    loop = hottest_loop(code)
    product = "HGMMA" if capability == 90 else "HMMA"
    assert any(product in line for line in loop)
    assert any("LDGSTS" in line for line in loop), "nothing is loaded ahead"
    assert not any(re.search(r"\b(?:STS|SHFL)\b", line) for line in loop)
    weights = launch.rows * 128 * (2 if activation else 1) / (32 * launch.warps)
    assert len(loop) / weights <= most


@pytest.mark.parametrize("capability", [100, 120])
def test_machine_code_for_blackwell_spills_or_multiplies_without_matrix_units(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for activation, launch, stages in (
        (None, triton_gemm.choose(16, 4096, 4096, BF16), 5),
        (None, triton_gemm.choose(4096, 4096, 4096, BF16), 3),
        ("silu", triton_gemm.choose_for_experts(64, 1, BF16, capability == 100).for_two_weights(), 3),
        ("", triton_gemm.choose_for_experts(128, 1, BF16, capability == 100), 3),
    ):
        used, code = compiled(capability, activation, BF16, launch, stages, tmp_path)
        assert used["LOCAL"] == 0
        assert used["STACK"] <= 32
        assert ("UTCHMMA" if capability == 100 else "HMMA") in code
    scaled = {"sums": "*fp32", "decode_scale": "*fp32", "token_scale": "*fp32", "bias": "*i16", "out": "*i16"}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    sizes = {"ROWS": 256, "TOKENS": 4, "OWN": False}
    kernel = machine_code(triton_gemm_kernels.add_splits, capability, options, **scaled, **sizes)
    used, code = disassembled(kernel, tmp_path)
    assert used == {"STACK": 0, "LOCAL": 0}
    assert "FFMA" not in code, "a product and the bias are rounded once instead of twice"


@pytest.mark.parametrize("activation", [None, "silu"])
def test_machine_code_for_fp32_has_no_registers(
    activation: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launch = triton_gemm.choose(1000, 4096, 4096, FP32)
    for capability in (80, 90):
        used, _ = compiled(capability, activation, FP32, launch, 3, tmp_path)
        # One loop over both weights of an expert makes ptxas give up: 32 registers and 10 KiB of stack.
        assert used["STACK"] <= 64


def hottest_loop(code: str) -> list[str]:
    """The instructions between the label and the branch back to it that have the most matrix products between them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = [[]]
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            instructions.append(line)
            back = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if back and back[1] in labels:
                loops.append(instructions[labels[back[1]] :])
    return max(loops, key=lambda loop: sum("MMA" in line for line in loop))


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["W4A16", "W4A4"])
def test_a_call_waits_for_the_gpu_or_capture_changes_a_bit(recipe: Recipe | None) -> None:
    w = fos.quantize(randn(96, 1536, seed=28)).to("cuda")
    experts = (
        [fos.quantize(randn(64, 1536, seed=29 + e)) for e in range(4)],
        [fos.quantize(randn(1536, 32, seed=33 + e)) for e in range(4)],
    )
    w13, w2 = (NVFP4Tensor.stack(parts).to("cuda") for parts in experts)
    weights, ids = (t.cuda() for t in routes(33, 4, "elsewhere"))
    x, other = (randn(33, 1536, seed=seed).bfloat16().cuda() for seed in (37, 38))
    dense, p13, p2 = prepared(w), prepared(w13), prepared(w2)

    def call() -> tuple[Tensor, Tensor]:
        return (
            triton_gemm.linear(x, *dense, w.row_decode_scale.contiguous(), None, None, torch.bfloat16),
            triton_gemm.moe(
                x, *p13, w13.row_decode_scale, *p2, w2.row_decode_scale, weights, ids, recipe, "silu", False
            ),
        )

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(other)
    ids.copy_(ids.flip(0))
    graph.replay()
    for got, needed in zip(captured, call(), strict=True):
        assert_same_tensor("y", got, needed)
