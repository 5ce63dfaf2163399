"""A folder of safetensors: which file holds which tensor, checked before any of it is used.

Nothing outside the folder is opened, nothing is unpickled and no code of a checkpoint is imported.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CONFIG: Final = "config.json"
HF_QUANT_CONFIG: Final = "hf_quant_config.json"

_LARGEST_JSON: Final = 256 << 20
_LARGEST_HEADER: Final = 100 << 20
"""What safetensors itself accepts."""
_MOST_VALUES: Final = (1 << 63) - 1
"""What torch can count. A header may claim more: a size of 2^64 beside one of 0 takes no bytes."""

TORCH_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F4": torch.uint8,  # two values a byte: read as their bytes, half as many columns
}
"""safetensors' names of the dtypes that can be read; tensors of others can only be copied."""
_OTHER_DTYPES: Final = ("F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U16", "U32", "U64", "C64")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: what, where, got, needed."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies, from the header of its file.

    Args:
        file: name in the checkpoint's folder.
        dtype: safetensors' name of it.
        shape: as the header has it.
        begin: of its bytes in the file.
        nbytes: how many.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors.

    Args:
        folder: where.
        config: ``config.json``.
        hf_quant_config: ``hf_quant_config.json`` of older ModelOpt exports, or None.
        tensors: every tensor by its name, in the order of names.
        warnings: what is odd but harmless.
    """

    folder: Path
    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]
    warnings: tuple[str, ...] = ()

    @staticmethod
    def open(folder: Path | str) -> Checkpoint:
        """Read the folder's config, index and headers; tensors are read when asked for.

        Raises:
            CheckpointError: no config, no safetensors, a file that is not sound, or an index that does not fit its
                files.
        """
        folder = Path(folder)
        try:
            listing = sorted(os.listdir(folder))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{folder}: cannot be read: {reason}; needed a folder") from error
        if CONFIG not in listing:
            raise CheckpointError(f"{folder}: has no {CONFIG}, needed a checkpoint as `save_pretrained` writes it")
        config = read_json(checked_path(folder, CONFIG), finite=False)
        hf_quant_config = None
        if HF_QUANT_CONFIG in listing:
            hf_quant_config = read_json(checked_path(folder, HF_QUANT_CONFIG))
        listed, names = _listed(folder, listing)
        tensors: dict[str, StoredTensor] = {}
        for file in names:
            for name, stored in _header(folder, file).items():
                if name in tensors:
                    raise CheckpointError(f"{folder}: {name!r} is in {tensors[name].file!r} and in {file!r}")
                tensors[name] = stored
        if listed is not None:
            _check_index(folder / INDEX, listed, tensors)
        orphans = [name for name in listing if name.endswith(".safetensors") and name not in names]
        warnings = (f"{folder}: not in the index, ignored: {', '.join(orphans)}",) if orphans else ()
        return Checkpoint(folder, config, hf_quant_config, dict(sorted(tensors.items())), warnings)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """A tensor, or its slices ``first`` to ``last`` of the leading dimension. An F4 tensor comes as its bytes.

        It is read, not mapped: a mapped file that another process cuts short would end this one.

        Raises:
            CheckpointError: no such tensor, a dtype torch has no name for, or a file shorter than its header says.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}")
        dtype = TORCH_DTYPES.get(stored.dtype)
        if dtype is None:
            known = ", ".join(TORCH_DTYPES)
            raise CheckpointError(f"{self.folder / stored.file}: {name}: got dtype {stored.dtype}, needed {known}")
        shape = list(stored.shape)
        if stored.dtype == "F4":
            if shape[-1] % 2:
                raise CheckpointError(
                    f"{self.folder / stored.file}: {name}: got F4 of shape {stored.shape}, needed an even last size"
                )
            shape[-1] //= 2
        begin, nbytes = stored.begin, stored.nbytes
        if shape:
            last = shape[0] if last is None else last
            each = nbytes // max(shape[0], 1)
            begin, nbytes, shape[0] = begin + first * each, (last - first) * each, last - first
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(nbytes)
        self.read_into(name, memoryview(data), begin)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)

    def read_into(self, name: str, buffer: memoryview, begin: int) -> None:
        """Fill ``buffer`` from position ``begin`` of the file that holds ``name``."""
        path = checked_path(self.folder, self.tensors[name].file)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(begin)
                filled = 0
                while filled < len(buffer):
                    got = file.readinto(buffer[filled:])
                    if not got:
                        raise CheckpointError(f"{path}: {name}: the file ends within it; did it change?")
                    filled += got
        except OSError as error:
            raise CheckpointError(f"{path}: {name}: cannot be read: {error.strerror}") from error


def checked_path(folder: Path, file: str, subfolder: str = "") -> Path:
    """``folder / file``, which must lie in the folder: links may only lead within it, or to the blobs of a hub cache.

    The hub's cache keeps ``snapshots/REVISION/file`` as links to ``blobs/HASH``.

    Args:
        folder: of a checkpoint.
        file: its name.
        subfolder: the name of the folder's own in which the file lies; not a link.
    """
    path = folder / subfolder / file
    try:
        real, inside = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{path}: cannot be followed ({error}), needed a file in the folder itself") from error
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    if real.parent not in (inside / subfolder, blobs) or not real.is_file():
        raise CheckpointError(f"{path}: leads to {real}, needed a file in the folder itself")
    return path


