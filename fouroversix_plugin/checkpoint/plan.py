"""What a conversion will write, decided from headers alone: every tensor, its place, and why the rest is left alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from fouroversix_plugin import __version__
from fouroversix_plugin.checkpoint.files import SINGLE, CheckpointError, StoredTensor
from fouroversix_plugin.checkpoint.sources import FP8, FULL_PRECISION, Matrix, Source, stack_of
from fouroversix_plugin.formats import COMPRESSED_TENSORS, MODELOPT, OURS, Format, Part, layers_behind_the_last
from fouroversix_plugin.recipe import BLOCK_SIZE, Scheme
from fouroversix_plugin.tables import is_number

OutputFormat = Literal["nvfp4_4over6", "modelopt", "compressed-tensors"]
_OUTPUT_FORMATS: Final[Mapping[str, Format]] = {f.name: f for f in (OURS, MODELOPT, COMPRESSED_TENSORS)}
OUTPUT_FORMATS: Final = tuple(_OUTPUT_FORMATS)

MAX_SHARD_SIZE: Final = 5_000_000_000
"""Bytes of tensors in one file, unless asked otherwise."""

_FUSED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("query", "key", "value"),
    ("c_fc_0", "c_fc_1"),
)
"""Projections that engines merge into one layer: they share one amax, so that the merged layer has one scale."""

_CODES: Final = ("weight_packed", "qweight")
"""Last parts of the names of other methods' codes, which mean nothing without the config that is replaced here."""

_EXPERT: Final = re.compile(r"(.*\.experts)\.\d+\.")
"""Name of what belongs to an expert, after the module that holds all of a layer."""

