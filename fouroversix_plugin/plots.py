"""Pictures of a comparison, as PNGs: a heat map of layers and modules, block scales by choice, errors against plain."""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fouroversix_plugin import tables
from fouroversix_plugin.checkpoint import load_checkpoint
from fouroversix_plugin.comparison import Comparison, ErrorPair
from fouroversix_plugin.functional import dequantize
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import BLOCK_SIZE, E2M1_MAX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH: Final = 12.0
_DPI: Final = 100
"""1200 pixels wide."""

_COLOURS: Final = ("#0072B2", "#E69F00")
"""Blue and orange of Okabe and Ito's palette: told apart by colour-blind readers, too."""

_GREY: Final = "#606060"

_MOST_ANNOTATED: Final = (48, 12)
"""Rows and columns of a heat map whose cells hold their numbers legibly."""

_STRONGEST: Final = 50.0
"""Per cent worse than plain that have the strongest colour: a layer that is broken leaves some for the others."""

_E4M3_NUMBERS: Final = 127
"""From 0 to 448: the bytes below that of NaN."""

_TAIL: Final = 1e-4
"""Share of the smallest block scales that a histogram leaves out."""

_SHIFT: Final = 0.12

_MOST_POINTS: Final = 20
"""Weights of a layer that can be told apart as points."""

_LOG_ABOVE: Final = 5
"""Ratio of the largest error to the smallest from which a linear axis would show only the largest."""

_ROWS_AT_ONCE: Final = 1024


def plot_comparison(
    comparison: Comparison,
    checkpoint_path: Path | str,
    folder: Path | str,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[Path]:
    """Draw a comparison into three PNGs, 1200 pixels wide.

    Args:
        comparison: what to draw.
        checkpoint_path: the quantized checkpoint it is of; its blocks are read once more.
        folder: where to; it is made if it does not exist.
        progress: told the name of a weight and its bytes once its blocks were counted.

    Returns:
        heatmap.png (squared error against plain NVFP4, layer by module; the experts of a layer as one),
        block_scales.png (block scales by choice of 4 or 6) and error.png (every weight's error against plain NVFP4's).

    Raises:
        ValueError: matplotlib is not installed.
        CheckpointError: a weight that cannot be read.
        OSError: the folder cannot be written.
    """
    figures = {
        "heatmap.png": _heat_map(comparison),
        "block_scales.png": _block_scales(comparison, checkpoint_path, progress),
        "error.png": _errors(comparison),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI, facecolor="white")
    return [folder / name for name in figures]


def require_matplotlib() -> None:
    """Raise ValueError, saying what to install, unless there is matplotlib to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots: matplotlib is not installed; pip install 'fouroversix-plugin[cli]' installs it")


def _figure(height: float, title: str, subtitle: str) -> tuple[Figure, Axes]:
    """An empty figure of its own: nothing is registered with pyplot, and no display is looked for."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{title}\n", fontsize=16, loc="left", fontweight="bold")
    # Names may have a $, which would begin a formula.
    style: dict[str, Any] = {"fontsize": 12, "color": _GREY, "linespacing": 0.7, "parse_math": False}
    below = axes.text(0, 1, f"{subtitle}\n", transform=axes.transAxes, **style)
    below.set_in_layout(False)  # the title has left room for it; a long one must not make the axes narrower
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=12)
    return figure, axes


def _subject(comparison: Comparison) -> str:
    return f"{tables.short(comparison.folder.resolve().name, '')}, {comparison.recipe}"


# --- layer by module ---


