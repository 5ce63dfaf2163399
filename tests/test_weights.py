"""Weights on their way in, and what an engine's layer needs: nothing damaged, missing or mislabelled is served."""

import gc
import inspect
import math
import re
import weakref
from typing import Any

import pytest
import torch
from conftest import assert_close, assert_same_bytes, assert_same_tensor, calc_diff, mixed_magnitudes
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.formats import COMPRESSED_TENSORS, FOUROVERSIX, MODELOPT, OURS, Format, Part
from fouroversix_plugin.kernels import ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor, scales_to_layout
from fouroversix_plugin.recipe import Recipe, Scheme
from fouroversix_plugin.serving.layer import (
    LoadReport,
    WeightShape,
    apply_linear,
    check_input_size,
    check_loading_order,
    local_expert_ids,
    static_amax,
)
from fouroversix_plugin.serving.module import (
    Unloaded,
    create_stored_experts,
    fill_all_shards,
    rows_in_checkpoint,
    take_stored,
)
from fouroversix_plugin.serving.scheme import served
from fouroversix_plugin.weights import missing, of_experts, quantize_weight, stored_weight

E4M3 = torch.float8_e4m3fn


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def concatenated(tensors: list[NVFP4Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Packed bytes and block scale bytes of the ranks, gathered."""
    return (
        torch.cat([q.packed for q in tensors], dim),
        torch.cat([q.block_scale.view(torch.uint8) for q in tensors], dim),
    )


# --- quantize_weight ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_weight_is_quantized_for_its_own_amax(dtype: torch.dtype) -> None:
    weight = mixed_magnitudes(32, 64, seed=1, spread=2).to(dtype)
    assert_same_bytes(quantize_weight("l", weight, Recipe()), reference.quantize(weight, Recipe()))


@pytest.mark.parametrize(
    ("shape", "bad", "message"),
    [
        ((4, 32), [((1, 7), math.nan), ((3, 0), math.inf)], "got 2 NaN or infinite values, the first at (1, 7)"),
        ((4, 32), [((0, 0), -math.inf)], "got 1 NaN or infinite values, the first at (0, 0)"),
        ((2, 4, 32), [((1, 2, 31), math.nan)], "got 1 NaN or infinite values, the first at (1, 2, 31)"),
    ],
)
def test_a_damaged_weight_is_refused_with_count_and_place(shape: Any, bad: Any, message: str) -> None:
    weight = randn(*shape)
    for place, value in bad:
        weight[place] = value
    with pytest.raises(ValueError, match=re.escape(f"model.layers.0.up_proj.weight: {message}")):
        quantize_weight("model.layers.0.up_proj", weight, Recipe())


def test_every_expert_has_its_own_amax() -> None:
    weight = randn(3, 16, 32) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    q = quantize_weight("experts", weight, Recipe())
    assert q.decode_scale.shape == (3,)
    for e in range(3):
        assert_same_bytes(q[e], reference.quantize(weight[e], Recipe()))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1], ids=["column-parallel", "row-parallel"])
def test_ranks_hold_slices_of_what_one_rank_would(ranks: int, dim: int) -> None:
    weight = mixed_magnitudes(32, 128, seed=2, spread=2)
    whole = quantize_weight("l", weight, Recipe())
    shards = weight.chunk(ranks, dim)
    amaxes: list[Tensor] = []
    for shard in shards:  # what the ranks bring to the reduction …
        quantize_weight("l", shard, Recipe(), lambda own: amaxes.append(own) or own)  # type: ignore[func-returns-value]
    assert len({amax.item() for amax in amaxes}) == ranks
    # … and what each gets out of it.
    parts = [quantize_weight("l", shard, Recipe(), lambda own: torch.stack(amaxes).amax(0)) for shard in shards]
    packed, block_scale = concatenated(parts, dim)
    assert_same_tensor("packed", packed, whole.packed)
    assert_same_tensor("block_scale", block_scale, whole.block_scale.view(torch.uint8))
    for part in parts:
        assert_same_tensor("decode_scale", part.decode_scale, whole.decode_scale)


def test_ranks_reduce_every_expert_for_itself() -> None:
    weight = randn(3, 32, 32) * torch.tensor([1.0, 8.0, 0.5]).view(3, 1, 1)
    whole = quantize_weight("experts", weight, Recipe())
    shards = weight.chunk(2, dim=1)
    amax = torch.stack([reference.row_amax(shard.flatten(-2)) for shard in shards]).amax(0)
    seen: list[torch.Size] = []
    parts = [quantize_weight("experts", s, Recipe(), lambda own: (seen.append(own.shape), amax)[1]) for s in shards]
    assert seen == [(3,), (3,)]
    packed, block_scale = concatenated(parts, 1)
    assert_same_tensor("packed", packed, whole.packed)
    assert_same_tensor("block_scale", block_scale, whole.block_scale.view(torch.uint8))
    assert_same_tensor("decode_scale", parts[1].decode_scale, whole.decode_scale)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float8_e4m3fn], ids=str)
def test_codes_of_another_format_are_not_taken_for_weights(dtype: torch.dtype) -> None:
    weight = torch.randint(0, 100, (16, 32), dtype=torch.uint8).to(dtype)
    with pytest.raises(ValueError, match=r"proj\.weight.*" + str(dtype).removeprefix("torch.")):
        quantize_weight("proj", weight, Recipe())


# --- stored_weight ---


def stored(seed: int = 3, widths: tuple[int, ...] = (32, 16, 16)) -> dict[str, Any]:
    """Arguments of stored_weight for a fused layer whose shards differ in magnitude, and so in decode scale."""
    shards = [
        quantize_weight("shard", randn(width, 64, seed=seed + i) * 8.0 ** (i - 1), Recipe())
        for i, width in enumerate(widths)
    ]
    packed, block_scale = concatenated(shards, 0)
    return {
        "name": "layers.0.qkv_proj",
        "packed": packed,
        "block_scale": block_scale.view(E4M3),
        "decode_scale": torch.stack([q.decode_scale for q in shards]),
        "widths": list(widths),
        "recipe": Recipe(),
    }


def with_bytes(block_scale: Tensor, *places: Any, value: int) -> Tensor:
    changed = block_scale.view(torch.uint8).clone()
    for place in places:
        changed[place] = value
    return changed.view(E4M3)


def test_shards_with_different_scales_stay_right() -> None:
    arguments = stored()
    assert len(set(arguments["decode_scale"].tolist())) == 3
    fused = stored_weight(**arguments)
    x = randn(5, 64, seed=9)
    y = fos.linear(x, fused)
    begin = 0
    for i, width in enumerate(arguments["widths"]):
        alone = quantize_weight("shard", randn(width, 64, seed=3 + i) * 8.0 ** (i - 1), Recipe())
        rows = slice(begin, begin + width)
        assert_same_tensor(f"shard {i}", fos.dequantize(fused)[rows], fos.dequantize(alone))
        assert_close(y[:, rows], fos.linear(x, alone), 1e-12, 1e-6)
        begin += width


def test_experts_keep_a_scale_for_each_half() -> None:
    one, two = (quantize_weight("e", randn(2, 16, 32, seed=seed) * 4.0**seed, Recipe()) for seed in (1, 2))
    packed, block_scale = concatenated([one, two], 1)
    scales = torch.stack([one.decode_scale, two.decode_scale], dim=1)  # [E, shards]
    fused = stored_weight("experts", packed, block_scale.view(E4M3), scales, [16, 16], Recipe())
    assert fused.decode_scale.shape == (2, 32)
    assert_same_tensor("gate", fos.dequantize(fused)[:, :16], fos.dequantize(one))
    assert_same_tensor("up", fos.dequantize(fused)[:, 16:], fos.dequantize(two))


def filled(*missing: str) -> dict[str, Any]:
    """A layer's parameters after loading, where the checkpoint lacked some."""
    arguments = stored()
    parameters = WeightShape(rows=64, columns=64, full_columns=128, shards=3).stored(OURS)
    empty: dict[str, Tensor] = {parameter.part: parameter.empty for parameter in parameters}
    for part, tensor in empty.items():
        assert (tensor.dtype, tensor.shape) == (arguments[part].dtype, arguments[part].shape)
    return {**arguments, **{part: empty[part] for part in missing}}


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (("packed",), "weight"),
        (("block_scale",), "weight_scale"),
        (("decode_scale",), "weight_scale_2"),
        (("packed", "block_scale", "decode_scale"), "weight_scale"),
    ],
)
def test_a_part_that_was_never_loaded_is_noticed(absent: tuple[str, ...], named: str) -> None:
    stored_weight(**filled())
    with pytest.raises(ValueError, match=rf"^layers\.0\.qkv_proj\.{named}: got nothing .*incomplete.*`ignore`"):
        stored_weight(**filled(*absent))


