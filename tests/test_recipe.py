"""Recipes and schemes: presets say what their sources say, and nothing is read that was not written."""

import copy
import dataclasses
import json
from typing import Any

import pytest
from conftest import RECIPES, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fouroversix_plugin.recipe import Recipe, Scheme, load_scheme, preset, preset_names

PRESETS = sorted((ROOT / "configs" / "recipes").glob("*.json"))
DEFAULT: dict[str, Any] = json.loads((ROOT / "configs" / "recipes" / "nvfp4_4over6.json").read_text())


def changed(path: str, value: object) -> dict[str, Any]:
    """The default block with one value replaced; ``path`` is dotted."""
    block = copy.deepcopy(DEFAULT)
    *parents, last = path.split(".")
    inner = block
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return block


# --- presets ---


def test_no_preset_is_missing_from_the_names_users_can_ask_for() -> None:
    assert preset_names() == [path.stem for path in PRESETS]
    assert {"nvfp4_4over6", "w4a16", "nvfp4", "flashinfer", "transformer_engine", "sglang_online"} <= {*preset_names()}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_printed_exactly_as_it_was_read(path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    scheme = Scheme.from_dict(json.loads(text))
    assert json.dumps(scheme.to_dict(), indent=2) + "\n" == text
    assert Scheme.from_dict(scheme.to_dict()) == scheme == preset(path.stem) == load_scheme(path)


def test_presets_do_not_drift_apart_in_what_they_ignore() -> None:
    assert len({preset(name).ignore for name in preset_names()}) == 1


def test_defaults_do_not_change() -> None:
    recipe = Recipe()
    assert (recipe.metric, recipe.scale_max, recipe.adaptive, recipe.error) == ("mse", 256, True, "amax")
    default = preset("nvfp4_4over6")
    assert (default.name, default.weights, default.activations) == ("W4A4", Recipe(), Recipe())
    assert (Scheme().weights, Scheme().activations, Scheme().ignore) == (Recipe(), Recipe(), ())


# design/numerics.md, "Whose defaults are these"
@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("w4a16", Recipe(), None),
        ("nvfp4", Recipe("mse", 448, False), Recipe("mse", 448, False)),
        ("flashinfer", Recipe("mae", 448, error="decode_scale"), Recipe("mae", 448)),
        ("transformer_engine", Recipe("mae", 256), Recipe("mae", 256)),
        ("sglang_online", Recipe("mse", 448, error="scaled"), Recipe("mse", 448, error="scaled")),
    ],
)
def test_a_preset_is_its_source(name: str, weights: Recipe, activations: Recipe | None) -> None:
    scheme = preset(name)
    assert (scheme.weights, scheme.activations) == (weights, activations)
    assert scheme.name == ("W4A16" if activations is None else "W4A4")


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"recipe: got 'mse'.*'nvfp4_4over6'"):
        preset("mse")
    with pytest.raises(ValueError, match=r"recipe: got \['w4a16'\]"):
        preset(["w4a16"])


def test_bad_scheme_file_is_named(tmp_path: Any) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed("weights.metric", "MSE")))
    with pytest.raises(ValueError, match=r"mine\.json: quantization_config\.weights\.metric: got 'MSE'"):
        load_scheme(path)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.json"):
            load_scheme(path)


# --- strictness ---


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quant_method", "nvfp4"),
        ("quant_method", None),
        ("format_version", 2),
        ("format_version", "1"),
        ("format_version", True),
        ("format_version", 1.0),
        ("group_size", 32),
        ("group_size", "16"),
        ("group_size", 16.0),
        ("weights", None),
        ("weights", "mse"),
        ("weights", []),
        ("weights.metric", "MSE"),
        ("weights.metric", ["mse"]),
        ("weights.scale_max", "256"),
        ("weights.scale_max", 256.0),
        ("weights.scale_max", 384),
        ("weights.scale_max", True),
        ("weights.adaptive", 1),
        ("weights.adaptive", "true"),
        ("weights.adaptive", None),
        ("weights.error", "none"),
        ("weights.error", {}),
        ("activations", {}),
        ("activations", False),
        ("activations", "token"),
        ("activations.metric", 0),
        ("activations.scale_max", "448"),
        ("activations.granularity", "row"),
        ("activations.granularity", None),
        ("ignore", "lm_head"),
        ("ignore", None),
        ("ignore", {"lm_head": 1}),
        ("ignore", ["lm_head", 1]),
        ("ignore", [""]),
        ("producer", []),
        ("producer", None),
        ("producer", {"name": 1}),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(path: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"quantization_config\.{path}\b"):
        Scheme.from_dict(changed(path, value))