def _heat_map(comparison: Comparison) -> Figure:
    cells, experts = _cells(comparison)
    rows = sorted({row for row, _ in cells})
    columns = list(dict.fromkeys(column for _, column in cells))
    percent = torch.full((len(rows), len(columns)), torch.nan)
    for (row, column), errors in cells.items():
        percent[rows.index(row), columns.index(column)] = 100 * (errors.ratio - 1)
    annotated = len(rows) <= _MOST_ANNOTATED[0] and len(columns) <= _MOST_ANNOTATED[1]
    height = max(2.2 + (0.27 if annotated else 0.14) * len(rows), 5)
    subtitle = _subject(comparison) + (f"; the experts of a layer (up to {experts}) as one" if experts > 1 else "")
    figure, axes = _figure(height, "Squared error against plain NVFP4, by layer and module", subtitle)
    seen = percent[percent.isfinite()]
    low, high = (seen.min().item(), seen.max().item()) if len(seen) else (-1.0, 0.0)
    worse = high > 0  # then colours part at 0: better than plain or not
    limit = min(max(-low, high), _STRONGEST)
    image = axes.imshow(
        percent.numpy(),
        aspect="auto",
        cmap="PuOr_r" if worse else "YlGnBu_r",
        vmin=-limit if worse else low,
        vmax=limit if worse else high,
    )
    rotation = 0 if len(columns) <= 8 else 45
    axes.set_xticks(range(len(columns)), _column_labels(columns), rotation=rotation, parse_math=False)
    step = 1 if annotated else 2
    axes.set_yticks(range(0, len(rows), step), [str(row) if row >= 0 else "none" for row in rows[::step]], fontsize=11)
    axes.set_ylabel("layer", fontsize=13, labelpad=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, extend="max" if high > limit else "neither")
    bar.set_label("squared error against plain NVFP4 (%), lower is better", fontsize=12)
    bar.outline.set_visible(False)
    if annotated:
        _annotate(axes, percent, image)
    return figure


def _cells(comparison: Comparison) -> tuple[dict[tuple[int, str], ErrorPair], int]:
    """Errors by layer (-1: outside of all) and kind of module, in model order; and the most experts in one cell."""
    cells: dict[tuple[int, str], ErrorPair] = {}
    members: dict[tuple[int, str], int] = {}
    for layer in sorted(comparison.layers, key=lambda layer: tables.in_model_order(layer.module)):
        cell = (_number(layer.module), tables.kind_of(layer.module))
        cells[cell] = cells[cell] + layer.errors if cell in cells else layer.errors
        members[cell] = members.get(cell, 0) + 1
    return cells, max(members.values(), default=0)


def _column_labels(columns: list[str]) -> list[str]:
    """The last parts of module names, on two lines: what holds a projection, and the projection."""
    parts = [[part for part in column.split(".") if part != "*"][-2:] for column in columns]
    return ["\n".join(part) for part in parts]


def _annotate(axes: Axes, percent: Tensor, image: Any) -> None:
    for row, values in enumerate(percent.tolist()):
        for column, value in enumerate(values):
            if value != value:
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            colour = "white" if dark else "black"
            axes.text(column, row, f"{value:+.1f}", ha="center", va="center", fontsize=10, color=colour)


# --- block scales by choice ---


