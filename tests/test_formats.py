"""What a config claims: each family's block is read strictly, and what would change its meaning is refused by key."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, single, tiny_model, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fouroversix_plugin.checkpoint import quantize_checkpoint
from fouroversix_plugin.formats import (
    COMPRESSED_TENSORS,
    FORMATS,
    FOUROVERSIX,
    MODELOPT,
    OURS,
    Stored,
    describe,
    padded_columns,
    padded_rows,
    quantization_block,
    stored_scheme,
)
from fouroversix_plugin.recipe import Recipe, Scheme, preset

PLAIN = Recipe(adaptive=False, scale_max=448)


def changed(family: str, path: str, value: object) -> dict[str, Any]:
    """A family's block with the value at a dotted path replaced; an Ellipsis removes it."""
    block = copy.deepcopy(dict(BLOCKS[family]))
    *parents, last = path.split(".")
    holder = block
    for key in parents:
        holder = holder[key]
    if value is ...:
        holder.pop(last, None)
    else:
        holder[last] = value
    return {"quant_method": "modelopt", **block} if family == "modelopt hf_quant_config" else block


def read(family: str, path: str, value: object) -> Stored:
    stored = stored_scheme(changed(family, path, value))
    assert stored is not None
    return stored


# --- what is read ---


def test_each_block_is_known_by_its_family() -> None:
    found = {}
    for family, block in BLOCKS.items():
        stored = stored_scheme({"quant_method": "modelopt", **block})
        assert stored is not None
        found[family] = stored
    assert [stored.format for stored in found.values()] == [OURS, MODELOPT, MODELOPT, COMPRESSED_TENSORS, FOUROVERSIX]
    for family, stored in found.items():
        ours = family in ("nvfp4_4over6", "fouroversix")
        assert stored.labelled == ours
        assert stored.scheme.weights == (Recipe() if ours else PLAIN)
        assert stored.scheme.activations == (Recipe() if ours else PLAIN)
        assert stored.scheme.input_scale == ("token" if ours else "static")
        assert stored.scheme.ignores("lm_head")
        assert not stored.scheme.ignores("model.layers.0.mlp.down_proj")


def test_the_names_and_directions_of_each_family_are_the_published_ones() -> None:
    assert [form.name for form in FORMATS] == ["nvfp4_4over6", "modelopt", "compressed-tensors", "fouroversix"]
    assert [form.inverted for form in FORMATS] == [False, False, True, False]
    assert [form.padded for form in FORMATS] == [False, False, False, True]
    assert dict(COMPRESSED_TENSORS.tensors("m")) == {
        "packed": "m.weight_packed",
        "block_scale": "m.weight_scale",
        "decode_scale": "m.weight_global_scale",
        "input_scale": "m.input_global_scale",
    }
    assert dict(MODELOPT.tensors("m")) == {
        "packed": "m.weight",
        "block_scale": "m.weight_scale",
        "decode_scale": "m.weight_scale_2",
        "input_scale": "m.input_scale",
    }
    assert dict(OURS.tensors("m")).items() <= dict(MODELOPT.tensors("m")).items(), "stock loaders read ours"


@pytest.mark.parametrize(
    ("rows", "columns", "needed"),
    [(1, 16, (128, 64)), (128, 64, (128, 64)), (129, 80, (256, 128)), (576, 1536, (640, 1536))],
)
def test_padding_is_to_128_rows_and_64_columns(rows: int, columns: int, needed: tuple[int, int]) -> None:
    assert (padded_rows(rows), padded_columns(columns)) == needed


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": "awq"},
        {"quant_method": "fp8"},
        {"quant_method": None},
        {"quant_method": ["modelopt"]},
        {},
        {"quant_method": "modelopt"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}},
        {"quant_method": "modelopt", "quant_algo": None},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": None},
        {"quant_method": "compressed-tensors"},
    ],
    ids=str,
)
def test_what_is_no_nvfp4_is_nobodys(block: Mapping[str, Any]) -> None:
    assert stored_scheme(block) is None
    assert describe(block)


