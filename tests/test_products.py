"""Dense linear layers, on every device and by every backend: exact products, summed in fp32, rounded once.

See products.py for the bounds. GPU cases are run by hand, not in CI.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same_tensor, calc_diff, repeated
from products import (
    CPU,
    CUDA,
    PLAIN,
    Products,
    assert_mostly_nearest,
    assert_rounded_once,
    assert_taken_back,
    assert_within,
    every_code_and_scale,
    everywhere,
    expected_linear,
    generator,
    most_bytes,
    on_cuda,
    over,
    power_of_two,
    prepared_bytes,
    quantized_x,
    randint,
    random_weight,
    random_x,
    whole_weight,
    whole_x,
)
from torch import Tensor

from fouroversix_plugin import kernels, reference
from fouroversix_plugin.kernels import ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe

# (N, K): less than a tile of any kernel, no multiple of one, and as many rows and columns as layers have.
SMALL = [(16, 16), (24, 144), (48, 576), (144, 80)]
ALL = [*itertools.product((16, 48, 4112), (16, 576, 1536, 14336)), (272, 1936), (48, 3136)]
TOKENS = {
    "cpu": (0, 1, 7, 8, 9, 64, 65, 129),
    "cuda": (0, 1, 7, 8, 9, 16, 63, 64, 65, 128, 129, 200, 256, 257, 1000),
}
by_shape = over("shape", SMALL, ALL)
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
by_scheme = pytest.mark.parametrize("activations", [None, Recipe()], ids=["W4A16", "W4A4"])


def dtypes(products: Products) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16, *([torch.float32] if products.device == "cpu" else []))


def without_sign_of_zero(y: Tensor) -> Tensor:
    return y + 0.0


# --- sums without a rounding ---


@by_shape
def test_whole_numbers_do_not_come_out_whole(products: Products, shape: tuple[int, int]) -> None:
    for dtype in dtypes(products):
        g = generator(products.device, "whole", shape, dtype)
        weight = whole_weight(*shape, g=g)
        linear = products.linear(weight.q, dtype)
        x = whole_x(1000, shape[1], dtype, g)
        for tokens in TOKENS[products.device]:
            rows = x[1000 - tokens :]
            bias = (randint(-255, 256, shape[:1], g) * weight.unit).to(dtype if tokens % 2 else torch.float32)
            for b in (None, bias):
                expected = expected_linear(rows, weight.q, None, b, exact=True)
                y = linear(rows, None, b)
                what = f"{dtype}, {tokens} tokens, {'no' if b is None else b.dtype} bias"
                assert_same_tensor(what, without_sign_of_zero(y), without_sign_of_zero(expected.y.float().to(dtype)))


@by_shape
def test_quantized_whole_numbers_do_not_come_out_whole(products: Products, shape: tuple[int, int]) -> None:
    for dtype in dtypes(products):
        g = generator(products.device, "quantized", shape, dtype)
        weight = whole_weight(*shape, g=g)
        linear = products.linear(weight.q, dtype)
        x, token_scale = quantized_x(1000, shape[1], dtype, g)
        values, found = reference.quantize_values(x, PLAIN)
        assert torch.equal(values * token_scale, x.float()), "the test's numbers are rounded"
        assert torch.equal(found, token_scale[:, 0])
        for tokens in TOKENS[products.device]:
            rows = x[1000 - tokens :]
            expected = expected_linear(rows, weight.q, PLAIN, exact=True)
            y = linear(rows, PLAIN)
            what = f"{dtype}, {tokens} tokens"
            assert_same_tensor(what, without_sign_of_zero(y), without_sign_of_zero(expected.y.float().to(dtype)))


# --- weights read back one by one: x is rows of the identity ---


def assert_read_back(products: Products, q: NVFP4Tensor, dtype: torch.dtype, tokens: int) -> None:
    linear, weight = products.linear(q, dtype), reference.dequantize(q, dtype)
    identity = torch.eye(q.shape[1], dtype=dtype, device=products.device)
    y = torch.cat([linear(rows) for rows in identity.split(tokens)])
    # [N, K] again, so that what fails is named by its place in the weight.
    assert_same_tensor(f"{tokens} tokens", without_sign_of_zero(y.T), without_sign_of_zero(weight))


@over(
    "shape",
    [(16, 16), (48, 80), (144, 576)],
    list(itertools.product((16, 48, 144, 4112), (16, 80, 576, 1536))),
)
@by_dtype
def test_a_weight_lies_in_anothers_place(products: Products, shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = generator(products.device, "read back", shape, dtype)
    packed = randint(0, 256, (shape[0], shape[1] // 2), g).to(torch.uint8)
    scales = randint(0x01, 0x7F, (shape[0], shape[1] // 16), g).to(torch.uint8).view(torch.float8_e4m3fn)
    decode_scale = power_of_two(randint(-3, 4, shape[:1], g)).float()
    for tokens in (1, 16, 64, 250) if products.device == "cuda" else (5, 64):
        assert_read_back(products, NVFP4Tensor(packed, scales, decode_scale), dtype, tokens)


@over("tokens", [7, 512], [1, 8, 64, 128, 512])
@by_dtype
def test_a_code_under_some_scale_is_lost_in_some_lane(products: Products, tokens: int, dtype: torch.dtype) -> None:
    assert_read_back(products, every_code_and_scale(products.device), dtype, tokens)


# --- scales that kernels lose ---


@by_scheme
@by_dtype
@everywhere
def test_a_row_takes_anothers_decode_scale(products: Products, dtype: torch.dtype, activations: Recipe | None) -> None:
    g = generator(products.device, "rows", dtype)
    q = random_weight(208, 576, g=g)
    orders = torch.logspace(-6, 6, 208, device=products.device)[torch.randperm(208, generator=g, device=g.device)]
    low = 1e-3 if dtype == torch.float16 else 1.0  # so that no result leaves fp16
    q = NVFP4Tensor(q.packed, q.block_scale, q.decode_scale * orders)
    for tokens in (1, 20, 200):
        x = (random_x(tokens, 576, torch.float32, g) * low).to(dtype)
        assert_within(f"{tokens} tokens", products.linear(q, dtype)(x, activations), expected_linear(x, q, activations))


@pytest.mark.parametrize("scales", ["smallest", "subnormal", "below 2^-6 here and there"])
@everywhere
def test_small_block_scales_are_flushed(products: Products, scales: str) -> None:
    shape = (144, 320)
    g = generator(products.device, scales)
    count = (shape[0], shape[1] // 16)
    scale_bytes = {
        "smallest": torch.ones(count, dtype=torch.int64, device=g.device),
        "subnormal": randint(1, 8, count, g),
        "below 2^-6 here and there": torch.where(randint(0, 2, count, g) == 0, randint(1, 8, count, g), 0x20),
    }[scales].to(torch.uint8)
    packed = randint(0, 256, (shape[0], shape[1] // 2), g).to(torch.uint8)
    q = NVFP4Tensor(packed, scale_bytes.view(torch.float8_e4m3fn), torch.full((144,), 2.0**5, device=g.device))
    for dtype, tokens in itertools.product((torch.bfloat16, torch.float16), (1, 9, 70, 300)):
        x = whole_x(tokens, shape[1], dtype, g)
        expected = expected_linear(x, q, exact=True).y.float().to(dtype)
        assert bool((expected != 0).any(dim=0).all()) or tokens == 1, "the test sees every row"
        y = products.linear(q, dtype)(x)
        assert_same_tensor(f"{dtype}, {tokens} tokens", without_sign_of_zero(y), without_sign_of_zero(expected))


@everywhere
def test_codes_under_a_block_scale_of_zero_count(products: Products) -> None:
    g = generator(products.device, "zero scales")
    weight = whole_weight(144, 336, g=g)
    scale_bytes = weight.q.block_scale.view(torch.uint8)
    gone = randint(0, 3, scale_bytes.shape, g) == 0
    gone[5] = True
    q = NVFP4Tensor(weight.q.packed, scale_bytes.masked_fill(gone, 0).view(torch.float8_e4m3fn), weight.q.decode_scale)
    for tokens in (1, 9, 70, 300):
        x = whole_x(tokens, 336, torch.bfloat16, g)
        y = products.linear(q, torch.bfloat16)(x)
        assert bool((y[:, 5] == 0).all())
        expected = expected_linear(x, q, exact=True).y.float().bfloat16()
        assert_same_tensor(f"{tokens} tokens", without_sign_of_zero(y), without_sign_of_zero(expected))


# --- sums in fp32 ---


@by_scheme
@by_shape
def test_a_sum_is_further_off_than_in_fp32(
    products: Products, shape: tuple[int, int], activations: Recipe | None
) -> None:
    for dtype in dtypes(products):
        g = generator(products.device, "random", shape, dtype, activations)
        q = random_weight(*shape, g=g)
        linear = products.linear(q, dtype)
        x, bias = random_x(1000, shape[1], dtype, g), torch.randn(shape[0], generator=g, device=g.device)
        expected = expected_linear(x, q, activations), expected_linear(x, q, activations, bias)
        for tokens, b in itertools.product(TOKENS[products.device], (None, bias)):
            y = linear(x[1000 - tokens :], activations, b)
            assert y.dtype == dtype
            what, needed = f"{dtype}, {tokens} tokens", expected[b is not None][slice(1000 - tokens, None)]
            assert_within(what, y, needed)
            assert_rounded_once(what, y, needed)
            assert_mostly_nearest(what, y, needed)


@by_scheme
@by_dtype
@pytest.mark.parametrize("shape", [(4112, 576), (4112, 14336)], ids=str)
@pytest.mark.parametrize("tokens", [4096, 8192])
@on_cuda
def test_many_tokens_are_further_off(
    products: Products, tokens: int, shape: tuple[int, int], dtype: torch.dtype, activations: Recipe | None
) -> None:
    g = generator(products.device, "many", tokens, shape, dtype, activations)
    q, x = random_weight(*shape, g=g), random_x(tokens, shape[1], dtype, g)
    y, expected = products.linear(q, dtype)(x, activations), expected_linear(x, q, activations)
    assert_within("y", y, expected)
    assert_rounded_once("y", y, expected)
    assert_mostly_nearest("y", y, expected)


def test_results_rounded_twice_pass() -> None:
    """Of the checks: what a product in bf16 or of another weight gives does not pass them."""
    g = generator("cpu", "wrong")
    q, x = random_weight(64, 576, g=g), random_x(64, 576, torch.bfloat16, g)
    expected = expected_linear(x, q)
    unscaled = expected.y / q.decode_scale
    assert_rounded_once("right", expected.y.bfloat16(), expected)
    twice = (unscaled.bfloat16().float() * q.decode_scale).bfloat16()
    with pytest.raises(AssertionError, match="calc_diff"):
        assert_rounded_once("y", twice, expected)
    with pytest.raises(AssertionError, match="are not the nearest numbers"):
        assert_mostly_nearest("y", twice, expected)
    lost = expected.y - (x[:, :1].double() @ reference.dequantize(q)[:, :1].double().T)
    with pytest.raises(pytest.fail.Exception, match="further off"):
        assert_within("y", lost.bfloat16(), expected)
    with pytest.raises(AssertionError, match="calc_diff"):
        assert_rounded_once("y", (expected.y * 1.004).bfloat16(), expected)


@by_dtype
@everywhere
def test_activations_are_quantized_otherwise(products: Products, dtype: torch.dtype) -> None:
    operators = torch.ops.fouroversix_triton if products.backend == "triton" else torch.ops.fouroversix
    x = random_x(65, 576, dtype, generator(products.device, "bytes", dtype))
    for recipe in (Recipe(), Recipe("mae", 448, error="decode_scale"), PLAIN):
        found, needed = operators.quantize_values(x, None, recipe.key), reference.quantize_values(x, recipe)
        for what, a, e in zip(("values", "token_scale"), found, needed, strict=True):
            assert_same_tensor(what, a, e)


@pytest.mark.parametrize("products", [CPU[0], CUDA[0]])
def test_a_static_amax_is_not_used(products: Products) -> None:
    g = generator(products.device, "static")
    q, x, amax = random_weight(80, 576, g=g), random_x(70, 576, torch.bfloat16, g), torch.tensor(3.0, device=g.device)
    y = ops.linear(x, ops.prepare_weight(q, x.dtype), Recipe(), None, amax)
    expected = expected_linear(x, q, Recipe(), input_amax=amax)
    assert_within("y", y, expected)
    assert calc_diff(y, expected_linear(x, q, Recipe()).y) > 1e-3, "the test tells one from the other"


# --- where x lies, and what is in it ---


VIEWS: list[Any] = [
    pytest.param(lambda wide, K: wide[:, :K], id="wide-rows"),
    pytest.param(lambda wide, K: wide[:, 3 : 3 + K], id="odd-columns"),
    pytest.param(lambda wide, K: wide[:, 1 : 1 + 2 * K : 2], id="every-second-column"),
    pytest.param(lambda wide, K: wide[::2, K : 2 * K], id="every-second-row"),
    pytest.param(lambda wide, K: wide[:K, :64].T, id="transposed"),
    pytest.param(lambda wide, K: wide[7:8, :K].expand(65, K), id="one-row-repeated"),
    pytest.param(lambda wide, K: wide.flatten()[1 : 1 + 65 * K].view(65, K), id="odd-offset"),
    pytest.param(lambda wide, K: wide.flatten()[9 : 9 + K].view(1, K), id="one-row-at-an-odd-offset"),
]


@by_scheme
@pytest.mark.parametrize("view", VIEWS)
@everywhere
def test_strides_or_offsets_change_a_bit(
    products: Products, view: Callable[[Tensor, int], Tensor], activations: Recipe | None
) -> None:
    g = generator(products.device, "views")
    q, wide = random_weight(80, 144, g=g), random_x(200, 307, torch.bfloat16, g)
    x, bias = view(wide, 144), random_x(2, 81, torch.bfloat16, g)[1, 1:]
    before = wide.clone()
    linear = products.linear(q, torch.bfloat16)
    assert_same_tensor("y", linear(x, activations, bias), linear(x.clone().contiguous(), activations, bias.clone()))
    assert_same_tensor("x", wide, before)


@by_scheme
@everywhere
def test_a_broken_token_reaches_another(products: Products, activations: Recipe | None) -> None:
    g = generator(products.device, "broken")
    q = random_weight(80, 576, g=g)
    linear = products.linear(q, torch.bfloat16)
    for tokens in (2, 9, 64, 130):
        x = random_x(tokens, 576, torch.bfloat16, g)
        clean = linear(x, activations)
        x[1, 5], x[tokens // 2, 100] = torch.nan, torch.inf
        y, broken = linear(x, activations), sorted({1, tokens // 2})
        assert not bool(y[broken].isfinite().any()), "a token with NaN or infinity has results"
        rest = [token for token in range(tokens) if token not in broken]
        assert_same_tensor(f"{tokens} tokens", y[rest], clean[rest])


@by_scheme
@everywhere
def test_the_magnitude_of_a_token_changes_its_digits(products: Products, activations: Recipe | None) -> None:
    g = generator(products.device, "magnitude")
    q = random_weight(80, 576, g=g)
    linear = products.linear(q, torch.bfloat16)
    for tokens in (1, 9, 70):
        x = random_x(tokens, 576, torch.bfloat16, g)
        y = linear(x, activations)
        for exponent in (-40, 40) if activations else (-80, 80):
            assert_same_tensor(f"2^{exponent}", linear(x * 2.0**exponent, activations), y * 2.0**exponent)


# --- one call after and beside another ---


@by_scheme
@by_dtype
@over("shape", [(144, 576)], [(144, 80), (48, 14336), (4112, 1536)])
def test_a_run_differs_from_the_one_before(
    products: Products, shape: tuple[int, int], dtype: torch.dtype, activations: Recipe | None
) -> None:
    g = generator(products.device, "runs", shape, dtype)
    q = random_weight(*shape, g=g)
    linear = products.linear(q, dtype)
    for tokens in (1, 16, 130) if products.device == "cpu" else (1, 16, 64, 130, 1000):
        x = random_x(tokens, shape[1], dtype, g)
        first = linear(x, activations)
        for run in range(1, 5 if products.device == "cpu" else 20):
            assert_same_tensor(f"{tokens} tokens, run {run}", linear(x, activations), first)


@by_scheme
@pytest.mark.parametrize("tokens", [1, 8, 33, 64, 257, 1000])
@pytest.mark.parametrize("shape", [(144, 80), (4112, 1536)], ids=str)
@on_cuda
def test_graph_replay_changes_a_bit(
    products: Products, shape: tuple[int, int], tokens: int, activations: Recipe | None
) -> None:
    g = generator(products.device, "graph", shape, tokens)
    q, (first, second) = random_weight(*shape, g=g), random_x(2 * tokens, shape[1], torch.bfloat16, g).chunk(2)
    linear, x = products.linear(q, torch.bfloat16), first.clone()
    linear(x, activations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [linear(x, activations) for _ in range(2)]
    for values in (second, first, second):
        x.copy_(values)
        for y in captured:
            y.fill_(torch.nan)
        graph.replay()
        for y in captured:
            assert_same_tensor("replayed", y, linear(values, activations))


@by_scheme
@pytest.mark.parametrize("tokens", [1, 16, 64, 257])
@on_cuda
def test_calls_on_two_streams_meet(products: Products, tokens: int, activations: Recipe | None) -> None:
    g = generator(products.device, "streams", tokens)
    weights = [random_weight(1040, 1536, g=g) for _ in range(2)]
    linears = [products.linear(q, torch.bfloat16) for q in weights]
    inputs = [random_x(tokens, 1536, torch.bfloat16, g) for _ in range(2)]
    expected = [linear(x, activations) for linear, x in zip(linears, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for call in range(10):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if call == 0:
                    torch.cuda._sleep(5_000_000)  # until calls wait on both: launching one takes longer than running it
                found[number].append(linears[number](inputs[number], activations))
    torch.cuda.synchronize()
    for results, needed in zip(found, expected, strict=True):
        for call, y in enumerate(results):
            assert_same_tensor(f"call {call}", y, needed)


@by_scheme
@pytest.mark.parametrize("captured", [False, True])
@on_cuda
def test_a_call_begins_before_its_input_is_there_or_is_overtaken(
    products: Products, captured: bool, activations: Recipe | None
) -> None:
    # A kernel may start before the one it follows has ended: what it reads must be there, and what it overwrites read.
    g = generator(products.device, "order", captured)
    q, values = random_weight(1040, 1536, g=g), [random_x(4, 1536, torch.bfloat16, g) for _ in range(3)]
    linear, x = products.linear(q, torch.bfloat16), torch.zeros_like(values[0])
    expected = [linear(v, activations) for v in values]

    def calls() -> list[Tensor]:
        found = []
        for v in values:
            torch.cuda._sleep(200_000)
            torch.add(v, 0, out=x)
            found += [linear(x, activations) for _ in range(2)]
            x.fill_(torch.nan)
        return found

    for found in repeated(calls, captured):
        for call, y in enumerate(found):
            assert_same_tensor(f"call {call}", y, expected[call // 2])


@by_scheme
@on_cuda
def test_a_call_waits_for_the_gpu(products: Products, activations: Recipe | None) -> None:
    g = generator(products.device, "wait")
    linear = products.linear(random_weight(144, 576, g=g), torch.bfloat16)
    inputs = [random_x(tokens, 576, torch.bfloat16, g) for tokens in (1, 64, 300)]
    for x in inputs:
        linear(x, activations)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in inputs:
            linear(x, activations)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_scheme
@by_dtype
@pytest.mark.parametrize("shape", [(144, 80), (48, 14336), (4112, 1536)], ids=str)
@on_cuda
def test_a_token_depends_on_its_neighbours(
    products: Products, shape: tuple[int, int], dtype: torch.dtype, activations: Recipe | None
) -> None:
    g = generator(products.device, "invariant", shape, dtype)
    linear, x = products.linear(random_weight(*shape, g=g), dtype), random_x(1000, shape[1], dtype, g)
    with kernels.batch_invariant(True):
        alone = linear(x[-1:], activations)
        for tokens in (7, 64, 1000):
            assert_same_tensor(f"last of {tokens}", linear(x[-tokens:], activations)[-1:], alone)


@by_scheme
@pytest.mark.parametrize("products", [CPU[0], CUDA[0]])
def test_compilation_breaks_or_changes_a_bit(products: Products, activations: Recipe | None) -> None:
    g = generator(products.device, "compiled")
    w = ops.prepare_weight(random_weight(48, 80, g=g), torch.bfloat16)
    bias = torch.randn(48, generator=g, device=g.device)

    def run(x: Tensor) -> Tensor:
        return ops.linear(x, w, activations, bias)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if products.device == "cuda" else "aot_eager")
    for tokens in (1, 33, 130):
        x = random_x(tokens, 80, torch.bfloat16, g)
        assert_same_tensor(f"{tokens} tokens", compiled(x), run(x))
    torch._dynamo.reset()


# --- prepared weights ---


@by_dtype
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (144, 16), (4112, 112), (3, 80, 144), (2, 2, 16, 48)], ids=str)
@pytest.mark.parametrize("products", [CPU[0], CUDA[0]])
def test_a_prepared_weight_cannot_be_taken_back_or_grows(
    products: Products, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    g = generator(products.device, "back", shape)
    q = random_weight(*shape, g=g)
    some = randint(0, 0x7F, q.block_scale.shape, g)
    scales = torch.where(randint(0, 4, some.shape, g) == 0, 0, some).to(torch.uint8)
    q = NVFP4Tensor(q.packed, scales.view(torch.float8_e4m3fn), q.decode_scale)
    per_matrix = NVFP4Tensor(q.packed, q.block_scale, q.decode_scale[..., 0].contiguous())
    for weight in (q, per_matrix):
        held = ops.prepare_weight(weight, dtype)
        assert_taken_back(ops.unprepare_weight(held), weight)
        assert prepared_bytes(held) <= most_bytes(weight)