def test_granularity_tensor_is_refused_for_activations_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"activations\.granularity: got 'tensor', needed 'token'.*neighbours"):
        Scheme.from_dict(changed("activations.granularity", "tensor"))


@pytest.mark.parametrize("path", ["sclae_max", "weights.granularity", "weights.backend", "activations.scope", "recipe"])
def test_an_unknown_key_is_an_error_that_names_it(path: str) -> None:
    parent, _, key = path.rpartition(".")
    where = f"quantization_config.{parent}".removesuffix(".")
    with pytest.raises(ValueError, match=rf"^{where}: unknown key '{key}'"):
        Scheme.from_dict(changed(path, 1))


@pytest.mark.parametrize(
    "path", [*DEFAULT, *(f"{part}.{key}" for part in ("weights", "activations") for key in DEFAULT[part])]
)
def test_a_missing_key_gets_no_default(path: str) -> None:
    parent, _, key = path.rpartition(".")
    block = copy.deepcopy(DEFAULT)
    del (block[parent] if parent else block)[key]
    where = f"quantization_config.{parent}".removesuffix(".")
    with pytest.raises(ValueError, match=rf"^{where}: key '{key}' is missing"):
        Scheme.from_dict(block)


@pytest.mark.parametrize("config", [None, [], "nvfp4_4over6", 1, {1: 2}])
def test_a_block_that_is_no_object_is_an_error(config: object) -> None:
    for read in (Scheme.from_dict, Scheme.from_options):
        with pytest.raises(ValueError, match="quantization_config: got"):
            read(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(path=st.sampled_from([*DEFAULT, "weights.metric", "weights.scale_max", "weights.adaptive"]), value=JSON)
@settings(max_examples=300)
def test_no_json_value_crashes_the_parser_or_is_changed_by_it(path: str, value: object) -> None:
    block = changed(path, value)
    try:
        scheme = Scheme.from_dict(block)
    except ValueError:
        return
    # Equal as JSON text: 256.0 and True do not pass for 256 and 1.
    assert json.dumps(scheme.to_dict()) == json.dumps(block)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"metric": "rmse"}, "metric"),
        ({"scale_max": 256.0}, "scale_max"),
        ({"scale_max": "448"}, "scale_max"),
        ({"adaptive": 1}, "adaptive"),
        ({"error": None}, "error"),
    ],
)
def test_the_constructor_is_as_strict_as_the_parser(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: got"):
        Recipe(**arguments)


# --- the short form ---


def test_short_form_is_the_preset_it_names() -> None:
    options = {"quant_method": "nvfp4_4over6", "recipe": "w4a16"}
    assert Scheme.from_options(options) == preset("w4a16")
    replaced = Scheme.from_options({**options, "ignore": ["lm_head"]})
    assert replaced == dataclasses.replace(preset("w4a16"), ignore=("lm_head",))
    assert Scheme.from_options({**options, "ignore": []}).ignore == ()
    assert Scheme.from_options(DEFAULT) == preset("nvfp4_4over6"), "a whole block is an option too"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "fast"}, r"recipe: got 'fast'"),
        ({"recipe": "../nvfp4"}, r"recipe: got '../nvfp4'"),
        ({"quant_method": "modelopt"}, r"quantization_config\.quant_method: got 'modelopt'"),
        ({"weights": {}}, r"unknown key 'weights'"),
        ({"ignore": "lm_head"}, r"quantization_config\.ignore: got 'lm_head'"),
    ],
)
def test_short_form_is_read_strictly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.from_options({"quant_method": "nvfp4_4over6", "recipe": "w4a16", **change})
    with pytest.raises(ValueError, match="'quant_method' is missing"):
        Scheme.from_options({"recipe": "w4a16"})


