"""Conversion: what is written is what was meant, whatever interrupts it, and what cannot be finished leaves nothing."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    ATTENTION,
    CONFIG,
    EXPERT,
    FIRST,
    GROUPS,
    MLP,
    QUANTIZED,
    SECOND,
    SINGLE,
    contents,
    everything,
    header_of,
    merged,
    single,
    tiny_model,
    write,
)
from conftest import assert_same_bytes, assert_same_tensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import (
    OUTPUT_FORMATS,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    partial_folder,
    plan_conversion,
    quantize_checkpoint,
)
from fouroversix_plugin.checkpoint import plan as plan_module
from fouroversix_plugin.checkpoint import target as target_module
from fouroversix_plugin.checkpoint import write as write_module
from fouroversix_plugin.checkpoint.files import INDEX
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe, Scheme, preset, preset_names
from fouroversix_plugin.reference import quantize as reference_quantize

E8M0 = torch.float8_e8m0fnu
SCHEME, W4A16 = preset("nvfp4_4over6"), preset("w4a16")
CARD = "README.md"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "source", tiny_model())
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "modeling.py").write_text("raise SystemExit('code of a checkpoint ran')")
    (folder / "old.bin").write_bytes(b"a pickle")
    return folder


def stored(tensors: Mapping[str, Tensor], module: str) -> NVFP4Tensor:
    return NVFP4Tensor(*(tensors[f"{module}.weight{suffix}"] for suffix in ("", "_scale", "_scale_2")))


def assert_nothing_left(target: Path) -> None:
    assert not list(target.parent.glob(f"*{target.name}*"))


def refuse(source: Path, message: str, scheme: Scheme = SCHEME, **options: Any) -> CheckpointError:
    """The conversion fails with ``message``, and neither a target nor a partial folder is left."""
    target = source.parent / "refused" / "out"
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize_checkpoint(source, target, scheme, **options)
    assert not target.parent.exists()
    return caught.value


# --- what is written ---


@pytest.mark.parametrize("max_shard_size", [1 << 30, 1000], ids=["one-file", "many-files"])
def test_weights_are_stored_as_quantized_with_the_amax_their_fused_layer_shares(
    source: Path, tmp_path: Path, max_shard_size: int
) -> None:
    quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=max_shard_size)
    before, after = merged(tiny_model()), everything(tmp_path / "out")
    for group in GROUPS:
        amax = max(before[f"{module}.weight"].abs().max().item() for module in group)
        for module in group:
            weight = before[f"{module}.weight"]
            assert_same_bytes(stored(after, module), reference_quantize(weight, Recipe(), amax=torch.tensor(amax)))
            for suffix in ("", "_scale", "_scale_2"):
                del after[f"{module}.weight{suffix}"]
    kept = {name: tensor for name, tensor in before.items() if name.removesuffix(".weight") not in QUANTIZED}
    assert set(after) == set(kept), "no tensor more, none less"
    for name, tensor in kept.items():
        assert_same_tensor(name, after[name], tensor)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_writes_what_the_reference_computes(source: Path, tmp_path: Path, name: str) -> None:
    scheme = preset(name)
    if scheme.input_scale == "static":
        refuse(source, "needs input scales from calibration, which this conversion does not make", scheme)
        return
    quantize_checkpoint(source, tmp_path / "out", scheme)
    weight = merged(tiny_model())[f"{MLP}.down_proj.weight"]
    expected = reference_quantize(weight, scheme.weights)
    assert_same_bytes(stored(everything(tmp_path / "out"), f"{MLP}.down_proj"), expected)


def test_the_merged_layer_has_the_bytes_of_its_parts(source: Path, tmp_path: Path) -> None:
    # What an engine gets that merges q, k and v first and quantizes while it loads.
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    before, after = merged(tiny_model()), everything(tmp_path / "out")
    whole = fos.quantize(torch.cat([before[f"{module}.weight"] for module in GROUPS[0]]))
    for part, suffix in ((whole.packed, ""), (whole.block_scale.view(torch.uint8), "_scale")):
        pieces = [after[f"{module}.weight{suffix}"].view(torch.uint8) for module in GROUPS[0]]
        assert_same_tensor(f"weight{suffix}", torch.cat(pieces), part)
    for module in GROUPS[0]:
        assert_same_tensor("weight_scale_2", after[f"{module}.weight_scale_2"], whole.decode_scale)


def test_the_config_says_what_was_done(source: Path, tmp_path: Path) -> None:
    scheme = Scheme(weights=Recipe("mae", 448), activations=None, ignore=("*.mlp*", "*embed_tokens"))
    plan = quantize_checkpoint(source, tmp_path / "out", scheme)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    written = Scheme.from_dict(config.pop("quantization_config"))
    assert config == CONFIG
    assert written == plan.scheme
    assert written.producer == {"name": "fouroversix-plugin", "version": fos.__version__}
    assert (written.weights, written.activations, written.ignore) == (scheme.weights, None, scheme.ignore)
    quantized = {name.removesuffix("_scale") for name in everything(tmp_path / "out") if name.endswith("_scale")}
    assert quantized == {f"{ATTENTION}.{name}_proj.weight" for name in "qkvo"}


def test_a_layer_left_as_it_was_is_one_the_config_ignores(source: Path, tmp_path: Path) -> None:
    # An engine asks only the config: a layer that it does not ignore must have been quantized.
    plan = quantize_checkpoint(source, tmp_path / "out", SCHEME)
    after = everything(tmp_path / "out")
    linear = {name.removesuffix(".weight") for name, t in after.items() if name.endswith(".weight") and t.ndim == 2}
    alone = {"model.embed_tokens", "model.layers.1.mlp.gate", f"{MLP}.odd_proj"}
    assert linear - QUANTIZED == alone
    assert {module for module in linear if plan.scheme.ignores(module)} == alone
    reasons = {left.name: left.reason for left in plan.left_alone}
    assert reasons.pop("model.embed_tokens") == reasons.pop("model.layers.1.mlp.gate") == "in `ignore`"
    assert reasons.pop(f"{MLP}.odd_proj") == "K = 24 is no multiple of 16"
    assert {name: reason for name, reason in reasons.items() if "linear" not in reason} == {}


def test_other_files_are_copied_and_pickles_and_stale_indexes_are_not(source: Path, tmp_path: Path) -> None:
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "model.gguf").write_text("the model again")
    (source / ".gitattributes").write_text("*.bin filter=lfs")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert set(contents(tmp_path / "out")) == {SINGLE, "config.json", CARD, "tokenizer.json", "modeling.py"}
    for name in ("tokenizer.json", "modeling.py"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}, "no partial folder"


def test_a_folder_of_the_models_own_is_lost(source: Path, tmp_path: Path) -> None:
    """What embedding models do with the transformer's output, and chat templates; not the model for other runtimes."""
    folders = {"1_Pooling": "config.json", "2_Dense": "model.safetensors", "onnx": "model.json"}
    for folder, file in {**folders, "additional_chat_templates": "tool_use.jinja"}.items():
        (source / folder).mkdir()
        (source / folder / file).write_text(folder)
    modules = [{"idx": i, "path": path} for i, path in enumerate(("", "1_Pooling", "2_Dense", "../source", "gone"))]
    (source / "modules.json").write_text(json.dumps(modules))
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    below = {path.relative_to(tmp_path / "out"): path.read_text() for path in (tmp_path / "out").glob("*/*")}
    copied = {"1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool_use.jinja"}
    assert {str(path) for path in below} == copied
    assert below[Path("1_Pooling/config.json")] == "1_Pooling"
    (source / "modules.json").rename(tmp_path / "modules.json")
    quantize_checkpoint(source, tmp_path / "without", SCHEME)
    own, others = (contents(tmp_path / name) for name in ("out", "without"))
    assert own.keys() - others.keys() == {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"}
    assert own[SINGLE] == others[SINGLE]
    (tmp_path / "modules.json").rename(source / "modules.json")
    shutil.rmtree(source / "2_Dense")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("")
    (source / "2_Dense").symlink_to(tmp_path / "elsewhere")
    refuse(source, "2_Dense.*needed a file in the folder itself")
    (source / "modules.json").write_text("{}")
    refuse(source, "modules.json: got something else, needed a JSON array of objects")


@pytest.mark.parametrize("name", ["chat.jinja", CARD])
def test_a_file_that_cannot_be_copied_is_found_before_the_work(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text("secret")
    (source / name).symlink_to(tmp_path / "elsewhere")
    told: list[str] = []
    with pytest.raises(CheckpointError, match=rf"{name}: .*needed a file in the folder itself"):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, progress=lambda name, _: told.append(name))
    assert told == [], "hours of work would be lost"
    assert_nothing_left(tmp_path / "out")


def test_progress_comes_to_all_bytes_of_the_source(source: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    plan = quantize_checkpoint(source, tmp_path / "out", SCHEME, progress=lambda *done: told.append(done))
    assert {name for name, _ in told} == set(merged(tiny_model()))
    assert sum(nbytes for _, nbytes in told) == plan.source_nbytes
    assert plan.source_nbytes == sum(tensor.nbytes for tensor in merged(tiny_model()).values())


def test_a_weight_that_is_stored_is_one_the_loader_accepts(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    after, loaded = everything(tmp_path / "out"), load_checkpoint(tmp_path / "out")
    assert set(loaded.quantized.values()) == QUANTIZED
    for module in QUANTIZED:
        q = loaded[f"{module}.weight"]
        assert isinstance(q, NVFP4Tensor)
        assert_same_bytes(q, stored(after, module))


# --- shards ---


@pytest.mark.parametrize("max_shard_size", [1, 500, 3000, 20_000, 1 << 30])
def test_files_are_no_larger_than_asked_unless_one_module_is(source: Path, tmp_path: Path, max_shard_size: int) -> None:
    plan = quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=max_shard_size)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == ([SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)])
    assert files == [shard.file for shard in plan.shards]
    sizes = []
    for file in files:
        held = load_file(tmp_path / "out" / file)
        modules = {name.rpartition(".weight")[0] or name for name in held}
        sizes.append(sum(tensor.nbytes for tensor in held.values()))
        assert len(modules) == 1 or sizes[-1] <= max_shard_size
    assert (count > 1) == (sum(sizes) > max_shard_size)
    placed = {name: file for file in files for name in header_of(tmp_path / "out" / file) if name != "__metadata__"}
    for module in QUANTIZED:
        assert len({placed[f"{module}.weight{suffix}"] for suffix in ("", "_scale", "_scale_2")}) == 1
    everything(tmp_path / "out")  # index and total_size
    assert Checkpoint.open(tmp_path / "out").warnings == ()


def test_layers_are_in_the_order_of_their_numbers_and_tensors_aligned(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": torch.ones(16, 32) for i in (0, 1, 2, 9, 10, 11)}
    tensors |= {"odd": torch.arange(3, dtype=torch.uint8), "single": torch.tensor(1.5), "half": torch.ones(3).half()}
    source = single(tmp_path / "source", tensors)
    quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=600)
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    files = [index[f"model.layers.{i}.mlp.down_proj.weight"] for i in (0, 1, 2, 9, 10, 11)]
    assert files == sorted(files)
    assert len(set(files)) > 2
    assert list(index) == sorted(index)
    for path in (tmp_path / "out").glob("*.safetensors"):
        header = header_of(path)
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert begin % 8 == 0
        for name, described in header.items():
            if name != "__metadata__":
                size = {"F32": 4, "F16": 2, "U8": 1, "F8_E4M3": 1}[described["dtype"]]
                assert (begin + described["data_offsets"][0]) % size == 0, name


# --- M7, M8, M9: the same bytes, modes, sizes ---


def test_the_same_source_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_checkpoint(source, tmp_path / name, SCHEME, max_shard_size=3000)
        for path in source.iterdir():
            os.utime(path, (0, 0))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("nbytes", [1, 300, 4096])
def test_how_many_rows_are_worked_on_at_once_changes_no_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    quantize_checkpoint(source, tmp_path / "whole", SCHEME)
    monkeypatch.setattr(write_module, "_ROWS_NBYTES", nbytes)
    monkeypatch.setattr(write_module, "_COPY_NBYTES", nbytes)
    calls: list[str] = []
    plan = quantize_checkpoint(source, tmp_path / "pieces", SCHEME, progress=lambda name, _: calls.append(name))
    assert calls.count(f"{MLP}.down_proj.weight") == {1: 32, 300: 32, 4096: 2}[nbytes]
    assert len(calls) > len(plan.source.checkpoint.tensors)
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


def test_the_number_of_threads_changes_no_byte(source: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        quantize_checkpoint(source, tmp_path / str(threads), SCHEME)
    torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        quantize_checkpoint(source, tmp_path / device, SCHEME, device=device)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_file_modes_follow_the_umask(source: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=3000)
    finally:
        assert os.umask(before) == umask, "left as it was"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("format", OUTPUT_FORMATS)
@pytest.mark.parametrize("max_shard_size", [3000, 1 << 30])
def test_a_plan_writes_nothing_and_knows_the_size_to_the_byte(
    source: Path, tmp_path: Path, format: str, max_shard_size: int
) -> None:
    before = contents(tmp_path)
    plan = plan_conversion(source, W4A16, format, max_shard_size)
    assert contents(tmp_path) == before
    done = quantize_checkpoint(source, tmp_path / "out", W4A16, format=format, max_shard_size=max_shard_size)
    assert plan == done
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert written == {shard.file: len(shard.header) + shard.nbytes for shard in plan.shards}
    assert plan.nbytes == sum(written.values())


# --- C1, C3, C6, C9: contents ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("module", [f"{ATTENTION}.q_proj", f"{MLP}.up_proj", f"{EXPERT}.w2"])
def test_a_damaged_weight_is_named_with_count_and_place_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, value: float
) -> None:
    files = tiny_model()
    for tensors in files.values():
        if f"{module}.weight" in tensors:
            tensors[f"{module}.weight"][[9, 13], [5, 2]] = value
    source = write(tmp_path / "source", files)
    message = rf"{module}\.weight: got 2 NaN or infinite values, the first at \(9, 5\), needed finite weights"
    refuse(source, message)
    monkeypatch.setattr(write_module, "_ROWS_NBYTES", 4 * 32 * 2)  # two or four rows at once
    refuse(source, message)


def test_a_damaged_tensor_that_is_only_copied_is_copied(tmp_path: Path) -> None:
    files = tiny_model()
    files[FIRST]["model.layers.0.input_layernorm.weight"][3] = float("nan")
    quantize_checkpoint(write(tmp_path / "source", files), tmp_path / "out", SCHEME)
    after = everything(tmp_path / "out")["model.layers.0.input_layernorm.weight"]
    assert_same_tensor("norm", after, files[FIRST]["model.layers.0.input_layernorm.weight"])


def convert(
    tmp_path: Path, weights: Mapping[str, Tensor], scheme: Scheme = SCHEME, **options: Any
) -> dict[str, Tensor]:
    """What becomes of weights by module name, in one file."""
    source = single(tmp_path / "source", {f"{module}.weight": weight for module, weight in weights.items()})
    quantize_checkpoint(source, tmp_path / "out", scheme, **options)
    return everything(tmp_path / "out")


@pytest.mark.parametrize("format", OUTPUT_FORMATS)
def test_zeros_stay_zeros(tmp_path: Path, format: str) -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[3], weight[:, 16:32] = 0, 0
    convert(
        tmp_path, {"zero": torch.zeros(16, 32), "minus": -torch.zeros(16, 32), "part": weight}, W4A16, format=format
    )
    loaded = load_checkpoint(tmp_path / "out")
    for name in ("zero", "minus"):
        q = loaded[f"{name}.weight"]
        assert isinstance(q, NVFP4Tensor)
        assert not q.block_scale.view(torch.uint8).any()
        assert q.decode_scale.item() == 1.0
        assert not fos.dequantize(q).any()
    values = fos.dequantize(loaded["part.weight"])  # type: ignore[arg-type]
    assert not values[3].any()
    assert not values[:, 16:32].any()
    assert values[:3, :16].any()


@pytest.mark.parametrize("columns", [8, 17, 24, 5128])
def test_columns_that_no_block_divides_are_left_alone_and_said_so(tmp_path: Path, columns: int) -> None:
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(2)).bfloat16()
    after = convert(tmp_path, {"odd": weight, "even": torch.ones(4, 32)})
    assert_same_tensor("odd", after["odd.weight"], weight)
    assert "odd.weight_scale" not in after
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert Scheme.from_dict(config["quantization_config"]).ignores("odd")