# --- our own ---


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 2, "quantization_config.format_version: got 2, needed 1"),
        ("format_version", True, "format_version: got True, needed 1"),
        ("format_version", ..., "key 'format_version' is missing"),
        ("group_size", 32, "group_size: got 32, needed 16"),
        ("group_size", "16", "group_size: got '16', needed 16"),
        ("weights", None, "weights: got None, needed an object"),
        ("weights.scale_max", "256", "weights.scale_max: got '256', needed 256 or 448"),
        ("weights.extra", 1, "weights: unknown key 'extra'"),
        ("weights.metric", ..., "weights: key 'metric' is missing"),
        ("activations", {}, "activations: key 'metric' is missing"),
        ("activations.granularity", "tensor", "granularity: got 'tensor', needed 'token' or 'static'"),
        ("ignore", "lm_head", "ignore: got 'lm_head', needed a list"),
        ("ignore", ["re:("], "no regular expression"),
        ("exclude_modules", [], "unknown key 'exclude_modules'"),
    ],
)
def test_our_own_block_is_read_strictly(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stored_scheme(changed("nvfp4_4over6", path, value))


# --- ModelOpt ---

FORMS = ["modelopt", "modelopt hf_quant_config"]


def at(family: str, key: str) -> str:
    return key if family == "modelopt" else f"quantization.{key}"


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "W4A8_NVFP4_FP8", "MIXED_PRECISION", "NVFP4_SVDQUANT"])
def test_kinds_of_nvfp4_with_other_meanings_are_refused_by_name(family: str, algorithm: str) -> None:
    with pytest.raises(ValueError, match=rf"quant_algo: got '{algorithm}', needed 'NVFP4' or 'W4A16_NVFP4'"):
        read(family, at(family, "quant_algo"), algorithm)


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("size", [32, 8, "16", None])
def test_another_group_size_is_refused(family: str, size: object) -> None:
    with pytest.raises(ValueError, match=rf"group_size: got {size!r}, needed 16"):
        read(family, at(family, "group_size"), size)
    assert read(family, at(family, "group_size"), ...).format is MODELOPT


@pytest.mark.parametrize("family", FORMS)
def test_weight_only_is_told_by_the_algorithm_or_by_the_groups(family: str) -> None:
    assert read(family, at(family, "quant_algo"), "W4A16_NVFP4").scheme.activations is None
    groups = {"group_0": {"weights": {}, "input_activations": {"num_bits": 4}, "targets": ["Linear"]}}
    assert read(family, at(family, "config_groups"), groups).scheme.activations == PLAIN
    groups["group_0"]["input_activations"] = None
    assert read(family, at(family, "config_groups"), groups).scheme.activations is None
    assert read(family, at(family, "config_groups"), {}).scheme.activations == PLAIN


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("value", ["lm_head", [1], [""], {"a": 1}, [None]], ids=repr)
def test_an_exclude_list_of_another_type_is_refused(family: str, value: object) -> None:
    key = "ignore" if family == "modelopt" else "exclude_modules"
    with pytest.raises(ValueError, match=rf"{key}: got .*, needed a list of non-empty strings"):
        read(family, at(family, key), value)


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("value", [None, [], ...], ids=repr)
def test_no_exclude_list_excludes_nothing(family: str, value: object) -> None:
    key = "ignore" if family == "modelopt" else "exclude_modules"
    assert read(family, at(family, key), value).scheme.ignore == ()


@pytest.mark.parametrize(
    ("pattern", "excluded", "kept"),
    [
        ("lm_head", ["lm_head"], ["model.lm_head", "lm_head2"]),
        ("model.layers.0", ["model.layers.0", "model.layers.0.mlp.down_proj"], ["model.layers.01", "model.layers.1"]),
        ("model.layers.0.*", ["model.layers.0.mlp.down_proj", "model.layers.0"], ["model.layers.01.mlp"]),
        ("*self_attn*", ["model.layers.3.self_attn", "model.layers.3.self_attn.q_proj"], ["model.layers.3.mlp"]),
        ("model.layers.?.mlp", ["model.layers.3.mlp.up_proj"], ["model.layers.13.mlp.up_proj"]),
        ("vision_tower", ["vision_tower.blocks.0.qkv"], ["model.vision_tower.blocks.0.qkv"]),
    ],
)
@pytest.mark.parametrize("family", FORMS)
def test_a_name_in_modelopts_list_excludes_all_that_is_in_it(
    family: str, pattern: str, excluded: list[str], kept: list[str]
) -> None:
    key = "ignore" if family == "modelopt" else "exclude_modules"
    scheme = read(family, at(family, key), [pattern]).scheme
    assert [module for module in excluded if not scheme.ignores(module)] == []
    assert [module for module in kept if scheme.ignores(module)] == []


def test_a_fused_layer_of_which_modelopt_excludes_a_part_is_refused() -> None:
    scheme = read("modelopt", "ignore", ["*.q_proj"]).scheme
    with pytest.raises(ValueError, match=r"`ignore` matches 'a\.q_proj' but not 'a\.k_proj'"):
        scheme.ignores("a.qkv_proj", ["a.q_proj", "a.k_proj", "a.v_proj"])