def test_layers_that_predict_more_tokens_are_quantized_while_loading() -> None:
    config = {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}
    scheme = served("model", None, config, None).scheme
    assert [n for n in (60, 61, 62) if scheme.ignores(f"model.layers.{n}.self_attn.q_b_proj")] == [61]


def test_what_an_error_says_of_experts_ignores_nothing() -> None:
    layer, names = "layers.0.experts", [f"layers.0.experts.{e}.up_proj" for e in range(2)]
    for name, quantized in ((of_experts(layer, "w13_"), names), (layer, names), ("layers.0.o_proj", [])):
        (advice,) = re.findall(r"should list '(.+)' in `ignore`", missing(name, "weight"))
        assert Scheme(ignore=(advice,)).ignores(name.partition(" ")[0], quantized)


@pytest.mark.parametrize("shard", [slice(0, 32), slice(32, 48), slice(48, 64)], ids=["q", "k", "v"])
def test_one_shard_that_was_never_loaded_is_noticed(shard: slice) -> None:
    complete, empty = filled(), filled("packed", "block_scale", "decode_scale")
    for part, named in (("packed", "weight"), ("block_scale", "weight_scale")):
        tensor = complete[part].view(torch.uint8).clone()
        tensor[shard] = empty[part].view(torch.uint8)[shard]
        with pytest.raises(ValueError, match=rf"qkv_proj\.{named}: got nothing"):
            stored_weight(**{**complete, part: tensor.view(complete[part].dtype)})
    scales = complete["decode_scale"].clone()
    scales[1] = math.nan
    with pytest.raises(ValueError, match=r"qkv_proj\.weight_scale_2: got nothing"):
        stored_weight(**{**complete, "decode_scale": scales})


