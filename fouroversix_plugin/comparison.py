"""How far a quantized checkpoint is from its source, layer by layer, and how far plain NVFP4 of the same source is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fouroversix_plugin import tables
from fouroversix_plugin.checkpoint import Checkpoint, CheckpointError, LoadedCheckpoint, load_checkpoint
from fouroversix_plugin.checkpoint.plan import group_of
from fouroversix_plugin.checkpoint.sources import Matrix, Source
from fouroversix_plugin.functional import dequantize, quantize
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe
from fouroversix_plugin.reference import row_amax
from fouroversix_plugin.weights import check_full_precision, nonfinite

SCHEMA_VERSION: Final = 1

PLAIN: Final = Recipe(adaptive=False, scale_max=448)
"""Plain NVFP4, the yardstick."""

MEAN_RATIO_RANGE: Final = (0.97, 1.03)
"""Rounding moves the mean ratio by less; mixed ranges of encoding and decoding (256 and 448) make it 0.571 or 1.75."""

_RATIO_NOISE: Final = 0.5
"""Rounding a weight of n values can move its mean ratio by about this over sqrt(n) besides: 0.03 for 16x16."""

_ROWS_NBYTES: Final = 16 << 20
"""How much of a weight (in fp32) is compared at once; its differences are worked on in fp64, a few copies of them."""


@dataclass(frozen=True, slots=True)
class Error:
    """Sums over one weight or many: x the source's values, q what they became.

    Args:
        squared_error: sum of (q - x)².
        product: sum of q x.
        squares: sum of x².
        values: how many.
    """

    squared_error: float
    product: float
    squares: float
    values: int

    def __add__(self, other: Error) -> Error:
        return Error(
            self.squared_error + other.squared_error,
            self.product + other.product,
            self.squares + other.squares,
            self.values + other.values,
        )

    @property
    def relative_rmse(self) -> float:
        """||q - x|| / ||x||."""
        return math.sqrt(_ratio(self.squared_error, self.squares, of_nothing=0.0))

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise: 10 log10(||x||² / ||q - x||²); infinite where nothing was lost."""
        if self.squared_error == 0:
            return math.inf
        return 10 * math.log10(self.squares / self.squared_error) if self.squares else -math.inf

    @property
    def mean_ratio(self) -> float:
        """sum(q x) / sum(x²): 1 where values are encoded and decoded for the same range."""
        return _ratio(self.product, self.squares, of_nothing=1.0 if self.squared_error == 0 else math.inf)

    def to_dict(self) -> dict[str, float | None]:
        figures = {"relative_rmse": self.relative_rmse, "sqnr_db": self.sqnr_db, "mean_ratio": self.mean_ratio}
        return {"squared_error": self.squared_error, **{name: _finite(figure) for name, figure in figures.items()}}


_NOTHING: Final = Error(0.0, 0.0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class ErrorPair:
    """The error of a checkpoint, and that of plain NVFP4 with the same amaxes, from the same source."""

    error: Error
    plain: Error

    def __add__(self, other: ErrorPair) -> ErrorPair:
        return ErrorPair(self.error + other.error, self.plain + other.plain)

    @property
    def ratio(self) -> float:
        """Squared error over plain NVFP4's: below 1 is better than plain."""
        return _ratio(self.error.squared_error, self.plain.squared_error, of_nothing=1.0)

    @property
    def failed(self) -> bool:
        """Whether the values are off by a factor, as a whole."""
        low, high = MEAN_RATIO_RANGE
        noise = _RATIO_NOISE / math.sqrt(max(self.error.values, 1))
        return not low - noise <= self.error.mean_ratio <= high + noise

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.error.to_dict(),
            "plain_nvfp4": self.plain.to_dict(),
            "squared_error_ratio": _finite(self.ratio),
            "failed": self.failed,
        }


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """One quantized weight: its module, shape (N, K) and errors."""

    module: str
    shape: tuple[int, int]
    errors: ErrorPair