def read_json(path: Path, finite: bool = True) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no key twice and, where ``finite``, no NaN or Infinity.

    (Some architectures' ``config.json`` holds Infinity, which Python writes and reads.)
    """
    content = _read_json(path, finite)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, needed a JSON object")
    return content


def read_json_objects(path: Path) -> list[dict[str, Any]]:
    """A JSON array of objects, as strictly."""
    content = _read_json(path, finite=True)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise CheckpointError(f"{path}: got something else, needed a JSON array of objects")
    return content


def _read_json(path: Path, finite: bool) -> Any:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path}: got {path.stat().st_size} bytes, needed at most {_LARGEST_JSON}")
        return _parse(path.read_text(encoding="utf-8"), finite)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def _parse(text: str, finite: bool) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} is there twice")
        return content

    def refuse(constant: str) -> None:
        raise ValueError(f"got {constant}, needed finite numbers")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse if finite else None)


def _listed(folder: Path, listing: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """The index's ``weight_map``, or None without an index; and the names of the files that hold tensors."""
    if INDEX in listing:
        index = folder / INDEX
        listed = read_json(checked_path(folder, INDEX)).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError(f"{index}: got no usable `weight_map`, needed tensor names to file names")
        names = sorted(set(listed.values()))
        absent = [name for name in names if name not in listing]
        if absent:
            raise CheckpointError(
                f"{index}: names {', '.join(map(repr, absent[:5]))}, which {'is' if len(absent) == 1 else 'are'} not "
                "in the same folder"
            )
        return listed, names
    if SINGLE in listing:
        return None, [SINGLE]
    single = [name for name in listing if name.endswith(".safetensors")]
    if len(single) == 1:
        return None, single
    pickles = [name for name in listing if name.endswith(PICKLES)]
    found = f"{len(single)} other safetensors files" if single else "none"
    if pickles and not single:
        found = f"only {pickles[0]} (pickle is not supported: reading it can run code)"
    raise CheckpointError(f"{folder}: needed {SINGLE} or {INDEX}, found {found}; convert it to safetensors")


def _check_index(index: Path, listed: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    held = {name: stored.file for name, stored in tensors.items()}
    if listed == held:
        return
    missing = sorted(name for name in listed if name not in held)
    extra = sorted(name for name in held if name not in listed)
    moved = sorted(name for name in listed if name in held and listed[name] != held[name])
    parts = [
        f"{what} {', '.join(map(repr, names[:3]))}{' and more' if len(names) > 3 else ''}"
        for what, names in (("in no file:", missing), ("not in the index:", extra), ("in another file:", moved))
        if names
    ]
    raise CheckpointError(f"{index}: index and files disagree; {'; '.join(parts)}")


def _header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """Names and places of a file's tensors; the library checks everything about them but names that come twice."""
    path = checked_path(folder, file)
    try:
        with path.open("rb"):  # first: the library calls a file absent that may not be read
            pass
        with safe_open(path, framework="pt"):
            pass
        entries, data = _entries(path)
        return {name: _stored(file, data, name, entry) for name, entry in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: deep nesting, or no room to map it
        message = f"{path}: not a readable safetensors file: {error}{_what_is_wrong(path)}"
        raise CheckpointError(message) from error


def _entries(path: Path) -> tuple[dict[str, Any], int]:
    """What a file's header says of each tensor, and where the data begins."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        most = min(_LARGEST_HEADER, os.fstat(stream.fileno()).st_size - 8)
        if length > most:
            raise ValueError(f"got a header of {length} bytes, needed at most {most}")
        entries = _parse(stream.read(length).decode("utf-8"), finite=True)
    if not isinstance(entries, dict):
        raise ValueError(f"got a header that is a {type(entries).__name__}, needed an object")
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _stored(file: str, data: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    if math.prod(max(size, 1) for size in entry["shape"]) > _MOST_VALUES:
        raise ValueError(f"the tensor {name!r}: got shape {entry['shape']}, needed sizes that a tensor can have")
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)


def _what_is_wrong(path: Path) -> str:
    """What the library's error leaves out: the tensor it is about, or how many bytes are missing."""
    try:
        entries, data = _entries(path)
        held, described = path.stat().st_size - data, 0
    except (OSError, ValueError, RecursionError):
        return ""
    for name, entry in entries.items():
        try:
            begin, end = entry["data_offsets"]
            bits = 8 if entry["dtype"] == "BOOL" else int(re.findall(r"\d+", entry["dtype"])[0])
            sound = _known(entry["dtype"]) and bits * math.prod(entry["shape"]) == 8 * (end - begin)
            sound = sound and all(type(size) is int and size >= 0 for size in (begin, end, *entry["shape"]))
        except (KeyError, IndexError, TypeError, ValueError):
            sound = False
        if not sound:
            return f"; the tensor {name!r} is described as {str(entry)[:200]}"
        described = max(described, end)
    if described == held:
        return ""
    return f"; its header describes {described} bytes of tensors, the file holds {held}: was all of it downloaded?"


def _known(dtype: str) -> bool:
    return dtype in TORCH_DTYPES or dtype in _OTHER_DTYPES
