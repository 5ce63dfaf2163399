"""Checkpoints on disk: sharded safetensors read, quantized and written, one tensor at a time.

A finished folder appears under its name at once and complete: everything is written into ``DST.partial`` first,
``config.json`` last, and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fouroversix_plugin import __version__
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import BLOCK_SIZE, Scheme
from fouroversix_plugin.reference import row_amax
from fouroversix_plugin.weights import check_full_precision, quantize_weight

INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl")

_FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Projections that engines merge into one layer: they share one amax, so that the merged layer has one scale."""


_SMALLEST_AMAX: Final = 1e-34
"""Below it the fp32 decode scale would be subnormal."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: what, where, got, needed."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors: its ``config.json`` and which file holds which tensor."""

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read the folder's config and headers; tensors are read when asked for.

        Raises:
            CheckpointError: no config, no safetensors, or an index that does not fit its files.
        """
        folder = Path(folder)
        config = _read_json(folder / "config.json")
        index = folder / INDEX
        if index.exists():
            listed = _read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed or not all(isinstance(n, str) for n in listed.values()):
                raise CheckpointError(f"{index}: got no usable `weight_map`, needed tensor names to file names")
            names = sorted(set(listed.values()))
        elif (folder / _SINGLE).exists():
            listed, names = None, [_SINGLE]
        else:
            pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
            found = f"only {pickles[0]} (pickle is not read)" if pickles else "none"
            raise CheckpointError(f"{folder}: needed {_SINGLE} or {INDEX}, found {found}; convert it to safetensors")
        files: dict[str, str] = {}
        for name in names:
            for tensor in _tensor_names(folder, name):
                if tensor in files:
                    raise CheckpointError(f"{folder}: {tensor!r} is in {files[tensor]!r} and in {name!r}")
                files[tensor] = name
        if listed is not None and listed != files:
            wrong = sorted(set(listed.items()) ^ set(files.items()))[0]
            raise CheckpointError(f"{index}: {wrong[0]!r} in {wrong[1]!r}: index and file disagree")
        return Checkpoint(folder, config, files)

    def tensors(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of one file, one at a time in the order of their names."""
        with _open(self.folder, file) as handle:
            for name in sorted(handle.keys()):
                yield name, handle.get_tensor(name)


def quantize_checkpoint(
    source: Path, target: Path, scheme: Scheme, progress: Callable[[str], None] = lambda name: None
) -> Scheme:
    """Write ``target``, the checkpoint ``source`` with its linear weights quantized, shard by shard.

    Linear weights are the 2-D ``….weight`` tensors whose module the scheme does not ignore; those whose K is not a
    multiple of 16 are left alone and added to ``ignore``. Parts that engines merge (q/k/v, gate/up, w1/w3) are scaled
    for one amax, so the bytes equal those of an engine that quantizes the same checkpoint while loading it.

    Args:
        source: a folder of full-precision safetensors with its ``config.json``.
        target: the folder to make; must not exist.
        scheme: what to compute and what to leave alone.
        progress: told the name of every tensor when it is done.

    Returns:
        The scheme as written: with its producer, and all that was left alone in ``ignore``.

    Raises:
        CheckpointError: unreadable, already quantized or non-finite source, or ``target`` exists; nothing is left.
    """
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint.open(source)
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, dict) and config.get("quantization_config") is not None:
            raise CheckpointError(
                f"{source}: already quantized ({config['quantization_config']}), needed full-precision weights"
            )
    if target.exists():
        raise CheckpointError(f"{target}: exists already; name another folder or remove it")
    if source.resolve() in target.resolve().parents:
        raise CheckpointError(f"{target}: lies inside the source; name a folder outside of {source}")
    try:
        with _partial_folder(target) as partial:
            scheme = _write(checkpoint, partial, scheme, progress)
            partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written from {source}: {error}") from error
    return scheme


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """An empty ``target.partial`` for one process alone, which renames it; removed if that fails."""
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial}: another process is writing {target}; wait for it to finish") from None
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _write(checkpoint: Checkpoint, folder: Path, scheme: Scheme, progress: Callable[[str], None]) -> Scheme:
    amax, left_alone = _shared_amax(checkpoint, scheme)
    producer = {"name": "fouroversix-plugin", "version": __version__}
    scheme = replace(scheme, ignore=scheme.ignore + left_alone, producer=producer)
    weight_map: dict[str, str] = {}
    total = 0
    mode = _mode_of_new_files(folder)
    for file in sorted(set(checkpoint.files.values())):
        shard: dict[str, Tensor] = {}
        for name, tensor in checkpoint.tensors(file):
            module = name.removesuffix(".weight")
            if _is_quantized(name, tensor.shape, scheme):
                with _as_checkpoint_error():
                    q = quantize_weight(module, tensor, scheme.weights, partial(torch.maximum, amax[_group(module)]))
                shard |= _stored(module, q)
            else:
                shard[name] = tensor
            progress(name)
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    if set(weight_map.values()) != {_SINGLE}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)
    for path in sorted(checkpoint.folder.iterdir()):
        if (
            path.is_file()
            and path.suffix not in (".safetensors", *_PICKLES)
            and path.name not in (INDEX, "config.json")
        ):
            shutil.copyfile(path, folder / path.name)
    _write_json(folder / "config.json", {**checkpoint.config, "quantization_config": scheme.to_dict()})
    return scheme


