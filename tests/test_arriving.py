"""Weights that are quantized as soon as they have arrived, with what engines' loaders do made up."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import assert_same_bytes
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.serving.arriving import ArrivingWeight
from fouroversix_plugin.weights import quantize_weight

RECIPE = fos.Recipe()


def arriving(shape: tuple[int, ...], full_columns: int) -> tuple[Tensor, ArrivingWeight]:
    data = torch.empty(*shape, dtype=torch.bfloat16)
    return data, ArrivingWeight("layer", data, full_columns, RECIPE)


def loader(weight: ArrivingWeight, copy: Callable[..., Any], rows: int | None = None) -> Callable[..., object]:
    return weight.loader(copy, lambda *shard, **named: rows)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def test_memory_is_held_before_the_first_tensor_or_after_the_last() -> None:
    data, weight = arriving((64, 32), 32)
    held = data.untyped_storage().nbytes
    load = loader(weight, lambda param, given, at: param[at : at + 32].copy_(given))
    whole = values(64, 32)
    seen = [held()]
    for at in (0, 32):
        load(data, whole[at : at + 32], at)
        seen.append(held())
    assert seen == [0, 64 * 32 * 2, 0]
    assert_same_bytes(weight.take(), quantize_weight("layer", whole, RECIPE))


def test_a_tensor_that_comes_twice_stands_for_another() -> None:
    data, weight = arriving((64, 32), 32)
    load = loader(weight, lambda param, given, at: param[at : at + 32].copy_(given))
    whole = values(64, 32)
    for _ in range(2):
        load(data, whole[:32], 0)
    with pytest.raises(ValueError, match=r"layer\.weight: got nothing"):
        weight.take()
    load(data, whole[32:], 32)
    assert_same_bytes(weight.take(), quantize_weight("layer", whole, RECIPE))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_scales_for_its_own_part(rank: int) -> None:
    whole = values(64, 64)
    data, weight = arriving((64, 32), 64)
    part = slice(32 * rank, 32 * rank + 32)
    loader(weight, lambda param, given: param.copy_(given[:, part]))(data, whole)
    q = quantize_weight("layer", whole, RECIPE)
    scale = slice(2 * rank, 2 * rank + 2)
    expected = fos.NVFP4Tensor(q.packed[:, part.start // 2 : part.stop // 2], q.block_scale[:, scale], q.decode_scale)
    assert_same_bytes(weight.take(), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_an_expert_is_scaled_for_another_one(fused: bool) -> None:
    """Halves of the columns of three experts, one by one or all at once."""
    whole = values(3, 16, 64)
    data, weight = arriving((3, 16, 32), 64)
    if fused:
        loader(weight, lambda param, given: param.copy_(given[..., 32:]))(data, whole)
    else:
        load = loader(weight, lambda param, given, expert: param[expert].copy_(given[:, 32:]))
        for expert in (2, 0, 1):
            load(data, whole[expert], expert)
    taken = weight.take()
    for expert in range(3):
        q = quantize_weight("layer", whole[expert], RECIPE)
        assert torch.equal(taken.decode_scale[expert], q.decode_scale)
        assert torch.equal(taken.packed[expert], q.packed[:, 16:])


def test_an_expert_of_another_rank_counts_or_comes_too_late() -> None:
    data, weight = arriving((16, 32), 32)
    load = loader(weight, lambda param, given, ours: param.copy_(given) if ours else None)
    for ours in (False, True, False):
        load(data, values(16, 32) if ours else 1000 * values(16, 32), ours)
    assert_same_bytes(weight.take(), quantize_weight("layer", values(16, 32), RECIPE))


def test_threads_lose_a_tensor() -> None:
    whole = values(512, 32)
    data, weight = arriving((512, 32), 32)
    load = loader(weight, lambda param, given, at: param[at : at + 16].copy_(given))
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(load, data, whole[at : at + 16], at) for at in range(0, 512, 16)]:
            future.result()
    assert_same_bytes(weight.take(), quantize_weight("layer", whole, RECIPE))


def test_what_is_wrong_is_quantized() -> None:
    data, weight = arriving((64, 32), 32)
    load = loader(weight, lambda param, given: param[: len(given)].copy_(given), rows=64)
    with pytest.raises(ValueError, match=r"layer.weight: got shape \(32, 32\), needed \(64, 32\)"):
        load(data, values(32, 32))
    with pytest.raises(ValueError, match=r"layer.weight: got shape \(64, 16\), needed \(64, 32\)"):
        load(data, values(64, 16))
    with pytest.raises(ValueError, match=r"layer.weight: got torch.uint8, needed one of"):
        load(data, torch.zeros(64, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"layer.weight: got nothing"):
        weight.take()
    load(data, values(64, 32))
    whole = loader(weight, lambda param, given: param.copy_(given))
    for again in (load, whole):
        with pytest.raises(ValueError, match="cannot be loaded again: restart the server"):
            again(data, values(64, 32))
