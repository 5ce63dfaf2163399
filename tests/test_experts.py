"""Mixtures of experts, on every device and by every backend: what they multiply, round and sum, and for which tokens.

See products.py for the bounds. GPU cases are run by hand, not in CI.
"""

import math

import pytest
import torch
from conftest import assert_same_tensor, calc_diff, mean_ratio
from products import (
    CPU,
    CUDA,
    PLAIN,
    Expected,
    Products,
    assert_rounded_once,
    assert_taken_back,
    assert_within,
    everywhere,
    expected_experts,
    generator,
    half_unit,
    most_bytes,
    on_cuda,
    over,
    power_of_two,
    prepared_bytes,
    quantized_x,
    randint,
    random_experts,
    random_weight,
    random_x,
    routing,
    whole_weight,
)
from torch import Tensor

from fouroversix_plugin import kernels, reference
from fouroversix_plugin.kernels import hopper, ops
from fouroversix_plugin.recipe import Recipe

# (E, top_k, H, I)
SMALL = [(1, 1, 128, 64), (4, 2, 576, 48), (16, 8, 128, 64)]
ALL = [
    *[(1, 1, 128, 64), (4, 2, 576, 192), (16, 8, 128, 48), (16, 1, 2048, 192), (64, 2, 576, 64), (4, 2, 14336, 128)],
    (128, 8, 2048, 768),
]
TOKENS = {"cpu": (0, 1, 3, 64), "cuda": (0, 1, 3, 64, 257, 1000)}
by_shape = over("shape", SMALL, ALL, ALL[:-1])
by_scheme = pytest.mark.parametrize("activations", [None, Recipe()], ids=["W4A16", "W4A4"])
by_place = pytest.mark.parametrize("on_input", [False, True], ids=["weight-on-output", "weight-on-input"])
prepared_only = pytest.mark.parametrize("products", [CPU[0], CUDA[0]])


# An expert has less than a row, or one of columns that the kernel for few rows cannot take; then Qwen3-30B-A3B for one
# token, on one GPU and on two, and for so many that experts have 1, 4, 16, 128 and 512 rows.
@pytest.mark.parametrize(
    ("slots", "experts", "hidden", "inner", "rows"),
    [
        *[(8, 16, 576, 48, 8), (16, 16, 2064, 48, 32), (8, 128, 2048, 768, 32), (8, 128, 2048, 384, 8)],
        *[(128, 128, 2048, 768, 32), (512, 128, 2048, 768, 32), (2048, 128, 2048, 768, 32)],
        *[(16384, 128, 2048, 768, 192), (65536, 128, 2048, 768, 128)],
    ],
)
def test_tiles_on_hopper_hold_other_rows(slots: int, experts: int, hidden: int, inner: int, rows: int) -> None:
    assert hopper._rows_of_a_tile(slots, experts, hidden, inner) == rows
    with kernels.batch_invariant(True):
        assert hopper._rows_of_a_tile(slots, experts, hidden, inner) >= 32


def check(what: str, y: Tensor, expected: Expected, hidden: int) -> None:
    """What W4A16, and exact gates and ups in W4A4, have to be. A fifth more for gates, ups and products that lie so
    near to a midpoint that they are rounded the other way."""
    assert_within(what, y, expected)
    # Tensor cores drop what lies below the last place of a sum, with every 16 columns: a share of gates and of ups is
    # rounded the other way, by a unit, whose square is 12 times that of a rounding. Few such numbers vary in their sum;
    # and they are few where few tokens, those of experts with the largest scales, make up the mean.
    share = 2 * (hidden / 16 * 2.0**-24) / torch.finfo(y.dtype).eps
    otherwise = share * expected.columns * max(len(y) / 8, 1)
    assert_rounded_once(what, y, expected, more=0.2 + 12 * share * (1 + 5 / math.sqrt(max(otherwise, 1))))


# --- of the checks ---


