"""Products on Hopper in every way they can be launched, not only as the kernels choose (run by hand, not in CI)."""

import itertools

import pytest
import torch
from conftest import assert_same_tensor
from products import (
    ON_CUDA,
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

from fouroversix_plugin.kernels import hopper, ops
from fouroversix_plugin.recipe import Recipe

pytestmark = list(ON_CUDA)

TILES = (32, 64, 128, 256)
# (tokens of a tile, CTAs that share its columns, times 16 weight rows at once of few tokens)
LAUNCHES = [*itertools.product(TILES, (1, 2, 3, 5, 8), (1,)), *itertools.product((8, 16), (1,), (1, 2, 3, 5, 8))]


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if (why := hopper.reason(torch.device("cuda"))) is not None:
        pytest.skip(why)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Less than a tile, an odd number of them, no whole steps, more tiles than there are teams to take them at once.
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (272, 1936), (1040, 576), (512, 4096), (34048, 192)], ids=str)
def test_a_launch_changes_a_whole_number(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = generator("cuda", "launch", shape, dtype)
    weight = whole_weight(*shape, g=g)
    held = ops.prepare_weight(weight.q, dtype)
    x = whole_x(600, shape[1], dtype, g)
    bias = (randint(-255, 256, shape[:1], g) * weight.unit).to(dtype)
    for rows in (1, 8, 9, 15, 16, 33, 48, 65, 100, 130, 190, 257, 300, 600):
        for b in (None, bias):
            expected = expected_linear(x[:rows], weight.q, None, b, exact=True).y.float().to(dtype) + 0.0
            for tokens, split, strips in LAUNCHES:
                if (rows > tokens and tokens <= 16) or split > -(-shape[1] // 64):
                    continue
                if tokens <= 16 and shape[1] % 128 and shape[1] > 16 // strips * 128:
                    continue  # x has to come at once
                y: Tensor = torch.ops.fouroversix_cuda.linear(
                    x[:rows], held.weight, held.block_scale, held.decode_scale, None, b, False, tokens, split, strips
                )
                what = f"{rows} rows, {tokens} tokens a tile, {split} CTAs, {strips} at once, bias {b is not None}"
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
        for tokens in (8, *TILES):
            monkeypatch.setattr(hopper, "_rows_of_a_tile", lambda *_, tokens=tokens: tokens)
            of_tiles[tokens] = ops.moe(x, *held, weights, ids, activations, "silu", False)
        for tokens in TILES[1:]:  # the order of additions is the same
            assert_same_tensor(f"{rows} rows, {tokens} a tile", of_tiles[tokens], of_tiles[32])
        if activations is None:
            expected = expected_experts(x, *q, weights, ids)[0]
            for tokens in (8, 32):
                assert_within(f"{rows} rows, {tokens} a tile", of_tiles[tokens], expected)
