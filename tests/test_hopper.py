"""Products on Hopper in every way they can be launched, not only as the kernels choose (run by hand, not in CI)."""

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import assert_same_tensor, repeated
from products import (
    ON_CUDA,
    PLAIN,
    assert_within,
    expected_experts,
    expected_linear,
    generator,
    randint,
    random_experts,
    random_x,
    routing,
    whole_weight,
    whole_x,
)
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, hopper, native, ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe

pytestmark = list(ON_CUDA)

TILES = {"linear": (32, 64, 128, 256), "experts": (8, 32, 64, 128, 192)}
# (tokens of a tile; parts of the columns; tiles at once, or of few tokens times 16 weight rows): a cluster shares the
# parts of one tile, those of two are slices.
LAUNCHES = [
    *itertools.product(TILES["linear"], (1, 2, 3, 5, 8), (1,)),
    *itertools.product((64, 128), (1, 2, 3, 8, 16), (2,)),
    *itertools.product((8, 16), (1,), (1, 2, 3, 5, 8)),
]


def launches_of(rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Those of LAUNCHES that so many rows of x with so many columns can have."""
    for tokens, split, strips in LAUNCHES:
        if (rows > tokens and tokens <= 16) or split > -(-columns // 64):
            continue
        if tokens > 16 or few_rows_take(columns, strips):
            yield tokens, split, strips


def few_rows_take(columns: int, strips: int = 1) -> bool:
    """Whether the kernel for few rows can multiply: x comes in whole pairs of steps, or all of it at once."""
    return columns % 128 == 0 or columns <= 16 // strips * 128


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if (why := hopper.reason(torch.device("cuda"))) is not None:
        pytest.skip(why)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Less than a tile, an odd number of them, no whole steps, more tiles than there are teams to take them at once, more
# pieces of x than the kernel for few rows has barriers for.
@pytest.mark.parametrize(
    "shape", [(16, 16), (48, 80), (272, 1936), (1040, 576), (512, 4096), (34048, 192), (144, 33792)], ids=str
)
def test_a_launch_changes_a_whole_number(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = generator("cuda", "launch", shape, dtype)
    weight = whole_weight(*shape, g=g)
    held = ops.prepare_weight(weight.q, dtype)
    x = whole_x(600, shape[1], dtype, g)
    bias = (randint(-255, 256, shape[:1], g) * weight.unit).to(dtype)
    for rows in (1, 8, 9, 15, 16, 33, 48, 65, 100, 130, 190, 257, 300, 600):
        for b in (None, bias):
            expected = expected_linear(x[:rows], weight.q, None, b, exact=True).y.float().to(dtype) + 0.0
            for tokens, split, strips in launches_of(rows, shape[1]):
                y: Tensor = torch.ops.fouroversix_cuda.linear(
                    x[:rows], held.weight, held.block_scale, held.decode_scale, None, b, False, tokens, split, strips
                )
                what = f"{rows} rows, {tokens} tokens a tile, {split} parts, {strips} at once, bias {b is not None}"
                assert_same_tensor(what, y + 0.0, expected)


@pytest.mark.parametrize("activations", [None, Recipe()], ids=["W4A16", "W4A4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# (E, top_k, H, I). The last has enough pairs of tiles for all multiprocessors, and odd numbers of tiles.
@pytest.mark.parametrize("shape", [(4, 2, 576, 192), (16, 8, 128, 48), (8, 2, 2048, 192), (140, 4, 640, 192)], ids=str)
def test_tiles_of_experts_change_a_result(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int], dtype: torch.dtype, activations: Recipe | None
) -> None:
    E, top_k, H, inner = shape
    g = generator("cuda", "tiles", shape, dtype)
    q = random_experts(E, H, inner, g)
    held = ops.prepare_experts(*q, dtype)
    for rows in (1, 7, 64, 300, 900):
        x = random_x(rows, H, dtype, g)
        weights, ids = routing(rows, E, top_k, g)
        ids[rows // 2, 0] = -1
        of_tiles = {}
        for tokens in TILES["experts"]:
            monkeypatch.setattr(hopper, "_rows_of_a_tile", lambda *_, tokens=tokens: tokens)
            of_tiles[tokens] = ops.moe(x, *held, weights, ids, activations, "silu", False)
        for tokens in TILES["experts"][2:]:  # the order of additions is the same
            assert_same_tensor(f"{rows} rows, {tokens} a tile", of_tiles[tokens], of_tiles[32])
        if activations is None:
            expected = expected_experts(x, *q, weights, ids)[0]
            for tokens in (8, 32):
                assert_within(f"{rows} rows, {tokens} a tile", of_tiles[tokens], expected)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("rows", [1, 48, 1000])
@pytest.mark.parametrize("last", ["ids", "x"])
def test_experts_read_what_is_not_there_yet(last: str, rows: int, captured: bool) -> None:
    E, top_k, H, inner = 16, 4, 512, 192
    g = generator("cuda", "late", rows)
    held = ops.prepare_experts(*random_experts(E, H, inner, g), torch.bfloat16)
    given = [(random_x(rows, H, torch.bfloat16, g), *routing(rows, E, top_k, g)) for _ in range(3)]
    if last == "x":  # of a kernel that lets the next one start before it has ended
        made = [(native.quantize_values(x, PLAIN, None, False)[0], *others) for x, *others in given]
    else:
        made = given
    expected = [ops.moe(x, *held, weights, ids, Recipe(), "silu", False) for x, weights, ids in made]
    now = [torch.empty_like(tensor) for tensor in given[0]]

    def calls() -> list[Tensor]:
        found = []
        for tensors in given:
            torch.cuda._sleep(100_000)
            for to, tensor in zip(now, tensors, strict=True):  # ids last
                torch.add(tensor, 0, out=to)
            x = native.quantize_values(now[0], PLAIN, None, False)[0] if last == "x" else now[0]
            found.append(ops.moe(x, *held, now[1], now[2], Recipe(), "silu", False))
        return found

    for found in repeated(calls, captured):
        for number, (a, e) in enumerate(zip(found, expected, strict=True)):
            assert_same_tensor(f"call {number}", a, e)


@pytest.mark.parametrize("activations", [None, Recipe()], ids=["W4A16", "W4A4"])
@pytest.mark.parametrize("rows", [1, 100])
def test_routing_on_another_device_is_read(rows: int, activations: Recipe | None) -> None:
    g = generator("cuda", "elsewhere")
    held = ops.prepare_experts(*random_experts(4, 128, 48, g), torch.bfloat16)
    x, (weights, ids) = random_x(rows, 128, torch.bfloat16, g), routing(rows, 4, 2, g)
    for elsewhere in ((weights.cpu(), ids), (weights, ids.cpu())):
        with pytest.raises(ValueError, match=r"topk_ids, topk_weights: got tensors on .*cpu.*needed them on cuda:0"):
            ops.moe(x, *held, *elsewhere, activations, "silu", False)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("experts", [1, 40, 128, 1500, 4096])
# One thread block, a cluster that reads ids once, one that reads them twice.
@pytest.mark.parametrize("tokens", [1, 300, 9000])
def test_a_slot_is_lost_or_lies_among_those_of_another_expert(tokens: int, experts: int, gathered: bool) -> None:
    top_k, most = 8, 64
    g = generator("cuda", "sorted", tokens, experts)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=g, device="cuda", dtype=torch.int32)
    kernels = torch.ops.fouroversix_cuda
    row_of_slot, slot_of_row, token_of_row, blocks, in_use, progress = kernels.route(
        ids, experts, most, False, gathered, gathered
    )
    x = torch.randn(tokens, 48, generator=g, device="cuda", dtype=torch.bfloat16)
    rows_of_x = kernels.gather(x, row_of_slot, slot_of_row, None) if gathered else None
    block_count, count = in_use.tolist()
    counts = (ids >= 0) & (ids < experts)
    assert count == int(counts.sum())
    slots, rows = slot_of_row[:count].long(), torch.arange(count, device="cuda")
    assert torch.equal(slots.sort().values, counts.flatten().nonzero().flatten())
    assert torch.equal(row_of_slot.flatten()[slots], rows.int())
    assert bool((row_of_slot[~counts] == -1).all())
    expert, begin, end = blocks[:block_count, :3].long().unbind(1)
    assert torch.equal(torch.repeat_interleave(expert, end - begin), ids.flatten()[slots].long())
    assert torch.equal(torch.cat([begin, end[-1:]]), torch.cat([rows[:1], end])) if count else block_count == 0
    assert bool(((begin < end) & (end - begin <= most)).all())
    needed = -(-torch.bincount(ids[counts].long(), minlength=experts) // most)
    assert torch.equal(torch.bincount(expert, minlength=experts), needed)
    assert progress.numel() == (ids.numel() if gathered else 0)
    assert not progress[:count].any()
    assert bool((progress[count:] == -1).all())
    if gathered:
        assert torch.equal(rows_of_x[:count], x[slots // top_k])
    else:
        assert torch.equal(token_of_row[:count], (slots // top_k).int())


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(metric="mae"), Recipe(metric="abs_max"), PLAIN], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("static", [False, True])
# A cluster of each size a row, and more rows than those are for; of more slots than are written at once.
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (20, 8), (200, 3), (200, 11), (300, 8), (3000, 11)])
@pytest.mark.parametrize("columns", [16, 2064])
def test_a_row_quantized_for_its_slots_is_another(
    columns: int, tokens: int, top_k: int, static: bool, dtype: torch.dtype, recipe: Recipe
) -> None:
    experts = 64
    g = generator("cuda", "quantized for slots", columns, tokens, top_k)
    x = torch.randn(tokens, columns, generator=g, device="cuda", dtype=dtype)
    x[::2] = torch.randint(-24, 25, (len(x[::2]), columns), generator=g, device="cuda").to(dtype) / 4  # ties
    if tokens > 1:
        x[0, :16], x[-1, 5] = 0, torch.nan
    amax = torch.tensor(3.0, device="cuda") if static else None
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=g, device="cuda", dtype=torch.int32)
    row_of_slot, slot_of_row, _, _, in_use, _ = torch.ops.fouroversix_cuda.route(ids, experts, 64, False, True, False)
    found, scale = native.gather_quantized(x, recipe, amax, row_of_slot, slot_of_row)
    values, token_scale = native.quantize_values(x, recipe, amax, False)
    count = int(in_use[1])
    slots = slot_of_row[:count].long()
    assert torch.equal(slots.sort().values, ((ids >= 0) & (ids < experts)).flatten().nonzero().flatten())
    assert torch.equal(row_of_slot.flatten()[slots], torch.arange(count, device="cuda").int())
    assert_same_tensor("values", found[:count], values[slots // top_k])
    assert_same_tensor("scales", scale[:count], token_scale[slots // top_k])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("used", [0, 1, 37, 90])
# A cluster a row, and a group of threads.
@pytest.mark.parametrize("rows", [90, 1000])
def test_a_sorted_row_is_quantized_otherwise(rows: int, used: int, static: bool, dtype: torch.dtype) -> None:
    g = generator("cuda", "sorted rows", rows)
    x = torch.randn(rows, 768, generator=g, device="cuda", dtype=dtype)
    amax = torch.tensor(3.0, device="cuda") if static else None
    expected = native.quantize_values(x, Recipe(), amax, False)
    x[used:] = torch.nan
    in_use = torch.tensor([1, used], device="cuda", dtype=torch.int32)
    found = native.quantize_sorted(x, Recipe(), amax, in_use)
    for name, ours, theirs in zip(("values", "scales"), found, expected, strict=True):
        assert_same_tensor(name, ours[:used], theirs[:used])


@pytest.mark.parametrize("recipe", [None, Recipe(), Recipe(metric="mae"), Recipe(metric="abs_max"), PLAIN], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("static", [False, True])
# Whole tiles of 32 and of 64 rows, and parts of tiles and steps.
@pytest.mark.parametrize(("hidden", "inner", "tokens"), [(2048, 768, 300), (2048, 768, 700), (1040, 176, 300)])
def test_products_at_once_change_a_bit(
    hidden: int, inner: int, tokens: int, static: bool, dtype: torch.dtype, recipe: Recipe | None
) -> None:
    experts, top_k, calls = 120, 4, 12
    g = generator("cuda", "beside", hidden, inner, tokens)
    held = ops.prepare_experts(*random_experts(experts, hidden, inner, g), dtype)
    amax = torch.tensor(3.0, device="cuda") if static else None
    weights, ids = routing(tokens, experts, top_k, g)
    x = [random_x(tokens, hidden, dtype, g) for _ in range(calls)]
    x[1][3], x[1][5, 1], x[1][7] = 0, torch.nan, 30000
    # As they come, half of them elsewhere, most to one expert, none.
    of_call = [ids, torch.where(ids < experts // 2, ids, -1), torch.where(ids < 100, ids, 3), torch.full_like(ids, -1)]

    def outputs() -> list[Tensor]:
        # One after the other, in each other's memory.
        return [
            ops.moe(own, *held, weights, of_call[i % 4], recipe, "silu", False, None, amax) for i, own in enumerate(x)
        ]

    rows = hopper._rows_of_a_tile(ids.numel(), experts, hidden, inner)
    scales = [w.decode_scale for w in held]
    assert hopper._row_tiles_beside(ids, rows, *scales, recipe is not None) > 0
    found = outputs()
    with mock.patch.object(hopper, "_row_tiles_beside", return_value=0):
        expected = outputs()
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_same_tensor(f"call {i}", ours, theirs)


def test_products_run_at_once_beside_copies_or_fills() -> None:
    ids = torch.zeros(300, 4, device="cuda", dtype=torch.int32)
    aligned = [torch.ones(120, rows, device="cuda") for rows in (2 * 768, 2048)]
    unaligned = torch.ones(120 * 2048 + 1, device="cuda")[1:].view(120, 2048)
    assert hopper._row_tiles_beside(ids, 32, *aligned, True) == 6
    assert hopper._row_tiles_beside(ids, 32, aligned[0], unaligned, True) == 0
    assert hopper._row_tiles_beside(ids, 32, aligned[0], aligned[1].T.contiguous().T, True) == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert hopper._row_tiles_beside(ids, 32, *aligned, True) == 0
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [8, 64])
def test_the_pinned_silu_of_a_gate_is_another_number(tokens: int, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, device="cuda").to(torch.uint16).view(dtype)
    # Below that, a product with a weight is no normal number in fp32; and no sum is -0.
    gate = every[every.isfinite() & ((every.view(torch.int16) == 0) | (every.float().abs() >= 2.0**-100))]
    x = torch.zeros(len(gate), 64, device="cuda", dtype=dtype)
    x[:, 0], x[:, 1] = gate, 1.7
    # 16 rows that take column 0 for gate, 16 that take column 1 for up: 2 is the code of 1.
    packed = torch.zeros(1, 32, 32, device="cuda", dtype=torch.uint8)
    packed[:, :16, 0], packed[:, 16:, 0] = 0x02, 0x20
    block_scale = torch.ones(1, 32, 4, device="cuda").to(torch.float8_e4m3fn)
    held = ops.prepare_weight(NVFP4Tensor(packed, block_scale, torch.ones(1, device="cuda")), dtype, gated=True)
    kernels = torch.ops.fouroversix_cuda
    ids = torch.zeros(len(gate), 1, device="cuda", dtype=torch.int32)
    few = tokens == 8
    row_of_slot, slot_of_row, token_of_row, blocks, in_use, _ = kernels.route(ids, 1, tokens, False, not few, False)
    inner = kernels.multiply_gated(
        x if few else kernels.gather(x, row_of_slot, slot_of_row, None),
        held.weight, held.block_scale, held.decode_scale, None, token_of_row if few else None,
        blocks, in_use, None, 0, 16, hopper._PINNED_SILU, tokens,
    )  # fmt: skip
    expected = reference.silu_and_mul(x[:, :2].cpu()).expand(-1, 16)
    of_token = torch.empty_like(inner).index_copy_(0, slot_of_row.long(), inner)
    assert_same_tensor(f"{len(gate)} gates", of_token.cpu(), expected.contiguous())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_fast_pinned_silu_is_another_number(tmp_path: Path, dtype: str) -> None:
    program = tmp_path / "every_pinned_silu"
    source = Path(__file__).with_name(f"{program.name}.cu")
    flags = (*build.NVCC_STRICT, *build.architecture_flags(build.HOPPER), f"-DFOS_DTYPE={dtype}", "-DFOS_OUTPUT=gated")
    subprocess.run([build.nvcc(), "-std=c++20", "-O3", *flags, "-o", str(program), str(source)], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    different, unsure, units = map(int, printed.split())
    print(f"{dtype}: {different} of 2^32 differ; {unsure / 2**32:.2%} computed slowly, others to {units} units")
    assert different == 0
    assert units < 8
