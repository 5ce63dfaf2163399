"""What bench_gemm.py's measurements say: tables beside the floors, ratios against what was aimed at, a plot.

Pure functions of records: one dict a measurement, with ``shape``, ``peer`` and

- ``tokens``, ``seconds`` and, for experts, ``experts`` (how many a call reads, on average): a time; or
- ``relative_error``: of the result against the product in fp64; or
- ``failed``: why there is no time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markdown_table import table

BYTES_A_SECOND = 4.3e12
FLOP_A_SECOND = 790e12
"""What a large copy and a large bf16 product of cuBLAS reach on an H200."""
BYTES_A_WEIGHT = 0.5 + 1 / 16
MOST_ERROR = 0.05
"""Relative. Rounding to bf16 makes 0.003 and, through experts that quantize, a few hundredths; a wrong call makes 1."""

Record = Mapping[str, Any]
Times = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Seconds by shape, number of tokens and peer."""


@dataclass(frozen=True)
class Dense:
    """Y [M, N] = X [M, K] W^T."""

    N: int
    K: int

    @property
    def name(self) -> str:
        return f"{self.N}x{self.K}"

    def floors(self, M: int) -> tuple[float, float]:
        """Seconds that moving the bytes and multiplying take at least."""
        moved = BYTES_A_WEIGHT * self.N * self.K + 2 * M * (self.N + self.K)
        return moved / BYTES_A_SECOND, 2 * M * self.N * self.K / FLOP_A_SECOND


@dataclass(frozen=True)
class Moe:
    """w13, SiLU and product, w2 and the weighted sum, for M tokens of width H that choose ``top_k`` of E experts."""

    name: str
    E: int
    top_k: int
    H: int
    I: int  # noqa: E741  # the width of an expert, as papers call it

    def floors(self, M: int, experts: float | None = None) -> tuple[float, float]:
        """As :meth:`Dense.floors`. ``experts``: how many the tokens chose; as many as expected if it is not known."""
        read = self.E * (1 - (1 - self.top_k / self.E) ** M) if experts is None else experts
        moved = BYTES_A_WEIGHT * read * 3 * self.H * self.I + 4 * M * self.H
        return moved / BYTES_A_SECOND, 6 * M * self.top_k * self.H * self.I / FLOP_A_SECOND


DENSE_SHAPES = tuple(Dense(N, K) for N, K in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192)))
MOE_SHAPES = (Moe("qwen3-30b-a3b", 128, 8, 2048, 768), Moe("e64-h4096", 64, 8, 4096, 2048))


_ANY = 1 << 30


@dataclass(frozen=True)
class Aim:
    """Our time over that of the fastest of ``peers``, from ``low`` to ``high`` tokens."""

    low: int
    high: int
    most: float
    peers: tuple[str, ...]

    @property
    def range(self) -> str:
        if self.high == _ANY:
            return f"{self.low} up"
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"


DENSE_AIMS = (
    Aim(1, 16, 0.85, ("marlin", "humming")),
    Aim(64, 64, 0.90, ("humming",)),
    Aim(256, 256, 1.00, ("humming",)),
    Aim(1024, _ANY, 1.08, ("bf16",)),
    Aim(1024, _ANY, 0.50, ("marlin",)),
)
MOE_AIMS = (
    Aim(1, 64, 0.85, ("marlin",)),
    Aim(256, 1024, 0.70, ("vllm-bf16", "marlin")),
    Aim(4096, _ANY, 0.90, ("vllm-bf16",)),
)


class Verdict(NamedTuple):
    """An aim at one shape and number of tokens; ``ratio`` is None where a time is missing."""

    shape: str
    tokens: int
    aim: Aim
    ratio: float | None

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= self.aim.most


def times(records: Sequence[Record]) -> Times:
    found: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        if "seconds" in record:
            of_shape = found.setdefault(record["shape"], {})
            of_shape.setdefault(record["tokens"], {})[record["peer"]] = record["seconds"]
    return found


def floors(shape: Dense | Moe, M: int, records: Sequence[Record]) -> tuple[float, float]:
    """Of the experts that the measured calls read, where the shape has any."""
    if isinstance(shape, Dense):
        return shape.floors(M)
    read = [r["experts"] for r in records if r.get("tokens") == M and r["shape"] == shape.name and "experts" in r]
    return shape.floors(M, sum(read) / len(read) if read else None)


def verdicts(ours: str, shapes: Sequence[Dense | Moe], measured: Times) -> list[Verdict]:
    """Every aim that concerns a measured number of tokens."""
    found = []
    for shape in shapes:
        for tokens, seconds in sorted(measured.get(shape.name, {}).items()):
            for aim in DENSE_AIMS if isinstance(shape, Dense) else MOE_AIMS:
                if aim.low <= tokens <= aim.high:
                    known = ours in seconds and all(peer in seconds for peer in aim.peers)
                    ratio = seconds[ours] / min(seconds[peer] for peer in aim.peers) if known else None
                    found.append(Verdict(shape.name, tokens, aim, ratio))
    return found


