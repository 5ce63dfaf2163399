"""Opening a folder of safetensors: what is not sound is refused by name, and nothing beside it is read."""

import json
import os
import pickle
import re
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from checkpoints import (
    ATTENTION,
    CONFIG,
    FIRST,
    MLP,
    SECOND,
    SINGLE,
    contents,
    entry,
    everything,
    merged,
    raw_file,
    redtype,
    single,
    tiny_model,
    weight_map,
    write,
    write_index,
)
from conftest import assert_same_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fouroversix_plugin.checkpoint import Checkpoint, CheckpointError, load_checkpoint, quantize_checkpoint
from fouroversix_plugin.checkpoint import files as files_module
from fouroversix_plugin.checkpoint.files import INDEX, TORCH_DTYPES
from fouroversix_plugin.recipe import preset

SCHEME = preset("nvfp4_4over6")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", tiny_model())


def folder_with(folder: Path, content: bytes, config: str = "{}") -> Path:
    """A checkpoint whose only file is ``content``, which need not be one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / SINGLE).write_bytes(content)
    return folder


def refuse(source: Path, message: str) -> CheckpointError:
    """Opening fails with ``message``, and so does a conversion, which leaves neither a target nor a partial folder."""
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(source)
    target = source.parent / "refused" / "out"
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, target, SCHEME)
    assert not target.parent.exists()
    return caught.value


# --- what is read ---


def test_every_tensor_is_found_in_its_file_and_read_as_it_is_stored(source: Path) -> None:
    opened = Checkpoint.open(source)
    expected = merged(tiny_model())
    assert list(opened.tensors) == sorted(expected)
    assert {name: stored.file for name, stored in opened.tensors.items()} == weight_map()
    assert (opened.config, opened.hf_quant_config, opened.warnings) == (CONFIG, None, ())
    for name, tensor in expected.items():
        assert_same_tensor(name, opened.read(name), tensor)
        assert opened.tensors[name].nbytes == tensor.nbytes


def test_rows_are_read_from_where_they_lie(source: Path) -> None:
    opened = Checkpoint.open(source)
    whole = merged(tiny_model())[f"{MLP}.up_proj.weight"]
    for first, last in ((0, 1), (7, 31), (47, 48), (0, 48), (5, 5)):
        assert_same_tensor(f"{first}:{last}", opened.read(f"{MLP}.up_proj.weight", first, last), whole[first:last])


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_every_dtype_of_a_header_is_read_as_the_torch_dtype_of_that_name(tmp_path: Path, dtype: str) -> None:
    bits = {"BOOL": 8}.get(dtype) or int(re.findall(r"\d+", dtype)[0])
    nbytes = 2 * 4 * bits // 8
    data = bytes(i % 2 for i in range(nbytes))
    folder = folder_with(tmp_path, raw_file({"w": entry(dtype, (2, 4), 0, nbytes)}, data))
    got = Checkpoint.open(folder).read("w")
    assert got.dtype == TORCH_DTYPES[dtype]
    assert tuple(got.shape) == ((2, 2) if dtype == "F4" else (2, 4)), "F4 comes as its bytes"
    assert bytes(got.contiguous().view(torch.uint8).flatten().tolist()) == data


def test_half_a_byte_of_codes_is_not_dropped(tmp_path: Path) -> None:
    # Three F4 codes in a row: the library accepts it, but rows of whole bytes cannot hold them.
    folder = folder_with(tmp_path, raw_file({"w": entry("F4", (2, 3), 0, 3)}, b"123"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w: got F4 of shape \(2, 3\), needed an even"):
        Checkpoint.open(folder).read("w")


def test_a_dtype_torch_cannot_read_is_named_and_listed(tmp_path: Path) -> None:
    opened = Checkpoint.open(folder_with(tmp_path, raw_file({"w": entry("F6_E2M3", (4,), 0, 3)}, b"123")))
    assert opened.tensors["w"].dtype == "F6_E2M3", "it can still be copied"
    with pytest.raises(CheckpointError, match=r"w: got dtype F6_E2M3, needed F64, F32, F16, BF16"):
        opened.read("w")


def test_a_tensor_without_values_is_read_and_one_without_a_name_is_missing(tmp_path: Path) -> None:
    opened = Checkpoint.open(single(tmp_path / "source", {"empty": torch.empty(0, 16), "scalar": torch.tensor(2.5)}))
    assert tuple(opened.read("empty").shape) == (0, 16)
    assert opened.read("scalar").item() == 2.5
    with pytest.raises(CheckpointError, match="has no tensor 'other'"):
        opened.read("other")


def test_a_single_file_under_another_name_is_taken_but_not_one_of_several(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"consolidated.safetensors": merged(tiny_model())})
    (source / INDEX).unlink()
    assert len(Checkpoint.open(source).tensors) == len(weight_map())
    save_file({"a": torch.ones(1)}, source / "adapter.safetensors")
    refuse(source, r"needed model\.safetensors or model\.safetensors\.index\.json, found 2 other safetensors files")


def test_an_index_over_one_file_is_followed(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"model-00001-of-00001.safetensors": merged(tiny_model())})
    opened = Checkpoint.open(source)
    assert {stored.file for stored in opened.tensors.values()} == {"model-00001-of-00001.safetensors"}
    assert list(opened.tensors) == sorted(weight_map())
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert Checkpoint.open(tmp_path / "out").tensors[f"{MLP}.down_proj.weight_scale"].file == SINGLE


def test_a_file_cut_after_it_was_opened_is_an_error_not_a_crash(source: Path) -> None:
    opened = Checkpoint.open(source)
    path = source / SECOND
    path.write_bytes(path.read_bytes()[:-100])
    last = max((n for n, s in opened.tensors.items() if s.file == SECOND), key=lambda n: opened.tensors[n].begin)
    with pytest.raises(CheckpointError, match=rf"{re.escape(last)}: the file ends within it; did it change\?"):
        opened.read(last)
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(SECOND)):
        opened.read(last)


# --- F1: malformed files ---

GOOD = {"w": entry("F32", (2, 2), 0, 16)}
DATA = bytes(16)
MALFORMED = {
    "empty": (b"", "header too small"),
    "cut-in-its-length": (b"\1\0\0", "header too small"),
    "another-format": (b"PK\x03\x04" * 8, "header too large"),
    "header-of-a-terabyte": ((2**40).to_bytes(8, "little") + b"{}", "header too large"),
    "header-longer-than-the-file": ((200).to_bytes(8, "little") + b"{}", "invalid header length"),
    "header-not-json": (raw_file("{x"), "invalid JSON"),
    "header-a-list": (raw_file([]), "invalid JSON"),
    "header-not-utf-8": (raw_file(b"\xff\xfe{}"), "UTF-8"),
    "header-nested-deeply": (raw_file("[" * 200_000), "invalid JSON"),
    "metadata-not-text": (raw_file({"__metadata__": {"a": 1}, **GOOD}, DATA), "expected a string"),
    "cut-in-its-data": (raw_file(GOOD, DATA[:9]), "describes 16 bytes of tensors, the file holds 9"),
    "bytes-after-its-data": (raw_file(GOOD, DATA + b"x"), "describes 16 bytes of tensors, the file holds 17"),
    "unknown-dtype": (raw_file({"w": entry("F7", (2, 2), 0, 16)}, DATA), "'w'"),
    "negative-shape": (raw_file({"w": entry("F32", (-2, -2), 0, 16)}, DATA), "'w'"),
    "fractional-shape": (raw_file('{"w":{"dtype":"F32","shape":[2.5],"data_offsets":[0,10]}}', DATA[:10]), "'w'"),
    "shape-and-bytes-disagree": (raw_file({"w": entry("F32", (2, 3), 0, 16)}, DATA), "'w'"),
    "shape-overflows": (raw_file({"w": entry("F32", (2**40, 2**40), 0, 16)}, DATA), "'w'"),
    "no-offsets": (raw_file({"w": {"dtype": "F32", "shape": [4]}}, DATA), "'w'"),
    "ends-before-it-begins": (raw_file({"w": entry("F32", (2,), 8, 0)}, DATA[:8]), "`w`"),
    "overlapping": (raw_file({"v": entry("F32", (2,), 0, 8), "w": entry("F32", (2,), 4, 12)}, DATA[:12]), "`w`"),
    "with-a-hole": (raw_file({"v": entry("F32", (2,), 0, 8), "w": entry("F32", (1,), 12, 16)}, DATA), "`w`"),
    "size-no-tensor-has": (raw_file({"w": entry("F32", (2**63, 0), 0, 0)}), "'w'"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_file_that_is_no_safetensors_is_named_with_the_tensor_and_the_cause(tmp_path: Path, kind: str) -> None:
    content, message = MALFORMED[kind]
    error = refuse(folder_with(tmp_path / "source", content), re.escape(message))
    assert str(error).startswith(f"{tmp_path / 'source' / SINGLE}: not a readable safetensors file: ")
    assert kind == "size-no-tensor-has" or error.__cause__ is not None, "the library's own error is kept"


def test_a_malformed_shard_among_good_ones_is_the_one_that_is_named(source: Path) -> None:
    path = source / SECOND
    path.write_bytes(path.read_bytes()[:-7])
    error = refuse(source, rf"{SECOND}: not a readable safetensors file: .*was all of it downloaded")
    assert FIRST not in str(error)


# --- F7 ---


@pytest.mark.parametrize("twice", ['"w"', '"\\u0077"'], ids=["spelled-alike", "escaped"])
def test_a_name_twice_in_a_header_is_refused_though_the_library_takes_the_last(tmp_path: Path, twice: str) -> None:
    described = json.dumps(entry("F32", (1,), 0, 4))
    folder = folder_with(tmp_path / "source", raw_file(f'{{"w":{described},{twice}:{described}}}', bytes(4)))
    with safe_open(folder / SINGLE, framework="pt") as accepted:
        assert list(accepted.keys()) == ["w"]
    refuse(folder, r"model\.safetensors: .*the key 'w' is there twice")


# --- F2: anything at all ---


def good_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("BF16", (2, 16), 0, 64),
        "b.weight": entry("F32", (4, 16), 64, 320),
        "c": entry("F8_E4M3", (3,), 320, 323),
    }
    return raw_file(header, bytes(range(256)) + bytes(67))


def open_and_read_all(content: bytes) -> None:
    """Succeeds or raises CheckpointError; anything else is the failure that is looked for."""
    with tempfile.TemporaryDirectory() as folder, suppress(CheckpointError):
        opened = Checkpoint.open(folder_with(Path(folder), content))
        for name in opened.tensors:
            opened.read(name)


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_random_bytes_are_an_error_never_a_crash(content: bytes) -> None:
    open_and_read_all(content)


@given(st.binary(max_size=120), st.binary(max_size=40))
@settings(max_examples=100)
def test_a_random_header_of_right_length_is_an_error_never_a_crash(header: bytes, data: bytes) -> None:
    open_and_read_all(raw_file(header, data))


@given(st.data())
@settings(max_examples=200)
def test_a_flipped_byte_in_a_good_file_is_an_error_or_harmless_never_a_crash(data: st.DataObject) -> None:
    content = bytearray(good_file())
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, header - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    open_and_read_all(bytes(content))


MAPS = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=3), st.just([]), st.just({})
)


@given(
    st.dictionaries(
        st.text(max_size=4),
        st.one_of(
            VALUES,
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "U8", "C64", "BOOL", "F16 "]),
                    "shape": st.lists(st.one_of(st.integers(0, 4), VALUES), max_size=3),
                    "data_offsets": st.lists(st.one_of(st.integers(0, 32), VALUES), max_size=3),
                }
            ),
        ),
        max_size=3,
    ),
    st.binary(max_size=32),
)
@settings(max_examples=200)
def test_a_header_of_any_json_is_an_error_or_sound_never_a_crash(header: object, data: bytes) -> None:
    open_and_read_all(raw_file(header, data))


def test_what_a_header_claims_is_not_allocated(tmp_path: Path) -> None:
    # 2^62 bytes of zeros in one dimension, none in the other; and a length field that asks for 90 MB.
    claims = [
        raw_file({"w": entry("F32", (2**62, 0), 0, 0)}),
        (90 << 20).to_bytes(8, "little") + b"{}",
        raw_file({"w": entry("F32", (2**34,), 0, 2**36)}, bytes(16)),
    ]
    for i, content in enumerate(claims):
        folder = folder_with(tmp_path / str(i), content)
        tracemalloc.start()
        try:
            Checkpoint.open(folder).read("w")
        except CheckpointError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 1 << 20


@given(st.one_of(VALUES, st.dictionaries(st.text(max_size=5), st.one_of(VALUES, MAPS), max_size=3)))
@settings(max_examples=100)
def test_an_index_of_any_json_is_an_error_never_a_crash(index: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = folder_with(Path(name), good_file())
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=re.escape(INDEX)):
            Checkpoint.open(folder)


@given(st.dictionaries(st.sampled_from(["a.weight", "b.weight", "c", "d"]), st.text(max_size=20), min_size=1))
@settings(max_examples=100)
def test_an_index_of_any_file_names_is_an_error_never_a_crash(listed: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = folder_with(Path(name), good_file())
        write_index(folder, listed)
        with pytest.raises(CheckpointError, match=re.escape(INDEX)):
            Checkpoint.open(folder)


# --- F3: nothing outside of the folder ---


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "{absolute}",
        "a/../../x.safetensors",
        "sub/x.safetensors",
        "./x.safetensors",
        "x\0.safetensors",
        "..\\x",
        "",
        "..",
        ".",
    ],
)
def test_a_file_name_in_the_index_that_leads_elsewhere_is_refused_before_any_open(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (source / "sub").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in (tmp_path, outside, source / "sub", source):
        save_file({"secret.weight": torch.ones(16, 16)}, folder / "x.safetensors")
    file = file.format(absolute=outside / "x.safetensors")
    write_index(source, {**weight_map(), "secret.weight": file})
    monkeypatch.setattr(files_module, "safe_open", lambda *_, **__: pytest.fail("a file was opened"))
    error = refuse(source, "not in the same folder")
    assert repr(file) in str(error)


@pytest.mark.parametrize("name", [SECOND, "config.json", INDEX])
@pytest.mark.parametrize("kind", ["file", "relative", "chain", "loop", "dangling", "folder", "blobs-of-no-hub"])
def test_a_link_that_leaves_the_folder_is_refused(source: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = source / name
    outside = tmp_path / ("blobs" if kind == "blobs-of-no-hub" else "outside")
    outside.mkdir()
    path.rename(outside / name)
    if kind == "chain":
        (source / "between").symlink_to(outside / name)
    (outside / "folder").mkdir()
    leads = {
        "relative": Path("..") / "outside" / name,
        "chain": source / "between",
        "loop": path,
        "dangling": source / "nothing",
        "folder": outside / "folder",
    }
    path.symlink_to(leads.get(kind, outside / name))
    refuse(source, rf"{re.escape(name)}: .*needed a file in the folder itself")


def test_a_link_within_the_folder_is_followed(source: Path) -> None:
    (source / SECOND).rename(source / "data")
    (source / SECOND).symlink_to("data")
    name = f"{ATTENTION}.k_proj.weight"
    assert_same_tensor(name, Checkpoint.open(source).read(name), tiny_model()[SECOND][name])


def hub_cache(folder: Path) -> Path:
    """A model as the hub's cache keeps it: every file of a snapshot is a link into ``blobs``."""
    hub = folder / "models--maker--tiny"
    blobs = write(hub / "blobs", tiny_model())
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    return snapshot


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    quantize_checkpoint(snapshot, tmp_path / "out", SCHEME)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert f"{MLP}.down_proj.weight_scale" in everything(tmp_path / "out")
    (tmp_path / "alias").symlink_to(snapshot)
    assert len(load_checkpoint(tmp_path / "alias")) == len(weight_map()), "also through a link to the snapshot"