def test_a_checkpoint_does_not_hold_the_short_form() -> None:
    with pytest.raises(ValueError, match="unknown key 'recipe'"):
        Scheme.from_dict({"quant_method": "nvfp4_4over6", "recipe": "w4a16"})


# --- recipes as words and numbers ---


def test_operators_receive_the_recipe_that_was_sent() -> None:
    assert len({recipe.key for recipe in RECIPES}) == len(RECIPES) == 36
    for recipe in RECIPES:
        assert Recipe.from_key(recipe.key) == recipe
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe().key == "mse_256_amax"
    assert Recipe("mse", 448, adaptive=False).key == "mse_448_amax_plain"
    with pytest.raises(ValueError, match=r"recipe key: got 'mse_384_amax', needed one of abs_max_256_amax, "):
        Recipe.from_key("mse_384_amax")


@pytest.mark.parametrize(
    ("recipe", "code", "scale"),
    [
        (Recipe(), 1536, 384),
        (Recipe(scale_max=448), 2688, 448),
        (Recipe(adaptive=False), 1536, 256),
        (Recipe(scale_max=448, adaptive=False), 2688, 448),
    ],
)
def test_range_numbers(recipe: Recipe, code: float, scale: float) -> None:
    assert (recipe.encoded_amax, recipe.largest_block_scale) == (code, scale)


# --- ignore ---


@pytest.mark.parametrize(
    ("pattern", "ignored", "kept"),
    [
        ("lm_head", ["lm_head"], ["model.lm_head", "lm_head2", "lm_hea", "LM_HEAD"]),
        (
            "*.gate",
            ["model.layers.0.mlp.gate", ".gate"],
            ["gate", "model.layers.0.mlp.gate_proj", "a.gate.b", "a.Gate"],
        ),
        ("model.layers.?.mlp", ["model.layers.1.mlp"], ["model.layers.11.mlp"]),
        ("layers.[01].mlp", ["layers.0.mlp", "layers.1.mlp"], ["layers.2.mlp", "layers.[01].mlp"]),
        # What means something to a regular expression means only itself here.
        ("a.b+c", ["a.b+c"], ["aXb+c", "a.bbc"]),
        ("(a|b)", ["(a|b)"], ["a", "b"]),
        ("^lm_head$", ["^lm_head$"], ["lm_head"]),
        (".*", [".x"], ["lm_head"]),
        ("re:.*gate", ["model.gate", "model.gate_proj"], ["model.Gate", "re:"]),
        ("re:.*gate$", ["model.gate"], ["model.gate_proj"]),
        ("re:gate", ["gate", "gate_proj"], ["model.gate"]),  # from the start of the name
    ],
)
def test_ignore_matches_whole_names_as_globs(pattern: str, ignored: list[str], kept: list[str]) -> None:
    scheme = Scheme(ignore=(pattern,))
    assert [name for name in ignored + kept if scheme.ignores(name)] == ignored


def test_a_broken_regular_expression_in_ignore_is_named() -> None:
    with pytest.raises(ValueError, match=r"ignore: 're:\(lm_head' is no regular expression"):
        Scheme(ignore=("re:(lm_head",))


@pytest.mark.parametrize("ignore", ["*.gate", (1,), (None,)], ids=str)
def test_an_ignore_list_of_something_else_is_refused(ignore: Any) -> None:
    # Of a string, every letter would be a pattern: a star ignores the whole model.
    with pytest.raises(ValueError, match=r"ignore: got .*, needed a list"):
        Scheme(ignore=ignore)


def test_an_ignore_list_can_be_read_again() -> None:
    scheme = Scheme(ignore=["lm_head", ""])  # type: ignore[arg-type]
    assert Scheme.from_dict(scheme.to_dict()) == scheme == Scheme(ignore=("lm_head",))


def test_static_activations_survive_the_disk() -> None:
    scheme = preset("nvfp4_static")
    assert scheme.input_scale == "static"
    assert scheme.to_dict()["activations"]["granularity"] == "static"
    assert Scheme.from_dict(scheme.to_dict()) == scheme != preset("nvfp4")
    with pytest.raises(ValueError, match="input_scale: got 'row', needed 'token' or 'static'"):
        Scheme(input_scale="row")  # type: ignore[arg-type]