# --- text ------------------------------------------------------------------------------------------------------------


def shape_table(shape: Dense | Moe, titles: Mapping[str, str], records: Sequence[Record]) -> str:
    """Microseconds of every peer that was asked for, '-' where there are none, and the floors."""
    of_tokens = times(records).get(shape.name, {})
    rows = []
    for M, seconds in sorted(of_tokens.items()):
        moving, multiplying = floors(shape, M, records)
        figures = [_microseconds(seconds.get(peer)) for peer in titles]
        rows.append([str(M), *figures, _microseconds(moving), _microseconds(multiplying)])
    return table(["M", *titles.values(), "memory floor", "tensor floor"], rows)


def verdict_table(judged: Mapping[str, Sequence[Verdict]], titles: Mapping[str, str]) -> str:
    """A row for every shape and aim, a column for each of ours: its worst ratio, where, and whether all are met."""
    groups: dict[tuple[str, Aim], dict[str, list[Verdict]]] = {}
    for ours, found in judged.items():
        for verdict in found:
            groups.setdefault((verdict.shape, verdict.aim), {}).setdefault(ours, []).append(verdict)
    rows = []
    for (shape, aim), by_ours in groups.items():
        against = " or ".join(titles.get(peer, peer) for peer in aim.peers)
        rows.append([shape, aim.range, against, f"{aim.most:.2f}", *(_worst(by_ours.get(ours, [])) for ours in judged)])
    return table(["shape", "M", "against", "at most", *(titles.get(ours, ours) for ours in judged)], rows)


def _worst(found: Sequence[Verdict]) -> str:
    known = [(verdict.ratio, verdict.tokens) for verdict in found if verdict.ratio is not None]
    if not known:
        return "-"
    ratio, tokens = max(known)
    said = "NO" if ratio > found[0].aim.most else "yes" if len(known) == len(found) else "?"
    return f"{ratio:.2f} at {tokens} {said.rjust(3)}"


def verdict_summary(title: str, found: Sequence[Verdict]) -> str:
    met, unknown = sum(v.met is True for v in found), sum(v.met is None for v in found)
    return f"{title}: {met} of {len(found)} aims met" + (f", {unknown} not known" if unknown else "")


def notes(records: Sequence[Record], titles: Mapping[str, str]) -> list[str]:
    """Errors of the results, and every reason for missing times once."""
    lines = []
    errors = [(r["shape"], titles.get(r["peer"], r["peer"]), r["relative_error"]) for r in records if _checked(r)]
    by_peer: dict[str, list[tuple[str, float]]] = {}
    for shape, title, error in errors:
        by_peer.setdefault(title, []).append((shape, error))
    for title, found in by_peer.items():
        shape, worst = max(found, key=lambda pair: _badness(pair[1]))
        right = worst <= MOST_ERROR  # not for NaN
        lines.append(f"{title}: relative error {worst:.2g}" + ("" if right else f" at {shape}: ITS RESULT IS WRONG"))
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if "failed" in record:
            shapes = reasons.setdefault((titles.get(record["peer"], record["peer"]), record["failed"]), [])
            if record["shape"] not in shapes:
                shapes.append(record["shape"])
    lines += [f"{title}: no times for {', '.join(shapes)}: {why}" for (title, why), shapes in reasons.items()]
    return lines


def _checked(record: Record) -> bool:
    return "relative_error" in record


def _badness(error: float) -> float:
    return error if error == error else float("inf")


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


# --- picture ---------------------------------------------------------------------------------------------------------


def plot(
    shapes: Sequence[Dense | Moe],
    titles_of: Callable[[Dense | Moe], Mapping[str, str]],
    records: Sequence[Record],
    machine: str,
    path: Path,
) -> None:
    """Time over the larger floor by number of tokens, a panel for every shape: 1 is what the chip allows."""
    from matplotlib.figure import Figure

    measured = times(records)
    shown = [shape for shape in shapes if measured.get(shape.name)]
    columns = min(len(shown), 4) or 1
    rows = -(-len(shown) // columns) or 1
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    lines: dict[str, Any] = {}
    for panel, shape in zip(panels, shown, strict=False):
        for peer, title in titles_of(shape).items():
            points = [
                (M, seconds[peer] / max(floors(shape, M, records)))
                for M, seconds in sorted(measured[shape.name].items())
                if peer in seconds and peer != "read"
            ]
            if points:
                style = {"linewidth": 2.4} if title.startswith("ours") else {"linewidth": 1.2, "linestyle": "--"}
                colour = lines[title].get_color() if title in lines else f"C{len(lines)}"
                lines[title], *_ = panel.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, **style)
        panel.axhline(1, color="0.4", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set(title=shape.name, xlabel="tokens", ylabel="time over floor")
        panel.grid(color="0.9")
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.suptitle(f"{machine}; floor: bytes at {BYTES_A_SECOND / 1e12} TB/s or {FLOP_A_SECOND / 1e12:g} TFLOP/s")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