@dataclass(frozen=True, slots=True)
class Comparison:
    """See :func:`compare_checkpoints`.

    Args:
        folder: of the quantized checkpoint.
        source: of what it was made from.
        recipe: of its weights, in words.
        layers: every quantized weight, the largest relative RMSE first.
    """

    folder: Path
    source: Path
    recipe: str
    layers: tuple[LayerComparison, ...]

    @property
    def total(self) -> ErrorPair:
        """All weights as if they were one: large ones count for more."""
        return sum((layer.errors for layer in self.layers), ErrorPair(_NOTHING, _NOTHING))

    @property
    def failed(self) -> bool:
        return any(layer.errors.failed for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """One JSON object; a figure that is not finite (a weight of zeros) is null."""
        return {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": str(self.folder),
            "source": str(self.source),
            "recipe": self.recipe,
            "failed": self.failed,
            "total": self.total.to_dict(),
            "layers": [
                {"module": layer.module, "shape": list(layer.shape), **layer.errors.to_dict()} for layer in self.layers
            ],
        }

    def text(self, limit: int = 20) -> str:
        """For a terminal: the worst ``limit`` layers, every layer whose mean ratio is off, and the total."""
        shown = [layer for i, layer in enumerate(self.layers) if i < limit or layer.errors.failed]
        prefix = tables.common_prefix(layer.module for layer in self.layers)
        rows = [(tables.short(layer.module, prefix), tables.shape_text(layer.shape), layer.errors) for layer in shown]
        rows.append((f"all {len(self.layers)} weights", "", self.total))
        header = (
            *(f"layer ({prefix}…)" if prefix else "layer", "shape"),
            *("rel. RMSE", "plain", "SQNR dB", "plain", "mean ratio", "plain", "sq. error vs plain"),
        )
        lines = [f"checkpoint  {self.folder}", f"source      {self.source}", f"weights     {self.recipe}", ""]
        lines += tables.table(header, ((name, shape, *_cells(errors)) for name, shape, errors in rows))
        if len(shown) < len(self.layers):
            lines[-1:-1] = [f"… {len(self.layers) - len(shown)} layers with smaller errors"]
        lines += ["", *self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> Iterator[str]:
        yield (
            f'{self.total.ratio - 1:+.1%} squared error against plain NVFP4 ("plain") quantized from the same source '
            "with the same amaxes"
        )
        failed = [layer for layer in self.layers if layer.errors.failed]
        low, high = MEAN_RATIO_RANGE
        if failed:
            yield (
                f"FAILED: the mean ratio of {len(failed)} of {len(self.layers)} weights, such as {failed[0].module}, "
                f"lies outside of {low} to {high}."
            )
            yield (
                "Such values were encoded for one range and decoded for another (0.571, 1.75: 256 and 448), or come "
                "from another source."
            )
        else:
            small = any(not low <= layer.errors.error.mean_ratio <= high for layer in self.layers)
            yield f"the mean ratio of every weight lies within {low} to {high}" + (
                ", or for few values as near as rounding explains" if small else ""
            )


def compare_checkpoints(
    path: Path | str, source: Path | str, progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> Comparison:
    """Measure every quantized weight of a checkpoint against the full-precision weight of the same name.

    The same figures are taken for plain NVFP4, quantized from the same source, where a row is scaled for the amax that
    it was scaled for in the checkpoint: that of all weights which engines merge with its own and which have the same
    decode scale.

    Args:
        path: a folder with NVFP4 weights of any family that ``load_checkpoint`` reads.
        source: a folder in full precision or FP8 with the same linear weights, experts stacked or not.
        progress: told the name of a weight and its bytes in the source once it was compared.

    Raises:
        CheckpointError: a folder that cannot be read, nothing quantized in ``path``, a weight that a loader would
            refuse, or one that ``source`` does not hold, not in that shape or not as finite values.
    """
    loaded = load_checkpoint(path)
    if loaded.stored is None:
        raise CheckpointError(f"{path}: is not quantized, needed NVFP4 weights to compare with {source}")
    origin = _open_source(source)
    matrices = _matrices(loaded, origin)
    groups: dict[str, list[str]] = {}
    for name, module in loaded.quantized.items():
        groups.setdefault(group_of(module), []).append(name)
    layers = []
    for names in groups.values():
        amaxes = _amaxes(loaded, origin, {name: matrices[name] for name in names})
        for name in names:
            q = _weight(loaded, name)
            layers.append(_compare(origin, matrices[name], q, amaxes))
            progress(name, _stored_nbytes(origin, matrices[name]))
    layers.sort(key=lambda layer: layer.errors.error.relative_rmse, reverse=True)
    recipe = str(loaded.stored.scheme.weights) if loaded.stored.labelled else "NVFP4, recipe not in the file"
    return Comparison(Path(path), Path(source), recipe, tuple(layers))


def _open_source(source: Path | str) -> Source:
    try:
        return Source.open(Checkpoint.open(source))
    except CheckpointError as error:
        raise CheckpointError(f"the source to compare with: {error}") from error


def _matrices(loaded: LoadedCheckpoint, source: Source) -> dict[str, Matrix]:
    """The source's matrix of every quantized weight, by the weight's name; checked for shape."""
    folder = source.checkpoint.folder
    found: dict[str, Matrix] = {}
    unreadable: list[CheckpointError] = []
    for name, stored in source.checkpoint.tensors.items():
        try:
            matrices = source.matrices(name, stored)
        except CheckpointError as error:  # matters only if one of its weights is wanted
            unreadable.append(error)
            continue
        found |= {f"{matrix.module}.weight": matrix for matrix in matrices or ()}
    for name in loaded.quantized:
        if name not in found:
            why = f" (not readable there: {unreadable[0]})" if unreadable else ""
            raise CheckpointError(
                f"{folder}: has no linear weight {name!r}, which {loaded.checkpoint.folder} holds quantized; needed "
                f"the checkpoint that it was made from{why}"
            )
        got, needed = (found[name].rows, found[name].columns), loaded.shape(name)
        if got != needed:
            raise CheckpointError(f"{folder}: {name}: got shape {got}, needed {needed} as in the quantized checkpoint")
    return {name: found[name] for name in loaded.quantized}


def _weight(loaded: LoadedCheckpoint, name: str) -> NVFP4Tensor:
    q = loaded[name]
    assert isinstance(q, NVFP4Tensor)
    return q


def _rows(source: Source, matrix: Matrix) -> Iterator[tuple[int, int, Tensor]]:
    """Spans of a matrix's rows with their values in full precision.

    Raises:
        CheckpointError: values of another kind, or NaN or infinity among them.
    """
    for first, last in source.rows_at_a_time(matrix, _ROWS_NBYTES):
        x = source.read(matrix, first, last)
        where = f"{source.checkpoint.folder}: {matrix.module}.weight"
        try:
            check_full_precision(where, x.dtype)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if not bool(x.isfinite().all()):
            bad = nonfinite(x)
            row, column = bad[0].tolist()
            raise CheckpointError(
                f"{where}: got {len(bad)} NaN or infinite values in rows {first} to {last - 1}, the first at "
                f"{(first + row, column)}, needed finite weights"
            )
        yield first, last, x


def _amaxes(loaded: LoadedCheckpoint, source: Source, matrices: dict[str, Matrix]) -> dict[float, float]:
    """The source's amax of all rows that have one decode scale, by that scale, over weights that engines merge."""
    amaxes: dict[float, float] = {}
    for name, matrix in matrices.items():
        scales = _weight(loaded, name).row_decode_scale
        for first, last, x in _rows(source, matrix):
            rows = row_amax(x)
            for scale in scales[first:last].unique().tolist():
                largest = rows[scales[first:last] == scale].max().item()
                amaxes[scale] = max(amaxes.get(scale, 0.0), largest)
    return amaxes


def _compare(source: Source, matrix: Matrix, q: NVFP4Tensor, amaxes: dict[float, float]) -> LayerComparison:
    total = ErrorPair(_NOTHING, _NOTHING)
    for first, last, x in _rows(source, matrix):
        part = q.rows(first, last)
        amax = torch.tensor([amaxes[scale] for scale in part.row_decode_scale.tolist()])
        plain = quantize(x, PLAIN, "token", amax)
        total += ErrorPair(_error(part, x), _error(plain, x))
    return LayerComparison(matrix.module, (matrix.rows, matrix.columns), total)


def _stored_nbytes(source: Source, matrix: Matrix) -> int:
    stored = source.checkpoint.tensors[matrix.tensor]
    return stored.nbytes * matrix.rows * matrix.columns // math.prod(stored.shape)


def _error(q: NVFP4Tensor, x: Tensor) -> Error:
    values, exact = dequantize(q).double().flatten(), x.double().flatten()
    difference = values - exact
    return Error(
        torch.dot(difference, difference).item(),
        torch.dot(values, exact).item(),
        torch.dot(exact, exact).item(),
        exact.numel(),
    )


def _cells(errors: ErrorPair) -> Sequence[str]:
    ours, plain = errors.error, errors.plain
    return (
        *(f"{ours.relative_rmse:.2%}", f"{plain.relative_rmse:.2%}"),
        *(f"{ours.sqnr_db:.2f}", f"{plain.sqnr_db:.2f}"),
        *(f"{'! ' if errors.failed else ''}{ours.mean_ratio:.4f}", f"{plain.mean_ratio:.4f}"),
        f"{errors.ratio - 1:+.1%}",
    )


def _ratio(part: float, whole: float, of_nothing: float) -> float:
    """part / whole; without a whole ``of_nothing`` where there is no part either, else infinite."""
    if whole == 0:
        return of_nothing if part == 0 else math.inf
    return part / whole


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