def test_a_link_beside_the_blobs_of_a_hub_cache_is_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    secret = snapshot.parent.parent / "secret"
    (snapshot / SECOND).resolve().rename(secret)
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"{SECOND}: .*needed a file in the folder itself"):
        Checkpoint.open(snapshot)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(source: Path) -> None:
    (source / SECOND).unlink()
    os.mkfifo(source / SECOND)
    refuse(source, rf"{SECOND}: .*needed a file in the folder itself")


# --- F4: an index that does not fit ---


def test_a_missing_shard_is_named(source: Path) -> None:
    (source / SECOND).unlink()
    refuse(source, rf"names '{SECOND}', which is not in the same folder")
    (source / FIRST).unlink()
    refuse(source, rf"names '{FIRST}', '{SECOND}', which are not in the same folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{MLP}.extra.weight": FIRST}, rf"in no file: '{MLP}\.extra\.weight'"),
        ({f"{MLP}.up_proj.weight": None}, rf"not in the index: '{MLP}\.up_proj\.weight'"),
        ({f"{MLP}.up_proj.weight": FIRST}, rf"in another file: '{MLP}\.up_proj\.weight'"),
    ],
    ids=["not-in-its-file", "not-in-the-index", "in-another-file"],
)
def test_an_index_that_disagrees_with_its_files_is_refused_with_the_tensors(
    source: Path, change: dict[str, str | None], message: str
) -> None:
    write_index(source, {tensor: file for tensor, file in {**weight_map(), **change}.items() if file is not None})
    refuse(source, rf"{INDEX}: index and files disagree; {message}")


