"""What bench_serve.py's measurements say: a table of configurations, ratios against what was aimed at, a plot.

Pure functions of records: one dict each, with ``configuration`` and

- ``point`` ("1", "16", ... streams, or "prefill") and ``speed`` (tokens a second), the best of its repeats; or
- ``load_seconds``, ``model_gib``, ``start_seconds``: of starting; or
- ``products``: whose kernels multiply linear layers and experts of ours; or
- ``failed``: why there is nothing more.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markdown_table import table

CONFIGURATIONS = {
    "bf16": "bf16",
    "stock": "stock NVFP4",
    "w4a16": "ours W4A16",
    "w4a4": "ours W4A4",
}
PREFILL = "prefill"
STARTING = {"load_seconds": "load s", "start_seconds": "start s", "model_gib": "weights GiB"}

Record = Mapping[str, Any]


class Aim(NamedTuple):
    """The speed of ``ours`` over that of the fastest of ``others``, at every one of ``points``."""

    ours: str
    points: tuple[str, ...]
    least: float
    others: tuple[str, ...]


_OWN = (
    Aim("w4a4", ("1", "16"), 0.88, ("w4a16",)),
    Aim("w4a4", ("256", PREFILL), 0.95, ("w4a16",)),
)
DENSE_AIMS = (
    Aim("w4a16", ("1", "16"), 1.15, ("stock",)),
    Aim("w4a16", ("1", "16"), 1.50, ("bf16",)),
    Aim("w4a16", ("64",), 1.05, ("bf16", "stock")),
    Aim("w4a16", ("256",), 0.97, ("bf16",)),
    Aim("w4a16", (PREFILL,), 0.90, ("bf16",)),
    *_OWN,
)
MOE_AIMS = (Aim("w4a16", ("1", "16", "64", "256", PREFILL), 1.10, ("bf16", "stock")), *_OWN)


class Verdict(NamedTuple):
    """An aim at one of its points; ``ratio`` is None where a speed is missing."""

    point: str
    aim: Aim
    ratio: float | None

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio >= self.aim.least


def speeds(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Tokens a second by configuration and point."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        if "speed" in record:
            found.setdefault(record["configuration"], {})[record["point"]] = record["speed"]
    return found


def verdicts(records: Sequence[Record], experts: bool) -> list[Verdict]:
    """Of every aim whose own speed or all of whose others' were measured."""
    measured = speeds(records)
    found = []
    for aim in MOE_AIMS if experts else DENSE_AIMS:
        for point in aim.points:
            ours = measured.get(aim.ours, {}).get(point)
            others = [measured.get(other, {}).get(point) for other in aim.others]
            known = [speed for speed in others if speed is not None]
            if ours is None and len(known) < len(others):
                continue
            complete = ours is not None and len(known) == len(others)
            found.append(Verdict(point, aim, ours / max(known) if complete and ours is not None else None))
    return found


def result_table(records: Sequence[Record], configurations: Sequence[str], points: Sequence[str]) -> str:
    measured = speeds(records)
    rows = []
    for name in configurations:
        starting = {key: r[key] for r in records if r["configuration"] == name for key in STARTING if key in r}
        figures = [measured.get(name, {}).get(point) for point in points]
        rows.append(
            [
                CONFIGURATIONS[name],
                *("-" if figure is None else f"{figure:.0f}" for figure in figures),
                *(f"{starting[key]:.1f}" if key in starting else "-" for key in STARTING),
            ]
        )
    streams = [point if point == PREFILL else f"{point} stream{'s' * (point != '1')}" for point in points]
    return table(["tokens a second", *streams, *STARTING.values()], rows)


def verdict_table(found: Sequence[Verdict]) -> str:
    rows = [
        [
            CONFIGURATIONS[verdict.aim.ours],
            verdict.point,
            " or ".join(CONFIGURATIONS[other] for other in verdict.aim.others),
            f"{verdict.aim.least:.2f}",
            "-" if verdict.ratio is None else f"{verdict.ratio:.2f}",
            {True: "yes", False: "NO", None: "-"}[verdict.met],
        ]
        for verdict in found
    ]
    return table(["speed of", "at", "over the faster of", "at least", "ratio", "met"], rows)


def verdict_summary(found: Sequence[Verdict]) -> str:
    met, unknown = sum(v.met is True for v in found), sum(v.met is None for v in found)
    return f"{met} of {len(found)} aims met" + (f", {unknown} not known" if unknown else "")


def products(records: Sequence[Record]) -> list[str]:
    lines = [(CONFIGURATIONS[r["configuration"]], r["products"].items()) for r in records if "products" in r]
    return [f"{title}: " + ", ".join(f"products of {what} by {by}" for what, by in found) for title, found in lines]


def reasons(records: Sequence[Record]) -> list[str]:
    return [f"{CONFIGURATIONS[r['configuration']]}: {r['failed']}" for r in records if "failed" in r]


def plot(records: Sequence[Record], configurations: Sequence[str], title: str, path: Path) -> None:
    """Decoding by number of streams, and prefill beside it."""
    from matplotlib.figure import Figure

    measured = speeds(records)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    decode, prefill = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, name in enumerate(configurations):
        points = sorted((int(point), speed) for point, speed in measured.get(name, {}).items() if point != PREFILL)
        if points:
            decode.plot(*zip(*points, strict=True), marker="o", color=f"C{place}", label=CONFIGURATIONS[name])
        if speed := measured.get(name, {}).get(PREFILL):
            prefill.bar(place, speed, color=f"C{place}")
            prefill.annotate(f"{speed:.0f}", (place, speed), (0, 3), textcoords="offset points", ha="center")
    decode.set_xscale("log", base=2)
    decode.set_yscale("log")
    decode.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    decode.set(xlabel="streams", ylabel="tokens a second", title="decode")
    decode.grid(color="0.9", which="both")
    if decode.lines:
        decode.legend(frameon=False)
    prefill.set_xticks(range(len(configurations)), [CONFIGURATIONS[name] for name in configurations], rotation=30)
    prefill.set(title=PREFILL)
    prefill.margins(y=0.1)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