def test_a_row_of_negative_zeros_is_not_taken_for_a_missing_one() -> None:
    # -0.0 twice is the byte of what was never loaded: a row may be full of it where its block scales are 0.
    q = quantize_weight("l", randn(4, 32), Recipe())
    packed, block_scale = q.packed.clone(), with_bytes(q.block_scale, 1, value=0)
    packed[1], packed[2, :8] = 0x88, 0x88
    loaded = stored_weight("l", packed, block_scale, q.decode_scale.view(1), [4], Recipe())
    values = fos.dequantize(loaded)
    assert not values[1].any()
    assert_same_tensor("values", values, fos.dequantize(NVFP4Tensor(packed, block_scale, q.decode_scale)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("block_scale", 0xFF, "weight_scale: got negative or NaN block scales, needed 0 or more"),
        ("block_scale", 0x80, "weight_scale: got negative or NaN block scales"),
        ("block_scale", 0xB8, "weight_scale: got negative or NaN block scales"),
        ("block_scale", 0x7F, "weight_scale: got nothing (or NaN)"),
        ("decode_scale", 0.0, "weight_scale_2: got 0.0, needed finite, normal and above 0"),
        ("decode_scale", -0.5, "weight_scale_2: got -0.5, needed finite, normal and above 0"),
        ("decode_scale", math.inf, "weight_scale_2: got inf, needed finite, normal and above 0"),
        ("decode_scale", math.nan, "weight_scale_2: got nothing (or NaN)"),
        ("decode_scale", 1e-40, "weight_scale_2: got 9.99"),  # subnormal: no weight is that small
    ],
)
def test_a_scale_that_no_quantizer_writes_is_refused(part: str, change: Any, message: str) -> None:
    arguments = stored()
    if part == "block_scale":
        arguments[part] = with_bytes(arguments[part], (40, 2), value=change)
    else:
        arguments[part] = arguments[part].clone()
        arguments[part][2] = change
    with pytest.raises(ValueError, match=re.escape(f"layers.0.qkv_proj.{message}")):
        stored_weight(**arguments)