# --- compressed-tensors ---


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("transform_config", {"config_groups": {}}, "transform_config: got one, needed weights that are not"),
        ("config_groups.group_1", {}, "config_groups: got ['group_0', 'group_1'], needed exactly one group"),
        ("config_groups", {}, "config_groups: got [], needed exactly one group"),
        ("config_groups", None, "config_groups: got [], needed exactly one group"),
        ("config_groups", [1], "config_groups: got [1], needed an object"),
        ("config_groups.group_0", "NVFP4", "group_0: got 'NVFP4', needed an object"),
        (
            "config_groups.group_0.targets",
            ["Linear", "Embedding"],
            "targets: got ['Linear', 'Embedding'], needed ['Linear']",
        ),
        ("config_groups.group_0.targets", ["re:.*q_proj"], "targets: got ['re:.*q_proj'], needed ['Linear']"),
        ("config_groups.group_0.targets", ..., "targets: got None, needed ['Linear']"),
        ("config_groups.group_0.weights", None, "group_0.weights: got None, needed an object"),
        ("config_groups.group_0.weights.num_bits", 8, "weights.num_bits: got 8, needed 4"),
        ("config_groups.group_0.weights.type", "int", "weights.type: got 'int', needed 'float'"),
        ("config_groups.group_0.weights.strategy", "group", "weights.strategy: got 'group', needed 'tensor_group'"),
        ("config_groups.group_0.weights.group_size", 32, "weights.group_size: got 32, needed 16"),
        ("config_groups.group_0.weights.symmetric", False, "weights.symmetric: got False, needed True"),
        ("config_groups.group_0.input_activations.num_bits", 8, "input_activations.num_bits: got 8, needed 4"),
        ("config_groups.group_0.input_activations.group_size", 32, "input_activations.group_size: got 32, needed 16"),
        ("ignore", "lm_head", "ignore: got 'lm_head', needed a list of non-empty strings"),
        ("ignore", ["re:*"], "'re:*' is no regular expression"),
    ],
)
def test_compressed_tensors_of_another_meaning_is_refused_by_key(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read("compressed-tensors", path, value)


def test_compressed_tensors_without_activations_is_weight_only() -> None:
    for value in (None, ...):
        assert read("compressed-tensors", "config_groups.group_0.input_activations", value).scheme.activations is None


def test_compressed_tensors_patterns_are_names_or_regular_expressions_from_the_start() -> None:
    scheme = read("compressed-tensors", "ignore", ["lm_head", "re:.*mlp.gate$", "re:visual"]).scheme
    for module in ("lm_head", "model.layers.0.mlp.gate", "visual.blocks.0.qkv"):
        assert scheme.ignores(module)
    for module in ("model.lm_head", "model.layers.0.mlp.gate_proj", "model.visual.blocks.0.qkv"):
        assert not scheme.ignores(module)


# --- fouroversix ---


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dtype", "mxfp4", "dtype: got 'mxfp4', needed 'nvfp4'"),
        ("dtype", "if4", "dtype: got 'if4', needed 'nvfp4'"),
        ("weight_dtype", "mxfp4", "weight_dtype: got 'mxfp4', needed 'nvfp4'"),
        ("activation_dtype", "mxfp4", "activation_dtype: got 'mxfp4', needed 'nvfp4'"),
        ("keep_master_weights", True, "keep_master_weights: got True, needed False"),
        ("module_config_overrides", {"q_proj": {"scale_rule": "mae"}}, "module_config_overrides: got {'q_proj'"),
        ("scale_rule", "static_4", "scale_rule: got 'static_4', needed mse, mae, abs_max or static_6"),
        ("weight_scale_rule", "static_4", "weight_scale_rule: got 'static_4', needed mse"),
        ("activation_scale_rule", "static_4", "activation_scale_rule: got 'static_4', needed mse"),
        ("scale_rule", 4, "scale_rule: got 4, needed mse"),
        ("scale_rule", ["mse"], "scale_rule: got ['mse'], needed mse"),
        ("modules_to_not_convert", "lm_head", "modules_to_not_convert: got 'lm_head', needed a list"),
    ],
)
def test_fouroversix_of_another_meaning_is_refused_by_key(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read("fouroversix", path, value)


@pytest.mark.parametrize(
    ("rule", "recipe"),
    [("mse", Recipe("mse")), ("mae", Recipe("mae")), ("abs_max", Recipe("abs_max")), ("static_6", PLAIN)],
)
def test_each_rule_of_fouroversix_is_a_recipe_with_its_range(rule: str, recipe: Recipe) -> None:
    stored = read("fouroversix", "scale_rule", rule)
    assert (stored.scheme.weights, stored.scheme.activations) == (recipe, recipe)
    stored = read("fouroversix", "weight_scale_rule", rule)
    assert (stored.scheme.weights, stored.scheme.activations) == (recipe, Recipe("mse"))
    stored = read("fouroversix", "activation_scale_rule", rule)
    assert (stored.scheme.weights, stored.scheme.activations) == (Recipe("mse"), recipe)


def test_names_that_transformers_leaves_alone_are_whole_or_ends_and_hold_their_subtrees() -> None:
    scheme = read("fouroversix", "modules_to_not_convert", ["lm_head", "mlp.gate"]).scheme
    for module in ("lm_head", "model.lm_head", "mlp.gate", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate.weight"):
        assert scheme.ignores(module)
    for module in ("my_lm_head", "model.layers.0.mlp.gate_proj", "lm_head2"):
        assert not scheme.ignores(module)
    assert read("fouroversix", "modules_to_not_convert", None).scheme.ignore == ()


# --- where the block lies ---


def test_the_block_is_found_where_writers_put_it() -> None:
    block, older = {"quant_method": "x"}, {"quantization": {"quant_algo": "NVFP4"}}
    assert quantization_block({}, None) is None
    assert quantization_block({"quantization_config": None, "text_config": None}, None) is None
    for config in (
        {"quantization_config": block},
        {"compression_config": block},
        {"text_config": {"quantization_config": block}},
        {"text_config": {"compression_config": block}},
        {"quantization_config": block, "text_config": {"quantization_config": {"quant_method": "other"}}},
    ):
        assert quantization_block(config, None) == block
        assert quantization_block(config, older) == block
    assert quantization_block({}, older) == {"quant_method": "modelopt", **older}
    for wrong in ("fp8", [], 4, True):
        with pytest.raises(ValueError, match=r"quantization_config: got .*, needed an object"):
            quantization_block({"quantization_config": wrong}, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 40) | st.sampled_from(["NVFP4", "mse", "Linear", "re:(", "", "lm_head"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["group_0", "weights", "x"]), inner),
    max_leaves=5,
)
KEYS = {
    "nvfp4_4over6": ["format_version", "group_size", "weights", "activations", "ignore", "producer", "x"],
    "modelopt": ["quant_algo", "group_size", "ignore", "exclude_modules", "config_groups", "quantization"],
    "compressed-tensors": ["format", "config_groups", "ignore"],
    "fouroversix": ["dtype", "scale_rule", "weight_scale_rule", "modules_to_not_convert", "keep_master_weights"],
}


@given(st.data())
@settings(max_examples=300)
def test_a_block_of_any_json_is_read_or_a_value_error(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(KEYS)))
    block = dict(BLOCKS[family])
    for key in data.draw(st.lists(st.sampled_from(KEYS[family]), min_size=1, max_size=3)):
        block[key] = data.draw(JSON)
    try:
        stored = stored_scheme(block)
    except ValueError:
        return
    assert stored is None or isinstance(stored.scheme, Scheme)
    assert describe(block)


