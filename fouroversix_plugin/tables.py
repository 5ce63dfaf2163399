"""Tables of a model's layers for a terminal: names in model order and without what they share, aligned columns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

_PROJECTIONS: Final = (
    ("qkv_proj", "q_proj", "query", "q_a_proj", "q_b_proj"),
    ("k_proj", "key", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("v_proj", "value"),
    ("o_proj", "out_proj", "dense"),
    ("gate_up_proj", "gate_proj", "w1"),
    ("up_proj", "w3"),
    ("down_proj", "w2"),
)
"""Last parts of module names in the order in which a layer runs them."""

_RANK: Final[Mapping[str, int]] = {name: rank for rank, names in enumerate(_PROJECTIONS) for name in names}
_LONGEST_NAME: Final = 44
_MOST_DIGITS: Final = 18


def kind_of(module: str) -> str:
    """The name with its numbers (of layers and experts) as ``*``: ``model.layers.*.mlp.experts.*.up_proj``."""
    return ".".join("*" if is_number(part) else part for part in module.split("."))


def numbers_of(module: str) -> tuple[int, ...]:
    """The numbers that :func:`kind_of` leaves out: layer, then expert."""
    return tuple(int(part) for part in module.split(".") if is_number(part))


def is_number(part: str) -> bool:
    """Whether a part of a name can be that of a layer; `int` reads neither superscripts nor thousands of digits."""
    return part.isdecimal() and len(part) <= _MOST_DIGITS


def in_model_order(module: str) -> tuple[tuple[int, ...], bool, int, str, tuple[int, ...]]:
    """A key for sorting: by layer, then attention before the rest, then q, k, v, o, gate, up, down, then experts."""
    numbers, kind = numbers_of(module), kind_of(module)
    return numbers[:1], "att" not in kind, _RANK.get(kind.rpartition(".")[2], len(_PROJECTIONS)), kind, numbers


def collapsed(modules: Iterable[str], most: int) -> dict[str, list[str]]:
    """Rows of a table, in model order: their labels, and the modules each stands for.

    A kind of module with more than ``most`` rows has the experts of a layer in one row, and if those are still too
    many, all layers.
    """
    kinds: dict[str, list[str]] = {}
    for module in sorted(modules, key=in_model_order):
        kinds.setdefault(kind_of(module), []).append(module)
    rows: dict[str, list[str]] = {}
    for kind, members in kinds.items():
        for numbers_left in range(kind.count("*"), -1, -1):
            of_kind: dict[str, list[str]] = {}
            for module in members:
                of_kind.setdefault(_with_numbers(kind, numbers_of(module)[:numbers_left]), []).append(module)
            if len(of_kind) <= most:
                break
        rows.update(of_kind)
    return dict(sorted(rows.items(), key=lambda row: in_model_order(row[1][0])))


def common_prefix(names: Iterable[str]) -> str:
    """What the names of all numbered layers begin with, up to a dot: ``model.layers.``, or ''."""
    shared = os.path.commonprefix([name for name in names if kind_of(name) != name or "*" in name])
    return shared[: shared.rfind(".") + 1]


def short(name: str, prefix: str) -> str:
    """``name`` without ``prefix``, and without its middle where it would still be too long for a column."""
    name = name.removeprefix(prefix)
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of aligned columns: those numbered in ``left`` to the left, the others to the right."""
    cells = [tuple(header), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def readable_size(nbytes: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point: ``59.7 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def shape_text(shape: Sequence[int]) -> str:
    """``576x1536``; ``scalar`` for no dimension."""
    return "x".join(map(str, shape)) or "scalar"


def _with_numbers(kind: str, numbers: Sequence[int]) -> str:
    for number in numbers:
        kind = kind.replace("*", str(number), 1)
    return kind
