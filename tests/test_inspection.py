"""What `inspect` says of a checkpoint: nothing damaged is hidden, nothing sound is called damaged."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    ATTENTION,
    BLOCKS,
    EXPERT,
    FAMILIES,
    MLP,
    QUANTIZED,
    RECIPE,
    parts,
    single,
    tiny_model,
    write,
    write_family,
)
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import tables
from fouroversix_plugin.checkpoint import CheckpointError, quantize_checkpoint
from fouroversix_plugin.inspection import Inspection, inspect_checkpoint
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe, preset

PLAIN = Recipe(adaptive=False, scale_max=448)


def weight(seed: int = 0, rows: int = 32, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 50


def quantized(modules: Mapping[str, NVFP4Tensor], family: str, amax: float = 1.0) -> dict[str, Tensor]:
    """The tensors of all modules as ``family`` spells them."""
    return {
        f"{module}.{part}": tensor.clone()
        for module, q in modules.items()
        for part, tensor in parts(family, q, amax).items()
    }


def ours(**changes: Any) -> dict[str, Any]:
    return {**BLOCKS["nvfp4_4over6"], **changes}


def statuses(inspection: Inspection) -> list[tuple[str, str]]:
    return [(check.status, check.subject) for check in inspection.checks]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_model as our own converter writes it."""
    folder = tmp_path_factory.mktemp("models")
    quantize_checkpoint(write(folder / "source", tiny_model()), folder / "target", fos.preset("nvfp4_4over6"))
    return folder / "target"


# --- every family ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_described_by_what_its_files_hold(tmp_path: Path, family: str) -> None:
    x = weight()
    amax = x.abs().max().item()
    q = fos.quantize(x)
    tensors = quantized({f"{MLP}.down_proj": q}, family, amax) | {"lm_head.weight": weight(rows=48)}
    inspection = inspect_checkpoint(write_family(tmp_path / "m", family, tensors))
    assert inspection.stored is not None
    assert inspection.stored.format.name == family.split()[0]
    (layer,) = inspection.layers
    assert (layer.module, layer.shape, layer.error) == (f"{MLP}.down_proj", (32, 64), None)
    assert layer.nbytes == sum(t.nbytes for name, t in tensors.items() if name.startswith(MLP))
    assert layer.blocks is not None
    assert (layer.blocks.fours, layer.blocks.nonzero) == q.block_choices()
    assert layer.blocks.largest_scale == q.block_scale.float().max().item()
    assert layer.blocks.decode_scale == pytest.approx((amax / 1536, amax / 1536), rel=1e-6)
    assert inspection.share_of_four == q.share_of_four()
    assert [(other.name, other.reason) for other in inspection.others] == [("lm_head.weight", "in `ignore` as lm_head")]
    assert not inspection.failed


def test_the_producer_is_named_wherever_a_family_keeps_it(tmp_path: Path, converted: Path) -> None:
    assert dict(inspect_checkpoint(converted).producer) == {"name": "fouroversix-plugin", "version": fos.__version__}
    family = "modelopt hf_quant_config"
    folder = write_family(tmp_path / "m", family, quantized({"a": fos.quantize(weight(), PLAIN)}, family))
    assert dict(inspect_checkpoint(folder).producer) == {"name": "modelopt", "version": "0.33.0"}
    block = {**BLOCKS["compressed-tensors"], "version": "0.17.0"}
    tensors = quantized({"a": fos.quantize(weight(), PLAIN)}, "compressed-tensors", weight().abs().max().item())
    folder = write_family(tmp_path / "ct", "compressed-tensors", tensors, block)
    assert dict(inspect_checkpoint(folder).producer) == {"name": "compressed-tensors", "version": "0.17.0"}


def test_input_scales_are_not_called_weights_that_were_forgotten(tmp_path: Path) -> None:
    tensors = quantized({"a": fos.quantize(weight(), PLAIN)}, "modelopt") | {"a.input_scale": torch.tensor(0.1)}
    (other,) = inspect_checkpoint(write_family(tmp_path / "m", "modelopt", tensors)).others
    assert (other.name, other.reason) == ("a.input_scale", "scale of activations")


# --- damage ---


