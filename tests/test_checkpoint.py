"""Conversion: what is written is what was meant, and what cannot be finished leaves nothing behind."""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bytes, assert_same_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import INDEX, Checkpoint, CheckpointError, quantize_checkpoint
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe, Scheme, preset

SCHEME = preset("nvfp4_4over6")
CONFIG = {
    "model_type": "tiny",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoModel": "x.X"},
}
ATTENTION, MLP, EXPERT = "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp.experts.0"


def tiny_model() -> dict[str, dict[str, Tensor]]:
    """Tensors by file: a layer whose q/k/v and gate/up lie in different files, and one expert. Embeddings are tied."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, times: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*shape, generator=generator) * times).to(dtype)

    return {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": randn(40, 32),
            "model.layers.0.input_layernorm.weight": randn(32),
            f"{ATTENTION}.q_proj.weight": randn(32, 32),
            f"{ATTENTION}.q_proj.bias": randn(32),
            f"{ATTENTION}.v_proj.weight": randn(16, 32, times=0.1),
            f"{MLP}.gate_proj.weight": randn(48, 32, dtype=torch.float32),
        },
        "model-00002-of-00002.safetensors": {
            f"{ATTENTION}.k_proj.weight": randn(16, 32, times=5),
            f"{ATTENTION}.o_proj.weight": randn(32, 32, dtype=torch.float16),
            f"{MLP}.up_proj.weight": randn(48, 32, times=3),
            f"{MLP}.down_proj.weight": randn(32, 48),
            f"{MLP}.odd_proj.weight": randn(32, 24),  # K is no multiple of 16
            "model.layers.1.mlp.gate.weight": randn(4, 32),
            f"{EXPERT}.w1.weight": randn(16, 32),
            f"{EXPERT}.w2.weight": randn(32, 16),
            f"{EXPERT}.w3.weight": randn(16, 32, times=0.5),
            "model.layers.1.conv.weight": randn(4, 16, 3),  # no matrix, though its second dimension would do
        },
    }


# Weights that share an amax.
GROUPS = [
    [f"{ATTENTION}.{name}_proj" for name in "qkv"],
    [f"{ATTENTION}.o_proj"],
    [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
    [f"{MLP}.down_proj"],
    [f"{EXPERT}.w1", f"{EXPERT}.w3"],
    [f"{EXPERT}.w2"],
]
QUANTIZED = {module for group in GROUPS for module in group}


def write(folder: Path, files: Mapping[str, Mapping[str, Tensor]], config: object = CONFIG) -> Path:
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    if set(files) != {"model.safetensors"}:
        write_index(folder, {tensor: name for name, tensors in files.items() for tensor in tensors})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "source", tiny_model())
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "modeling.py").write_text("raise SystemExit('code of a checkpoint ran')")
    (folder / "old.bin").write_bytes(b"a pickle")
    return folder


def everything(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, checked against its index."""
    index = json.loads((folder / INDEX).read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(folder / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        tensors |= held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def assert_nothing_left(target: Path, source: Path | None) -> None:
    beside = {path.name for path in target.parent.iterdir()}
    assert beside == ({source.name} if source is not None and source.exists() else set())


# --- what is written ---


def test_weights_are_stored_as_quantized_with_the_amax_their_fused_layer_shares(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    before = {name: tensor for tensors in tiny_model().values() for name, tensor in tensors.items()}
    after = everything(tmp_path / "out")
    for group in GROUPS:
        amax = max(before[f"{module}.weight"].abs().max().item() for module in group)
        for module in group:
            q = NVFP4Tensor(*(after.pop(f"{module}.weight{suffix}") for suffix in ("", "_scale", "_scale_2")))
            assert_same_bytes(q, fos.quantize(before[f"{module}.weight"], Recipe(), amax=amax))
    kept = {name: tensor for name, tensor in before.items() if name.removesuffix(".weight") not in QUANTIZED}
    assert set(after) == set(kept), "no tensor more, none less"
    for name, tensor in kept.items():
        assert_same_tensor(name, after[name], tensor)


def test_the_merged_layer_has_the_bytes_of_its_parts(source: Path, tmp_path: Path) -> None:
    # What an engine gets that merges q, k and v first and quantizes while it loads.
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    before = {name: tensor for tensors in tiny_model().values() for name, tensor in tensors.items()}
    after = everything(tmp_path / "out")
    merged = fos.quantize(torch.cat([before[f"{module}.weight"] for module in GROUPS[0]]))
    for part, suffix in ((merged.packed, ""), (merged.block_scale.view(torch.uint8), "_scale")):
        stored = [after[f"{module}.weight{suffix}"].view(torch.uint8) for module in GROUPS[0]]
        assert_same_tensor(f"weight{suffix}", torch.cat(stored), part)
    for module in GROUPS[0]:
        assert_same_tensor("weight_scale_2", after[f"{module}.weight_scale_2"], merged.decode_scale)


def test_the_config_says_what_was_done(source: Path, tmp_path: Path) -> None:
    scheme = Scheme(weights=Recipe("mae", 448), activations=None, ignore=("*.mlp*", "*embed_tokens"))
    returned = quantize_checkpoint(source, tmp_path / "out", scheme)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    written = Scheme.from_dict(config.pop("quantization_config"))
    assert config == CONFIG
    assert written == returned
    assert written.producer == {"name": "fouroversix-plugin", "version": fos.__version__}
    assert (written.weights, written.activations, written.ignore) == (scheme.weights, None, scheme.ignore)
    quantized = {name.removesuffix("_scale") for name in everything(tmp_path / "out") if name.endswith("_scale")}
    assert quantized == {f"{ATTENTION}.{name}_proj.weight" for name in "qkvo"}


def test_a_layer_left_as_it_was_is_one_the_config_ignores(source: Path, tmp_path: Path) -> None:
    # An engine asks only the config: a layer that it does not ignore must have been quantized.
    written = quantize_checkpoint(source, tmp_path / "out", SCHEME)
    after = everything(tmp_path / "out")
    linear = {name.removesuffix(".weight") for name, t in after.items() if name.endswith(".weight") and t.ndim == 2}
    assert linear - QUANTIZED == {"model.embed_tokens", "model.layers.1.mlp.gate", f"{MLP}.odd_proj"}
    assert {module for module in linear if written.ignores(module)} == linear - QUANTIZED


def test_files_keep_their_names_and_the_rest_is_copied(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*tiny_model(), INDEX, "config.json", "tokenizer.json", "modeling.py"}, "no pickle"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert index[f"{ATTENTION}.k_proj.weight_scale_2"] == "model-00002-of-00002.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}, "no partial folder"
    assert sorted(Checkpoint.open(tmp_path / "out").files) == sorted(index)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    tensors = {name: tensor for held in tiny_model().values() for name, tensor in held.items()}
    source = write(tmp_path / "source", {"model.safetensors": tensors})
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{MLP}.down_proj.weight"].dtype == torch.uint8


def test_an_index_over_one_file_still_finds_it(tmp_path: Path) -> None:
    tensors = {name: tensor for held in tiny_model().values() for name, tensor in held.items()}
    source = write(tmp_path / "source", {"model-00001-of-00001.safetensors": tensors})
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    opened = Checkpoint.open(tmp_path / "out")
    assert opened.files[f"{MLP}.down_proj.weight_scale"] == "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_file_modes_follow_the_umask(source: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        quantize_checkpoint(source, tmp_path / "out", SCHEME)
    finally:
        assert os.umask(before) == umask, "left as it was"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_same_source_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_checkpoint(source, tmp_path / name, SCHEME)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_progress_is_told_every_tensor(source: Path, tmp_path: Path) -> None:
    told: list[str] = []
    quantize_checkpoint(source, tmp_path / "out", SCHEME, told.append)
    assert sorted(told) == sorted(name for tensors in tiny_model().values() for name in tensors)


def test_a_link_into_a_hub_cache_is_followed(tmp_path: Path) -> None:
    # The hub's cache holds every file as a link into ../../blobs.
    blobs = write(tmp_path / "blobs", tiny_model())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    quantize_checkpoint(snapshot, tmp_path / "out", SCHEME)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert f"{MLP}.down_proj.weight_scale" in everything(tmp_path / "out")


def test_a_weight_that_is_stored_is_one_the_loader_accepts(source: Path, tmp_path: Path) -> None:
    from fouroversix_plugin.weights import stored_weight

    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    after = everything(tmp_path / "out")
    for module in QUANTIZED:
        packed, block_scale, decode_scale = (after[f"{module}.weight{suffix}"] for suffix in ("", "_scale", "_scale_2"))
        assert decode_scale.shape == ()
        widths = [packed.shape[0]]
        q = stored_weight(module, packed, block_scale, decode_scale.view(1), widths, SCHEME.weights)
        assert_same_tensor(module, fos.dequantize(q), fos.dequantize(NVFP4Tensor(packed, block_scale, decode_scale)))


# --- what is refused ---


def refuse(source: Path, message: str, target: Path | None = None) -> CheckpointError:
    """The conversion fails with ``message``, and neither a target nor a partial folder is left."""
    target = source.parent / "out" if target is None else target
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize_checkpoint(source, target, SCHEME)
    assert_nothing_left(target, source)
    return caught.value


def test_an_existing_target_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for target in (tmp_path / "out", source):
        with pytest.raises(CheckpointError, match=rf"{target}: exists already"):
            quantize_checkpoint(source, target, SCHEME)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert everything_unchecked(source) == everything_unchecked(write(tmp_path / "fresh", tiny_model()))


def everything_unchecked(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("module", [f"{ATTENTION}.q_proj", f"{MLP}.up_proj", f"{EXPERT}.w2"])
def test_a_damaged_weight_leaves_nothing(tmp_path: Path, module: str, value: float) -> None:
    files = tiny_model()
    for tensors in files.values():
        if f"{module}.weight" in tensors:
            tensors[f"{module}.weight"][3, 5] = value
    source = write(tmp_path / "source", files)
    refuse(source, rf"{module}\.weight: got 1 NaN or infinite values, the first at \(3, 5\)")


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        if name == f"{MLP}.up_proj.weight":  # in the second file
            assert (tmp_path / "out.partial" / "model-00001-of-00002.safetensors").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, interrupt)
    assert_nothing_left(tmp_path / "out", source)
    quantize_checkpoint(source, tmp_path / "out", SCHEME)


def test_the_config_is_written_last(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder with a config.json and without all of its shards looks like a model.
    seen: list[set[str]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        seen.append({path.name for path in self.iterdir()})
        return rename(self, target)

    def before_config(name: str) -> None:
        assert not (tmp_path / "out.partial" / "config.json").exists()

    monkeypatch.setattr(Path, "rename", watched)
    quantize_checkpoint(source, tmp_path / "out", SCHEME, before_config)
    assert [names >= {"config.json", INDEX, *tiny_model()} for names in seen] == [True]


@pytest.mark.parametrize("block", [{"quant_method": "awq"}, SCHEME.to_dict(), {}, None, "fp8"], ids=str)
def test_a_quantized_source_is_refused_whatever_its_block_looks_like(tmp_path: Path, block: object) -> None:
    source = write(tmp_path / "source", tiny_model(), {**CONFIG, "quantization_config": block})
    if block is None:  # as good as none: some writers say so
        quantize_checkpoint(source, tmp_path / "out", SCHEME)
        return
    refuse(source, "already quantized")


def test_a_source_quantized_in_its_text_config_is_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "text_config": {"quantization_config": {"quant_method": "awq"}}}
    refuse(write(tmp_path / "source", tiny_model(), config), "already quantized")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
def test_codes_are_not_quantized_as_if_they_were_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    # ModelOpt's older files carry their scheme in hf_quant_config.json, so config.json looks like a bf16 model's.
    files = tiny_model()
    files["model-00002-of-00002.safetensors"][f"{MLP}.down_proj.weight"] = torch.ones(32, 48).to(dtype)
    refuse(write(tmp_path / "source", files), rf"{MLP}\.down_proj\.weight.*{str(dtype).removeprefix('torch.')}")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(marker),)

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    refuse(source, r"found only pytorch_model\.bin \(pickle is not read\); convert it to safetensors")
    assert not marker.exists()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", r"nowhere.config\.json: cannot be read")
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.json").write_text("{}")
    refuse(tmp_path / "nowhere", r"needed model\.safetensors or model\.safetensors\.index\.json, found none")


# --- indexes that lie ---


def weight_map() -> dict[str, str]:
    return {tensor: name for name, tensors in tiny_model().items() for tensor in tensors}


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "{absolute}",
        "a/../../x.safetensors",
        "sub/x.safetensors",
        "x\0.safetensors",
        "..\\x",
        "",
        "..",
        ".",
    ],
)
def test_nothing_outside_the_folder_is_opened(source: Path, tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (source / "sub").mkdir()
    for folder in (tmp_path, outside, source / "sub"):
        save_file({"secret.weight": torch.ones(16, 16)}, folder / "x.safetensors")
    file = file.format(absolute=outside / "x.safetensors")
    write_index(source, {**weight_map(), "secret.weight": file})
    with pytest.raises(CheckpointError, match="needed a file in the same folder") as caught:
        quantize_checkpoint(source, tmp_path / "target" / "out", SCHEME)
    assert repr(file) in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_a_missing_shard_is_named(source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()
    refuse(source, "names 'model-00002-of-00002.safetensors'")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({f"{MLP}.extra.weight": "model-00001-of-00002.safetensors"}, "extra"),  # listed, but in no file
        ({f"{MLP}.up_proj.weight": None}, "up_proj"),  # in a file, but not listed
        ({f"{MLP}.up_proj.weight": "model-00001-of-00002.safetensors"}, "up_proj"),  # in the other file
    ],
    ids=["not-in-its-file", "not-in-the-index", "in-another-file"],
)
def test_an_index_that_disagrees_with_its_files_is_refused(
    source: Path, change: dict[str, str | None], named: str
) -> None:
    listed = {tensor: file for tensor, file in {**weight_map(), **change}.items() if file is not None}
    write_index(source, listed)
    refuse(source, rf"'model\.layers\.0\.mlp\.{named}.*index and file disagree")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    files = tiny_model()
    first, second = files
    files[first][f"{MLP}.down_proj.weight"] = files[second][f"{MLP}.down_proj.weight"] * 2
    source = write(tmp_path / "source", files)
    for file in (first, second):
        write_index(source, {**weight_map(), f"{MLP}.down_proj.weight": file})
        refuse(source, rf"{MLP}\.down_proj\.weight")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 200_000, b"\xff\xfe"],
    ids=["empty", "cut", "list", "no-map", "map-is-a-list", "file-is-a-number", "deep", "not-utf-8"],
)
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_of_another_kind_is_refused(source: Path, name: str, text: str | bytes) -> None:
    if name == "config.json" and isinstance(text, str) and text.startswith("{"):
        text = "[" + text  # any object is a config
    (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(source, name.replace(".", r"\."))


@pytest.mark.parametrize("damage", ["cut", "no-header", "long-header", "flipped"])
def test_a_file_that_is_no_safetensors_is_named(source: Path, damage: str) -> None:
    path = source / "model-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-7:]
    elif damage == "no-header":
        content = bytearray(b"PK\x03\x04" * 8)
    elif damage == "long-header":
        content[:8] = (2**40).to_bytes(8, "little")
    else:
        content[12] ^= 0xFF
    path.write_bytes(content)
    refuse(source, rf"{path.name}: not a readable safetensors file")


def test_a_running_conversion_is_not_removed_by_a_second(source: Path, tmp_path: Path) -> None:
    outcomes: list[object] = []

    def second(name: str) -> None:
        if not outcomes:
            try:
                outcomes.append(quantize_checkpoint(source, tmp_path / "out", SCHEME))
            except CheckpointError as error:
                outcomes.append(error)

    quantize_checkpoint(source, tmp_path / "out", SCHEME, second)
    assert isinstance(outcomes[0], CheckpointError)
    everything(tmp_path / "out")


def test_a_target_inside_the_source_is_refused(source: Path) -> None:
    before = {path.name for path in source.iterdir()}
    with pytest.raises(CheckpointError):
        quantize_checkpoint(source, source / "out", SCHEME)
    assert {path.name for path in source.iterdir()} == before


def test_leftovers_of_a_killed_conversion_do_not_get_in(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model-00009-of-00009.safetensors").write_text("half of a shard")
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert not partial.exists()
    assert "model-00009-of-00009.safetensors" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_a_group_that_engines_fuse_is_not_quantized_in_part(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj: left alone, but .* ignore all of its parts or none"):
        quantize_checkpoint(source, tmp_path / "out", replace(SCHEME, ignore=(*SCHEME.ignore, "*.q_proj")))
    assert list(tmp_path.glob("out*")) == []


def test_stacked_experts_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    files = tiny_model()
    stacked = "model.layers.0.mlp.experts.gate_up_proj"
    files["model-00002-of-00002.safetensors"][stacked] = torch.ones(4, 32, 16, dtype=torch.bfloat16)
    source = write(tmp_path / "source", files)
    refuse(source, rf"{stacked.replace('.', '[.]')}: got experts stacked in one tensor \(4, 32, 16\)")
    quantize_checkpoint(source, tmp_path / "out", replace(SCHEME, ignore=(*SCHEME.ignore, "*.experts.*")))


def test_a_weight_too_small_to_be_loaded_again_is_refused(tmp_path: Path) -> None:
    files = tiny_model()
    files["model-00002-of-00002.safetensors"][f"{MLP}.down_proj.weight"].fill_(1e-36)
    refuse(write(tmp_path / "source", files), r"down_proj: got an amax of .*, needed 1e-34 or 0")


def test_a_target_that_cannot_be_made_is_one_clear_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize_checkpoint(source, tmp_path / "file" / "out", SCHEME)