_DTYPE_OF_PART: Final[Mapping[Part, tuple[str, int]]] = {
    "packed": ("U8", 1),
    "block_scale": ("F8_E4M3", 1),
    "decode_scale": ("F32", 4),
}


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write: a part of a quantized matrix, or a copy.

    Args:
        name, dtype, shape, nbytes: of the tensor, as safetensors has them.
        matrix, part: what it is of a quantized matrix; else it is a copy of the source's tensor ``name``.
        dequantized: an FP8 weight left alone: written as BF16.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    matrix: Matrix | None = None
    part: Part | None = None
    dequantized: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its tensors in the order of their bytes."""

    file: str
    outputs: tuple[Output, ...]

    @property
    def header(self) -> bytes:
        """Length and JSON, padded so that the data starts at a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for output in self.outputs:
            end = position + output.nbytes
            entries[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Of the tensors, without the header."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A module (or tensor) that is not quantized, and why.

    Args:
        name: in the checkpoint.
        reason: in words.
        nbytes: of the tensor.
        linear: whether engines may ask for it as a linear layer.
        holder: of stacked experts, the module by which engines ask for all of them.
    """

    name: str
    reason: str
    nbytes: int
    linear: bool
    holder: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, decided.

    Args:
        source: what is read.
        scheme: as it will be written: with its producer, and all linear layers left alone in ``ignore``.
        format: how the quantized weights are spelled.
        shards: the files to write.
        groups: matrices that share one amax, by the name of their group, in the order of names.
        left_alone: what is only copied, linear layers first.
    """

    source: Source
    scheme: Scheme
    format: Format
    shards: tuple[Shard, ...]
    groups: Mapping[str, tuple[Matrix, ...]]
    left_alone: tuple[LeftAlone, ...]

    @property
    def nbytes(self) -> int:
        """Of all files of tensors, headers included."""
        return sum(len(shard.header) + shard.nbytes for shard in self.shards)

    @property
    def source_nbytes(self) -> int:
        """Of the tensors that are read; FP8 scales go with their weights."""
        tensors = self.source.checkpoint.tensors
        return sum(stored.nbytes for name, stored in tensors.items() if self.source.fp8_extra_of(name) is None)


def make_plan(source: Source, scheme: Scheme, format: str = OURS.name, max_shard_size: int = MAX_SHARD_SIZE) -> Plan:
    """Decide what becomes of every tensor.

    Linear weights are the 2-D ``….weight`` tensors and the stacked experts that the scheme does not ignore and whose K
    is a multiple of 16. What engines merge shares one amax.

    Raises:
        CheckpointError: only some of what an engine merges can be quantized, experts stacked in an unknown way, or a
            format that cannot say what the scheme asks for.
    """
    spelled = _OUTPUT_FORMATS.get(format)
    if spelled is None:
        raise CheckpointError(f"format: got {format!r}, needed one of {', '.join(OUTPUT_FORMATS)}")
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size: got {max_shard_size}, needed bytes")
    if scheme.activations is not None and (spelled is not OURS or scheme.input_scale == "static"):
        raise CheckpointError(
            f"format {format!r}, activations {scheme.input_scale!r}: W4A4 there needs input scales from calibration, "
            "which this conversion does not make; quantize activations per token in our own format, or use a W4A16 "
            "recipe such as `w4a16` (the weights are the same)"
        )
    scheme = replace(scheme, ignore=scheme.ignore + layers_behind_the_last(source.checkpoint.config))
    groups: dict[str, list[Matrix]] = {}
    units: list[tuple[str, list[Output]]] = []
    linear: list[LeftAlone] = []
    others: list[LeftAlone] = []
    for name, stored in source.checkpoint.tensors.items():
        if source.fp8_extra_of(name) is not None:
            continue
        matrices = source.matrices(name, stored) if not _ignored_as_a_whole(name, stored, scheme) else None
        reason = _why_left_alone(source, name, stored, matrices, scheme)
        if reason is None:
            assert matrices is not None
            for matrix in matrices:
                groups.setdefault(group_of(matrix.module), []).append(matrix)
                units.append((matrix.module, list(_parts(matrix, spelled))))
            continue
        units.append((name, [_copy(name, stored)]))
        module = name.removesuffix(".weight")
        is_linear = matrices is not None or (name.endswith(".weight") and len(stored.shape) == 2)
        is_linear = is_linear or _ignored_as_a_whole(name, stored, scheme)
        stack = stack_of(name, stored)
        holder = None if stack is None else stack[0]
        alone = LeftAlone(module if is_linear else name, reason, stored.nbytes, is_linear, holder)
        (linear if is_linear else others).append(alone)
    _refuse_same_names(units)
    _refuse_half_groups(groups, linear)
    _refuse_some_experts(groups, linear)
    asked = dict.fromkeys(name for alone in linear for name in _as_engines_ask(source, alone))
    extra = tuple(name for name in asked if not ignores(scheme, name))
    producer = {"name": "fouroversix-plugin", "version": __version__}
    return Plan(
        source,
        replace(scheme, ignore=scheme.ignore + extra, producer=producer),
        spelled,
        tuple(_shards(units, max_shard_size)),
        {name: tuple(groups[name]) for name in sorted(groups, key=_natural)},
        tuple(linear + others),
    )


def _as_engines_ask(source: Source, alone: LeftAlone) -> tuple[str, ...]:
    """For `ignore`: GPT-2's names begin where engines have a prefix, and stacked experts are one layer there."""
    if source.is_transposed(f"{alone.name}.weight"):
        return (f"*{alone.name}",)
    return (alone.name,) if alone.holder is None else (alone.name, alone.holder)


def group_of(module: str) -> str:
    """The name of what shares one amax with ``module``: itself, unless engines merge it with its siblings."""
    parent, _, name = module.rpartition(".")
    siblings = next((group for group in _FUSED if name in group), (name,))
    return f"{parent}.{'+'.join(siblings)}"


def ignores(scheme: Scheme, module: str) -> bool:
    """Whether a linear layer is ignored by its name or, as part of an expert, by that of what holds all experts."""
    expert = _EXPERT.match(module)
    return scheme.ignores(module) or (expert is not None and scheme.ignores(expert[1]))


def _ignored_as_a_whole(name: str, stored: StoredTensor, scheme: Scheme) -> bool:
    """Whether stacked experts are ignored by the name of their tensor or of the module that holds them."""
    module = name.removesuffix(".weight")
    return len(stored.shape) == 3 and (scheme.ignores(module) or scheme.ignores(module.rpartition(".")[0]))


def _why_left_alone(
    source: Source, name: str, stored: StoredTensor, matrices: list[Matrix] | None, scheme: Scheme
) -> str | None:
    """The reason, or None for a tensor that is quantized."""
    if matrices is None:
        if name.rpartition(".")[2] in _CODES:
            raise CheckpointError(f"{name}: is quantized already, needed full-precision or FP8 weights")
        if stored.dtype in FP8 and (name.endswith(".weight") or len(stored.shape) == 3):
            raise CheckpointError(
                f"{name}: got {stored.dtype} of shape {stored.shape}, needed FP8 in 2-D weights [N, K] only"
            )
        if source.is_transposed(name):
            return "stored as [K, N], which engines turn around"
        if _ignored_as_a_whole(name, stored, scheme):
            return "in `ignore`"
        return f"not a linear weight ({len(stored.shape)}-D)"
    ignored = [matrix.module for matrix in matrices if ignores(scheme, matrix.module)]
    if len(ignored) == len(matrices):
        return "in `ignore`"
    if ignored:
        kept = next(matrix.module for matrix in matrices if matrix.module not in ignored)
        raise CheckpointError(
            f"{name}: `ignore` matches {ignored[0]!r} but not {kept!r}, which engines keep in one layer; ignore all "
            "of its parts or none"
        )
    if source.is_of_mamba_1(matrices[0].module):
        return "of a Mamba-1 mixer, which engines do not quantize"
    columns = matrices[0].columns
    if columns == 0 or matrices[0].rows == 0:
        return "empty"
    if columns % BLOCK_SIZE:
        return f"K = {columns} is no multiple of {BLOCK_SIZE}"
    if stored.dtype not in FULL_PRECISION and matrices[0].scale is None:
        raise CheckpointError(
            f"{name}: got {stored.dtype}, needed {', '.join(FULL_PRECISION)} or FP8 with scales; it is quantized "
            "already, or belongs into `ignore`"
        )
    return None


def _refuse_same_names(units: list[tuple[str, list[Output]]]) -> None:
    """Where the source has tensors named as the parts of a quantized weight are, or an expert stacked and by itself."""
    found: dict[str, Output] = {}
    for output in (output for _, outputs in units for output in outputs):
        other = found.setdefault(output.name, output)
        if other is not output:
            first, second = (o.name if o.matrix is None else o.matrix.tensor for o in (other, output))
            raise CheckpointError(
                f"{output.name}: would be written twice, for {first!r} and for {second!r} of the source; remove one "
                "of them from it, or add the weight to `ignore`"
            )


def _refuse_half_groups(groups: Mapping[str, list[Matrix]], left_alone: list[LeftAlone]) -> None:
    for alone in left_alone:
        group = groups.get(group_of(alone.name))
        if group:
            raise CheckpointError(
                f"{alone.name}: left alone ({alone.reason}), but {group[0].module} is quantized; engines fuse them "
                "into one layer: ignore all of its parts or none"
            )


def _refuse_some_experts(groups: Mapping[str, list[Matrix]], left_alone: list[LeftAlone]) -> None:
    quantized = {
        found[1]: matrix.module
        for group in groups.values()
        for matrix in group
        if (found := _EXPERT.match(matrix.module)) is not None
    }
    for alone in left_alone:
        found = _EXPERT.match(alone.name)
        module = quantized.get(alone.holder or (found[1] if found else ""))
        if module is not None:
            raise CheckpointError(
                f"{alone.name}: left alone ({alone.reason}), but {module} is quantized; engines keep all experts in "
                "one layer: ignore all of them (*.experts.*) or none"
            )


def _parts(matrix: Matrix, spelled: Format) -> Iterator[Output]:
    shapes: dict[Part, tuple[int, ...]] = {
        "packed": (matrix.rows, matrix.columns // 2),
        "block_scale": (matrix.rows, matrix.columns // BLOCK_SIZE),
        "decode_scale": (1,) if spelled is COMPRESSED_TENSORS else (),
    }
    for part, name in spelled.tensors(matrix.module):
        if part in shapes:
            dtype, itemsize = _DTYPE_OF_PART[part]
            yield Output(name, dtype, shapes[part], itemsize * math.prod(shapes[part]), matrix, part)


def _copy(name: str, stored: StoredTensor) -> Output:
    if stored.dtype in FP8 and name.endswith(".weight"):
        return Output(name, "BF16", stored.shape, 2 * stored.nbytes, dequantized=True)
    return Output(name, stored.dtype, stored.shape, stored.nbytes)


def _shards(units: list[tuple[str, list[Output]]], max_shard_size: int) -> Iterator[Shard]:
    """Files filled in the order of names, layers by number; the tensors of one module stay together."""
    filled: list[list[Output]] = [[]]
    size = 0
    for _, outputs in sorted(units, key=lambda unit: _natural(unit[0])):
        nbytes = sum(output.nbytes for output in outputs)
        if filled[-1] and size + nbytes > max_shard_size:
            filled.append([])
            size = 0
        filled[-1] += outputs
        size += nbytes
    for i, outputs in enumerate(filled, 1):
        file = SINGLE if len(filled) == 1 else f"model-{i:05}-of-{len(filled):05}.safetensors"
        # Widest values first: then every tensor starts at a multiple of its item's size.
        yield Shard(file, tuple(sorted(outputs, key=lambda output: (-_itemsize(output), output.name))))


def _itemsize(output: Output) -> int:
    bits = int(re.sub(r"^[A-Z]+(\d+).*$", r"\1", output.dtype)) if output.dtype != "BOOL" else 8
    return max(bits // 8, 1)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts layer 10 after layer 9."""
    return [(0, int(part)) if is_number(part) else (1, part) for part in re.split(r"(\d+)", name) if part]