def test_a_damaged_layer_hides_no_other(tmp_path: Path) -> None:
    sound, damaged = fos.quantize(weight()), fos.quantize(weight(1))
    damaged.block_scale.view(torch.uint8)[3, 1] = 0x7F
    tensors = quantized({f"model.layers.{i}.fc": sound for i in range(3)}, "nvfp4_4over6")
    tensors |= quantized({"model.layers.1.fc": damaged}, "nvfp4_4over6")
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors))
    assert [layer.error is None for layer in inspection.layers] == [True, False, True]
    assert inspection.failed
    assert statuses(inspection) == [("failed", "model.layers.1.fc")]
    assert "model.layers.1.fc.weight_scale: got nothing (or NaN)" in inspection.checks[0].message
    assert inspection.share_of_four == sound.share_of_four()
    listed = inspection.to_dict()["layers"][1]
    assert (listed["passed"], listed["share_of_four"], listed["shape"]) == (False, None, [32, 64])
    text = inspection.text()
    assert "FAILED: model.layers.1.fc: model.layers.1.fc.weight_scale" in text
    assert "2 of 3 quantized weights pass every check" in text


def test_a_scale_that_the_label_rules_out_fails(tmp_path: Path) -> None:
    plain = fos.quantize(weight(), PLAIN)
    tensors = quantized({"a.fc": plain, "b.fc": fos.quantize(weight())}, "nvfp4_4over6")
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors))
    assert statuses(inspection) == [("failed", "a.fc")]
    assert "block scale 448 is impossible for scale_max 256" in inspection.checks[0].message


def test_a_linear_weight_that_is_neither_quantized_nor_ignored_fails(tmp_path: Path) -> None:
    # A loader that follows the label would wait for its scales.
    tensors = quantized({"a.fc": fos.quantize(weight())}, "nvfp4_4over6") | {"b.fc.weight": weight()}
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors))
    assert statuses(inspection) == [("failed", "b.fc.weight")]
    assert "in full precision that `ignore` does not name" in inspection.checks[0].message


def test_an_odd_tensor_is_a_failed_check_and_hides_no_other(tmp_path: Path) -> None:
    tensors = quantized({"a.fc": fos.quantize(weight())}, "nvfp4_4over6")
    tensors |= {"b.fc.weight": torch.zeros(32, 32, dtype=torch.int32), "norm.weight": torch.ones(32)}
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors))
    assert statuses(inspection) == [("failed", "b.fc.weight")]
    assert "got I32" in inspection.checks[0].message
    reasons = {other.name: other.reason for other in inspection.others}
    assert reasons == {"b.fc.weight": "not understood", "norm.weight": "not a linear weight (1-D)"}


def test_what_is_ignored_by_name_may_be_as_odd_as_it_likes(tmp_path: Path) -> None:
    tensors = quantized({"a.fc": fos.quantize(weight())}, "nvfp4_4over6")
    tensors |= {"b.fc.weight": torch.zeros(32, 32, dtype=torch.int32), "c.experts.w": torch.zeros(2, 16, 16)}
    block = ours(ignore=["b.fc", "c.experts.w"])
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors, block))
    reasons = {other.name: other.reason for other in inspection.others}
    assert reasons == {"b.fc.weight": "in `ignore` as b.fc", "c.experts.w": "in `ignore` as c.experts.w"}
    assert not inspection.failed


def test_a_folder_that_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        inspect_checkpoint(tmp_path)
    block = {"quant_method": "awq", "bits": 4}
    with pytest.raises(CheckpointError, match="got awq, needed NVFP4"):
        inspect_checkpoint(single(tmp_path / "m", {"a.weight": weight()}, {"quantization_config": block}))


# --- ranges and labels ---


def test_a_label_of_448_on_weights_of_256_is_a_warning(tmp_path: Path) -> None:
    tensors = quantized({"a": fos.quantize(weight()), "b": fos.quantize(weight(1))}, "nvfp4_4over6")
    block = ours(weights={**RECIPE, "scale_max": 448})
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors, block))
    assert statuses(inspection) == [("warning", "")]
    assert inspection.checks[0].message.startswith("looks like scale_max 256: no block scale is above ")
    assert not inspection.failed


def test_one_layer_that_reaches_448_confirms_a_label_of_448(tmp_path: Path) -> None:
    tensors = quantized({"a": fos.quantize(weight()), "b": fos.quantize(weight(1), PLAIN)}, "nvfp4_4over6")
    block = ours(weights={**RECIPE, "scale_max": 448})
    assert inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors, block)).checks == ()


def test_a_layer_that_uses_little_of_its_range_is_fine(tmp_path: Path) -> None:
    # k_proj and v_proj share the amax of q_proj: their own largest scales are far below 384.
    small = fos.quantize(weight() / 30, amax=weight().abs().max())
    inspection = inspect_checkpoint(
        write_family(tmp_path / "m", "nvfp4_4over6", quantized({"a.k_proj": small}, "nvfp4_4over6"))
    )
    assert inspection.largest_block_scale is not None
    assert inspection.largest_block_scale < 64
    assert inspection.checks == ()


