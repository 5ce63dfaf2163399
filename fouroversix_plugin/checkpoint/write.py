"""Quantize a checkpoint: a plan carried out a few rows at a time, in memory that does not grow with the model.

A file gets its name when all of it is on the disk, and ``config.json`` is written last; ``target`` says how the folder
gets its own.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fouroversix_plugin import __version__
from fouroversix_plugin.checkpoint.card import CARD, model_card
from fouroversix_plugin.checkpoint.config import config, hf_quant_config
from fouroversix_plugin.checkpoint.files import (
    CONFIG,
    HF_QUANT_CONFIG,
    INDEX,
    PICKLES,
    SINGLE,
    Checkpoint,
    CheckpointError,
    checked_path,
    read_json_objects,
)
from fouroversix_plugin.checkpoint.plan import MAX_SHARD_SIZE, Output, Plan, Shard, group_of, make_plan
from fouroversix_plugin.checkpoint.sources import Matrix, Source
from fouroversix_plugin.checkpoint.target import (
    check_target,
    copy_file,
    publish,
    published,
    unfinished,
    write_json,
    write_text,
)
from fouroversix_plugin.formats import COMPRESSED_TENSORS, MODELOPT, OURS, Part
from fouroversix_plugin.kernels import select
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import BLOCK_SIZE, Scheme
from fouroversix_plugin.reference import global_scales, row_amax
from fouroversix_plugin.weights import nonfinite

logger = logging.getLogger(__name__)

_ROWS_NBYTES: Final = 64 << 20
"""How much of a weight (in fp32) is worked on at once."""

_OTHER_WEIGHTS: Final = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite")
"""The same model for other frameworks, in full precision."""

_MODULES: Final = "modules.json"
"""Of Sentence Transformers: the folders of what follows the transformer, such as pooling."""
_CHAT_TEMPLATES: Final = "additional_chat_templates"

_COPY_NBYTES: Final = 16 << 20

_SMALLEST_AMAX: Final = 1e-34
"""Below it the fp32 decode scale would be subnormal."""

Progress = Callable[[str, int], None]
"""Told the name of a tensor and how many bytes of the source were just finished."""


def plan_conversion(
    source: Path | str, scheme: Scheme, format: str = OURS.name, max_shard_size: int = MAX_SHARD_SIZE
) -> Plan:
    """What :func:`quantize_checkpoint` would write, without writing: read from the headers, exact to the byte.

    Raises:
        CheckpointError: a source that cannot be read or is quantized already, or a plan that cannot be.
    """
    with _as_checkpoint_error():
        return make_plan(Source.open(Checkpoint.open(source)), scheme, format, max_shard_size)


def quantize_checkpoint(
    source: Path | str,
    target: Path | str,
    scheme: Scheme,
    *,
    format: str = OURS.name,
    device: torch.device | str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda name, nbytes: None,
) -> Plan:
    """Write ``target``, the checkpoint ``source`` with its linear weights quantized.

    The bytes depend on the source, the scheme, the format and the shard size, never on the device, and equal those of
    an engine that quantizes the same checkpoint while loading it. The folder's other files are copied.

    Args:
        source: a folder of safetensors (bf16, fp16, fp32 or FP8) with its ``config.json``.
        target: the folder to make.
        scheme: what to compute and what to leave alone.
        format: how to spell the result: one of ``OUTPUT_FORMATS``. The formats of others take W4A16 only.
        device: where to quantize.
        max_shard_size: bytes of tensors in one file.
        resume: go on with what an interrupted conversion left; else that is removed.
        overwrite: replace ``target`` if it is a checkpoint; it stays until the new one is complete.
        progress: told about every piece of work.

    Returns:
        The plan that was carried out.

    Raises:
        CheckpointError: a source that cannot be read, is quantized already, has nothing to quantize or holds NaN or
            infinity; a target that exists, lies inside the source or is being written; a full disk; nothing to resume,
            or something else. The target is then as it was and nothing half done is left, except after an
            interruption.
    """
    source, target = Path(source), Path(target)
    plan = plan_conversion(source, scheme, format, max_shard_size)
    if not plan.groups:  # no loader would find what the config promises
        reasons = Counter(alone.reason for alone in plan.left_alone if alone.linear)
        why = ", ".join(f"{count}: {reason}" for reason, count in reasons.items()) or "it has none"
        raise CheckpointError(f"{source}: got no linear weight to quantize ({why}), needed at least one")
    for warning in plan.source.checkpoint.warnings:
        logger.warning("fouroversix: %s", warning)
    manifest = _manifest(plan)
    try:
        if resume and published(target, manifest):
            return plan
        check_target(source, target, overwrite)
        with unfinished(target, manifest, resume) as partial:
            _carry_out(plan, partial, torch.device(device), progress)
            check_target(source, target, overwrite)  # somebody may have made it meanwhile
            publish(partial, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written from {source}: {error}") from error
    return plan


def _manifest(plan: Plan) -> dict[str, Any]:
    """What an unfinished conversion must have in common with the one that goes on with it."""
    checkpoint = plan.source.checkpoint
    files = sorted({stored.file for stored in checkpoint.tensors.values()} | {CONFIG})
    described = {file: (checkpoint.folder / file).stat() for file in files}
    headers = hashlib.sha256(repr(sorted(checkpoint.tensors.items())).encode()).hexdigest()
    return {
        "version": __version__,
        "scheme": plan.scheme.to_dict(),
        "format": plan.format.name,
        "files": {shard.file: hashlib.sha256(shard.header).hexdigest() for shard in plan.shards},
        "source": {file: [status.st_size, status.st_mtime_ns] for file, status in described.items()},
        "headers": headers,
    }


def _carry_out(plan: Plan, folder: Path, device: torch.device, progress: Progress) -> None:
    card, others = model_card(plan), _other_files(plan.source.checkpoint.folder)  # may fail: before the work
    amaxes = _Amaxes(plan)
    for shard in plan.shards:
        path = folder / shard.file
        if path.exists():
            for output in shard.outputs:  # finished before an interruption
                progress(output.name, _source_nbytes(plan, output))
            continue
        growing = path.with_name(path.name + ".tmp")
        with growing.open("wb") as stream:
            _write_shard(plan, shard, stream.fileno(), device, amaxes, progress)
            os.fsync(stream.fileno())
        growing.rename(path)
        with safe_open(path, framework="pt"):  # the library's checks of what was just written
            pass
    if [shard.file for shard in plan.shards] != [SINGLE]:
        weight_map = {output.name: shard.file for shard in plan.shards for output in shard.outputs}
        total = sum(shard.nbytes for shard in plan.shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)
    for path in others:
        copied = folder / path.relative_to(plan.source.checkpoint.folder)
        copied.parent.mkdir(exist_ok=True)
        copy_file(path, copied)
    write_text(folder / CARD, card)
    if plan.format is MODELOPT:
        write_json(folder / HF_QUANT_CONFIG, hf_quant_config(plan))
    write_json(folder / CONFIG, config(plan))


def _write_shard(
    plan: Plan, shard: Shard, descriptor: int, device: torch.device, amaxes: _Amaxes, progress: Progress
) -> None:
    header = shard.header
    os.posix_fallocate(descriptor, 0, len(header) + shard.nbytes)  # a full disk is known now, not hours later
    os.pwrite(descriptor, header, 0)
    position = len(header)
    places: dict[Matrix, dict[Part, int]] = {}
    for output in shard.outputs:
        if output.matrix is not None and output.part is not None:
            places.setdefault(output.matrix, {})[output.part] = position
        else:
            _copy(plan.source, output, descriptor, position, progress)
        position += output.nbytes
    # What shares an amax is adjacent: its weights are read twice, the second time from the page cache.
    for matrix in sorted(places, key=lambda matrix: group_of(matrix.module)):
        _quantize(plan, matrix, amaxes.of(matrix), descriptor, places[matrix], device, progress)


def _quantize(
    plan: Plan,
    matrix: Matrix,
    amax: Tensor,
    descriptor: int,
    places: Mapping[Part, int],
    device: torch.device,
    progress: Progress,
) -> None:
    for first, last in plan.source.rows_at_a_time(matrix, _ROWS_NBYTES):
        rows = plan.source.read(matrix, first, last)
        q = _quantize_rows(matrix, rows, plan.scheme, amax, device)
        _pwrite(descriptor, q.packed, places["packed"] + first * matrix.columns // 2)
        _pwrite(descriptor, q.block_scale, places["block_scale"] + first * matrix.columns // BLOCK_SIZE)
        progress(matrix.tensor, (last - first) * matrix.columns * rows.element_size() // (4 if matrix.scale else 1))
    encode, decode = global_scales(amax, plan.scheme.weights)
    _pwrite(descriptor, encode if plan.format is COMPRESSED_TENSORS else decode, places["decode_scale"])


def _quantize_rows(matrix: Matrix, rows: Tensor, scheme: Scheme, amax: Tensor, device: torch.device) -> NVFP4Tensor:
    def on(where: torch.device) -> NVFP4Tensor:
        quantize = select("quantize", "", rows.shape, where).quantize
        return quantize(rows.to(where), scheme.weights, "tensor", amax.to(where)).to("cpu")

    try:
        return on(device)
    except RuntimeError as error:
        # torch's own error, or the driver's where not even a context has room.
        if "out of memory" not in str(error).lower():
            raise
        logger.warning(
            "fouroversix: %s: no memory left on %s; quantized on the CPU, to the same bytes", matrix.module, device
        )
        return on(torch.device("cpu"))


class _Amaxes:
    """The amax of every group of matrices, found when it is first needed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._found: dict[str, Tensor] = {}

    def of(self, matrix: Matrix) -> Tensor:
        """float32 []: the largest magnitude in all that shares one scale with ``matrix``."""
        group = group_of(matrix.module)
        if group not in self._found:
            members = self._plan.groups[group]
            self._found[group] = torch.stack([self._own(member) for member in members]).amax()
            self._check(members[0].module, self._found[group])
        return self._found[group]

    def _own(self, matrix: Matrix) -> Tensor:
        source = self._plan.source
        spans = list(source.rows_at_a_time(matrix, _ROWS_NBYTES))
        amax = torch.stack([row_amax(source.read(matrix, *span).flatten()) for span in spans]).amax()
        if bool(amax.isfinite()):
            return amax
        bad = [(first, nonfinite(source.read(matrix, first, last))) for first, last in spans]
        first, row = next((first, indices[0].tolist()) for first, indices in bad if len(indices))
        raise CheckpointError(
            f"{matrix.module}.weight: got {sum(len(indices) for _, indices in bad)} NaN or infinite values, the first "
            f"at {(first + row[0], row[1])}, needed finite weights; the checkpoint is damaged, or its values do not "
            "fit its dtype"
        )

    def _check(self, module: str, amax: Tensor) -> None:
        largest = self._plan.scheme.weights.encoded_amax
        if 0 < amax < _SMALLEST_AMAX or amax > largest:
            raise CheckpointError(
                f"{module}: got an amax of {amax:.3g}, needed 0 or {_SMALLEST_AMAX:.3g} to {largest:g}; add it to "
                "`ignore`"
            )