# --- what we write, in the eyes of others ---


def test_our_compressed_tensors_block_is_valid_to_that_package(tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    source = write(tmp_path / "source", tiny_model())
    quantize_checkpoint(source, tmp_path / "out", preset("w4a16"), format="compressed-tensors")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(block)
    weights = config.config_groups["group_0"].weights
    assert config.format == "nvfp4-pack-quantized"
    assert (weights.num_bits, weights.type, weights.strategy) == (4, "float", "tensor_group")
    assert (weights.group_size, weights.symmetric, weights.dynamic) == (16, True, False)
    assert config.config_groups["group_0"].input_activations is None
    assert config.config_groups["group_0"].targets == ["Linear"]
    presets = quantization.preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
        assert getattr(weights, key) == getattr(presets, key), "as that package writes it itself"


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_what_we_write_in_anothers_format_we_read_as_what_it_is(tmp_path: Path, format: str) -> None:
    tensors = {f"model.{name}.weight": torch.ones(16, 32) for name in ("a", "b.gate", "gate.c")} | {
        "lm_head.weight": torch.ones(16, 32)
    }
    quantize_checkpoint(single(tmp_path / "source", tensors), tmp_path / "out", preset("w4a16"), format=format)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = stored_scheme(config["quantization_config"])
    assert stored is not None
    assert (stored.format.name, stored.scheme.activations) == (format, None)
    ignored = [name.removesuffix(".weight") for name in tensors if stored.scheme.ignores(name.removesuffix(".weight"))]
    assert sorted(ignored) == ["lm_head", "model.b.gate"]
    if format == "modelopt":
        older = quantization_block({}, json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()))
        assert older is not None
        assert stored_scheme(older) == stored