def _block_scales(comparison: Comparison, checkpoint_path: Path | str, progress: Callable[[str, int], None]) -> Figure:
    fours, sixes = _count_blocks(checkpoint_path, progress)
    total = max(int((fours + sixes).sum()), 1)
    figure, axes = _figure(
        6.5,
        "Block scales by choice",
        f"{_subject(comparison)}: {fours.sum().item() / total:.1%} of {total:,} blocks chose 4",
    )
    # Every E4M3 number has the bin of what rounds to it, and a height that makes the area its share: counted in bins of
    # one width, the uneven steps of E4M3 would show as teeth.
    numbers = torch.arange(_E4M3_NUMBERS, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    inner = ((numbers[:-1] + numbers[1:]) / 2).log2()
    edges = torch.cat((inner, numbers[-1:].log2() + 1 / 16))
    for counts, colour, label in ((sixes, _COLOURS[0], "chose 6"), (fours, _COLOURS[1], "chose 4")):
        heights = (100 * counts[1:] / total / edges.diff()).tolist()
        axes.stairs(heights, edges.tolist(), color=colour, fill=True, alpha=0.3)
        axes.stairs(heights, edges.tolist(), color=colour, linewidth=2, label=label)
    shares = (fours + sixes)[1:].cumsum(0) / total
    first = int(edges[int((shares > _TAIL).int().argmax())].floor())
    octaves = range(first, 10)
    axes.set_xlim(first, 9)
    axes.set_xticks(octaves, [f"{2**octave}" if octave >= 0 else f"1/{2**-octave}" for octave in octaves])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("E4M3 block scale as stored", fontsize=13)
    axes.set_ylabel("share of all non-zero blocks (% per octave)", fontsize=13)
    axes.legend(fontsize=13, frameon=False, loc="upper left")
    return figure


def _count_blocks(path: Path | str, progress: Callable[[str, int], None]) -> tuple[Tensor, Tensor]:
    """int64 [127] each: non-zero blocks that chose 4, and 6, by the byte of their block scale."""
    loaded = load_checkpoint(path)
    counts = torch.zeros(2, _E4M3_NUMBERS, dtype=torch.int64)
    for name in loaded.quantized:
        q = loaded[name]
        assert isinstance(q, NVFP4Tensor)
        for first in range(0, q.shape[0], _ROWS_AT_ONCE):
            part = q.rows(first, min(first + _ROWS_AT_ONCE, q.shape[0]))
            largest = _largest_codes(part)
            scales = part.block_scale.contiguous().view(torch.uint8)
            for count, chosen in zip(counts, ((largest > 0) & (largest < E2M1_MAX), largest == E2M1_MAX), strict=True):
                count += scales[chosen].int().bincount(minlength=_E4M3_NUMBERS)
        progress(name, q.nbytes)
    return counts[0], counts[1]


def _largest_codes(q: NVFP4Tensor) -> Tensor:
    """fp32 [N, K/16]: the largest e2m1 magnitude of each block, which is 6 where the block chose 6."""
    ones = torch.ones(q.block_scale.shape).to(torch.float8_e4m3fn)
    values = dequantize(NVFP4Tensor(q.packed, ones, torch.tensor(1.0)))
    return values.abs().reshape(*q.block_scale.shape, BLOCK_SIZE).amax(dim=-1)


# --- errors against plain NVFP4 ---


def _errors(comparison: Comparison) -> Figure:
    from matplotlib.ticker import MaxNLocator

    total = comparison.total
    layers: dict[int, list[ErrorPair]] = {}
    for layer in comparison.layers:
        layers.setdefault(_number(layer.module), []).append(layer.errors)
    numbers = sorted(layers)
    crowded = len(comparison.layers) > _MOST_POINTS * len(layers)
    figure, axes = _figure(
        6.5,
        f"{total.ratio - 1:+.1%} squared error against plain NVFP4",
        f"{_subject(comparison)}: {len(comparison.layers):,} weights",
    )
    positive: list[float] = []
    for name, colour, marker, shift, error in (
        # Side by side: where the two are alike, one must not hide the other.
        ("plain NVFP4", _COLOURS[1], "s", -_SHIFT, lambda pair: pair.plain),
        ("this checkpoint", _COLOURS[0], "o", _SHIFT, lambda pair: pair.error),
    ):
        values = [[100 * error(pair).relative_rmse for pair in layers[number]] for number in numbers]
        positive += [value for of_layer in values for value in of_layer if value > 0]
        if crowded:
            axes.fill_between(numbers, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.25, lw=0)
            shift = 0.0
        for number, of_layer in zip(numbers, () if crowded else values, strict=not crowded):
            axes.scatter([number + shift] * len(of_layer), of_layer, s=30, c=colour, marker=marker, alpha=0.5, lw=0)
        axes.plot(
            [number + shift for number in numbers],
            [100 * error(_pooled(layers[number])).relative_rmse for number in numbers],
            color=colour,
            marker=marker,
            markersize=6 if len(numbers) <= _MOST_ANNOTATED[0] else 3,
            linewidth=2,
            label=f"{name}, {error(total).relative_rmse:.2%} over all weights",
        )
    if positive and max(positive) > _LOG_ABOVE * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    single = "bands reach from its smallest to its largest" if crowded else "a point for each weight"
    outside = "; -1: outside of all" if -1 in layers else ""
    axes.set_xlabel(f"layer (lines: all its weights as one; {single}{outside})", fontsize=13)
    axes.set_ylabel("relative RMSE (%)", fontsize=13)
    axes.grid(axis="y", which="both", color="#E0E0E0")
    axes.set_axisbelow(True)
    figure.legend(fontsize=13, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _number(module: str) -> int:
    """Of the layer that a module is in, or -1."""
    return (*tables.numbers_of(module), -1)[0]


def _pooled(pairs: list[ErrorPair]) -> ErrorPair:
    return functools.reduce(operator.add, pairs)