def test_layers_that_predict_more_tokens_are_quantized(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1, 2, 10)] + ["model.layers.2.eh_proj"]
    source = single(tmp_path / "source", {f"{name}.weight": torch.ones(4, 32) for name in names})
    config = json.loads((source / "config.json").read_text())
    for changed, left in (
        (config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, 2),
        (config | {"text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 9}}, 3),
        (config | {"num_hidden_layers": 11, "num_nextn_predict_layers": 1}, 1),
        (config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 10**12}, 3),
        (config | {"num_hidden_layers": 2}, 1),
    ):
        (source / "config.json").write_text(json.dumps(changed))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        quantize_checkpoint(source, tmp_path / "out", preset("w4a16"))
        after = everything(tmp_path / "out")
        assert len([name for name in names if f"{name}.weight_scale" not in after]) == left
        scheme = Scheme.from_dict(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
        assert all(scheme.ignores(name) == (f"{name}.weight_scale" not in after) for name in names)
        if changed.get("num_hidden_layers") == 11:  # what vLLM calls MiMo's model.mtp_layers.0
            assert scheme.ignores("model.layers.11.self_attn.qkv_proj")


def test_weights_that_engines_turn_around_are_quantized(tmp_path: Path) -> None:
    names = {"h.0.attn.c_attn": (32, 96), "h.0.mlp.other": (4, 32)}
    source = single(tmp_path / "source", {f"{name}.weight": torch.ones(shape) for name, shape in names.items()})
    config = json.loads((source / "config.json").read_text()) | {"model_type": "gpt2"}
    (source / "config.json").write_text(json.dumps(config))
    plan = quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert [alone.reason for alone in plan.left_alone] == ["stored as [K, N], which engines turn around"]
    assert plan.scheme.ignores("transformer.h.0.attn.c_attn")
    assert not plan.scheme.ignores("h.0.mlp.other")


def test_what_engines_build_unquantized_is_quantized(tmp_path: Path) -> None:
    """A Mamba-1 mixer has layers of names that Mamba-2's have, too."""
    kept = [f"layers.0.mamba.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    quantized = ["layers.1.mamba.in_proj", "layers.1.mamba.out_proj", "layers.0.mlp.x_proj"]
    weights = {f"{name}.weight": torch.ones(16, 32) for name in kept + quantized}
    plan = quantize_checkpoint(single(tmp_path / "source", weights), tmp_path / "out", SCHEME)
    assert {alone.name: alone.reason[:10] for alone in plan.left_alone} == dict.fromkeys(kept, "of a Mamba")
    assert [name for name in kept + quantized if plan.scheme.ignores(name)] == kept


@pytest.mark.parametrize("columns", [16, 48, 80, 5136])
def test_columns_of_whole_blocks_are_quantized_whatever_a_kernel_pads_to(tmp_path: Path, columns: int) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(3))
    assert_same_bytes(stored(convert(tmp_path, {"w": weight}), "w"), reference_quantize(weight, Recipe()))


@pytest.mark.parametrize("names", plan_module._FUSED, ids="+".join)
def test_what_engines_merge_is_scaled_apart(tmp_path: Path, names: tuple[str, ...]) -> None:
    weights = {f"a.{name}": torch.randn(8 * i, 32) * i for i, name in enumerate(names, 1)}
    after = convert(tmp_path, weights)
    amax = max(weight.abs().amax() for weight in weights.values())
    for name, weight in weights.items():
        assert_same_bytes(stored(after, name), reference_quantize(weight, Recipe(), "tensor", amax))


def test_only_some_of_what_engines_fuse_having_whole_blocks_is_refused(tmp_path: Path) -> None:
    source = single(
        tmp_path / "source", {"a.gate_proj.weight": torch.ones(4, 32), "a.up_proj.weight": torch.ones(4, 24)}
    )
    refuse(
        source, r"a\.up_proj: left alone \(K = 24.*, but a\.gate_proj is quantized; .*ignore all of its parts or none"
    )


def test_an_empty_weight_is_copied(tmp_path: Path) -> None:
    after = convert(tmp_path, {"none": torch.empty(0, 32), "flat": torch.empty(16, 0), "w": torch.ones(16, 32)})
    assert (tuple(after["none.weight"].shape), tuple(after["flat.weight"].shape)) == ((0, 32), (16, 0))


EXTREMES = {
    "fp16-largest": torch.tensor([65504.0, -65504, 1, -1, 0.1] * 64).half() / 64,  # 65504 itself exceeds what is served
    "fp16-denormals": torch.arange(-160, 160).half() * 2.0**-24,
    "bf16-tiny": (torch.arange(-160, 160) * 1e-33).bfloat16(),
    "fp32-denormal-blocks": torch.cat([torch.full((16,), 1e-40), torch.arange(304.0)]),
    "minus-zero": torch.tensor([-0.0, 0.0, -1e-9, 1.0] * 80),
    "ties": torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -2.5] * 32),
    "every-bf16": torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16),
    "every-fp16": torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_values_are_stored_as_the_reference_computes_them(tmp_path: Path, name: str) -> None:
    values = EXTREMES[name]
    values = values[values.isfinite() & (values.float().abs() <= 1536)]
    weight = values[: len(values) // 32 * 32].reshape(-1, 32).contiguous()
    q = stored(convert(tmp_path, {"w": weight}), "w")
    assert_same_bytes(q, reference_quantize(weight, Recipe()))
    assert fos.dequantize(q).isfinite().all()
    load_checkpoint(tmp_path / "out")["w.weight"]


@pytest.mark.parametrize("amax", [1e-36, 1537.0, 65504.0, 3.39e38])
def test_a_weight_that_could_not_be_loaded_again_is_refused_with_its_range(tmp_path: Path, amax: float) -> None:
    source = single(tmp_path / "source", {"l.down_proj.weight": torch.full((16, 32), amax)})
    refuse(source, r"l\.down_proj: got an amax of .*, needed 0 or 1e-34 to 1536; add it to `ignore`")


# --- what may be quantized ---


@pytest.mark.parametrize("block", [{"quant_method": "awq"}, SCHEME.to_dict(), {}, None, "fp8"], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["", "in-text_config"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantized_source_is_refused_whatever_its_block_looks_like(
    tmp_path: Path, block: object, nested: bool, key: str
) -> None:
    config = {**CONFIG, "text_config": {key: block}} if nested else {**CONFIG, key: block}
    source = write(tmp_path / "source", tiny_model(), config)
    if block is None:  # as good as none: some writers say so
        quantize_checkpoint(source, tmp_path / "out", SCHEME)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert Scheme.from_dict(written["quantization_config"]).weights == SCHEME.weights
        assert "compression_config" not in written
        return
    error = refuse(source, "already quantized" if isinstance(block, dict) else f"{key}: got 'fp8', needed an object")
    assert str(source) in str(error)


def test_our_own_output_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    for format in OUTPUT_FORMATS:
        quantize_checkpoint(source, tmp_path / format, W4A16, format=format)
        refuse(tmp_path / format, rf"already quantized \({format}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
def test_codes_are_not_quantized_as_if_they_were_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    # ModelOpt's older files carry their scheme in hf_quant_config.json, so config.json looks like a bf16 model's.
    files = tiny_model()
    files[SECOND][f"{MLP}.down_proj.weight"] = torch.ones(32, 48).to(dtype)
    names = {torch.uint8: "U8", torch.int8: "I8", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}
    refuse(write(tmp_path / "source", files), rf"{MLP}\.down_proj\.weight: got {names[dtype]}")


def test_a_group_that_engines_fuse_is_not_quantized_in_part(source: Path) -> None:
    scheme = replace(SCHEME, ignore=(*SCHEME.ignore, "*.q_proj"))
    refuse(source, r"q_proj: left alone \(in `ignore`\), but .* ignore all of its parts or none", scheme)


def test_options_that_mean_nothing_are_refused(source: Path) -> None:
    refuse(source, r"format: got 'gguf', needed one of nvfp4_4over6, modelopt, compressed-tensors", format="gguf")
    refuse(source, r"max_shard_size: got 0, needed bytes", max_shard_size=0)
    for format in ("modelopt", "compressed-tensors"):
        refuse(source, rf"format '{format}'.*needs input scales from calibration.*`w4a16`", SCHEME, format=format)


# --- FP8 sources ---


def fp8_model(scaling: str, rows: int = 200, columns: int = 288) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(FP8 tensors with their scales under ``weight_scale``, the same weights in fp32)."""
    generator = torch.Generator().manual_seed(4)
    fp8, full = {}, {}
    modules = [f"{ATTENTION}.{name}_proj" for name in "qk"] + [f"{MLP}.down_proj", "lm_head"]
    for i, module in enumerate(modules):
        codes = (torch.randn(rows, columns, generator=generator) * 50).to(torch.float8_e4m3fn)
        shape = {"tensor": (), "tensor-1": (1,), "channel": (rows, 1), "channel-1d": (rows,)}.get(scaling, (2, 3))
        scale = (torch.rand(shape, generator=generator) + 0.5) * 10.0 ** -(i + 2)
        spread = torch.empty(rows, columns)
        for r in range(rows):
            for c in range(0, columns, 32):
                per_row, per_tensor = scale.numel() == rows, scale.numel() == 1
                value = scale.flatten()[0 if per_tensor else r] if per_row or per_tensor else scale[r // 128, c // 128]
                spread[r, c : c + 32] = value
        fp8[f"{module}.weight"], fp8[f"{module}.weight_scale"] = codes, scale
        full[f"{module}.weight"] = codes.float() * spread
    return fp8, full


FP8_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("scaling", ["tensor", "tensor-1", "channel", "channel-1d", "block"])
def test_an_fp8_source_gives_the_bytes_of_its_weights_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaling: str, name: str
) -> None:
    fp8, full = fp8_model(scaling)
    fp8 = {key.replace("weight_scale", name): tensor for key, tensor in fp8.items()}
    fp8 |= {f"{MLP}.down_proj.input_scale": torch.ones(()), "norm.weight": torch.ones(288).bfloat16()}
    config = {**CONFIG, "quantization_config": FP8_CONFIGS["fp8"]}
    monkeypatch.setattr(write_module, "_ROWS_NBYTES", 100 * 4 * 288)  # two pieces, of whole blocks all the same
    quantize_checkpoint(single(tmp_path / "fp8", fp8, config), tmp_path / "from fp8", SCHEME)
    quantize_checkpoint(single(tmp_path / "full", full), tmp_path / "from full", SCHEME)
    got, expected = everything(tmp_path / "from fp8"), everything(tmp_path / "from full")
    assert_same_tensor("ignored: BF16", got.pop("lm_head.weight"), expected.pop("lm_head.weight").bfloat16())
    assert_same_tensor("norm", got.pop("norm.weight"), fp8["norm.weight"])
    assert set(got) == set(expected), "no FP8 scale is left"
    for key, tensor in expected.items():
        assert_same_tensor(key, got[key], tensor)
    block = json.loads((tmp_path / "from fp8" / "config.json").read_text())["quantization_config"]
    assert Scheme.from_dict(block).weights == SCHEME.weights


@pytest.mark.parametrize("method", FP8_CONFIGS)
def test_every_way_to_say_fp8_is_understood(tmp_path: Path, method: str) -> None:
    fp8, full = fp8_model("channel", rows=32, columns=64)
    source = single(tmp_path / "fp8", fp8, {**CONFIG, "quantization_config": FP8_CONFIGS[method]})
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    expected = reference_quantize(full[f"{MLP}.down_proj.weight"], Recipe())
    assert_same_bytes(stored(everything(tmp_path / "out"), f"{MLP}.down_proj"), expected)


def test_fp8_blocks_of_another_size_are_taken_from_the_config(tmp_path: Path) -> None:
    codes = torch.ones(64, 64).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = {"l.weight": codes, "l.weight_scale_inv": scale}
    block = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    source = single(tmp_path / "source", tensors, {**CONFIG, "quantization_config": block})
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    expected = reference_quantize(scale.repeat_interleave(32, 0).repeat_interleave(32, 1), Recipe())
    assert_same_bytes(stored(everything(tmp_path / "out"), "l"), expected)
    for size in ([32], "128", [0, 128], [True, 2]):
        config = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
        (source / "config.json").write_text(json.dumps(config))
        refuse(source, "weight_block_size: got .*, needed two sizes")


def test_fp8_weights_without_scales_or_with_others_are_refused(tmp_path: Path) -> None:
    codes = torch.ones(256, 64).to(torch.float8_e4m3fn)
    refuse(
        single(tmp_path / "a", {"l.weight": codes}), r"l\.weight: got F8_E4M3 without a scale, needed l\.weight_scale"
    )
    scale = torch.ones(3, 1)
    refuse(
        single(tmp_path / "b", {"l.weight": codes, "l.weight_scale": scale}),
        r"l\.weight_scale: got shape \(3, 1\), needed one value, one per row \(256\) or one per block \(2, 1\)",
    )
    nan = torch.full((), float("nan"))
    refuse(single(tmp_path / "c", {"l.weight": codes, "l.weight_scale": nan}), r"l\.weight: got 16384 NaN or infinite")
    codes = torch.ones(16, 16, 3).to(torch.float8_e4m3fn)
    tensors = {"conv.weight": codes, "conv.weight_scale": torch.ones(16)}
    refuse(single(tmp_path / "d", tensors), r"conv\.weight: got F8_E4M3 of shape \(16, 16, 3\), needed .*2-D")
    stacked = {"layers.0.experts.down_proj": codes}
    refuse(single(tmp_path / "e", stacked), "got FP8, needed BF16, F16, F32 .*multiply them out first")
    turned = {"h.0.attn.c_attn.weight": codes[0], "h.0.attn.c_attn.weight_scale": torch.ones(())}
    source = single(tmp_path / "f", turned, {"model_type": "gpt2"})
    refuse(source, r"c_attn\.weight: got F8_E4M3 of shape \(16, 3\), needed .*\[N, K\]")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_exponents_as_bare_bytes_are_not_read_as_fp8_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    # MXFP8 and others keep E8M0 as U8: 2^-7 is 120 there.
    scale = torch.ones(256, 1).to(dtype)
    tensors = {"l.weight": torch.ones(256, 32).to(torch.float8_e4m3fn), "l.weight_scale": scale}
    refuse(single(tmp_path / "source", tensors), r"l\.weight_scale: got \w+, needed F64, BF16, F16, F32, F8_E8M0")


def test_fp8_scales_may_be_exponents(tmp_path: Path) -> None:
    scale = torch.tensor([[0.25], [0.125]])
    tensors = {"l.weight": torch.ones(256, 64).to(torch.float8_e4m3fn), "l.weight_scale_inv": scale.to(E8M0)}
    quantize_checkpoint(single(tmp_path / "source", tensors), tmp_path / "out", SCHEME)
    expected = reference_quantize(scale.repeat_interleave(128, 0).expand(256, 64), Recipe())
    assert_same_bytes(stored(everything(tmp_path / "out"), "l"), expected)


# --- stacked experts ---

EXPERTS, INNER, HIDDEN = 3, 32, 48


def experts() -> dict[str, Tensor]:
    """The weights of every expert, unstacked."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": (torch.randn(shape, generator=generator) * 4.0**e).bfloat16()
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }


def stack(names: tuple[str, ...], transposed: bool) -> Tensor:
    unstacked = experts()
    matrices = [
        torch.cat([unstacked[f"model.layers.0.mlp.experts.{e}.{name}.weight"] for name in names])
        for e in range(EXPERTS)
    ]
    return torch.stack([matrix.t() if transposed else matrix for matrix in matrices]).contiguous()


@pytest.mark.parametrize("transposed", [False, True], ids=["E-N-K", "E-K-N"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("separate", [False, True], ids=["gate_up", "gate-and-up"])
@pytest.mark.parametrize("nbytes", [1, 1 << 26])
def test_stacked_experts_give_the_files_of_the_unstacked_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool, suffix: str, separate: bool, nbytes: int
) -> None:
    monkeypatch.setattr(write_module, "_ROWS_NBYTES", nbytes)
    prefix, router = "model.layers.0.mlp.experts", {"model.layers.0.mlp.gate.weight": torch.ones(EXPERTS, HIDDEN)}
    together = [("gate_up_proj", ("gate_proj", "up_proj"))]
    apart: list[tuple[str, tuple[str, ...]]] = [("gate_proj", ("gate_proj",)), ("up_proj", ("up_proj",))]
    tensors = {
        f"{prefix}.{name}{suffix}": stack(names, transposed)
        for name, names in [*(apart if separate else together), ("down_proj", ("down_proj",))]
    }
    config = {**CONFIG, "hidden_size": HIDDEN}
    quantize_checkpoint(single(tmp_path / "stacked", tensors | router, config), tmp_path / "a", SCHEME)
    quantize_checkpoint(single(tmp_path / "unstacked", experts() | router, config), tmp_path / "b", SCHEME)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    gate, up = (experts()[f"{prefix}.1.{name}_proj.weight"] for name in ("gate", "up"))
    amax = torch.maximum(gate.abs().max(), up.abs().max()).float()
    expected = reference_quantize(up, Recipe(), amax=amax)
    assert_same_bytes(stored(everything(tmp_path / "a"), f"{prefix}.1.up_proj"), expected)


def test_experts_of_granite_are_left_as_they_are(tmp_path: Path) -> None:
    """Stacked beside no module of experts, and with a width that does not tell which dimension is the input."""
    moe = "model.layers.0.block_sparse_moe"
    gate_up, down = stack(("gate_proj", "up_proj"), False), stack(("down_proj",), False)
    shared = torch.ones(32, HIDDEN)
    tensors = {f"{moe}.input_linear.weight": gate_up, f"{moe}.output_linear.weight": down}
    tensors["model.layers.0.shared_mlp.input_linear.weight"] = shared
    source = single(tmp_path / "source", tensors, {**CONFIG, "hidden_size": 2 * INNER})
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    after = everything(tmp_path / "out")
    for e in range(EXPERTS):
        for name, weight in (
            ("gate_proj", gate_up[e, :INNER]),
            ("up_proj", gate_up[e, INNER:]),
            ("down_proj", down[e]),
        ):
            amax = gate_up[e].abs().max().float() if name != "down_proj" else None
            expected = reference_quantize(weight, Recipe(), amax=amax)
            assert_same_bytes(stored(after, f"{moe}.experts.{e}.{name}"), expected)
    assert_same_bytes(stored(after, "model.layers.0.shared_mlp.input_linear"), reference_quantize(shared, Recipe()))


@pytest.mark.parametrize("suffix", ["experts.down_proj", "block_sparse_moe.output_linear.weight"])
@pytest.mark.parametrize("format", OUTPUT_FORMATS)
def test_engines_ask_for_stacked_experts_that_were_left_alone(tmp_path: Path, suffix: str, format: str) -> None:
    tensors = {f"layers.0.{suffix}": torch.ones(2, 48, 24), "layers.0.mlp.weight": torch.ones(16, 32)}
    source = single(tmp_path / "source", tensors, {**CONFIG, "hidden_size": 48})
    quantize_checkpoint(source, tmp_path / "out", W4A16, format=format)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    holder = "layers.0.experts" if suffix.startswith("experts") else "layers.0.block_sparse_moe.experts"
    assert holder in block["ignore"]


@pytest.mark.parametrize("pattern", ["*.experts", "*.experts.*", "model.layers.0.block_sparse_moe.experts"])
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_that_are_ignored_together_are_quantized(tmp_path: Path, pattern: str, stacked: bool) -> None:
    """By whatever name engines or the checkpoint have for them."""
    moe = "model.layers.0.block_sparse_moe"
    apart = {f"{moe}.{name.removeprefix('model.layers.0.mlp.')}": weight for name, weight in experts().items()}
    both = {f"{moe}.input_linear.weight": stack(("gate_proj", "up_proj"), False)}
    source = single(tmp_path / "source", {**(both if stacked else apart), "o_proj.weight": torch.ones(16, 32)})
    scheme = replace(SCHEME, ignore=(pattern,))
    plan = quantize_checkpoint(source, tmp_path / "out", scheme)
    assert [matrix.module for group in plan.groups.values() for matrix in group] == ["o_proj"]
    names = [name.removesuffix(".weight") for name in apart]
    assert plan.scheme.ignores(f"{moe}.experts", names)


@pytest.mark.parametrize("ignored", ["*.down_proj", "*.experts.0.*", "*.experts.1.gate_proj|*.experts.1.up_proj"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_layer_of_experts_is_quantized_in_part(tmp_path: Path, ignored: str, stacked: bool) -> None:
    prefix = "model.layers.0.mlp.experts"
    apart = {f"{prefix}.{name}": stack((name,), False) for name in ("gate_proj", "up_proj", "down_proj")}
    source = single(tmp_path / "source", apart if stacked else experts(), {**CONFIG, "hidden_size": HIDDEN})
    scheme = replace(SCHEME, ignore=(*SCHEME.ignore, *ignored.split("|")))
    message = "`ignore` matches" if stacked and "experts." in ignored else "engines keep all experts in one layer"
    refuse(source, message, scheme)


def test_the_hidden_size_of_a_text_config_tells_the_orientation(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.experts.down_proj": stack(("down_proj",), transposed=True)}
    config = {**CONFIG, "hidden_size": INNER, "text_config": {"hidden_size": HIDDEN}}
    quantize_checkpoint(single(tmp_path / "source", tensors, config), tmp_path / "out", SCHEME)
    weight = experts()["model.layers.0.mlp.experts.2.down_proj.weight"]
    got = stored(everything(tmp_path / "out"), "model.layers.0.mlp.experts.2.down_proj")
    assert_same_bytes(got, reference_quantize(weight, Recipe()))


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "message"),
    [
        ("down_proj", (2, 32, 32), 32, "which dimension is the input cannot be told from hidden_size 32"),
        ("down_proj", (2, 32, 48), None, "which dimension is the input cannot be told from hidden_size None"),
        ("down_proj", (2, 32, 48), 64, "which dimension is the input cannot be told from hidden_size 64"),
        ("gate_up_proj", (2, 33, 48), 48, "got 33 outputs, needed an even number"),
        ("w13", (2, 32, 48), 48, "a kind that is not supported .*names other than gate_up_proj"),
    ],
)
def test_experts_stacked_in_an_unknown_way_are_refused_and_can_be_ignored(
    tmp_path: Path, name: str, shape: tuple[int, ...], hidden: int | None, message: str
) -> None:
    prefix = "model.layers.0.mlp.experts"
    tensors = {f"{prefix}.{name}": torch.ones(shape), f"{MLP}.down_proj.weight": torch.ones(16, 32)}
    source = single(tmp_path / "source", tensors, {**CONFIG, "hidden_size": hidden})
    refuse(source, rf"experts stacked in {re.escape(prefix)}\.{name} \(.*{message}")
    for i, pattern in enumerate((prefix, f"{prefix}.*", "*.experts")):
        out = tmp_path / f"out{i}"
        quantize_checkpoint(source, out, replace(SCHEME, ignore=(*SCHEME.ignore, pattern)))
        assert_same_tensor(name, everything(out)[f"{prefix}.{name}"], torch.ones(shape))


def test_stacked_experts_with_biases_are_refused(tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp.experts"
    tensors = {f"{prefix}.down_proj": torch.ones(2, 32, 48), f"{prefix}.down_proj_bias": torch.ones(2, 48)}
    refuse(single(tmp_path / "source", tensors, {**CONFIG, "hidden_size": 48}), "biases")


def test_some_of_the_experts_in_one_tensor_cannot_be_ignored(tmp_path: Path) -> None:
    # The config would say that they are not quantized.
    tensors = {"model.layers.0.mlp.experts.down_proj": stack(("down_proj",), transposed=False)}
    source = single(tmp_path / "source", tensors, {**CONFIG, "hidden_size": HIDDEN})
    scheme = replace(SCHEME, ignore=("*.experts.1.*",))
    refuse(source, r"experts\.down_proj: `ignore` matches 'model.*experts\.1\.down_proj' but not '.*\.0\.", scheme)


# --- formats ---


@pytest.mark.parametrize("format", OUTPUT_FORMATS)
@pytest.mark.parametrize("scale_max", [256, 448])
def test_every_format_holds_the_same_weights(source: Path, tmp_path: Path, format: str, scale_max: Any) -> None:
    scheme = replace(W4A16, weights=Recipe(scale_max=scale_max))
    quantize_checkpoint(source, tmp_path / "ours", scheme)
    quantize_checkpoint(source, tmp_path / "out", scheme, format=format)
    ours, loaded = load_checkpoint(tmp_path / "ours"), load_checkpoint(tmp_path / "out")
    assert set(loaded) == set(ours)
    assert loaded.quantized.keys() == ours.quantized.keys() != set()
    for name, expected in ours.items():
        got = loaded[name]
        if isinstance(expected, NVFP4Tensor):
            assert isinstance(got, NVFP4Tensor)
            assert_same_bytes(got, expected)
        else:
            assert isinstance(got, Tensor)
            assert_same_tensor(name, got, expected)


def test_modelopt_output_has_modelopts_names_dtypes_and_direction(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", W4A16, format="modelopt")
    after = everything(tmp_path / "out")
    weight = merged(tiny_model())[f"{MLP}.down_proj.weight"]
    packed, block_scale, decode = (after[f"{MLP}.down_proj.weight{suffix}"] for suffix in ("", "_scale", "_scale_2"))
    assert (packed.dtype, packed.shape) == (torch.uint8, (32, 24))
    assert (block_scale.dtype, block_scale.shape) == (torch.float8_e4m3fn, (32, 3))
    assert (decode.dtype, decode.shape) == (torch.float32, ())
    assert decode.item() == pytest.approx(weight.abs().max().item() / 1536, rel=1e-6)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    values = magnitudes[codes & 7] * torch.where(codes > 7, -1, 1)
    values = values * block_scale.float().repeat_interleave(16, 1) * decode
    assert (values - weight.float()).abs().max() < 0.2 * weight.abs().max().item()
    assert_same_tensor("ours", values, fos.dequantize(NVFP4Tensor(packed, block_scale, decode)))
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    older = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    alone = ["model.embed_tokens", "model.layers.0.mlp.odd_proj", "model.layers.1.mlp.gate"]
    assert (block["quant_method"], block["quant_algo"], block["group_size"]) == ("modelopt", "W4A16_NVFP4", 16)
    assert (older["quant_algo"], older["group_size"], older["kv_cache_quant_algo"]) == ("W4A16_NVFP4", 16, None)
    assert block["ignore"] == older["exclude_modules"] == alone, "names: other loaders' patterns mean other things"


def test_compressed_tensors_output_has_its_names_dtypes_and_direction(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", W4A16, format="compressed-tensors")
    after = everything(tmp_path / "out")
    weight = merged(tiny_model())[f"{MLP}.down_proj.weight"]
    assert f"{MLP}.down_proj.weight" not in after
    encode = after[f"{MLP}.down_proj.weight_global_scale"]
    assert (encode.dtype, encode.shape) == (torch.float32, (1,))
    assert encode.item() == pytest.approx(1536 / weight.abs().max().item(), rel=1e-6)
    q = reference_quantize(weight, Recipe())
    assert_same_tensor("packed", after[f"{MLP}.down_proj.weight_packed"], q.packed)
    assert_same_tensor("scale", after[f"{MLP}.down_proj.weight_scale"], q.block_scale)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["format"] == "nvfp4-pack-quantized"
    assert block["ignore"] == ["model.embed_tokens", "model.layers.0.mlp.odd_proj", "model.layers.1.mlp.gate"]
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_a_stale_hf_quant_config_does_not_get_in(tmp_path: Path) -> None:
    fp8, _ = fp8_model("tensor", rows=32, columns=64)
    source = single(tmp_path / "source", fp8)
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert len(load_checkpoint(tmp_path / "out").quantized) == 3


# --- the model card ---


def test_the_card_keeps_the_sources_front_matter_and_says_what_was_done(source: Path, tmp_path: Path) -> None:
    (source / CARD).write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Tiny\n\nA model.\n")
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith("---\nlicense: apache-2.0\ntags: [a]\n---\n\n# NVFP4 with Four over Six\n")
    assert card.endswith("\n---\n\n# Tiny\n\nA model.\n")
    values = sum(merged(tiny_model())[f"{module}.weight"].numel() for module in QUANTIZED)
    for line in (
        "| architecture | `TinyForCausalLM` |",
        "| scheme | W4A4 |",
        "| weights | NVFP4, mse 256 amax |",
        "| activations | NVFP4, mse 256 amax, per token |",
        f"| quantized | {len(QUANTIZED)} linear weights, {values} values |",
        f"| written as | `nvfp4_4over6` by fouroversix-plugin {fos.__version__} |",
    ):
        assert line in card.splitlines()
    assert "pip install fouroversix-plugin" in card
    assert str(tmp_path) not in card, "a card is published"


@pytest.mark.parametrize(
    "text", [None, b"", b"# Tiny\n", b"---\nnever closed", b"\xff\xfe not UTF-8", b"x" * (2 << 20)]
)
def test_a_card_of_any_kind_does_not_stop_a_conversion(source: Path, tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (source / CARD).write_bytes(text)
    quantize_checkpoint(source, tmp_path / "out", W4A16, format="modelopt")
    card = (tmp_path / "out" / CARD).read_text()
    assert card.startswith("# NVFP4 with Four over Six\n")
    assert "| activations | not quantized |" in card
    assert "pip install" not in card, "stock engines serve it"
    assert card.endswith("# Tiny\n") == (text == b"# Tiny\n")


@pytest.mark.parametrize("architectures", [None, [], "Tiny", {"a": 1}, 7, ["\ud800"], [7]], ids=repr)
def test_a_config_that_names_no_architecture_does_not_stop_a_conversion(tmp_path: Path, architectures: object) -> None:
    source = write(tmp_path / "source", tiny_model(), {**CONFIG, "architectures": architectures})
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert "| architecture | `" in (tmp_path / "out" / CARD).read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == architectures


# --- sources that cannot be converted ---


@pytest.mark.parametrize("codes", ["weight_packed", "qweight"])
def test_codes_of_another_method_are_copied_without_their_config(tmp_path: Path, codes: str) -> None:
    # Of FP8 and int4 together, as compressed-tensors writes them, or of GPTQ without its config.
    fp8, _ = fp8_model("channel", rows=32, columns=64)
    tensors = {**fp8, f"{MLP}.up_proj.{codes}": torch.zeros(32, 8, dtype=torch.int32)}
    config = {**CONFIG, "quantization_config": FP8_CONFIGS["compressed-tensors"]}
    for ignore in ((), ("*.up_proj",)):
        message = rf"up_proj\.{codes}: is quantized already"
        refuse(single(tmp_path / str(len(ignore)), tensors, config), message, replace(W4A16, ignore=ignore))


@pytest.mark.parametrize("max_shard_size", [600, 10**9])  # in two files nothing else would notice
def test_a_tensor_of_the_source_has_the_name_of_a_part(tmp_path: Path, max_shard_size: int) -> None:
    tensors = {"l.weight": torch.ones(32, 32), "l.weight_scale": torch.ones(400)}
    source = single(tmp_path / "a", tensors)
    message = r"l\.weight_scale: would be written twice, for 'l\.weight' and for 'l\.weight_scale' of the source"
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(source, SCHEME, max_shard_size=max_shard_size)
    plan_conversion(source, replace(SCHEME, ignore=("l",)))


def test_an_expert_is_there_stacked_and_by_itself(tmp_path: Path) -> None:
    stacked = {"m.experts.gate_up_proj": torch.ones(2, 2 * INNER, HIDDEN)}
    alone = {f"m.experts.0.{name}.weight": torch.ones(INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
    source = single(tmp_path / "a", {**stacked, **alone}, {**CONFIG, "hidden_size": HIDDEN})
    refuse(source, r"would be written twice, for 'm\.experts\.0\.\w+\.weight' and for 'm\.experts\.gate_up_proj'")


def test_a_checkpoint_of_nothing_that_is_quantized_is_not_written(source: Path, tmp_path: Path) -> None:
    # Its config would promise NVFP4, which a loader looks for.
    scheme = replace(SCHEME, ignore=("*",))
    assert plan_conversion(source, scheme).groups == {}
    refuse(source, r"got no linear weight to quantize \(14: in `ignore`\), needed at least one", scheme)
    refuse(single(tmp_path / "norms", {"norm.weight": torch.ones(16)}), r"to quantize \(it has none\)")


@pytest.mark.parametrize("number", ["²", "9" * 5000], ids=["superscript", "long"])
def test_digits_that_are_no_number_are_part_of_a_name(tmp_path: Path, number: str) -> None:
    source = single(tmp_path / "source", {f"layers.{number}.a1{number}.weight": torch.ones(16, 16)})
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert list(load_checkpoint(tmp_path / "out")) == [f"layers.{number}.a1{number}.weight"]


# --- M5: the target ---


def test_an_existing_target_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    before = contents(tmp_path)
    for name in ("out", "file", "link"):
        with pytest.raises(CheckpointError, match=rf"{name}: exists already; .*--overwrite"):
            quantize_checkpoint(source, tmp_path / name, SCHEME)
        with pytest.raises(CheckpointError, match=rf"{name}: is no checkpoint .*, so it is not overwritten"):
            quantize_checkpoint(source, tmp_path / name, SCHEME, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_made_meanwhile_is_lost(source: Path, tmp_path: Path, overwrite: bool) -> None:
    mine = tmp_path / "out" / "mine"

    def make(name: str, nbytes: int) -> None:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("precious")

    with pytest.raises(CheckpointError, match=r"out: (exists already|is no checkpoint)"):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, overwrite=overwrite, progress=make)
    assert mine.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def refuse_before_the_work(source: Path, target: Path, message: str) -> None:
    told: list[str] = []
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, target, SCHEME, overwrite=True, progress=lambda name, _: told.append(name))
    assert told == []


def test_a_target_that_cannot_get_its_name_is_found_after_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_disk: Callable[..., Path]
) -> None:
    long = "d" * 240  # fits, as does its .partial
    refuse_before_the_work(source, tmp_path / long, "cannot be written.*File name too long")
    refuse_before_the_work(source, tmp_path / os.fsdecode(b"\xff"), "got a name that is not UTF-8")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "below")
    for name in (".", "..", "/"):
        refuse_before_the_work(source, Path(name), "has no name of its own, needed a folder to make, such as .*NAME")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]
    if shutil.which("mount") is not None:
        refuse_before_the_work(source, tiny_disk("size=64k"), "is a mount point, which cannot be replaced")


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_the_target(source: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "outer").mkdir()
    inner = write(tmp_path / "outer" / "inner", tiny_model())
    (tmp_path / "outer" / "config.json").write_text("{}")
    before = contents(tmp_path)
    for start, target, message in (
        (source, source, "is the source itself"),
        (source, tmp_path / "alias", "is the source itself"),
        (tmp_path / "alias", source, "is the source itself"),
        (source, tmp_path / "x" / ".." / "source", "is the source itself"),
        (source, source / "out", "lies inside the source"),
        (source, source / "deep" / "out", "lies inside the source"),
        (source, tmp_path / "alias" / "out", "lies inside the source"),
        (inner, tmp_path / "outer", "holds the source" if overwrite else "exists already"),
    ):
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(start, target, SCHEME, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_an_overwritten_checkpoint_stays_until_the_new_one_is_complete(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(source, out, W4A16)
    (out / "notes.txt").write_text("of the old one")
    before = contents(out)

    def look(name: str, nbytes: int) -> None:
        assert contents(out) == before

    quantize_checkpoint(source, out, SCHEME, overwrite=True, progress=look)
    quantize_checkpoint(source, tmp_path / "fresh", SCHEME)
    assert contents(out) == contents(tmp_path / "fresh")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "fresh"}
    files = tiny_model()
    files[FIRST][f"{ATTENTION}.q_proj.weight"][0, 0] = float("nan")
    damaged = write(tmp_path / "damaged", files)
    with pytest.raises(CheckpointError, match="got 1 NaN"):
        quantize_checkpoint(damaged, out, SCHEME, overwrite=True)
    assert contents(out) == contents(tmp_path / "fresh"), "a failure leaves the old one"


def test_an_overwritten_checkpoint_is_put_back_if_the_new_one_cannot_take_its_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(source, tmp_path / "out", W4A16)
    before = contents(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match=r"out: cannot be written.*Permission denied"):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, overwrite=True)
    assert contents(tmp_path) == before


def test_an_empty_folder_may_be_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize_checkpoint(source, tmp_path / "out", SCHEME, overwrite=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_what_cannot_be_removed_is_found_after_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(source, tmp_path / "out", W4A16)
    (tmp_path / "out" / "below").mkdir(mode=0o555)
    # As for anybody but root.
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    before = contents(tmp_path)
    refuse_before_the_work(source, tmp_path / "out", "out/below: is write-protected .*out is not overwritten")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["circle", "circle/out"])
def test_links_in_a_circle_are_one_clear_error(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "circle").symlink_to("back")
    (tmp_path / "back").symlink_to("circle")
    refuse_before_the_work(source, tmp_path / name, "is no checkpoint|Too many levels of symbolic links")


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_a_folder_of_the_user_beside_the_target_is_not_removed(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("precious")
    quantize_checkpoint(source, tmp_path / "elsewhere" / "out", SCHEME)
    shutil.move(tmp_path / "elsewhere" / "out", tmp_path / "out")
    if name == "out.partial":
        for resume in (False, True):
            with pytest.raises(CheckpointError, match=r"out\.partial: is not what an interrupted conversion left"):
                quantize_checkpoint(source, tmp_path / "out", SCHEME, overwrite=True, resume=resume)
    else:
        quantize_checkpoint(source, tmp_path / "out", SCHEME, overwrite=True)
    assert (tmp_path / name / "thesis.tex").read_text() == "precious"


def test_folders_on_the_way_to_the_target_are_made_and_after_a_failure_removed(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "a" / "b" / "out", SCHEME)
    assert (tmp_path / "a" / "b" / "out" / "config.json").exists()
    (tmp_path / "c").mkdir()
    with pytest.raises(ZeroDivisionError):
        quantize_checkpoint(source, tmp_path / "c" / "d" / "out", SCHEME, progress=lambda *_: 1 // 0)
    assert list((tmp_path / "c").iterdir()) == []


# --- F9: what cannot be written ---


def test_a_target_that_cannot_be_made_is_one_clear_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"file.out: cannot be written.*Not a directory"):
        quantize_checkpoint(source, tmp_path / "file" / "out", SCHEME)


@pytest.mark.parametrize("function", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_is_one_clear_error_and_leaves_the_target_as_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, overwrite: bool
) -> None:
    if overwrite:
        quantize_checkpoint(source, tmp_path / "out", W4A16)
    before = contents(tmp_path)
    calls = 0
    original = getattr(os, function)

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, function, full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written.*No space left on device"):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, overwrite=overwrite, max_shard_size=3000)
    assert calls == 3
    assert contents(tmp_path) == before


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of a given size; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs may not be mounted here: {done.stderr.decode().strip()}")
        mounted.append(disk)
        return disk

    try:
        yield mount
    finally:
        for disk in mounted:
            subprocess.run(["umount", disk], check=True)


def test_a_really_full_disk_is_known_before_the_work_and_left_empty(
    source: Path, tiny_disk: Callable[..., Path]
) -> None:
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    disk = tiny_disk("size=16k")
    told: list[str] = []
    with pytest.raises(CheckpointError, match=r"cannot be written.*No space left on device"):
        quantize_checkpoint(source, disk / "out", SCHEME, progress=lambda name, _: told.append(name))
    assert told == []
    assert list(disk.iterdir()) == []
    disk = tiny_disk("size=64k")
    quantize_checkpoint(source, disk / "out", SCHEME)


def test_a_disk_that_may_only_be_read_is_one_clear_error(source: Path, tiny_disk: Callable[..., Path]) -> None:
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    with pytest.raises(CheckpointError, match=r"cannot be written.*Read-only file system"):
        quantize_checkpoint(source, tiny_disk("ro,size=64k") / "out", SCHEME)


# --- M2: no memory on the device ---


def test_a_device_without_memory_gives_the_same_bytes_and_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    quantize_checkpoint(source, tmp_path / "before", SCHEME)
    original, calls = write_module.select, 0

    def select(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(write_module, "select", select)
    quantize_checkpoint(source, tmp_path / "after", SCHEME)
    assert [line for line in log.messages if "no memory left on cpu; quantized on the CPU, to the same bytes" in line]
    assert contents(tmp_path / "before") == contents(tmp_path / "after")


# --- M3: interruption ---


class Killed(BaseException):
    """Ends a conversion where it stands, without what an Exception would have it clean up."""


def events(monkeypatch: pytest.MonkeyPatch, kill_at: int) -> list[str]:
    """Counts what changes the disk; the ``kill_at``-th such call ends the conversion before it, or (odd) after it."""
    seen: list[str] = []

    def watch(holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if kill_at == 2 * len(seen):
                raise Killed
            result = original(*arguments, **options)
            if kill_at == 2 * len(seen) + 1:
                raise Killed
            return result

        monkeypatch.setattr(holder, name, counted)

    for name in ("mkdir", "rename", "unlink"):
        watch(Path, name)
    for name in ("pwrite", "fsync", "posix_fallocate"):
        watch(os, name)
    watch(shutil, "copyfile")
    return seen


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_conversion_killed_at_any_step_goes_on_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    weights = {f"a.{name}_proj.weight": torch.randn(16, 32) for name in ("gate", "up", "down")}
    source = single(tmp_path / "source", weights)
    (source / "tokenizer.json").write_text("{}")
    convert = partial(quantize_checkpoint, source, scheme=SCHEME, max_shard_size=700, overwrite=overwrite)
    convert(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    assert len(list((tmp_path / "expected").glob("*.safetensors"))) == 2
    killed = 0
    for kill_at in range(2, 1000):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        if overwrite:
            shutil.copytree(tmp_path / "expected", folder / "out")
            (folder / "out" / "old").write_text("old")
        with monkeypatch.context() as patched:
            seen = events(patched, kill_at)
            try:
                convert(folder / "out")
                break  # more steps than it has
            except Killed:
                killed += 1
        where = f"killed at {kill_at}: {seen}"
        complete = (folder / "out" / "config.json").exists() and not (folder / "out" / "old").exists()
        if complete:
            published = {name: data for name, data in contents(folder / "out").items() if name in expected}
            assert published == expected, where
        begun = partial_folder(folder / "out").exists()
        if begun or (folder / "out" / target_module._MANIFEST).exists():
            convert(folder / "out", resume=True)
        elif not complete:
            with pytest.raises(CheckpointError, match="nothing to resume"):
                convert(folder / "out", resume=True)
            convert(folder / "out")
        assert contents(folder / "out") == expected, where
        assert [path.name for path in folder.iterdir()] == ["out"], where
        shutil.rmtree(folder)
    assert killed > 40
    assert set(seen) >= {"mkdir", "rename", "unlink", "pwrite", "fsync", "copyfile", "posix_fallocate"}


def test_a_conversion_killed_at_any_step_can_be_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = single(tmp_path / "source", {"a.down_proj.weight": torch.ones(16, 32)})
    quantize_checkpoint(source, tmp_path / "expected", SCHEME)
    for kill_at in range(2, 1000):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        with monkeypatch.context() as patched:
            events(patched, kill_at)
            try:
                quantize_checkpoint(source, folder / "out", SCHEME)
                break
            except Killed:
                pass
        quantize_checkpoint(source, folder / "out", SCHEME, overwrite=True)
        assert contents(folder / "out") == contents(tmp_path / "expected"), f"killed at {kill_at}"
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert kill_at > 20


def convert_slowly(source: Path, target: Path, begun: Any) -> None:
    """In a process of its own, to be killed."""
    torch.set_num_threads(1)

    def slow(name: str, nbytes: int) -> None:
        begun.set()
        time.sleep(0.05)

    quantize_checkpoint(source, target, SCHEME, max_shard_size=3000, progress=slow)


def test_a_process_killed_at_random_moments_is_resumed_to_the_same_files(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "expected", SCHEME, max_shard_size=3000)
    expected = contents(tmp_path / "expected")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fouroversix_plugin.checkpoint", "fouroversix_plugin.kernels.ops"])
    finished_shards: list[int] = []
    for seed in range(10):
        target = tmp_path / str(seed) / "out"
        target.parent.mkdir()
        begun = context.Event()
        process = context.Process(target=convert_slowly, args=(source, target, begun))
        process.start()
        assert begun.wait(60)
        time.sleep(random.Random(seed).uniform(0, 0.5))  # all of it takes 0.8 s or more
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if not target.exists():  # it does where this process slept longer than it meant to
            finished_shards.append(len(list(partial_folder(target).glob("*.safetensors"))))
            quantize_checkpoint(source, target, SCHEME, max_shard_size=3000, resume=True)
        assert contents(target) == expected
        assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert len(finished_shards) > 5, "most were killed before they were done"
    assert len(set(finished_shards)) > 2, "at moments that differ"


def interrupted(source: Path, target: Path, at: str = f"{EXPERT}.w1.weight", **options: Any) -> Path:
    """What a conversion leaves that is stopped from the keyboard at one tensor."""

    def interrupt(name: str, nbytes: int) -> None:
        if name == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            source, target, progress=interrupt, **({"scheme": SCHEME, "max_shard_size": 3000} | options)
        )
    assert not target.exists()
    return partial_folder(target)


def test_an_interruption_keeps_what_is_finished_and_resuming_does_not_do_it_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = interrupted(source, tmp_path / "out")
    finished = {path.name: path.stat().st_mtime_ns for path in left.glob("*.safetensors")}
    assert finished
    assert not (left / "config.json").exists(), "nothing that is half done looks like a checkpoint"
    with pytest.raises(CheckpointError):
        Checkpoint.open(left)
    told: list[tuple[str, int]] = []
    progress = lambda *done: told.append(done)  # noqa: E731
    plan = quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=3000, resume=True, progress=progress)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    assert sum(nbytes for _, nbytes in told) == plan.source_nbytes, "what was finished before counts too"
    quantize_checkpoint(source, tmp_path / "fresh", SCHEME, max_shard_size=3000)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_the_config_is_written_last(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder with a config.json and without all of its shards looks like a model.
    present: list[set[str]] = []
    original = os.fsync

    def watched(descriptor: int) -> None:
        present.append({path.name for path in (tmp_path / "out.partial").glob("[!.]*")})
        original(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    plan = quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=3000)
    files = {shard.file for shard in plan.shards} | {INDEX, CARD, "tokenizer.json"}
    assert [names >= files for names in present if "config.json" in names] != []
    assert all(names >= files for names in present if "config.json" in names)


def test_leftovers_of_a_killed_conversion_do_not_get_in(source: Path, tmp_path: Path) -> None:
    left = interrupted(source, tmp_path / "out")
    (left / "model-00009-of-00009.safetensors").write_text("half of a shard")
    (left / "folder").mkdir()
    (left / "folder" / "x").write_text("x")
    (left / "link").symlink_to(source)
    before = contents(source)
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert not left.exists()
    assert set(contents(tmp_path / "out")) == {SINGLE, "config.json", CARD, "tokenizer.json", "modeling.py"}
    assert contents(source) == before, "a link is not followed"


# --- M4: another conversion is not resumed ---


def test_nothing_to_resume_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"out\.partial: does not exist, so there is nothing to resume"):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, resume=True)
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scheme": preset("flashinfer")}, "scheme"),
        ({"scheme": replace(SCHEME, ignore=(*SCHEME.ignore, "*.down_proj"))}, "scheme"),
        ({"scheme": W4A16, "format": "modelopt"}, "format"),
        ({"max_shard_size": 2000}, "shard size"),
        ({"max_shard_size": 2600}, "shard size"),
    ],
    ids=["recipe", "ignore", "format", "more-files", "as-many-files"],
)
def test_other_arguments_are_not_resumed_with(
    source: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    left = interrupted(source, tmp_path / "out", scheme=W4A16 if named == "format" else SCHEME)
    before = contents(left)
    options = {"scheme": SCHEME, "max_shard_size": 3000} | options
    with pytest.raises(CheckpointError, match=rf"was started with another .*{named}.*start again without --resume"):
        quantize_checkpoint(source, tmp_path / "out", resume=True, **options)
    assert contents(left) == before


def change_weights(source: Path) -> None:
    files = tiny_model()
    save_file({name: tensor * 2 for name, tensor in files[SECOND].items()}, source / SECOND)


def change_config(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 1}))


def change_a_header_only(source: Path) -> None:
    path = source / SECOND
    times, content = path.stat(), path.read_bytes()
    assert content.count(b'"I64"') == 1
    path.write_bytes(content.replace(b'"I64"', b'"F64"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_a_time_only(source: Path) -> None:
    os.utime(source / FIRST, (0, 0))


@pytest.mark.parametrize("change", [change_weights, change_config, change_a_header_only, change_a_time_only])
def test_a_changed_source_is_not_resumed_from(source: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    left = interrupted(source, tmp_path / "out")
    before = contents(left)
    change(source)
    with pytest.raises(CheckpointError, match=r"was started with another .*(source|headers).*; give"):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=3000, resume=True)
    assert contents(left) == before


def test_another_version_is_not_resumed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out")
    monkeypatch.setattr(write_module, "__version__", "99")
    monkeypatch.setattr(plan_module, "__version__", "99")
    with pytest.raises(CheckpointError, match="was started with another version"):
        quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=3000, resume=True)


# --- M6 ---


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_conversion_into_one_folder_fails_and_harms_nothing(
    source: Path, tmp_path: Path, resume: bool
) -> None:
    refused: list[str] = []

    def second(name: str, nbytes: int) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match=r"another process is writing .*out; wait for it") as caught:
                quantize_checkpoint(source, tmp_path / "out", SCHEME, resume=resume)
            refused.append(str(caught.value))

    quantize_checkpoint(source, tmp_path / "out", SCHEME, progress=second)
    assert refused
    quantize_checkpoint(source, tmp_path / "alone", SCHEME)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


# --- M1: memory ---

MEASURED = """
    import sys
    import torch
    torch.set_num_threads(1)
    from fouroversix_plugin.checkpoint import quantize_checkpoint
    from fouroversix_plugin.recipe import preset

    source, target, warm = sys.argv[1:]
    quantize_checkpoint(warm, target + "-warm", preset("w4a16"))
    print("ready", flush=True)
    sys.stdin.readline()
    quantize_checkpoint(source, target, preset("w4a16"), max_shard_size=18_000_000)
"""


def anonymous(pid: int) -> int:
    """Bytes of a process that are not pages of files."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_below_two_largest_tensors_and_a_shard(tmp_path: Path) -> None:
    # Whatever held all of the model, or a tensor in fp32 with its copies, would be above.
    largest, count, shard = 48 << 20, 3, 18_000_000
    weight = torch.randn(1 << 16).bfloat16().repeat(largest // 2 >> 16).reshape(4096, -1)
    source = single(tmp_path / "source", {f"l{i}.down_proj.weight": weight.clone() for i in range(count)})
    del weight
    warm = single(tmp_path / "warm", {"l.weight": torch.ones(64, 64)})
    arguments = [sys.executable, "-c", textwrap.dedent(MEASURED), source, tmp_path / "out", warm]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        baseline = peak = anonymous(process.pid)
        process.stdin.write("go\n")
        process.stdin.close()
        samples = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            samples += 1
            time.sleep(0.001)
    assert process.returncode == 0
    assert samples > 100
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == count
    assert peak - baseline > 1 << 20, "something was measured"
    assert peak - baseline <= 2 * largest + shard, f"{(peak - baseline) / 2**20:.0f} MiB"


def test_every_file_opens_in_the_library(source: Path, tmp_path: Path) -> None:
    plan = quantize_checkpoint(source, tmp_path / "out", SCHEME, max_shard_size=3000)
    for shard in plan.shards:
        with safe_open(tmp_path / "out" / shard.file, framework="pt") as opened:
            assert set(opened.keys()) == {output.name for output in shard.outputs}
            assert opened.metadata() == {"format": "pt"}