@by_scheme
@by_place
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_what_is_expected_is_not_the_specification(activation: str, on_input: bool, activations: Recipe | None) -> None:
    g = generator("cpu", "specification", activation, on_input)
    experts, x = random_experts(5, 128, 48, g), random_x(40, 128, torch.float32, g)
    route = routing(40, 5, 2, g)
    route[1][3], route[1][5, 0] = -1, 5
    y = reference.moe(x, *experts, *route, activations, activation, on_input)
    expected, unsettled = expected_experts(x, *experts, *route, activations, activation, on_input)
    kept = ~unsettled if activations else slice(None)
    assert_within("y", y[kept], expected[kept])


# --- results ---


@by_shape
def test_experts_are_further_off_than_their_roundings(products: Products, shape: tuple[int, int, int, int]) -> None:
    E, top_k, H, inner = shape
    for dtype in (torch.bfloat16, torch.float16):
        g = generator(products.device, "experts", shape, dtype)
        q = random_experts(E, H, inner, g)
        experts = products.experts(*q, dtype)
        for tokens in TOKENS[products.device]:
            x, route = random_x(tokens, H, dtype, g), routing(tokens, E, top_k, g)
            y = experts(x, *route)
            assert y.dtype == dtype
            check(f"{dtype}, {tokens} tokens", y, expected_experts(x, *q, *route)[0], H)


@by_place
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@everywhere
def test_an_activation_is_another_or_weighs_elsewhere(products: Products, activation: str, on_input: bool) -> None:
    dtypes = (torch.bfloat16, torch.float16, *([torch.float32] if products.device == "cpu" else []))
    for dtype in dtypes:
        g = generator(products.device, "activation", activation, on_input, dtype)
        q = random_experts(6, 128, 80, g)
        for tokens in (1, 33, 100):
            x, route = random_x(tokens, 128, dtype, g), routing(tokens, 6, 3, g)
            y = products.experts(*q, dtype)(x, *route, None, activation, on_input)
            check(f"{dtype}, {tokens} tokens", y, expected_experts(x, *q, *route, None, activation, on_input)[0], 128)


@by_place
@by_shape
def test_quantized_experts_are_further_off_than_their_roundings(
    products: Products, shape: tuple[int, int, int, int], on_input: bool
) -> None:
    # Whole numbers, which the recipe quantizes to themselves: gates and ups have no error, so that the intermediate's
    # codes are known, and what follows is one more product.
    E, top_k, H, inner = shape
    for dtype in (torch.bfloat16, torch.float16):
        g = generator(products.device, "quantized", shape, dtype)
        w13, w2 = whole_weight(E, 2 * inner, H, g=g).q, random_weight(E, H, inner, g=g)
        experts = products.experts(w13, w2, dtype)
        for tokens in TOKENS[products.device]:
            x, route = quantized_x(tokens, H, dtype, g)[0], routing(tokens, E, top_k, g)
            if on_input:  # with powers of two they stay what they are
                route = power_of_two(randint(-2, 3, route[0].shape, g)).float(), route[1]
            y = experts(x, *route, PLAIN, "silu", on_input)
            expected, unsettled = expected_experts(x, w13, w2, *route, PLAIN, "silu", on_input, exact=True)
            assert int(unsettled.sum()) <= 2 + 0.2 * tokens, "the test has nothing to look at"
            check(f"{dtype}, {tokens} tokens", y[~unsettled], expected[~unsettled], H)


@by_place
@by_shape
def test_codes_of_intermediates_differ(products: Products, shape: tuple[int, int, int, int], on_input: bool) -> None:
    # A gate or up within its error of a midpoint moves a product by a place, which moves 2 % of the codes it is
    # quantized to, and where it is a token's largest, all are quantized anew: then numbers are off by a few per cent.
    E, top_k, H, inner = shape
    g = generator(products.device, "random", shape, on_input)
    q = random_experts(E, H, inner, g)
    experts = products.experts(*q, torch.bfloat16)
    for tokens in TOKENS[products.device]:
        x, route = random_x(tokens, H, torch.bfloat16, g), routing(tokens, E, top_k, g)
        for recipe in (Recipe(), Recipe("mae", 448)):
            y = experts(x, *route, recipe, "silu", on_input)
            assert y.shape == x.shape
            if tokens == 0:
                continue
            expected = expected_experts(x, *q, *route, recipe, "silu", on_input)[0]
            once = expected.y.bfloat16()
            off = (y.double() - expected.y).abs() > expected.error + half_unit(
                expected.y.abs() + expected.error, y.dtype
            )
            assert off.double().mean() <= 0.05 + 1 / tokens
            assert calc_diff(y, expected.y) <= 2 * calc_diff(once, expected.y) + 1e-4 / tokens
            assert abs(mean_ratio(y, once) - 1) <= 1e-3 + 1e-2 / tokens