@pytest.mark.parametrize(
    ("recipe", "fits", "too_large"),
    [(Recipe(), 0x7C, 0x7D), (Recipe(adaptive=False), 0x78, 0x79), (Recipe(scale_max=448), 0x7E, None)],
    ids=["256", "plain-256", "448"],
)
def test_a_file_labelled_with_another_range_is_refused(recipe: Recipe, fits: int, too_large: int | None) -> None:
    arguments = stored()
    arguments["block_scale"] = with_bytes(torch.zeros(64, 4).to(E4M3), slice(0, 64), value=fits)
    stored_weight(**{**arguments, "recipe": recipe})
    if too_large is not None:
        arguments["block_scale"] = with_bytes(arguments["block_scale"], (63, 3), value=too_large)
        scale = torch.tensor(too_large, dtype=torch.uint8).view(E4M3).item()
        with pytest.raises(ValueError, match=rf"block scale {scale:g} is impossible for scale_max 256 \(largest "):
            stored_weight(**{**arguments, "recipe": recipe})


def test_block_scale_448_in_a_256_file_is_named() -> None:
    arguments = stored()
    arguments["block_scale"] = with_bytes(arguments["block_scale"], (0, 0), value=0x7E)
    with pytest.raises(ValueError, match=r"qkv_proj\.weight_scale: block scale 448 is impossible for scale_max 256"):
        stored_weight(**arguments)


# --- layer: sizes ---


@pytest.mark.parametrize(
    ("full", "tp", "sizes"),
    [
        (2880, 8, "1, 2, 3, 4, 5, 6, 9, 10, 12, 15, 18, 20, 30, 36, 45, 60"),
        (1408, 16, "1, 2, 4, 8, 11, 22, 44"),
        (5128, 2, None),
    ],
)
def test_a_split_through_a_block_names_the_splits_that_are_none(full: int, tp: int, sizes: str | None) -> None:
    remedy = (
        f"use a tensor parallel size of {sizes}, or add 'mlp.down_proj' to `ignore`"
        if sizes
        else f"its full size {full} is not either: add 'mlp.down_proj' to `ignore`"
    )
    message = f"mlp.down_proj: K per rank: got {full // tp}, needed a multiple of 16; {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_input_size("mlp.down_proj", full // tp, full)
    if sizes:
        for size in sizes.split(", "):
            check_input_size("mlp.down_proj", full // int(size), full)


# --- layer: how it is loaded ---


def test_ranks_that_load_in_an_order_of_their_own_quantize_together() -> None:
    threads = {"enable_multithread_load": True}
    with pytest.raises(ValueError, match=r"^mlp: got enable_multithread_load with 2 ranks .*`fouroversix quantize`"):
        check_loading_order("mlp", 2, "auto", threads)
    with pytest.raises(ValueError, match=r"^mlp: got --load-format runai_streamer with 4 ranks"):
        check_loading_order("mlp", 4, "runai_streamer", {})
    check_loading_order("mlp", 1, "runai_streamer", threads)
    check_loading_order("mlp", 2, "auto", {"enable_multithread_load": False})
    check_loading_order("mlp", 2, "auto", object())


def test_a_projection_that_is_stored_fused_has_the_rows_of_its_copies() -> None:
    class QKVParallelLinear:
        total_num_heads, total_num_kv_heads, head_size, v_head_size = 32, 2, 128, 96

    of = {None: 32 * 128 + 2 * 128 + 2 * 96, "q": 4096, "k": 256, "v": 192}
    assert {shard: rows_in_checkpoint(QKVParallelLinear(), 5120, shard) for shard in of} == of

    class MergedColumnParallelLinear:
        output_sizes = (64, 48)

    class OfAModel(MergedColumnParallelLinear):
        """Counts copies on ranks."""

    merged, of_a_model = MergedColumnParallelLinear(), OfAModel()
    assert [rows_in_checkpoint(merged, 112, shard) for shard in (None, 1, "other")] == [112, 48, None]
    assert [rows_in_checkpoint(of_a_model, 112, shard) for shard in (None, 1)] == [None, None]


def test_parts_that_are_loaded_again_begin_as_anything_or_what_is_served_is_wiped() -> None:
    """vLLM then puts parameters in the place of the old ones, first without memory, and hands on their loaders."""
    layer = torch.nn.Module()
    unloaded = Unloaded(layer)
    loaders = {}
    for part in WeightShape(32, 32, 32, shards=2).stored(OURS):
        layer.register_parameter(part.name, torch.nn.Parameter(part.empty, requires_grad=False))
        loaders[part.name] = unloaded.before(lambda param, given: param.data[:16].fill_(given), part.name, part.empty)

    def become(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))

    begun = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    loaders["weight"](layer.weight, 1)
    served = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    for number in (2, 3):
        become({name: torch.empty_like(tensor, device="meta") for name, tensor in begun.items()})
        loaders["weight"](layer.weight, number)
        become({name: torch.ones(t.shape).to(t.dtype) for name, t in begun.items()})
        loaders["weight_scale_2"](layer.weight_scale_2, 2.0)
        loaders["weight"](layer.weight, number)
        assert_same_tensor("weight", layer.weight[16:], begun["weight"][16:])
        assert bool((layer.weight[:16] == number).all())
        assert_same_tensor("weight_scale", layer.weight_scale, begun["weight_scale"])
        # What comes late finds what is served.
        become(served)
        before = {name: tensor.clone() for name, tensor in served.items()}
        loaders["weight"](layer.weight, 1)
        for name, tensor in before.items():
            assert_same_tensor(name, getattr(layer, name), tensor)


