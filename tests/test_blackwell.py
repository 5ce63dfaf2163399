"""W4A4 on Blackwell, without one: torch's own checks of the GEMM's arguments, and the specification in its place.

What stands in for ``torch._scaled_mm`` reads its operands as cuBLASLt documents them: e2m1 codes, block scales in tiles
of 128x4, fp32 sums. Tests at the end of the file run on such a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from conftest import DTYPES, assert_same_bytes, assert_same_tensor, golden_cases
from products import assert_rounded_once, assert_within, expected_linear, random_weight, random_x
from test_nvfp4 import slowly_laid_out
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fouroversix_plugin as fos
from fouroversix_plugin import kernels, reference
from fouroversix_plugin.kernels import blackwell, cuda, hopper, ops, triton
from fouroversix_plugin.nvfp4 import NVFP4Tensor, scales_from_layout
from fouroversix_plugin.recipe import Recipe, Scheme, preset
from fouroversix_plugin.serving import layer as neutral

BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn
FP4 = torch.float4_e2m1fn_x2

Gemm = Callable[..., Tensor]


def gemm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``torch._scaled_mm`` of FP4 operands, by the specification's arithmetic."""
    assert (a.dtype, b.dtype, scale_a.dtype, scale_b.dtype, out_dtype) == (FP4, FP4, E4M3, E4M3, torch.float32)
    assert b.stride(0) == 1, "the second operand is given column by column"
    return values_of(a, scale_a) @ values_of(b.t(), scale_b).T


def values_of(operand: Tensor, scales: Tensor) -> Tensor:
    rows, half = operand.shape
    return reference.unscaled(operand.view(torch.uint8), scales_from_layout(scales, "128x4", rows, half // 8))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", gemm)


def for_fp4_units(q: NVFP4Tensor) -> ops.PreparedWeight:
    weight, block_scale = blackwell.prepare(q.packed, q.block_scale.view(torch.uint8))
    return ops.PreparedWeight(weight, block_scale, q.row_decode_scale.contiguous(), q.shape[-1])


def merged(rows: int, columns: int, generator: torch.Generator) -> NVFP4Tensor:
    """Three projections in one weight, each with a decode scale of its own."""
    parts = [
        fos.quantize(torch.randn(rows // 3 + (i == 0) * (rows % 3), columns, generator=generator) * 10.0**i)
        for i in range(3)
    ]
    return NVFP4Tensor(
        torch.cat([part.packed for part in parts]),
        torch.cat([part.block_scale.view(torch.uint8) for part in parts]).view(E4M3),
        torch.cat([part.row_decode_scale for part in parts]),
    )


def on_device(
    x: Tensor, w: ops.PreparedWeight, recipe: Recipe, bias: Tensor | None = None, amax: Tensor | None = None
) -> Tensor:
    """What ``ops.linear`` runs on Blackwell, from the CPU's quantizer."""
    x_packed, x_scale, token_scale = torch.ops.fouroversix.quantize_to_layout(
        x, None if amax is None else amax.expand(x.shape[0]), "token", recipe.key, blackwell.LAYOUT
    )
    assert w.block_scale is not None
    return cuda.linear_w4a4(x_packed, x_scale, token_scale, w.weight, w.block_scale, w.decode_scale, bias, x.dtype)


# --- what the GEMM is given ---


@pytest.mark.parametrize("tokens", [0, 1, 7, 128, 129])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (144, 96), (384, 576), (128, 4096)])
def test_torch_refuses_the_operands(tokens: int, rows: int, columns: int) -> None:
    with FakeTensorMode():  # with torch's checks, and no CUDA
        x = torch.empty(tokens, columns, dtype=BF16, device="cuda")
        packed, scales, _ = torch.ops.fouroversix.quantize_to_layout(x, None, "token", Recipe().key, blackwell.LAYOUT)
        weight, weight_scales, _ = torch.ops.fouroversix.quantize_to_layout(
            torch.empty(rows, columns, dtype=BF16, device="cuda"), None, "tensor", Recipe().key, blackwell.LAYOUT
        )
        sums = blackwell._sums(packed, scales, weight, weight_scales)
        assert (sums.shape, sums.dtype, sums.device.type) == ((tokens, rows), torch.float32, "cuda")


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (32, 48)])
def test_torch_takes_shapes_that_the_limits_leave_out(rows: int, columns: int) -> None:
    with FakeTensorMode():
        packed, scales = operand(7, columns)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            blackwell._sums(packed, scales, *operand(rows, columns))