def _copy(source: Source, output: Output, descriptor: int, position: int, progress: Progress) -> None:
    checkpoint = source.checkpoint
    stored = checkpoint.tensors[output.name]
    if output.dequantized:
        matrix = (source.matrices(output.name, stored) or [])[0]
        for first, last in source.rows_at_a_time(matrix, _ROWS_NBYTES):
            rows = source.read(matrix, first, last).to(torch.bfloat16)
            _pwrite(descriptor, rows, position + first * matrix.columns * 2)
            progress(output.name, rows.nbytes // 2)
        return
    buffer = memoryview(bytearray(min(_COPY_NBYTES, stored.nbytes)))
    for begin in range(0, stored.nbytes, _COPY_NBYTES):
        piece = buffer[: min(_COPY_NBYTES, stored.nbytes - begin)]
        checkpoint.read_into(output.name, piece, stored.begin + begin)
        _pwrite_bytes(descriptor, piece, position + begin)
        progress(output.name, len(piece))


def _source_nbytes(plan: Plan, output: Output) -> int:
    """Bytes of the source that an output stands for: a quantized matrix counts with its codes."""
    if output.matrix is None:
        return plan.source.checkpoint.tensors[output.name].nbytes
    if output.part != "packed":
        return 0
    stored = plan.source.checkpoint.tensors[output.matrix.tensor]
    return output.matrix.rows * output.matrix.columns * stored.nbytes // max(math.prod(stored.shape), 1)


def _other_files(source: Path) -> list[Path]:
    """Tokenizer, generation config and whatever else lies beside the weights. Code is copied, never run."""
    written = (CONFIG, HF_QUANT_CONFIG, CARD)
    beside = [
        checked_path(source, path.name)
        for path in sorted(source.iterdir())
        if not (path.is_dir() or path.name.startswith(".") or path.name in written)
        and not path.name.endswith((".safetensors", ".index.json", *_OTHER_WEIGHTS, *PICKLES))
    ]
    below = [
        checked_path(source, path.name, folder)
        for folder in _folders(source)
        for path in sorted((source / folder).iterdir())
        if not (path.is_dir() or path.name.startswith("."))
    ]
    return beside + below


def _folders(source: Path) -> list[str]:
    """Folders that belong to a model: what follows the transformer in an embedding model, and chat templates."""
    names = [_CHAT_TEMPLATES]
    if (source / _MODULES).exists():
        names += [str(module.get("path", "")) for module in read_json_objects(checked_path(source, _MODULES))]
    # The transformer's own path is empty: the folder itself.
    return [name for name in dict.fromkeys(names) if name and Path(name).name == name and (source / name).is_dir()]


def _pwrite(descriptor: int, tensor: Tensor, position: int) -> None:
    data = bytearray(tensor.nbytes)
    if data:
        torch.frombuffer(data, dtype=torch.uint8).copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
        _pwrite_bytes(descriptor, memoryview(data), position)


def _pwrite_bytes(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
