"""Compare results of gsm8k.py question by question: the same questions were asked, so only the flips say anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gsm8k_data import InputError
from gsm8k_statistics import ALPHA, CONFIDENCE, POWER, Interval, mcnemar, paired_difference, smallest_difference

# What decides which questions were asked and how. The server may differ: that is what is compared.
SAME = ("prompt_sha256", "mode", "max_tokens", "temperature", "stop")
POINT = {"fmt": "o", "color": "black", "capsize": 4}


class Result(NamedTuple):
    name: str
    accuracy: float
    interval: Interval
    settings: dict[str, Any]
    correct: dict[str, bool]
    """By question; failed requests are not in it."""


class Pair(NamedTuple):
    """A result beside the baseline, over the questions that both answered."""

    name: str
    baseline: str
    n: int
    difference: float
    confidence_interval: Interval
    gained: int
    """Questions that the baseline got wrong and this one right."""
    lost: int
    p_value: float
    smallest_difference: float | None


def read_result(path: Path) -> Result:
    try:
        return result_of(path.stem, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); needs what gsm8k.py --out wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what gsm8k.py --out writes ({type(error).__name__}: {error})") from error


def result_of(name: str, found: Mapping[str, Any]) -> Result:
    """From what gsm8k.py writes."""
    return Result(
        name=name,
        accuracy=float(found["accuracy"]),
        interval=Interval(*found["confidence_interval"]),
        settings={key: found["settings"][key] for key in SAME},
        correct={
            row["question"]: row["outcome"] == "correct" for row in found["answers"] if row["outcome"] != "failed"
        },
    )


def pair(baseline: Result, other: Result) -> Pair:
    for key in SAME:
        ours, theirs = (result.settings[key] for result in (baseline, other))
        if ours != theirs:
            raise InputError(
                f"{baseline.name} and {other.name} cannot be compared: their {key} differ ({ours!r}, {theirs!r}); "
                "give both the same --data, --shots-data, --num-shots, --num-questions and --seed"
            )
    common = baseline.correct.keys() & other.correct.keys()
    if not common:
        raise InputError(f"{baseline.name} and {other.name} have no answered question in common")
    gained = sum(other.correct[id] and not baseline.correct[id] for id in common)
    lost = sum(baseline.correct[id] and not other.correct[id] for id in common)
    return Pair(
        name=other.name,
        baseline=baseline.name,
        n=len(common),
        difference=(gained - lost) / len(common),
        confidence_interval=paired_difference(gained, lost, len(common)),
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
        smallest_difference=smallest_difference(len(common), gained + lost),
    )


def describe(found: Pair) -> str:
    low, high = found.confidence_interval
    least = "none, too few questions" if found.smallest_difference is None else f"{100 * found.smallest_difference:.1f}"
    return "\n".join(
        [
            f"{found.name} against {found.baseline}, {found.n} questions that both answered",
            f"  Difference: {100 * found.difference:+.2f} points (95 % interval {100 * low:+.2f} to {100 * high:+.2f})",
            f"  Flips: {found.gained} wrong to right, {found.lost} right to wrong; McNemar's exact "
            f"p = {found.p_value:.3g}",
            f"  Smallest difference that would have shown: {least} points (power {POWER:.0%}, alpha {ALPHA:.0%})",
        ]
    )


def compare(paths: list[Path], out: Path | None) -> None:
    """Print the comparison of each result with the first; with ``out``, write it there and plot it beside."""
    baseline, *others = [read_result(path) for path in paths]
    pairs = [pair(baseline, other) for other in others]
    for result in (baseline, *others):
        low, high = result.interval
        print(f"{result.name}: Accuracy: {result.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f})")
    for found in pairs:
        print(describe(found))
    if out is not None:
        settings = {"confidence": CONFIDENCE, "alpha": ALPHA, "power": POWER}
        out.write_text(json.dumps({**settings, "pairs": [found._asdict() for found in pairs]}, indent=2) + "\n")
        plot([baseline, *others], pairs, out.with_suffix(".png"))


def plot(results: list[Result], pairs: list[Pair], path: Path) -> None:
    """Accuracies, paired differences, and flips each way, on one page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.3, 2.8 + 0.9 * len(results) + 0.9 * len(pairs)), layout="constrained")
    accuracy, difference, flips = figure.subplots(
        3, 1, height_ratios=[len(results) + 0.5, len(pairs) + 0.5, len(pairs) + 0.5]
    )
    for place, result in enumerate(results):
        accuracy.errorbar(result.accuracy, place, xerr=_reach(result.accuracy, result.interval), **POINT)
    accuracy.set(xlabel="accuracy, Wilson's 95 % interval", title="GSM8K")
    for place, found in enumerate(pairs):
        middle, interval = 100 * found.difference, Interval(*(100 * bound for bound in found.confidence_interval))
        difference.errorbar(middle, place, xerr=_reach(middle, interval), **POINT)
        if found.smallest_difference is not None:
            reach = 100 * found.smallest_difference
            difference.barh(place, 2 * reach, left=-reach, height=0.5, color="0.9", zorder=0)
        label = f"p = {found.p_value:.3g}"
        difference.annotate(label, (middle, place), (0, 9), textcoords="offset points", ha="center")
        flips.barh(place, -found.lost, color="tab:red", height=0.5)
        flips.barh(place, found.gained, color="tab:blue", height=0.5)
    difference.axvline(0, color="0.6", linewidth=0.8)
    flips.axvline(0, color="0.6", linewidth=0.8)
    difference.set(
        xlabel=f"difference from {results[0].name} in points, 95 % interval; "
        f"grey: too small to show (power {POWER:.0%}, alpha {ALPHA:.0%})"
    )
    flips.set(xlabel="questions flipped: right to wrong (red), wrong to right (blue)")
    flips.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    for axes, names in ((accuracy, results), (difference, pairs), (flips, pairs)):
        axes.set(yticks=range(len(names)), yticklabels=[named.name for named in names], ylim=(len(names) - 0.4, -0.6))
    figure.savefig(path, dpi=150)


def _reach(value: float, interval: Interval) -> list[list[float]]:
    """How far error bars go to either side. At 0 and 1, rounding may put the value outside its interval."""
    return [[max(0.0, value - interval.low)], [max(0.0, interval.high - value)]]