def test_loaders_that_an_engine_keeps_keep_the_layer() -> None:
    class Layer(torch.nn.Module):
        def weight_loader(self, param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str) -> str:
            return f"{weight_name} {shard_id}"

    layer = Layer()
    shape = WeightShape(32, 32, 32, shards=1, lead=(2,))
    attributes = {"weight_loader": layer.weight_loader}

    def set_attributes(parameter: Tensor, given: dict[str, Any]) -> None:
        parameter.__dict__.update(given)

    create_stored_experts(
        layer, "w2_", "experts", OURS, shape, Recipe(), attributes, lambda *_, **__: 32, set_attributes
    )
    kept = layer.w2_weight.weight_loader
    packed = torch.zeros(32, 16, dtype=torch.uint8)
    assert kept(layer.w2_weight, packed, "of a checkpoint", shard_id="w2") == "w2_weight w2"
    assert list(inspect.signature(kept).parameters) == ["param", "loaded_weight", "weight_name", "shard_id"]
    known = weakref.ref(layer)
    del layer, attributes
    gc.collect()
    assert known() is None


def test_a_projection_stored_fused_leaves_shards_without_a_decode_scale() -> None:
    given: list[tuple[Any, ...]] = []
    load = fill_all_shards(lambda *arguments: given.append(arguments))
    scales = torch.nn.Parameter(torch.full((3,), torch.nan), requires_grad=False)
    load(scales, torch.tensor([0.5]))
    assert scales.tolist() == [0.5] * 3
    load(scales, torch.tensor(2.0), None)
    assert scales.tolist() == [2.0] * 3
    load(scales, torch.tensor(1.0), "k")
    assert [arguments[2] for arguments in given] == ["k"]


def test_static_input_scales_are_not_kept_when_weights_are_loaded_again() -> None:
    """vLLM's reload_weights copies into buffers that are persistent, and puts the old ones back of others."""
    scheme = fos.preset("nvfp4_static")
    layer = torch.nn.Module()
    for part in WeightShape(32, 32, 32, shards=1).stored(MODELOPT):
        layer.register_parameter(part.name, torch.nn.Parameter(torch.ones_like(part.empty), requires_grad=False))
    take_stored(layer, "", "mlp", MODELOPT, scheme, [32])
    assert "input_amax" in layer.state_dict()


# --- layer: what a loader is given ---