def test_presets_quantize_exactly_the_linear_layers() -> None:
    layer = "model.layers.0"
    quantized = [
        f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj")
    ] + [
        f"{layer}.mlp.gate_proj",
        f"{layer}.mlp.gate_up_proj",
        f"{layer}.mlp.experts.3.down_proj",
        f"{layer}.mlp.shared_expert.up_proj",
        f"{layer}.block_sparse_moe.experts.0.w1",
        "bert.encoder.layer.0.output.dense",
        f"{layer}.self_attn.indexer.wq_b",
        "model.decoder.layers.0.fc1",
    ]
    kept = [
        "lm_head",
        "language_model.lm_head",
        "model.embed_tokens",
        f"{layer}.mlp.gate",
        f"{layer}.block_sparse_moe.gate",
        f"{layer}.mlp.gate.wg",
        f"{layer}.mlp.router",
        f"{layer}.mlp.router.classifier",
        f"{layer}.mlp.shared_expert_gate",
        "mtp.fc",
        "model.mtp_layers.0.input_proj",
        "model.layers.61.eh_proj",
        "model.layers.61.shared_head.head",
        "model.mtp.layers.0.mlp.up_proj",
        "visual.blocks.0.attn.qkv",
        "model.visual.merger.mlp.0",
        "model.vision_tower.encoder.layers.0.fc1",
        "vpm.encoder.layers.0.mlp.fc1",
        "resampler.kv_proj",
        "mlp1.1",
        "audio_tower.layers.0.fc1",
        "multi_modal_projector.linear_1",
        "mm_projector.linear_1",
        "score",
        f"{layer}.altup.modality_router",
        f"{layer}.per_layer_input_gate",
        "model.connector.modality_projection.proj",
        # What engines build unquantized, under whatever name.
        "output",
        "language_model.output",
        "transformer.output_layer",
        "classifier.dense",
        "bert.pooler.dense",
        "head.dense",
        "custom_text_proj",
        f"{layer}.self_attn.q_norm",
        f"{layer}.self_attn.indexer.wk",
        f"{layer}.self_attn.indexer.weights_proj",
        f"{layer}.mlp.text_experts_gate",
        "model.vision_backbone.image_vit.transformer.0.attention.wq",
        "model.audio_encoder.layers.0.fc1",
    ]
    scheme = preset("nvfp4_4over6")
    assert [name for name in quantized + kept if scheme.ignores(name)] == kept


def test_a_fused_layer_is_never_half_ignored() -> None:
    shards = [f"layers.0.attn.{name}_proj" for name in "qkv"]
    fused = "layers.0.attn.qkv_proj"
    assert Scheme(ignore=("*.q_proj", "*.k_proj", "*.v_proj")).ignores(fused, shards)
    assert Scheme(ignore=("*.qkv_proj",)).ignores(fused, shards), "its own name counts too"
    assert not Scheme(ignore=("*.o_proj",)).ignores(fused, shards)
    assert not Scheme(ignore=("*.o_proj",)).ignores(fused)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv_proj: .*k_proj' but not 'layers\.0\.attn\.q_proj'"):
        Scheme(ignore=("*.k_proj", "*.v_proj")).ignores(fused, shards)


# --- values, not places ---


def test_recipes_and_schemes_cannot_be_changed_under_their_users() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().scale_max = 448  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme().ignore = ()  # type: ignore[misc]
    assert len({Recipe(), Recipe(), Recipe("mae")}) == 2
    assert len({preset("nvfp4"), preset("nvfp4"), preset("w4a16")}) == 2


def test_two_schemes_share_no_state() -> None:
    block = {**copy.deepcopy(DEFAULT), "producer": {"name": "a"}}
    first, second = Scheme.from_dict(block), Scheme.from_dict(block)
    block["producer"]["name"] = "b"
    block["ignore"].append("everything")
    block["weights"]["scale_max"] = 448
    first.to_dict()["ignore"].append("*")
    first.to_dict()["producer"]["name"] = "c"
    first.producer["name"] = "d"  # type: ignore[index]
    assert second.producer == {"name": "a"}
    assert first.ignore == second.ignore == tuple(DEFAULT["ignore"])
    assert first.weights == second.weights == Recipe()
    assert Scheme().producer is not Scheme().producer