def test_a_disagreement_of_many_tensors_is_told_in_a_line(source: Path) -> None:
    write_index(source, {**weight_map(), **{f"x{i}": FIRST for i in range(1000)}})
    error = refuse(source, "in no file: 'x0', 'x1', 'x10' and more")
    assert len(str(error)) < 1000


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path: Path) -> None:
    files = tiny_model()
    files[FIRST][f"{MLP}.down_proj.weight"] = files[SECOND][f"{MLP}.down_proj.weight"] * 2
    source = write(tmp_path / "source", files)
    for file in (FIRST, SECOND):
        write_index(source, {**weight_map(), f"{MLP}.down_proj.weight": file})
        refuse(source, rf"'{MLP}\.down_proj\.weight' is in '{FIRST}' and in '{SECOND}'")


def test_a_file_that_the_index_does_not_name_is_ignored_with_a_warning(
    source: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    (source / "orphan.safetensors").write_bytes(b"not even safetensors")
    opened = Checkpoint.open(source)
    assert list(opened.tensors) == sorted(weight_map())
    assert opened.warnings == (f"{source}: not in the index, ignored: orphan.safetensors",)
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    assert f"fouroversix: {opened.warnings[0]}" in log.messages
    assert not (tmp_path / "out" / "orphan.safetensors").exists()


# --- F5: JSON ---

UNUSABLE = {
    "empty": "",
    "cut": "{",
    "list": "[]",
    "text": '"weight_map"',
    "deep-lists": "[" * 1_000_000,
    "deep-objects": '{"a":' * 1_000_000,
    "not-utf-8": b"\xff\xfe",
    "two-values": "{} {}",
    "digits": '{"weight_map": ' + "1" * 10_000 + "}",
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("name", [INDEX, "config.json", "hf_quant_config.json"])
def test_json_that_cannot_be_read_is_refused_with_its_file(source: Path, name: str, text: str | bytes) -> None:
    (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    error = refuse(source, re.escape(name))
    assert len(str(error)) < 1000, "the file is not quoted"


@pytest.mark.parametrize(
    "text",
    ['{"metadata": {}}', *(f'{{"weight_map": {listed}}}' for listed in ("[]", "{}", "null", '{"a": 1}', '"a"'))],
)
def test_an_index_without_a_map_is_refused(source: Path, text: str) -> None:
    (source / INDEX).write_text(text)
    refuse(source, rf"{INDEX}: got no usable `weight_map`, needed tensor names to file names")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused_but_in_the_config(source: Path, constant: str) -> None:
    # Some architectures' config.json holds Infinity: it is written by Python, which reads it again.
    (source / "config.json").write_text(f'{{"limit": {constant}}}')
    Checkpoint.open(source)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map()})
    (source / INDEX).write_text(text.replace('"total_size": 0', f'"total_size": {constant}'))
    refuse(source, rf"{INDEX}: .*got {constant}, needed finite numbers")


@pytest.mark.parametrize("name", [INDEX, "config.json", "hf_quant_config.json"])
def test_a_key_that_is_there_twice_is_refused_not_the_last_taken(source: Path, name: str) -> None:
    (source / name).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    refuse(source, rf"{re.escape(name)}: .*the key 'a' is there twice")


# --- F6, F8: code in a checkpoint ---


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "model.ckpt"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(marker),)

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / name).write_bytes(pickle.dumps(Payload()))
    refuse(source, rf"found only {name} \(pickle is not supported.*convert it to safetensors")
    assert not marker.exists()
    pickle.loads((source / name).read_bytes())
    assert marker.exists(), "the payload would have run"