@pytest.mark.parametrize(("recipe", "notes"), [(Recipe(), 1), (PLAIN, 0)])
def test_an_unlabelled_file_is_recognized_by_its_scales(tmp_path: Path, recipe: Recipe, notes: int) -> None:
    tensors = quantized({"a": fos.quantize(weight(), recipe)}, "modelopt")
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "modelopt", tensors))
    assert [check.message[:26] for check in inspection.checks] == ["looks like 4over6 at 256: "] * notes
    assert inspection.to_dict()["recipe"]["weights"] is None  # a guess is no claim
    assert "recipe not in the file" in inspection.text()


def test_merged_layers_with_different_decode_scales_are_pointed_out_once_a_group(tmp_path: Path) -> None:
    q, k = fos.quantize(weight()), fos.quantize(weight(1) * 3)
    modules = {f"{ATTENTION}.q_proj": q, f"{ATTENTION}.k_proj": k, f"{MLP}.gate_proj": q, f"{MLP}.up_proj": q}
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", quantized(modules, "nvfp4_4over6")))
    assert statuses(inspection) == [("note", f"{ATTENTION}.q_proj+k_proj+v_proj")]
    assert not inspection.failed


# --- what is not quantized ---


def test_every_other_tensor_has_its_reason(converted: Path) -> None:
    inspection = inspect_checkpoint(converted)
    assert {layer.module for layer in inspection.layers} == QUANTIZED
    assert {other.name: other.reason for other in inspection.others} == {
        "model.embed_tokens.weight": "in `ignore` as *embed*",
        "model.layers.0.input_layernorm.weight": "not a linear weight (1-D)",
        f"{ATTENTION}.q_proj.bias": "not a linear weight (1-D)",
        f"{MLP}.odd_proj.weight": "K = 24 is no multiple of 16",  # though the converter put its name into `ignore`
        "model.layers.1.mlp.gate.weight": "in `ignore` as *.gate",
        "model.layers.1.conv.weight": "not a linear weight (3-D)",
        "model.layers.1.positions": "not a linear weight (1-D)",
    }
    assert not inspection.failed


def test_of_a_full_precision_checkpoint_it_says_what_could_be_quantized(tmp_path: Path, converted: Path) -> None:
    inspection = inspect_checkpoint(write(tmp_path / "m", tiny_model()))
    assert (inspection.stored, inspection.layers, inspection.failed) == (None, (), False)
    assert inspection.quantizable is not None
    assert inspection.quantizable.weights == len(QUANTIZED)
    written = sum(path.stat().st_size for path in converted.glob("*.safetensors"))
    assert inspection.quantizable.nbytes == written
    reasons = {other.name: other.reason for other in inspection.others}
    assert reasons[f"{EXPERT}.w1.weight"] == "could be quantized"
    assert reasons[f"{MLP}.odd_proj.weight"] == "K = 24 is no multiple of 16"
    assert reasons["model.embed_tokens.weight"] == "in `ignore` as *embed*"
    assert "nothing is quantized, nothing to check" in inspection.text()
    assert inspection.to_dict()["format"] is None


def test_a_full_precision_checkpoint_that_quantize_would_refuse_says_why(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 32, 64)}
    inspection = inspect_checkpoint(single(tmp_path / "m", tensors))
    assert statuses(inspection) == [("warning", "")]
    assert "which dimension is the input cannot be told" in inspection.checks[0].message
    assert inspection.quantizable is None
    assert [other.reason for other in inspection.others] == ["not quantized"]


