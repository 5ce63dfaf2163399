"""What a conversion writes, for people and for programs: from its plan alone, before or after it was carried out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fouroversix_plugin.checkpoint.plan import LeftAlone, Plan, group_of
from fouroversix_plugin.checkpoint.sources import Matrix
from fouroversix_plugin.tables import kind_of, readable_size, shape_text, table

SCHEMA_VERSION: Final = 1


def summary_dict(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object: every layer, every tensor left alone, every file."""
    sizes = _quantized_nbytes(plan)
    return {
        "schema_version": SCHEMA_VERSION,
        "format": plan.format.name,
        "quantization_config": plan.scheme.to_dict(),
        "source_nbytes": plan.source_nbytes,
        "nbytes": plan.nbytes,
        "bits_per_weight": _bits_per_weight(plan),
        "quantized": [
            {
                "name": matrix.module,
                "shape": [matrix.rows, matrix.columns],
                "nbytes": sizes[matrix.module],
                "shares_amax_with": [other.module for other in group if other is not matrix],
            }
            for group in plan.groups.values()
            for matrix in group
        ],
        "left_alone": [{"name": a.name, "reason": a.reason, "nbytes": a.nbytes} for a in plan.left_alone],
        "files": [{"name": shard.file, "nbytes": len(shard.header) + shard.nbytes} for shard in plan.shards],
    }


def summary_text(plan: Plan, target: Path, seconds: float | None) -> str:
    """The plan for a terminal; ``seconds`` is None for one that was not carried out."""
    matrices = [matrix for group in plan.groups.values() for matrix in group]
    activations = plan.scheme.activations
    rows = [
        ("scheme", f"{plan.scheme.name}: weights {plan.scheme.weights}; activations "
         + ("not quantized" if activations is None else f"{activations}, per token")),
        ("source", f"{plan.source.checkpoint.folder}: {readable_size(plan.source_nbytes)}"),
        ("quantized", _quantized(plan, matrices)),
        ("left alone", f"{len(plan.left_alone)} tensors, {readable_size(sum(a.nbytes for a in plan.left_alone))}"),
    ]  # fmt: skip
    files = f"{len(plan.shards)} file{'s' if len(plan.shards) > 1 else ''}, {readable_size(plan.nbytes)}"
    done = f"{target}: {files}, as {plan.format.name}"
    rows.append(("would write", done) if seconds is None else ("written", f"{done}, in {seconds:.1f} s"))
    lines = [f"{name:12}{text}" for name, text in rows]
    if matrices:
        lines += ["", *table(("quantized", "layers", "shape", "size"), _by_kind(plan, matrices))]
    if plan.left_alone:
        lines += ["", *table(("left alone", "tensors", "size", "why"), _left_alone(plan.left_alone), left=(0, 3))]
    return "\n".join(lines)


def _quantized(plan: Plan, matrices: list[Matrix]) -> str:
    if not matrices:
        return "nothing"
    values = sum(matrix.rows * matrix.columns for matrix in matrices)
    size = readable_size(sum(_quantized_nbytes(plan).values()))
    return f"{len(matrices)} linear weights, {values} values, {size}, {_bits_per_weight(plan):.3f} bits per weight"


def _bits_per_weight(plan: Plan) -> float | None:
    values = sum(matrix.rows * matrix.columns for group in plan.groups.values() for matrix in group)
    return 8 * sum(_quantized_nbytes(plan).values()) / values if values else None


def _quantized_nbytes(plan: Plan) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for shard in plan.shards:
        for output in shard.outputs:
            if output.matrix is not None:
                sizes[output.matrix.module] = sizes.get(output.matrix.module, 0) + output.nbytes
    return sizes


def _by_kind(plan: Plan, matrices: list[Matrix]) -> Iterator[tuple[str, ...]]:
    sizes = _quantized_nbytes(plan)
    kinds: dict[tuple[str, str], list[Matrix]] = {}
    for matrix in sorted(matrices, key=lambda matrix: kind_of(group_of(matrix.module))):
        kinds.setdefault((kind_of(matrix.module), shape_text((matrix.rows, matrix.columns))), []).append(matrix)
    for (kind, shape), members in kinds.items():
        yield kind, str(len(members)), shape, readable_size(sum(sizes[matrix.module] for matrix in members))


def _left_alone(left_alone: tuple[LeftAlone, ...]) -> Iterator[tuple[str, ...]]:
    kinds: dict[tuple[str, str], list[LeftAlone]] = {}
    for alone in left_alone:
        kinds.setdefault((kind_of(alone.name), alone.reason), []).append(alone)
    for (kind, reason), members in kinds.items():
        yield kind, str(len(members)), readable_size(sum(alone.nbytes for alone in members)), reason