@pytest.mark.parametrize("name", [SINGLE, "x.safetensors"])
def test_a_pickle_called_safetensors_is_no_pickle_to_us(tmp_path: Path, name: str) -> None:
    source = folder_with(tmp_path / "source", b"")
    (source / SINGLE).unlink()
    torch.save({"a": torch.ones(1)}, source / name)
    refuse(source, "not a readable safetensors file")


def test_code_that_a_config_asks_for_is_copied_and_never_imported(source: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (source / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    modules = set(sys.modules)
    config = {**CONFIG, "auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(source, tmp_path / "out", SCHEME)
    dict(load_checkpoint(tmp_path / "out"))
    assert not marker.exists()
    assert not any("modeling" in name for name in set(sys.modules) - modules)
    assert (tmp_path / "out" / "modeling.py").read_bytes() == (source / "modeling.py").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == config["auto_map"]


# --- F9: what may not be read ---


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder whose parents everybody may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", [SECOND, "config.json", INDEX])
def test_a_file_that_may_not_be_read_is_named(shared: Path, name: str) -> None:
    source = write(shared / "source", tiny_model())
    for path in source.iterdir():
        path.chmod(0o644)  # the library writes 0600
    before = contents(source)
    (source / name).chmod(0)
    with as_nobody(), pytest.raises(CheckpointError, match=rf"{re.escape(name)}: .*Permission denied"):
        Checkpoint.open(source)
    (source / name).chmod(0o644)
    assert contents(source) == before


def test_a_folder_that_may_not_be_read_is_named(shared: Path) -> None:
    source = write(shared / "source", tiny_model())
    source.chmod(0)
    with as_nobody(), pytest.raises(CheckpointError, match="source: cannot be read: Permission denied"):
        Checkpoint.open(source)
    source.chmod(0o755)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "no-weights", "NUL"])
def test_what_is_no_checkpoint_is_named_with_what_one_needs(tmp_path: Path, kind: str) -> None:
    source = tmp_path / ("nowhere\0" if kind == "NUL" else "nowhere")
    if kind == "file":
        source.write_text("model")
    elif kind in ("empty", "no-weights"):
        source.mkdir()
    if kind == "no-weights":
        (source / "config.json").write_text("{}")
    messages = {
        "nothing": "nowhere: cannot be read: No such file or directory; needed a folder",
        "file": "nowhere: cannot be read: Not a directory; needed a folder",
        "empty": r"nowhere: has no config\.json, needed a checkpoint as `save_pretrained` writes it",
        "no-weights": r"nowhere: needed model\.safetensors or model\.safetensors\.index\.json, found none",
        "NUL": "nowhere.*: cannot be read",
    }
    with pytest.raises(CheckpointError, match=messages[kind]):
        load_checkpoint(source)


def test_the_dtype_of_a_header_is_believed_only_where_the_bytes_fit(source: Path) -> None:
    redtype(source / SECOND, f"{MLP}.down_proj.weight", "F32", (32, 24))
    assert Checkpoint.open(source).tensors[f"{MLP}.down_proj.weight"].dtype == "F32"
    redtype(source / SECOND, f"{MLP}.down_proj.weight", "F32", (32, 48))
    refuse(source, rf"{SECOND}: not a readable safetensors file: .*'{MLP}\.down_proj\.weight'")