def test_an_fp8_checkpoint_can_be_quantized_and_its_scales_are_none_of_its_weights(tmp_path: Path) -> None:
    tensors = {"a.fc.weight": weight().to(torch.float8_e4m3fn), "a.fc.weight_scale_inv": torch.ones(1, 1)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    inspection = inspect_checkpoint(single(tmp_path / "m", tensors, config))
    assert inspection.quantizable is not None
    assert inspection.quantizable.weights == 1
    assert {other.name: other.reason for other in inspection.others} == {
        "a.fc.weight": "could be quantized",
        "a.fc.weight_scale_inv": "scale of an FP8 weight",
    }


# --- as JSON and as text ---


def test_json_holds_everything_and_no_infinity(converted: Path) -> None:
    report = json.loads(json.dumps(inspect_checkpoint(converted).to_dict(), allow_nan=False))
    assert report["schema_version"] == 1
    assert (report["format"], report["failed"], report["recipe"]["weights"]) == ("nvfp4_4over6", False, RECIPE)
    assert len(report["layers"]) == len(QUANTIZED)
    assert set(report["layers"][0]) == {
        *("module", "dtype", "shape", "nbytes", "bits_per_weight", "share_of_four", "largest_block_scale"),
        *("decode_scale", "passed", "error"),
    }
    values = sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    assert report["bits_per_weight"] == 8 * report["nbytes"]["quantized"] / values
    assert report["nbytes"]["other"] == sum(other["nbytes"] for other in report["not_quantized"])


def test_many_experts_share_a_line_but_a_damaged_one_keeps_its_own(tmp_path: Path) -> None:
    q, damaged = fos.quantize(weight(rows=16, columns=32)), fos.quantize(weight(1, rows=16, columns=32))
    damaged.block_scale.view(torch.uint8)[0, 0] = 0xFF
    modules = {f"model.layers.{layer}.mlp.experts.{e}.w2": q for layer in range(2) for e in range(70)}
    tensors = quantized({**modules, "model.layers.1.mlp.experts.7.w2": damaged}, "nvfp4_4over6")
    inspection = inspect_checkpoint(write_family(tmp_path / "m", "nvfp4_4over6", tensors))
    lines = inspection.text().splitlines()
    rows = [line.split() for line in lines if "experts" in line and "NVFP4" in line]
    assert sorted(row[:2] for row in rows) == [
        ["0.mlp.experts.*.w2", "70"],
        ["1.mlp.experts.*.w2", "69"],
        ["1.mlp.experts.7.w2", "1"],
    ]
    assert [row[-1] for row in rows].count("FAILED") == 1
    assert max(len(line) for line in lines if "FAILED:" not in line) <= 110
    assert len(inspection.to_dict()["layers"]) == 140


def test_progress_names_every_weight_with_its_bytes(converted: Path) -> None:
    told: dict[str, int] = {}
    inspection = inspect_checkpoint(converted, told.__setitem__)
    assert told == {f"{layer.module}.weight": layer.nbytes for layer in inspection.layers}


def test_layers_are_listed_as_a_model_runs_them() -> None:
    names = ["lm_head", "l.10.mlp.up_proj", "l.9.mlp.down_proj", "l.9.mlp.gate_proj", "l.9.self_attn.o_proj"]
    names += ["l.9.self_attn.q_proj", "l.9.mlp.experts.10.w1", "l.9.mlp.experts.9.w1"]
    assert sorted(names, key=tables.in_model_order) == [
        *("lm_head", "l.9.self_attn.q_proj", "l.9.self_attn.o_proj", "l.9.mlp.experts.9.w1", "l.9.mlp.experts.10.w1"),
        *("l.9.mlp.gate_proj", "l.9.mlp.down_proj", "l.10.mlp.up_proj"),
    ]
    assert tables.common_prefix(["lm_head", "model.layers.1.a", "model.layers.12.a"]) == "model.layers."
    assert tables.common_prefix(["lm_head"]) == ""


@pytest.mark.parametrize(
    ("most", "rows"),
    [(6, 6), (5, 2), (2, 2), (1, 1)],  # all; the experts of a layer as one; everything as one
)
def test_rows_are_merged_from_the_last_number_on(most: int, rows: int) -> None:
    modules = [f"layers.{layer}.experts.{e}.w1" for layer in range(2) for e in range(3)]
    merged = tables.collapsed(modules, most)
    assert len(merged) == rows
    assert sorted(name for names in merged.values() for name in names) == modules
    if rows == 2:
        assert list(merged) == ["layers.0.experts.*.w1", "layers.1.experts.*.w1"]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (59_700_000, "59.7 MB"), (1.5e13, "15 TB")]
)
def test_sizes_are_readable(nbytes: float, text: str) -> None:
    assert tables.readable_size(nbytes) == text


def test_digits_that_are_no_number_are_part_of_a_name(tmp_path: Path) -> None:
    source = single(
        tmp_path / "source", {f"layers.{number}.weight": torch.ones(16, 16) for number in ("²", "9" * 5000)}
    )
    quantize_checkpoint(source, tmp_path / "out", preset("w4a16"))
    for folder in (source, tmp_path / "out"):
        assert "layers.²" in inspect_checkpoint(folder).text()


def test_long_names_keep_their_end() -> None:
    name = "a" * 60 + ".self_attn.q_proj"
    assert len(tables.short(name, "")) == 44
    assert tables.short(name, "").endswith(".self_attn.q_proj")
