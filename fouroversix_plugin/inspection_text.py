"""An inspection for a terminal: a summary, the layers, what is not quantized, and the checks last."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fouroversix_plugin import tables
from fouroversix_plugin.recipe import Scheme

if TYPE_CHECKING:
    from fouroversix_plugin.inspection import Inspection, OtherTensor, QuantizedLayer

_MOST_ROWS: Final = 64
"""Rows of one kind of module before the experts of a layer, then all layers, share one."""

_MOST_MESSAGES: Final = 20


def inspection_text(inspection: Inspection) -> str:
    """All of it, in lines that fit 110 columns except for messages."""
    parts = [_summary(inspection)]
    if inspection.layers:
        parts.append(_layer_table(inspection))
    if inspection.others:
        parts.append(_other_table(inspection))
    parts.append(_check_lines(inspection))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _summary(inspection: Inspection) -> list[str]:
    quantized, other = (sum(part.nbytes for part in parts) for parts in (inspection.layers, inspection.others))
    size = tables.readable_size(quantized + other)
    rows = [("checkpoint", str(inspection.folder)), ("model", inspection.architecture)]
    if inspection.stored is None:
        rows += [("format", "not quantized"), ("size", f"{size} in {len(inspection.others)} tensors")]
        if inspection.quantizable is not None:
            could = inspection.quantizable
            rows.append(
                (
                    "quantize",
                    f"would take {could.weights} linear weights ({could.values / 1e6:,.1f} million values): "
                    f"{size} → {tables.readable_size(could.nbytes)}",
                )
            )
        return tables.table(*_headless(rows), left=(0, 1))
    scheme = inspection.stored.scheme
    limit = f"block scales up to {scheme.weights.largest_block_scale:g}"
    recipe = f"{scheme.weights}, {limit}" if inspection.stored.labelled else f"recipe not in the file, {limit}"
    rows += [("format", f"{inspection.stored.format.name}, {scheme.name}"), ("weights", recipe)]
    rows.append(("activations", _activations(scheme, inspection.stored.labelled)))
    rows.append(("producer", " ".join(inspection.producer.values()) or "not in the file"))
    rows.append(
        (
            "size",
            f"{size}: {tables.readable_size(quantized)} in {len(inspection.layers)} quantized weights, "
            f"{tables.readable_size(other)} in {len(inspection.others)} other tensors",
        )
    )
    if inspection.bits_per_weight is not None:
        rows.append(("bits", f"{inspection.bits_per_weight:.2f} per quantized weight, scales included"))
    if inspection.share_of_four is not None:
        rows.append(("share of 4", f"{inspection.share_of_four:.1%} of the blocks"))
    return tables.table(*_headless(rows), left=(0, 1))


def _layer_table(inspection: Inspection) -> list[str]:
    assert inspection.stored is not None
    limit = inspection.stored.scheme.weights.largest_block_scale
    sound = {layer.module: layer for layer in inspection.layers if layer.error is None}
    rows = tables.collapsed(sound, _MOST_ROWS)
    # A damaged layer has a row of its own: an average must not hide it.
    rows |= {layer.module: [layer.module] for layer in inspection.layers if layer.error is not None}
    layers = {layer.module: layer for layer in inspection.layers}
    prefix = tables.common_prefix(layers)
    count = len(rows) < len(layers)
    return tables.table(
        (
            _name_header("layer", prefix),
            *(("count",) if count else ()),
            *("dtype", "shape", "size", "share of 4", "largest scale", "range check"),
        ),
        (
            (tables.short(label, prefix), *((str(len(modules)),) if count else ()), *cells)
            for label, modules in sorted(rows.items(), key=lambda row: tables.in_model_order(row[1][0]))
            for cells in [_layer_cells([layers[module] for module in modules], limit)]
        ),
    )


def _other_table(inspection: Inspection) -> list[str]:
    groups: dict[tuple[str, str, tuple[int, ...], str], list[OtherTensor]] = {}
    for other in inspection.others:
        groups.setdefault((tables.kind_of(other.name), other.dtype, other.shape, other.reason), []).append(other)
    prefix = tables.common_prefix(key[0] for key in groups)
    return tables.table(
        (_name_header("not quantized", prefix), "count", "dtype", "shape", "size", "why"),
        (
            (
                tables.short(kind, prefix),
                str(len(members)),
                dtype,
                tables.shape_text(shape),
                tables.readable_size(sum(member.nbytes for member in members)),
                reason,
            )
            for (kind, dtype, shape, reason), members in groups.items()
        ),
        left=(0, 5),
    )


def _check_lines(inspection: Inspection) -> list[str]:
    subjects: dict[tuple[str, str], list[str]] = {}
    for check in inspection.checks:
        subjects.setdefault((check.status, check.message), []).append(check.subject)
    lines = []
    for (status, message), about in itertools.islice(subjects.items(), _MOST_MESSAGES):
        where = about[0] if len(about) == 1 else f"{about[0]} and {len(about) - 1} more"
        lines.append(": ".join(filter(None, (status.upper() if status == "failed" else status, where, message))))
    if len(subjects) > _MOST_MESSAGES:
        lines.append(f"… and {len(subjects) - _MOST_MESSAGES} more of the kind; --json lists all")
    failed = len({check.subject for check in inspection.checks if check.status == "failed"})
    if inspection.layers:
        damaged = sum(layer.error is not None for layer in inspection.layers)
        lines.append(
            f"{len(inspection.layers) - damaged} of {len(inspection.layers)} quantized weights pass every check"
        )
    elif not failed:
        lines.append("nothing is quantized, nothing to check")
    return lines


def _activations(scheme: Scheme, labelled: bool) -> str:
    if scheme.activations is None:
        return "not quantized"
    scaled = "per token" if scheme.input_scale == "token" else "for a calibrated amax"
    return f"{scheme.activations if labelled else 'NVFP4'}, {scaled}"


def _layer_cells(layers: Sequence[QuantizedLayer], limit: float) -> tuple[str, ...]:
    shapes = {layer.shape for layer in layers}
    shape = next(iter(shapes)) if len(shapes) == 1 else None
    figures = [layer.blocks for layer in layers if layer.blocks is not None]
    nonzero = sum(f.nonzero for f in figures)
    return (
        "NVFP4",
        "various" if shape is None else tables.shape_text(shape),
        tables.readable_size(sum(layer.nbytes for layer in layers)),
        f"{sum(f.fours for f in figures) / nonzero:.1%}" if nonzero else "–",
        f"{max(f.largest_scale for f in figures):g}" if figures else "–",
        f"<= {limit:g}" if figures else "FAILED",
    )


def _name_header(what: str, prefix: str) -> str:
    return f"{what} ({prefix}…)" if prefix else what


def _headless(rows: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], Sequence[tuple[str, str]]]:
    return rows[0], rows[1:]