class Recorder:
    """An engine's weight loader that copies what fits, as vLLM's do."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def weight_loader(self, param: Tensor, loaded: Tensor, *shard: Any, **named: Any) -> str:
        self.calls.append((loaded, *shard, named))
        assert param.shape == loaded.shape
        param.copy_(loaded)
        return "loaded"


def loader_of(part: Part, loader: Any, layer: str = "o_proj", form: Format = OURS, **more: Any) -> Any:
    """What an engine calls to fill one part of a weight with K = 64."""
    shape = WeightShape(rows=2, columns=64, full_columns=64, shards=1)
    parameter = next(parameter for parameter in shape.stored(form) if parameter.part == part)
    return parameter.loader(loader, layer, Recipe(), **more)


def test_bytes_that_fit_reach_the_engine_as_they_are() -> None:
    recorder = Recorder()
    load = loader_of("block_scale", recorder.weight_loader)
    param = torch.zeros(2, 4, dtype=torch.uint8).view(E4M3)
    scales = torch.tensor([[1, 0x7E, 0x38, 0], [2, 3, 4, 5]], dtype=torch.uint8)
    # Some writers store E4M3 scales as uint8: the same bytes, not numbers to be converted.
    for stored_as in (scales, scales.view(E4M3)):
        param.fill_(0)
        assert load(param, stored_as, "q", expert_id=3) == "loaded"
        assert_same_tensor("bytes", param.view(torch.uint8), scales)
        assert recorder.calls[-1][1:] == ("q", {"expert_id": 3})


@pytest.mark.parametrize("loaded", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_a_decode_scale_may_have_any_form_of_one_number(loaded: Tensor) -> None:
    param = torch.full((), torch.nan)
    loader_of("decode_scale", Recorder().weight_loader)(param, loaded)
    assert param.item() == 0.5
    param.fill_(torch.nan)
    loader_of("decode_scale", Recorder().weight_loader, form=COMPRESSED_TENSORS)(param, loaded)
    assert param.item() == 2.0


@pytest.mark.parametrize(
    ("part", "loaded", "message"),
    [
        ("packed", torch.zeros(2, 32, dtype=torch.bfloat16), "got torch.bfloat16, needed torch.uint8"),
        ("packed", torch.zeros(2, 32, dtype=torch.int32), "got torch.int32, needed torch.uint8"),
        ("packed", torch.zeros(2, 32).to(E4M3), "got torch.float8_e4m3fn, needed torch.uint8"),
        ("block_scale", torch.zeros(2, 4), "got torch.float32, needed torch.float8_e4m3fn"),
        ("decode_scale", torch.zeros(1, dtype=torch.uint8), "got torch.uint8, needed float32"),
    ],
)
def test_a_cast_that_would_turn_bytes_into_numbers_is_refused(part: Part, loaded: Tensor, message: str) -> None:
    recorder = Recorder()
    load = loader_of(part, recorder.weight_loader, "layers.0.o_proj")
    name = OURS.names[part]
    with pytest.raises(
        ValueError, match=rf"^layers\.0\.o_proj\.{name}: {message}.*add 'layers\.0\.o_proj' to the `ignore`"
    ):
        load(torch.zeros(loaded.shape, dtype=torch.uint8), loaded)
    assert recorder.calls == []


@pytest.mark.parametrize("shape", [(2, 64), (2, 16), (32,), ()], ids=str)
def test_a_tensor_of_another_width_is_not_cut_to_fit(shape: tuple[int, ...]) -> None:
    recorder = Recorder()
    load = loader_of("packed", recorder.weight_loader)
    needed = re.escape(f"o_proj.weight: got shape {shape}, needed ({shape[0] if shape else 1}, 32)")
    with pytest.raises(ValueError, match=needed):
        load(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8))
    assert recorder.calls == []


@pytest.mark.parametrize(
    "failure", [AssertionError(), RuntimeError("narrow: 48 > 32"), IndexError("shard 3")], ids=repr
)
def test_an_engines_bare_assertion_gets_the_name_of_the_layer(failure: Exception) -> None:
    def weight_loader(param: Tensor, loaded: Tensor) -> None:
        raise failure

    load = loader_of("packed", weight_loader)
    why = str(failure) or "AssertionError"
    needed = re.escape(f"o_proj.weight: a tensor of shape (3, 32) does not fit into (2, 32) on this rank ({why})")
    with pytest.raises(ValueError, match=needed) as caught:
        load(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(3, 32, dtype=torch.uint8))
    assert caught.value.__cause__ is failure


def test_padded_tensors_reach_the_engine_without_their_padding() -> None:
    x = torch.randn(130, 80, generator=torch.Generator().manual_seed(3))
    q = fos.quantize(x)
    blocks = torch.zeros(256, 8, dtype=torch.uint8)
    blocks[:130, :5] = q.block_scale.view(torch.uint8)
    packed = torch.zeros(256, 64, dtype=torch.uint8)
    packed[:130, :40] = q.packed
    stored_parts: dict[Part, Tensor] = {
        "packed": packed,
        "block_scale": scales_to_layout(blocks.view(E4M3), "128x4"),
        "decode_scale": x.abs().max().reshape(1),
        "metadata": torch.tensor([130, 80, 256, 128, 1, 1]),
    }
    expected: dict[Part, Tensor] = {
        "packed": q.packed,
        "block_scale": q.block_scale,
        "decode_scale": q.decode_scale.reshape(1),
    }
    for parameter in WeightShape(rows=130, columns=80, full_columns=80, shards=1).stored(FOUROVERSIX):
        recorder = Recorder()
        load = parameter.loader(recorder.weight_loader, "o_proj", Recipe(), rows=lambda shard: {"all": 130}[shard])
        if parameter.part == "metadata":
            load(parameter.empty, stored_parts["metadata"], "all")
            assert recorder.calls == [], "metadata is checked and goes nowhere"
            with pytest.raises(ValueError, match=r"o_proj.quantized_weight_metadata: got \[130, 80, 256, 128, 1, 0\]"):
                load(parameter.empty, torch.tensor([130, 80, 256, 128, 1, 0]), "all")
            continue
        param = torch.zeros_like(expected[parameter.part])
        if parameter.part == "decode_scale":
            param = param.reshape(())
        load(param, stored_parts[parameter.part], "all")
        assert_same_tensor(parameter.name, param.reshape(-1), expected[parameter.part].reshape(-1))
        unknown = parameter.loader(recorder.weight_loader, "o_proj", Recipe())
        with pytest.raises(ValueError, match="how many of its rows are padding"):
            unknown(param, stored_parts[parameter.part], "all")


def test_scales_in_the_layout_of_a_gemm_do_not_reach_the_engine() -> None:
    # Rows of different size, as a trained weight has them.
    x = randn(256, 1024, seed=4) * randn(256, 1, seed=5).exp()
    scales = fos.quantize(x).block_scale
    shape = WeightShape(rows=256, columns=1024, full_columns=1024, shards=1)
    parameter = next(parameter for parameter in shape.stored(OURS) if parameter.part == "block_scale")
    recorder = Recorder()
    load = parameter.loader(recorder.weight_loader, "o_proj", Recipe())
    load(torch.zeros_like(scales), scales)
    assert len(recorder.calls) == 1
    with pytest.raises(ValueError, match=r"o_proj\.weight_scale: the block scales lie in the 128x4 layout"):
        load(torch.zeros_like(scales), scales_to_layout(scales, "128x4").view(scales.shape))
    assert len(recorder.calls) == 1


# --- layer: static activations ---


def test_the_largest_calibrated_scale_serves_all_shards() -> None:
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    assert static_amax("experts", scales).item() == 2.0 * 2688
    assert static_amax("experts", scales[:, 0]).item() == 2688


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.nan, r"experts\.input_scale: got nothing"),
        (0.0, r"experts\.input_scale: got 0\.0, needed finite and above 0"),
        (-1.0, r"got -1\.0"),
        (torch.inf, "needed finite"),
    ],
)
def test_a_calibrated_scale_that_cannot_be_is_refused(bad: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        static_amax("experts", torch.tensor([1.0, bad]))


# --- layer: one line in the log ---


def test_loading_is_reported_once_and_not_again_on_reload(log: pytest.LogCaptureFixture) -> None:
    # 4/6: the first layer's blocks hold a 4 as their largest code, the second's a 6; 128 blocks each.
    four = torch.full((32, 64), 0x66, dtype=torch.uint8)[:, :32].contiguous()
    block_scale = torch.ones(32, 4).to(E4M3)
    layers = {
        "a": NVFP4Tensor(four, block_scale, torch.ones(())),
        "b": NVFP4Tensor(four | 0x11, block_scale, torch.ones(())),
    }
    report = LoadReport()
    for name in layers:
        report.expect(name)
    expanded = torch.zeros(32, 64, dtype=torch.bfloat16)  # as without a compiler
    prepared = ops.PreparedWeight(expanded, None, torch.ones(32))
    report.loaded("a", [layers["a"]], prepared)
    report.loaded("a", [layers["a"]], prepared)  # a reload before the end
    assert log.messages == []
    report.loaded("b", [layers["b"]], prepared)
    # 2 * (1024 + 128 + 4) bytes for 4096 weights.
    expected = [
        "fouroversix: loaded 2 layers, 4096 weights, 4.516 bits per weight, 50.0 % of blocks chose 4",
        "fouroversix: on CPU the weights are held dequantized after loading (torch.bfloat16)",
    ]
    assert log.messages == expected
    report.loaded("a", [layers["a"]], prepared)
    report.loaded("unknown", [layers["a"]], prepared)
    assert log.messages == expected


def test_packed_weights_are_not_reported_as_dequantized(log: pytest.LogCaptureFixture) -> None:
    q = quantize_weight("l", randn(16, 32), Recipe())
    log.clear()  # the choice of a backend
    report = LoadReport()
    report.expect("l")
    report.loaded("l", [q], ops.as_stored(q))
    assert len(log.messages) == 1


def test_stored_and_online_weights_report_the_same_size(log: pytest.LogCaptureFixture) -> None:
    # The decode scale of every row is how a loaded weight is held, not what its checkpoint costs.
    online = quantize_weight("l", randn(64, 64), Recipe())
    loaded = stored_weight("l", online.packed, online.block_scale, online.decode_scale.view(1), [64], Recipe())
    log.clear()  # the choice of a backend
    for q in (online, loaded):
        report = LoadReport()
        report.expect("l")
        report.loaded("l", [q], ops.as_stored(q))
    assert log.messages[0] == log.messages[1]


@pytest.mark.parametrize(
    ("made_with", "claimed", "warns"),
    [
        (Recipe(scale_max=256), Recipe(scale_max=448), True),
        (Recipe(scale_max=448), Recipe(scale_max=448), False),
        (Recipe(scale_max=256), Recipe(scale_max=256), False),
        (Recipe(scale_max=256), None, False),  # files of others make no claim
    ],
)
def test_a_wide_label_on_narrow_weights_is_mentioned(
    log: pytest.LogCaptureFixture, made_with: Recipe, claimed: Recipe | None, warns: bool
) -> None:
    q = quantize_weight("l", randn(64, 64), made_with)
    log.clear()
    report = LoadReport(claimed)
    report.expect("l")
    report.loaded("l", [q], ops.as_stored(q))
    assert any("says scale_max 448, but no block scale exceeds 384" in message for message in log.messages) is warns


# --- layer: applying ---


@pytest.mark.parametrize("activations", [None, Recipe()], ids=["W4A16", "W4A4"])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (0, 64), (2, 0, 64), (64,)], ids=str)
def test_a_prepared_layer_is_the_public_linear(shape: tuple[int, ...], activations: Recipe | None) -> None:
    x, bias = randn(*shape).bfloat16(), randn(64, seed=1).bfloat16()
    q = stored_weight(**stored())
    y = apply_linear(x, ops.prepare_weight(q, x.dtype), activations, bias, None)
    assert_same_tensor("y", y, fos.linear(x, q, activations, bias))
    assert y.shape == (*shape[:-1], 64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_global_expert_ids_become_this_ranks(dtype: torch.dtype) -> None:
    expert_map = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)  # this rank holds experts 2 and 3
    ids = torch.tensor([[0, 2], [3, 1], [-1, 3]], dtype=dtype)
    assert local_expert_ids(ids, expert_map).tolist() == [[-1, 0], [1, -1], [-1, 1]]
    assert local_expert_ids(ids, None) is ids


def test_the_recipe_of_the_weights_does_not_reach_the_activations() -> None:
    of_weights, of_activations = Recipe("mae", 448, error="decode_scale"), Recipe("mse", 256)
    x, weight = randn(8, 512), randn(48, 512, seed=1)
    q = quantize_weight("layer", weight, of_weights)
    y = apply_linear(x, ops.prepare_weight(q, torch.float32), of_activations, None, None)

    def expected(weights: Recipe, activations: Recipe) -> Tensor:
        return reference.linear(x, reference.quantize(weight, weights), activations)

    assert_close(y, expected(of_weights, of_activations), 1e-12, 1e-6)
    for weights, activations in (
        (of_activations, of_weights),
        (of_weights, of_weights),
        (of_activations, of_activations),
    ):
        assert calc_diff(y, expected(weights, activations)) > 1e-5