@prepared_only
def test_a_static_amax_is_not_used(products: Products) -> None:
    g = generator(products.device, "static")
    q = random_experts(4, 128, 80, g)
    x, route = random_x(40, 128, torch.bfloat16, g), routing(40, 4, 2, g)
    held = ops.prepare_experts(*q, torch.bfloat16)
    amax = [torch.tensor(value, device=g.device) for value in (2.0, 1.5)]
    y = ops.moe(x, *held, *route, Recipe(), "silu", False, *amax)
    needed = reference.moe(x, *q, *route, Recipe(), "silu", False, *amax)
    assert calc_diff(y, needed) <= 5e-6
    for one in ((amax[0], None), (None, amax[1])):
        assert calc_diff(y, ops.moe(x, *held, *route, Recipe(), "silu", False, *one)) > 1e-3, (
            "the test tells them apart"
        )


# --- which tokens ---


def by_hand(tokens: int, E: int, top_k: int, g: torch.Generator) -> dict[str, Tensor]:
    """Ids by what is special about them."""
    usual = routing(tokens, E, top_k, g)[1]
    others = torch.where(randint(0, 2, usual.shape, g) == 0, usual, torch.where(usual % 2 == 0, -1, E + usual))
    return {
        "all to one": torch.full_like(usual, E - 2),
        "one to each": torch.arange(tokens * top_k, device=g.device).view(tokens, top_k).remainder(E).to(usual.dtype),
        "all but one to the first": torch.where(torch.arange(tokens, device=g.device)[:, None] == tokens - 1, E - 1, 0)
        .expand(tokens, top_k)
        .to(usual.dtype)
        .contiguous(),
        "half to other ranks": others.to(usual.dtype),
        "all to other ranks": torch.full_like(usual, -1),
        "none of the first expert's": usual.clamp(min=1),
        "far out of range": torch.where(usual < E // 2, usual, torch.iinfo(torch.int32).max),
        "64 bits": usual.long(),
    }


@by_scheme
@over("tokens", [1, 3, 40], [1, 3, 64, 257, 1000])
def test_a_token_goes_to_another_expert(products: Products, tokens: int, activations: Recipe | None) -> None:
    E, top_k, H, inner = 8, 2, 128, 48
    g = generator(products.device, "by hand", tokens)
    # Whole numbers, of which W4A4 knows the intermediate's codes; of W4A16 nothing else is asked here.
    w13, w2 = whole_weight(E, 2 * inner, H, g=g).q, random_weight(E, H, inner, g=g)
    experts = products.experts(w13, w2, torch.bfloat16)
    x, weights = quantized_x(tokens, H, torch.bfloat16, g)[0], routing(tokens, E, top_k, g)[0]
    recipe = None if activations is None else PLAIN
    for what, ids in by_hand(tokens, E, top_k, g).items():
        y = experts(x, weights, ids, recipe)
        expected, unsettled = expected_experts(x, w13, w2, weights, ids, recipe, exact=True)
        assert int(unsettled.sum()) <= 2 + 0.2 * tokens, "the test has nothing to look at"
        assert_within(what, y[~unsettled], expected[~unsettled])
        nobody = ((ids < 0) | (ids >= E)).all(dim=1)
        assert_same_tensor(f"{what}, no expert", y[nobody], torch.zeros_like(y[nobody]))


@by_place
@by_scheme
@everywhere
def test_the_weight_of_nobodys_slot_counts(products: Products, activations: Recipe | None, on_input: bool) -> None:
    E, H = 4, 64
    g = generator(products.device, "nobody's weights")
    experts = products.experts(*random_experts(E, H, 32, g), torch.bfloat16)
    for tokens in (1, 40):
        x, (weights, ids) = random_x(tokens, H, torch.bfloat16, g), routing(tokens, E, 2, g)
        ids[:, 0] = torch.where(torch.arange(tokens, device=ids.device) % 2 == 0, -1, E)
        expected = experts(x, weights, ids, activations, "silu", on_input)
        for odd in (torch.nan, torch.inf):
            weights[:, 0] = odd
            y = experts(x, weights, ids, activations, "silu", on_input)
            assert_same_tensor(f"{tokens} tokens, {odd}", y, expected)


@by_scheme
@everywhere
def test_strides_of_operands_change_a_bit(products: Products, activations: Recipe | None) -> None:
    g = generator(products.device, "strides")
    experts = products.experts(*random_experts(6, 128, 48, g), torch.bfloat16)
    wide, (weights, ids) = random_x(40, 391, torch.bfloat16, g), routing(40, 6, 4, g)
    for x in (wide[:, 3:131], wide[:, 1:257:2], wide.flatten()[1:5121].view(40, 128), wide[:1, :128].expand(40, 128)):
        expected = experts(x.clone().contiguous(), weights[:, ::2].contiguous(), ids[:, 1::2].contiguous(), activations)
        assert_same_tensor("y", experts(x, weights[:, ::2], ids[:, 1::2], activations), expected)
        transposed = weights[:, ::2].T.contiguous().T, ids[:, 1::2].T.contiguous().T
        assert_same_tensor("y", experts(x, *transposed, activations), expected)


@by_scheme
@by_place
@everywhere
def test_a_broken_token_reaches_another(products: Products, on_input: bool, activations: Recipe | None) -> None:
    g = generator(products.device, "broken")
    experts = products.experts(*random_experts(4, 128, 48, g), torch.bfloat16)
    for tokens in (2, 64, 200):
        x, route = random_x(tokens, 128, torch.bfloat16, g), routing(tokens, 4, 2, g)
        clean = experts(x, *route, activations, "silu", on_input)
        x[1, 5] = torch.nan
        y = experts(x, *route, activations, "silu", on_input)
        assert bool(y[1].isnan().all())
        rest = [token for token in range(tokens) if token != 1]
        assert_same_tensor(f"{tokens} tokens", y[rest], clean[rest])


# --- one call after and beside another ---


@by_scheme
@over("shape", [(16, 8, 128, 48)], [(16, 8, 128, 48), (64, 2, 576, 192), (4, 2, 2048, 768)])
def test_a_run_differs_from_the_one_before(
    products: Products, shape: tuple[int, int, int, int], activations: Recipe | None
) -> None:
    E, top_k, H, inner = shape
    g = generator(products.device, "runs", shape)
    experts = products.experts(*random_experts(E, H, inner, g), torch.bfloat16)
    for tokens in (1, 16, 130):
        x, route = random_x(tokens, H, torch.bfloat16, g), routing(tokens, E, top_k, g)
        first = experts(x, *route, activations)
        for run in range(1, 4 if products.device == "cpu" else 20):
            assert_same_tensor(f"{tokens} tokens, run {run}", experts(x, *route, activations), first)


@by_scheme
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
@on_cuda
def test_graph_replay_keeps_the_routing_or_changes_a_bit(
    products: Products, tokens: int, activations: Recipe | None
) -> None:
    E, top_k, H, inner = 16, 2, 576, 192
    g = generator(products.device, "graph", tokens)
    experts = products.experts(*random_experts(E, H, inner, g), torch.bfloat16)
    first, second = ((random_x(tokens, H, torch.bfloat16, g), *routing(tokens, E, top_k, g)) for _ in range(2))
    one_expert = (first[0], first[1], torch.full_like(first[2], 3))
    nobody = (second[0], second[1], torch.full_like(first[2], -1))
    held = tuple(tensor.clone() for tensor in first)
    experts(*held, activations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(*held, activations)
    for values in (second, one_expert, nobody, first):
        for tensor, value in zip(held, values, strict=True):
            tensor.copy_(value)
        captured.fill_(torch.nan)
        graph.replay()
        assert_same_tensor("replayed", captured, experts(*values, activations))


@by_scheme
@pytest.mark.parametrize("tokens", [1, 64, 257])
@on_cuda
def test_calls_on_two_streams_meet(products: Products, tokens: int, activations: Recipe | None) -> None:
    E, top_k, H, inner = 16, 2, 576, 192
    g = generator(products.device, "streams", tokens)
    calls = [products.experts(*random_experts(E, H, inner, g), torch.bfloat16) for _ in range(2)]
    inputs = [(random_x(tokens, H, torch.bfloat16, g), *routing(tokens, E, top_k, g)) for _ in range(2)]
    expected = [experts(*given, activations) for experts, given in zip(calls, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for call in range(10):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if call == 0:
                    torch.cuda._sleep(5_000_000)  # until calls wait on both: launching one takes longer than running it
                found[number].append(calls[number](*inputs[number], activations))
    torch.cuda.synchronize()
    for results, needed in zip(found, expected, strict=True):
        for call, y in enumerate(results):
            assert_same_tensor(f"call {call}", y, needed)


@by_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Up to 500 rows an expert, or up to 125: tiles of every size.
@pytest.mark.parametrize("shape", [(4, 2, 576, 192), (64, 8, 2048, 768)], ids=str)
@on_cuda
def test_a_token_depends_on_its_neighbours(
    products: Products, shape: tuple[int, int, int, int], dtype: torch.dtype, activations: Recipe | None
) -> None:
    E, top_k, H, inner = shape
    g = generator(products.device, "invariant", shape, dtype)
    experts = products.experts(*random_experts(E, H, inner, g), dtype)
    given = random_x(1000, H, dtype, g), *routing(1000, E, top_k, g)
    with kernels.batch_invariant(True):
        alone = experts(*(tensor[-1:] for tensor in given), activations)
        for tokens in (7, 64, 1000):
            y = experts(*(tensor[-tokens:] for tensor in given), activations)
            assert_same_tensor(f"last of {tokens}", y[-1:], alone)


@by_scheme
@on_cuda
def test_a_call_waits_for_the_gpu(products: Products, activations: Recipe | None) -> None:
    g = generator(products.device, "wait")
    experts = products.experts(*random_experts(16, 576, 192, g), torch.bfloat16)
    inputs = [(random_x(tokens, 576, torch.bfloat16, g), *routing(tokens, 16, 2, g)) for tokens in (1, 64, 300)]
    for given in inputs:
        experts(*given, activations)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in inputs:
            experts(*given, activations)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_scheme
@prepared_only
def test_compilation_breaks_or_changes_a_bit(products: Products, activations: Recipe | None) -> None:
    g = generator(products.device, "compiled")
    w13, w2 = ops.prepare_experts(*random_experts(4, 128, 48, g), torch.bfloat16)

    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return ops.moe(x, w13, w2, topk_weights, topk_ids, activations, "silu", False)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if products.device == "cuda" else "aot_eager")
    for tokens in (1, 33):
        given = random_x(tokens, 128, torch.bfloat16, g), *routing(tokens, 4, 2, g)
        assert_same_tensor(f"{tokens} tokens", compiled(*given), run(*given))
    torch._dynamo.reset()


# --- prepared weights ---


@pytest.mark.parametrize("shape", [(1, 1, 128, 64), (3, 1, 80, 48), (4, 1, 576, 192), (2, 1, 16, 16)], ids=str)
@prepared_only
def test_prepared_experts_cannot_be_taken_back_or_grow(products: Products, shape: tuple[int, int, int, int]) -> None:
    E, _, H, inner = shape
    g = generator(products.device, "back", shape)
    for dtype in (torch.bfloat16, torch.float16):
        given = random_experts(E, H, inner, g)
        for held, q in zip(ops.prepare_experts(*given, dtype), given, strict=True):
            assert_taken_back(ops.unprepare_weight(held), q)
            assert prepared_bytes(held) <= most_bytes(q)