def _shared_amax(checkpoint: Checkpoint, scheme: Scheme) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The amax of every group of projections that share one, and the linear modules whose K rules them out."""
    amax: dict[str, Tensor] = {}
    quantized: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    left_alone = []
    for file in sorted(set(checkpoint.files.values())):
        for name, tensor in checkpoint.tensors(file):
            module = name.removesuffix(".weight")
            if _is_quantized(name, tensor.shape, scheme):
                with _as_checkpoint_error():
                    check_full_precision(name, tensor.dtype)
                group = _group(module)
                own = row_amax(tensor.flatten())
                amax[group] = torch.maximum(amax[group], own) if group in amax else own
                quantized.setdefault(group, []).append(module)
            elif module != name and tensor.ndim == 2:
                others.setdefault(_group(module), []).append(module)
                if not scheme.ignores(module):
                    left_alone.append(module)
            elif tensor.ndim == 3 and ".experts." in name and not scheme.ignores(name):
                raise CheckpointError(
                    f"{name}: got experts stacked in one tensor {tuple(tensor.shape)}, needed one each; add it "
                    "to `ignore`, or quantize while serving"
                )
    for group in quantized.keys() & others.keys():
        raise CheckpointError(
            f"{others[group][0]}: left alone, but {quantized[group][0]} is quantized; engines fuse them into one "
            "layer: ignore all of its parts or none"
        )
    for group, largest in amax.items():
        if 0 < largest < _SMALLEST_AMAX:
            raise CheckpointError(
                f"{quantized[group][0]}: got an amax of {largest:.3g}, needed {_SMALLEST_AMAX:.3g} or 0"
            )
    return amax, tuple(left_alone)


def _is_quantized(name: str, shape: torch.Size, scheme: Scheme) -> bool:
    module = name.removesuffix(".weight")
    fits = len(shape) == 2 and shape.numel() > 0 and shape[1] % BLOCK_SIZE == 0
    return module != name and fits and not scheme.ignores(module)


def _group(module: str) -> str:
    parent, _, name = module.rpartition(".")
    siblings = next((group for group in _FUSED if name in group), (name,))
    return f"{parent}.{'+'.join(siblings)}"


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _stored(module: str, q: NVFP4Tensor) -> dict[str, Tensor]:
    """A weight under ModelOpt's names, which stock NVFP4 loaders read too."""
    return {
        f"{module}.weight": q.packed,
        f"{module}.weight_scale": q.block_scale,
        f"{module}.weight_scale_2": q.decode_scale,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, needed a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensor_names(folder: Path, file: str) -> list[str]:
    with _open(folder, file) as handle:
        return list(handle.keys())


def _open(folder: Path, file: str) -> Any:
    if Path(file).name != file or not (folder / file).is_file():
        raise CheckpointError(f"{folder / INDEX}: names {file!r}, needed a file in the same folder")
    try:
        return safe_open(folder / file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / file}: not a readable safetensors file: {error}") from error


def _mode_of_new_files(folder: Path) -> int:
    """What the umask gives a new file: safetensors writes files for their owner only."""
    probe = folder / "mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode
