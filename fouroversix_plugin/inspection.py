"""What a checkpoint is: recipe, producer, size, every quantized layer with its scales, and what is not quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from fouroversix_plugin import tables
from fouroversix_plugin.checkpoint import Checkpoint, CheckpointError, LoadedCheckpoint, load_checkpoint
from fouroversix_plugin.checkpoint.plan import LeftAlone, group_of, ignores, make_plan
from fouroversix_plugin.checkpoint.sources import Source
from fouroversix_plugin.formats import Stored, quantization_block
from fouroversix_plugin.inspection_text import inspection_text
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import QUANT_METHOD, Scheme, preset
from fouroversix_plugin.weights import looks_narrow

SCHEMA_VERSION: Final = 1

Status = Literal["failed", "warning", "note"]


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """What the blocks of a weight say.

    Args:
        fours: blocks that chose 4.
        nonzero: blocks that chose at all.
        largest_scale: the largest E4M3 block scale.
        decode_scale: smallest and largest fp32 decode scale; equal where the weight has one.
    """

    fours: int
    nonzero: int
    largest_scale: float
    decode_scale: tuple[float, float]


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """One quantized weight.

    Args:
        module: full name.
        shape: (N, K), or None where not even that can be read.
        nbytes: of codes and scales as they are stored.
        blocks: None for a weight that does not pass the checks of a loader.
        error: why it does not.
    """

    module: str
    shape: tuple[int, int] | None
    nbytes: int
    blocks: BlockFigures | None
    error: str | None = None

    @property
    def values(self) -> int:
        return self.shape[0] * self.shape[1] if self.shape is not None else 0

    def to_dict(self) -> dict[str, Any]:
        figures = self.blocks
        return {
            "module": self.module,
            "dtype": "NVFP4",
            "shape": self.shape and list(self.shape),
            "nbytes": self.nbytes,
            "bits_per_weight": _bits(self.nbytes, self.values),
            "share_of_four": figures and _share(figures.fours, figures.nonzero),
            "largest_block_scale": figures and figures.largest_scale,
            "decode_scale": figures and list(figures.decode_scale),
            "passed": self.error is None,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor that is not quantized, and why."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "nbytes": self.nbytes,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Quantizable:
    """What ``quantize`` would make of a checkpoint with its default recipe.

    Args:
        weights: linear weights it would take.
        values: how many numbers those hold.
        nbytes: of all tensors afterwards, with headers.
    """

    weights: int
    values: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Check:
    """Something to know about a checkpoint: ``failed`` ones make it unfit to be served.

    Args:
        status: how bad it is.
        subject: name of the layer, of the layers that are merged, or of the tensor; "" for the whole checkpoint.
        message: what it is.
    """

    status: Status
    subject: str
    message: str

    def to_dict(self) -> dict[str, str]:
        return {"status": self.status, "subject": self.subject, "message": self.message}


@dataclass(frozen=True, slots=True)
class Inspection:
    """See :func:`inspect_checkpoint`.

    Args:
        folder: of the checkpoint.
        architecture: as its config names it.
        stored: what its config claims of its quantization, or None for a checkpoint that is not quantized.
        producer: who wrote it, as far as it says.
        layers: its quantized weights, in model order.
        others: all other tensors.
        quantizable: for a checkpoint that is not quantized and could be.
        checks: what is wrong, odd or good to know.
    """

    folder: Path
    architecture: str
    stored: Stored | None
    producer: Mapping[str, str]
    layers: tuple[QuantizedLayer, ...]
    others: tuple[OtherTensor, ...]
    quantizable: Quantizable | None
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(check.status == "failed" for check in self.checks)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per value of the quantized weights, scales and padding included."""
        sound = [layer for layer in self.layers if layer.shape is not None]
        return _bits(sum(layer.nbytes for layer in sound), sum(layer.values for layer in sound))

    @property
    def share_of_four(self) -> float | None:
        """Of the non-zero blocks of all weights that can be read."""
        figures = [layer.blocks for layer in self.layers if layer.blocks is not None]
        return _share(sum(f.fours for f in figures), sum(f.nonzero for f in figures))

    @property
    def largest_block_scale(self) -> float | None:
        return max((layer.blocks.largest_scale for layer in self.layers if layer.blocks is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """One JSON object; every layer, tensor and check is in it."""
        stored = self.stored
        recipe = None
        if stored is not None:
            scheme = stored.scheme
            recipe = {
                "name": scheme.name,
                "labelled": stored.labelled,
                "weights": scheme.weights.to_dict() if stored.labelled else None,
                "activations": scheme.activations and scheme.activations.to_dict(),
                "input_scale": scheme.input_scale if scheme.activations is not None else None,
                "largest_block_scale": scheme.weights.largest_block_scale,
                "ignore": list(scheme.ignore),
            }
        quantizable = self.quantizable
        return {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": str(self.folder),
            "architecture": self.architecture,
            "failed": self.failed,
            "format": stored and stored.format.name,
            "recipe": recipe,
            "producer": dict(self.producer),
            "nbytes": {
                "quantized": sum(layer.nbytes for layer in self.layers),
                "other": sum(other.nbytes for other in self.others),
            },
            "bits_per_weight": self.bits_per_weight,
            "share_of_four": self.share_of_four,
            "largest_block_scale": self.largest_block_scale,
            "layers": [layer.to_dict() for layer in self.layers],
            "not_quantized": [other.to_dict() for other in self.others],
            "quantizable": quantizable
            and {"weights": quantizable.weights, "values": quantizable.values, "nbytes": quantizable.nbytes},
            "checks": [check.to_dict() for check in self.checks],
        }

    def text(self) -> str:
        """For a terminal: a summary, the layers, what is not quantized, and the checks last."""
        return inspection_text(self)


def inspect_checkpoint(
    path: Path | str, progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> Inspection:
    """Read every quantized weight of a checkpoint and say what it holds.

    Args:
        path: a folder: NVFP4 of any family that ``load_checkpoint`` reads, full precision or FP8.
        progress: told the name of a quantized weight and its bytes once they were read.

    Returns:
        An :class:`Inspection`. A weight that a loader would refuse is a failed check in it; the others are still read.

    Raises:
        CheckpointError: a folder, config or header that cannot be read at all, or another quantization.
    """
    checkpoint = Checkpoint.open(path)
    source = _as_source(checkpoint)
    if source is not None:
        return _not_quantized(source)
    loaded = load_checkpoint(path)
    stored = loaded.stored
    assert stored is not None
    layers = []
    for name in sorted(loaded.quantized, key=lambda name: tables.in_model_order(loaded.quantized[name])):
        layer = _read_layer(loaded, stored, name)
        layers.append(layer)
        progress(name, layer.nbytes)
    others, odd = _others(loaded, stored)
    checks = [Check("failed", layer.module, layer.error) for layer in layers if layer.error is not None]
    return Inspection(
        checkpoint.folder,
        _architecture(checkpoint),
        stored,
        _producer(checkpoint, stored),
        tuple(layers),
        tuple(others),
        None,
        (*checks, *odd, *_looks_narrow(layers, stored), *_unequal_scales(layers), *_warnings(checkpoint)),
    )


def _as_source(checkpoint: Checkpoint) -> Source | None:
    """The checkpoint as something to quantize, or None for one that is quantized (to more than FP8)."""
    try:
        return Source.open(checkpoint)
    except CheckpointError:
        return None


def _not_quantized(source: Source) -> Inspection:
    checkpoint = source.checkpoint
    scheme = preset(QUANT_METHOD)
    checks: list[Check] = []
    quantizable = None
    left_alone: tuple[LeftAlone, ...] = ()
    try:
        plan = make_plan(source, scheme)
    except CheckpointError as error:
        checks.append(Check("warning", "", f"`quantize` would refuse it: {error}"))
    else:
        matrices = [matrix for group in plan.groups.values() for matrix in group]
        values = sum(matrix.rows * matrix.columns for matrix in matrices)
        quantizable = Quantizable(len(matrices), values, plan.nbytes)
        left_alone = plan.left_alone
    reasons = {alone.name: alone.reason for alone in left_alone}
    others = []
    for name, tensor in checkpoint.tensors.items():
        reason = reasons.get(name, reasons.get(name.removesuffix(".weight")))
        if source.fp8_extra_of(name) is not None:
            reason = "scale of an FP8 weight"
        elif reason is None:
            reason = "could be quantized" if quantizable is not None else "not quantized"
        else:
            reason = _with_pattern(reason, name, scheme)
        others.append(OtherTensor(name, tensor.dtype, tensor.shape, tensor.nbytes, reason))
    others.sort(key=_by_kind)
    return Inspection(
        checkpoint.folder,
        _architecture(checkpoint),
        None,
        {},
        (),
        tuple(others),
        quantizable,
        (*checks, *_warnings(checkpoint)),
    )


# --- the quantized layers ---


def _read_layer(loaded: LoadedCheckpoint, stored: Stored, name: str) -> QuantizedLayer:
    module = loaded.quantized[name]
    tensors = loaded.checkpoint.tensors
    nbytes = sum(tensors[tensor].nbytes for part, tensor in stored.format.tensors(module) if part != "input_scale")
    shape = None
    try:
        shape = loaded.shape(name)
        q = loaded[name]
        assert isinstance(q, NVFP4Tensor)
    except CheckpointError as error:
        return QuantizedLayer(module, shape, nbytes, None, str(error).removeprefix(f"{loaded.checkpoint.folder}: "))
    fours, nonzero = q.block_choices()
    # As bytes, whose order is that of positive E4M3 numbers: torch has no maximum of float8.
    largest = q.block_scale.contiguous().view(torch.uint8).max().view(torch.float8_e4m3fn).item()
    decode = (q.decode_scale.min().item(), q.decode_scale.max().item())
    return QuantizedLayer(module, shape, nbytes, BlockFigures(fours, nonzero, largest, decode))


def _looks_narrow(layers: Sequence[QuantizedLayer], stored: Stored) -> Iterator[Check]:
    """Where no layer uses the range above 384: its groups were scaled for 256, whatever the label is."""
    largest = max((layer.blocks.largest_scale for layer in layers if layer.blocks is not None), default=0.0)
    if not looks_narrow(stored.scheme.weights, largest):
        return
    seen = f"no block scale is above {largest:g}"
    if stored.labelled:
        label = stored.scheme.weights
        claim = f"the label says {label}, which reaches {label.largest_block_scale:g}"
        yield Check("warning", "", f"looks like scale_max 256: {seen}; {claim} (the weights decode right either way)")
    else:
        yield Check("note", "", f"looks like 4over6 at 256: {seen}; plain NVFP4 reaches 448 in every amax group")


def _unequal_scales(layers: Sequence[QuantizedLayer]) -> Iterator[Check]:
    groups: dict[str, set[tuple[float, float]]] = {}
    for layer in layers:
        if layer.blocks is not None:
            groups.setdefault(group_of(layer.module), set()).add(layer.blocks.decode_scale)
    for name, scales in groups.items():
        if len(scales) > 1:
            yield Check(
                "note",
                name,
                "different decode scales in layers that engines merge; the plugin keeps one per row, engines that take "
                "the largest for all scale the others wrongly",
            )


# --- the other tensors ---


def _others(loaded: LoadedCheckpoint, stored: Stored) -> tuple[list[OtherTensor], list[Check]]:
    input_scales = {
        tensor
        for module in loaded.quantized.values()
        for part, tensor in stored.format.tensors(module)
        if part == "input_scale"
    }
    others, checks = [], []
    for name in loaded:
        if name in loaded.quantized:
            continue
        tensor = loaded.checkpoint.tensors[name]
        reason = "scale of activations" if name in input_scales else None
        if reason is None:
            try:
                reason = _why_not_quantized(loaded.checkpoint, name, stored.scheme)
            except CheckpointError as error:
                reason = "not understood"
                checks.append(Check("failed", name, str(error)))
        if reason is None:
            reason = "full precision in the file"
            if stored.format.name == QUANT_METHOD:
                message = "a linear weight in full precision that `ignore` does not name: a loader expects it quantized"
                checks.append(Check("failed", name, message))
        others.append(OtherTensor(name, tensor.dtype, tensor.shape, tensor.nbytes, reason))
    return sorted(others, key=_by_kind), checks


def _why_not_quantized(checkpoint: Checkpoint, name: str, scheme: Scheme) -> str | None:
    """The reason for which ``quantize`` leaves a tensor alone, or None where it would take it."""
    module = name.removesuffix(".weight")
    # A plan of this tensor alone: one that is odd hides no other. Without its own name, which the converter puts into
    # `ignore` for layers that it cannot quantize, so that the plan says why.
    alone = Source(replace(checkpoint, tensors={name: checkpoint.tensors[name]}), (1, 1))
    patterns = tuple(pattern for pattern in scheme.ignore if pattern != module)
    try:
        left_alone = make_plan(alone, Scheme(scheme.weights, None, ignore=patterns)).left_alone
    except CheckpointError:
        if module not in scheme.ignore:
            raise
        left_alone = ()
    if left_alone:
        return _with_pattern(left_alone[0].reason, name, scheme)
    return _with_pattern("in `ignore`", name, scheme) if module in scheme.ignore else None


def _with_pattern(reason: str, name: str, scheme: Scheme) -> str:
    """``reason``, and if it is the ignore list, the pattern that matches the tensor's module or what holds it."""
    if reason != "in `ignore`":
        return reason
    module = name.removesuffix(".weight")
    for pattern in scheme.ignore:
        if any(ignores(Scheme(ignore=(pattern,)), each) for each in (module, module.rpartition(".")[0])):
            return f"{reason} as {pattern}"
    return reason


def _by_kind(other: OtherTensor) -> tuple[bool, str, tuple[int, ...]]:
    """Matrices first, then by name, layers by number."""
    return len(other.shape) < 2, tables.kind_of(other.name), tables.numbers_of(other.name)


# --- what the config says ---


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else str(checkpoint.config.get("model_type", "unknown"))


def _producer(checkpoint: Checkpoint, stored: Stored) -> Mapping[str, str]:
    if stored.scheme.producer:
        return stored.scheme.producer
    block = quantization_block(checkpoint.config, checkpoint.hf_quant_config) or {}
    producer = block.get("producer")
    if isinstance(producer, Mapping):
        return {str(key): str(value) for key, value in producer.items()}
    return {"name": stored.format.name, "version": str(block["version"])} if "version" in block else {}


def _warnings(checkpoint: Checkpoint) -> Iterator[Check]:
    return (Check("warning", "", warning) for warning in checkpoint.warnings)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _bits(nbytes: int, values: int) -> float | None:
    return 8 * nbytes / values if values else None