def operand(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    packed, scales, _ = torch.ops.fouroversix.quantize_to_layout(
        torch.empty(rows, columns, dtype=BF16, device="cuda"), None, "token", Recipe().key, blackwell.LAYOUT
    )
    return packed, scales


@pytest.mark.parametrize("case", golden_cases())
def test_golden_scales_lie_elsewhere(case: dict[str, Any], golden: Mapping[str, Tensor]) -> None:
    recipe = Recipe(case["metric"], case["scale_max"], case["adaptive"], case["error"])
    packed, scales, _ = torch.ops.fouroversix.quantize_to_layout(
        golden[case["input"]], None, case["scope"], recipe.key, blackwell.LAYOUT
    )
    assert_same_tensor("packed", packed, golden[f"{case['case']}/packed"])
    row_major = golden[f"{case['case']}/block_scale"].view(torch.uint8)
    assert scales.tolist() == slowly_laid_out(row_major, "128x4")
    assert_same_tensor("a weight's", blackwell.prepare(packed, row_major)[1], scales)


# --- arithmetic ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 129])
@pytest.mark.usefixtures("stand_in")
def test_scales_and_bias_round_elsewhere(tokens: int, with_bias: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(tokens)
    w = merged(144, 96, g)
    x = (torch.randn(tokens, 96, generator=g) * torch.logspace(-3, 3, max(tokens, 1))[:tokens, None]).to(dtype)
    bias = torch.randn(144, generator=g).to(dtype) if with_bias else None
    expected = reference.linear(x, w, Recipe(), bias)
    assert_same_tensor("on the device", on_device(x, for_fp4_units(w), Recipe(), bias), expected)
    assert_same_tensor("the operator", ops.linear(x, for_fp4_units(w), Recipe(), bias), expected)
    if tokens > 1 and dtype != torch.float32:
        sums = values_times_values(x, w)
        twice = (sums.to(dtype).float() * fos.quantize(x, granularity="token").decode_scale[:, None]).to(dtype)
        twice = (twice.float() * w.decode_scale).to(dtype)
        assert not torch.equal(twice, reference.linear(x, w, Recipe())), "one rounding and two cannot be told apart"


def values_times_values(x: Tensor, w: NVFP4Tensor) -> Tensor:
    return reference.quantize_values(x, Recipe())[0].float() @ reference.unscaled(w.packed, w.block_scale).T


@pytest.mark.parametrize("name", ["nvfp4_4over6", "transformer_engine", "flashinfer", "sglang_online", "nvfp4"])
@pytest.mark.usefixtures("stand_in")
def test_recipes_of_activations_are_mixed_up(name: str) -> None:
    g = torch.Generator().manual_seed(5)
    recipe = preset(name).activations
    assert recipe is not None
    x, w = torch.randn(33, 128, generator=g).bfloat16(), merged(48, 128, g)
    assert_same_tensor(name, on_device(x, for_fp4_units(w), recipe), reference.linear(x, w, recipe))


@pytest.mark.usefixtures("stand_in")
def test_static_activations_are_scaled_for_something_else() -> None:
    g = torch.Generator().manual_seed(6)
    x, w, amax = torch.randn(5, 64, generator=g).bfloat16(), merged(48, 64, g), torch.tensor(3.0)
    recipe = Recipe("mse", 448, adaptive=False)
    expected = reference.linear(x, w, recipe, None, amax)
    assert_same_tensor("on the device", on_device(x, for_fp4_units(w), recipe, None, amax), expected)
    assert_same_tensor("the operator", ops.linear(x, for_fp4_units(w), recipe, None, amax), expected)


@pytest.mark.usefixtures("stand_in")
def test_a_broken_row_reaches_others() -> None:
    g = torch.Generator().manual_seed(7)
    x, w = torch.randn(4, 64, generator=g).bfloat16(), merged(48, 64, g)
    whole = on_device(x, for_fp4_units(w), Recipe())
    x[1, 3] = torch.nan
    y = on_device(x, for_fp4_units(w), Recipe())
    assert y[1].isnan().all()
    assert_same_tensor("the other rows", y[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.usefixtures("stand_in")
def test_operands_that_do_not_fit_are_multiplied() -> None:
    g = torch.Generator().manual_seed(8)
    w = for_fp4_units(merged(48, 64, g))
    assert w.block_scale is not None
    x, scales, token_scale = torch.ops.fouroversix.quantize_to_layout(
        torch.randn(3, 64, generator=g), None, "token", Recipe().key, "128x4"
    )
    good = (x, scales, token_scale, w.weight, w.block_scale, w.decode_scale, None, BF16)
    blackwell.linear(*good)
    for place, other, message in (
        (1, scales[:256], r"x's block scales: got \(256,\)"),
        (2, token_scale.double(), r"x's decode scales: got \(3,\) torch.float64"),
        (3, w.weight[:, :16], r"weight: got \(48, 16\) torch.uint8 on cpu, needed \(48, 32\)"),
        (4, w.block_scale.view(E4M3), "weight's block scales: got"),
        (5, w.decode_scale[:1], r"weight: got \(48, 32\).*needed \(1, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            blackwell.linear(*good[:place], other, *good[place + 1 :])
    with kernels.batch_invariant(True), pytest.raises(ValueError, match="call set_batch_invariant before"):
        blackwell.linear(*good)
    with pytest.raises(ValueError, match=r"activations: got None \(W4A16\), needed a recipe"):
        ops.linear(torch.randn(3, 64), w, None, None)
    with pytest.raises(ValueError, match="x: got 32 columns, needed the weight's 64"):
        ops.linear(torch.randn(3, 32), w, Recipe(), None)


def test_a_weight_does_not_come_back() -> None:
    q = merged(144, 96, torch.Generator().manual_seed(9))
    assert_same_bytes(ops.unprepare_weight(for_fp4_units(q)), q)


def test_the_operator_breaks_its_schema_or_its_fake() -> None:
    for tokens in (0, 3):
        g = torch.Generator().manual_seed(10)
        w = for_fp4_units(merged(48, 64, g))
        x = torch.ops.fouroversix.quantize_to_layout(
            torch.randn(tokens, 64, generator=g), None, "token", Recipe().key, "128x4"
        )
        for bias, dtype in ((None, BF16), (torch.randn(48), torch.float32)):
            torch.library.opcheck(
                torch.ops.fouroversix.linear_w4a4.default,
                (*x, w.weight, w.block_scale, w.decode_scale, bias, dtype),
            )


# --- the trial ---


def row_major_scales(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    def values(operand: Tensor, scales: Tensor) -> Tensor:
        rows, blocks = operand.shape[0], operand.shape[1] // 8
        return reference.unscaled(operand.view(torch.uint8), scales[: rows * blocks].view(rows, blocks))

    return values(a, scale_a) @ values(b.t(), scale_b).T


def swapped_nibbles(a: Tensor, b: Tensor, **scales: Any) -> Tensor:
    codes = a.view(torch.uint8)
    return gemm((codes << 4 | codes >> 4).view(FP4), b, **scales)


def one_scale_of_the_weight(a: Tensor, b: Tensor, *, scale_b: Tensor, **rest: Any) -> Tensor:
    first = scale_b.view(torch.uint8)[:1].expand(scale_b.shape).contiguous()
    return gemm(a, b, scale_b=first.view(E4M3), **rest)


def rounded_to_bf16(a: Tensor, b: Tensor, **rest: Any) -> Tensor:
    return gemm(a, b, **rest).bfloat16().float()


def wrong_from_the_second_tile_of_tokens_on(a: Tensor, b: Tensor, **rest: Any) -> Tensor:
    sums = gemm(a, b, **rest)
    sums[128:] = 0
    return sums


def refusing(a: Tensor, b: Tensor, **rest: Any) -> Tensor:
    raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling this\nand more")


@pytest.mark.usefixtures("stand_in")
def test_a_right_gemm_is_refused() -> None:
    assert blackwell._fault.__wrapped__(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (row_major_scales, "products wrong in a trial"),
        (swapped_nibbles, "products wrong in a trial"),
        (one_scale_of_the_weight, "products wrong in a trial"),
        (rounded_to_bf16, "products wrong in a trial"),
        (wrong_from_the_second_tile_of_tokens_on, "got 288 of 18720 FP4 products wrong in a trial"),
        (refusing, "does not multiply FP4 here: RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED when calling this"),
    ],
)
def test_a_wrong_gemm_is_used(wrong: Gemm, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", wrong)
    found = blackwell._fault.__wrapped__(torch.device("cpu"))
    assert found is not None
    assert found.endswith(reason)


@pytest.mark.usefixtures("stand_in")
def test_the_trial_depends_on_what_an_engine_sets_while_it_builds_a_model() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device("meta"):
            assert blackwell._fault.__wrapped__(torch.device("cpu")) is None
    finally:
        torch.set_default_dtype(before)


# --- the choice ---


@pytest.fixture
def blackwells(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend that GPUs are of a compute capability, and what torch's FP4 GEMM and Triton say there."""

    def pretend(capability: tuple[int, int], fault: str | None = None, no_triton: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(blackwell, "_fault", lambda device: fault)
        monkeypatch.setattr(triton, "reason", lambda: no_triton)

    cuda._log_choice.cache_clear()
    with FakeTensorMode():
        yield pretend
    cuda._log_choice.cache_clear()


def packed(*shape: int) -> Tensor:
    return torch.empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0), (12, 1)])
def test_blackwell_is_not_chosen(
    capability: tuple[int, int], dtype: torch.dtype, blackwells: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    blackwells(capability)
    for _ in range(2):
        assert cuda.choose(packed(48, 64), dtype, "W4A4") == "blackwell"
    (line,) = [r.message for r in log.records]
    assert line.startswith("fouroversix: products of linear W4A4 by blackwell (passed over: hopper: ")


NO = "compute capability {}.{}, needed 10.x or 12.x"


@pytest.mark.parametrize(
    ("capability", "shape", "scheme", "fault", "reason"),
    [
        ((8, 0), (48, 64), "W4A4", None, NO.format(8, 0)),
        ((8, 9), (48, 64), "W4A4", None, NO.format(8, 9)),
        ((11, 0), (48, 64), "W4A4", None, NO.format(11, 0)),
        ((10, 0), (48, 64), "W4A16", None, "activations are not quantized"),
        ((10, 0), (48, 64), "", None, "activations need not be quantized"),
        ((10, 0), (40, 64), "W4A4", None, "weight [40, 64], needed multiples of 16 and 32"),
        ((12, 0), (48, 80), "W4A4", None, "weight [48, 80], needed multiples of 16 and 32"),
        ((12, 0), (48, 64), "W4A4", "products wrong", "products wrong"),
        ((10, 0), (2, 48, 64), "W4A4", None, blackwell.NO_EXPERTS),
        ((10, 0), (2, 48, 64), "W4A16", None, "activations are not quantized"),
        ((8, 0), (2, 48, 64), "W4A4", None, NO.format(8, 0)),
    ],
)
def test_what_cannot_multiply_is_chosen_or_goes_unsaid(
    capability: tuple[int, int],
    shape: tuple[int, ...],
    scheme: str,
    fault: str | None,
    reason: str,
    blackwells: Callable[..., None],
    log: pytest.LogCaptureFixture,
) -> None:
    blackwells(capability, fault)
    assert cuda.choose(packed(*shape), BF16, scheme) == "triton"
    (line,) = [r.message for r in log.records]
    what = "experts" if len(shape) > 2 else "linear"
    assert line.startswith(f"fouroversix: products of {what} {scheme}".rstrip() + " by triton (passed over: hopper: ")
    assert line.endswith(f"; blackwell: {reason})")


def test_without_triton_nothing_is_said_of_torch(
    blackwells: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    blackwells((10, 0), no_triton="Triton does not work")
    assert cuda.choose(packed(48, 64), BF16, "W4A16") == "torch"
    assert log.records[-1].message.endswith("triton: Triton does not work)")


def test_products_that_depend_on_the_batch_are_chosen(
    blackwells: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    with kernels.batch_invariant(True):
        blackwells((10, 0))
        assert cuda.choose(packed(48, 64), BF16, "W4A4") == "triton"
        assert log.records[-1].message.endswith("and results have to be batch-invariant)")
        blackwells((10, 0), no_triton="Triton does not work")
        with pytest.raises(ValueError, match=r"linear: got those of torch, .* triton: Triton does not work\); install"):
            cuda.choose(packed(48, 64), BF16, "W4A4")


def test_hopper_is_passed_over(
    blackwells: Callable[..., None], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    blackwells((9, 0))
    monkeypatch.setattr(hopper, "reason", lambda device: None)
    assert cuda.choose(packed(48, 64), BF16, "W4A4") == "hopper"
    assert [r.message for r in log.records] == ["fouroversix: products of linear W4A4 by hopper"]
    assert cuda.choose(packed(48, 64), torch.float32, "W4A4") == "triton"
    assert "hopper: activations are torch.float32; blackwell: compute capability 9.0" in log.records[-1].message


@pytest.mark.parametrize("rows", [8, 24, 3352])
def test_hopper_is_given_rows_that_it_cannot_multiply(
    blackwells: Callable[..., None], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, rows: int
) -> None:
    """Some linear-attention layers have few: a number for each head."""
    blackwells((9, 0))
    monkeypatch.setattr(hopper, "reason", lambda device: None)
    assert cuda.choose(packed(rows, 64), BF16, "W4A16") == "triton"
    assert f"hopper: {rows} rows, needed a multiple of 16" in log.records[-1].message


def test_a_layer_is_prepared_for_another_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    prepare = ops.prepare_weight

    def recorded(q: NVFP4Tensor, dtype: torch.dtype, gated: bool = False, scheme: str = "") -> ops.PreparedWeight:
        seen.append((gated, scheme))
        return prepare(q, dtype, gated, scheme)

    monkeypatch.setattr(ops, "prepare_weight", recorded)
    g = torch.Generator().manual_seed(11)
    for name in ("nvfp4_4over6", "w4a16"):
        scheme: Scheme = preset(name)
        neutral.prepare_linear("layer", merged(48, 64, g), scheme, neutral.LoadReport(), BF16)
        experts = [NVFP4Tensor.stack([merged(*shape, g) for _ in range(2)]) for shape in ((96, 64), (64, 48))]
        neutral.prepare_experts("layer", *experts, scheme, neutral.LoadReport(), BF16)
        assert seen == [(False, scheme.name), (True, scheme.name), (False, scheme.name)]
        seen.clear()


def test_compilers_change_a_bit_or_break_the_graph() -> None:
    g = torch.Generator().manual_seed(12)
    q, x, bias = merged(48, 64, g), torch.randn(2, 3, 64, generator=g).bfloat16(), torch.randn(48, generator=g)
    w = for_fp4_units(q)

    def run(x: Tensor, weight: Tensor, block_scale: Tensor, decode_scale: Tensor) -> Tensor:
        return neutral.apply_linear(x, ops.PreparedWeight(weight, block_scale, decode_scale), Recipe(), bias, None)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = compiled(x, w.weight, w.block_scale, w.decode_scale)
    assert_same_tensor("y", y.flatten(0, 1), reference.linear(x.flatten(0, 1), q, Recipe(), bias))


# --- on such a GPU ---


def on_blackwell(test: Callable[..., None]) -> Callable[..., None]:
    there = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (10, 12)
    return pytest.mark.gpu(pytest.mark.skipif(not there, reason="no GPU of Blackwell on this machine")(test))


@on_blackwell
def test_the_gemm_of_this_gpu_is_wrong() -> None:
    assert blackwell.reason(torch.device("cuda"), "W4A4", (16, 32)) is None


@on_blackwell
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 129, 1000])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (144, 96), (576, 1536), (4096, 4096)])
def test_a_product_is_off_by_more_than_its_sum(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(rows + columns + tokens)
    q, x = random_weight(rows, columns, g=g), random_x(tokens, columns, dtype, g)
    bias = torch.randn(rows, generator=g, device="cuda").to(dtype)
    w = ops.prepare_weight(q, dtype, scheme="W4A4")
    assert w.is_for_fp4_units
    y, expected = ops.linear(x, w, Recipe(), bias), expected_linear(x, q, Recipe(), bias)
    assert_within("y", y, expected)
    if y.numel() > 1000 and dtype != torch.float32:
        assert_rounded_once("y", y, expected)


@on_blackwell
def test_a_call_waits_for_the_gpu_or_capture_changes_a_bit() -> None:
    g = torch.Generator("cuda").manual_seed(13)
    w = ops.prepare_weight(random_weight(576, 1536, g=g), BF16, scheme="W4A4")
    x, other = (random_x(33, 1536, BF16, g) for _ in range(2))
    ops.linear(x, w, Recipe(), None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear(x, w, Recipe(), None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.linear(x, w, Recipe(), None)
    x.copy_(other)
    graph.replay()
    assert_same_tensor("y", captured, ops.linear(x, w, Recipe(), None))
