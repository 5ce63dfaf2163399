"""What accuracy.py measured, as tables: one a model, the ratios of divergences, and what questions were answered anew.

Pure functions of a result: ``settings``, and ``configurations`` in the order of the table, each a dict with ``model``,
``configuration``, and as far as it got ``divergence`` (what divergence.py writes; BF16 has none), ``gsm8k`` (what
gsm8k.py writes), ``phases`` (seconds by name) and ``failed`` (why there is nothing more).
"""

from collections.abc import Iterator, Mapping, Sequence
from math import exp, log, sqrt
from statistics import geometric_mean, stdev
from typing import Any, NamedTuple

from divergence_statistics import Estimate, ratio
from gsm8k_compare import pair, result_of
from markdown_table import table

REFERENCE = "bf16"
PLAIN = "nvfp4"
RECIPES = {PLAIN: "plain NVFP4", "nvfp4_4over6": "4over6 (mse 256)", "flashinfer": "mae 448"}
SCHEMES = ("w4a16", "w4a4")
CONFIGURATIONS = {
    REFERENCE: "BF16",
    **{f"{recipe}-{scheme}": f"{label}, {scheme.upper()}" for scheme in SCHEMES for recipe, label in RECIPES.items()},
}
AIM = 0.90
"""Mean KL of 4over6 over that of plain NVFP4: at most this, with an interval below 1."""
AIMED = "nvfp4_4over6"
ORDER = "-order-"
"""In the name of a model that is another one with its channels in another order (demo_model.py --order)."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""How many standard errors the 95 % interval of the mean of 2, 3, ... 11 values reaches; of more, at most the last."""

Entry = Mapping[str, Any]
Result = Mapping[str, Any]


class Ratio(NamedTuple):
    """Mean KL of one recipe over that of plain NVFP4 in the same scheme, with documents resampled in pairs."""

    model: str
    scheme: str
    recipe: str
    kl: Estimate

    @property
    def met(self) -> bool | None:
        return _is_met(self)


class Spread(NamedTuple):
    """Ratios of one network in several channel orders. Documents do not show this: one order is one rounding."""

    model: str
    scheme: str
    recipe: str
    ratios: list[float]

    @property
    def kl(self) -> Estimate:
        """The geometric mean, and Student's interval of it: a few orders say little of how they spread."""
        mean, count = geometric_mean(self.ratios), len(self.ratios)
        reach = exp(STUDENT[min(count, len(STUDENT) + 1) - 2] * stdev(map(log, self.ratios)) / sqrt(count))
        return Estimate(mean, mean / reach, mean * reach)

    @property
    def met(self) -> bool | None:
        return _is_met(self)


def _is_met(found: Ratio | Spread) -> bool | None:
    """None for recipes that nothing is expected of."""
    return (found.kl.value <= AIM and found.kl.high < 1) if found.recipe == AIMED else None


def entries(result: Result, model: str) -> dict[str, Entry]:
    return {entry["configuration"]: entry for entry in result["configurations"] if entry["model"] == model}


def models(result: Result) -> list[str]:
    return list(dict.fromkeys(entry["model"] for entry in result["configurations"]))


def kl_ratios(result: Result) -> list[Ratio]:
    """Of all that were measured beside plain NVFP4."""
    found = []
    for model in models(result):
        of_model = entries(result, model)
        for scheme in SCHEMES:
            plain = of_model.get(f"{PLAIN}-{scheme}", {}).get("divergence")
            for recipe in RECIPES:
                other = of_model.get(f"{recipe}-{scheme}", {}).get("divergence")
                if recipe != PLAIN and plain and other:
                    ours, theirs = (side["by_document"]["kl"] for side in (other, plain))
                    found.append(Ratio(model, scheme, recipe, ratio(ours, theirs, result["settings"]["seed"])))
    return found


def spreads(found: Sequence[Ratio]) -> list[Spread]:
    """Of every network that was measured in several channel orders."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for one in found:
        groups.setdefault((one.model.partition(ORDER)[0], one.scheme, one.recipe), []).append(one.kl.value)
    return [Spread(*key, ratios) for key, ratios in groups.items() if len(ratios) > 1]


def verdicts(result: Result) -> list[bool]:
    """Whether each aim was met: over the orders of a network's channels, where there are several."""
    found = kl_ratios(result)
    over_orders = spreads(found)
    ordered = {(one.model, one.scheme) for one in over_orders}
    alone = [one for one in found if (one.model.partition(ORDER)[0], one.scheme) not in ordered]
    met = [*(one.met for one in over_orders), *(one.met for one in alone)]
    return [one for one in met if one is not None]


def report(result: Result) -> str:
    """Markdown."""
    parts = [_about(result), *(f"**{model}**\n\n{_model_table(entries(result, model))}" for model in models(result))]
    if found := kl_ratios(result):
        parts.append(f"Mean KL over that of plain NVFP4, documents resampled in pairs:\n\n{_ratio_table(found)}")
    if over_orders := spreads(found):
        parts.append(
            "The same over the orders of a network's channels, each of which is another rounding of one function:\n\n"
            f"{_spread_table(over_orders)}"
        )
    if rows := list(_flips(result)):
        header = ["GSM8K against BF16", "points", "wrong to right", "right to wrong", "McNemar's exact p"]
        parts.append(table(header, rows))
    parts.append(_phase_table(result))
    parts += [
        f"{entry['model']}, {label(entry)}: {entry['failed']}"
        for entry in result["configurations"]
        if "failed" in entry
    ]
    return "\n\n".join(parts)


def label(entry: Entry) -> str:
    return CONFIGURATIONS[entry["configuration"]]


def _about(result: Result) -> str:
    settings = result["settings"]
    scored = [entry["divergence"] for entry in result["configurations"] if "divergence" in entry]
    counted = f"{scored[0]['positions']} positions of {scored[0]['documents']} solutions" if scored else "no solutions"
    outside = max((found["mass_outside"] for found in scored), default=0.0)
    return (
        f"{result['machine']}; KL(BF16 || quantized) in nats over {counted}, the {settings['top']} most likely tokens "
        f"of both and one bucket (at most {outside:.2g} of the mass); GSM8K with {settings['num_shots']} examples, at "
        f"most {settings['max_tokens']} tokens. 95 % intervals, those of KL and perplexity over documents."
    )


def _model_table(found: Mapping[str, Entry]) -> str:
    rows = []
    for name, entry in found.items():
        divergence, gsm8k = entry.get("divergence"), entry.get("gsm8k")
        figures = {key: Estimate(**value) for key, value in divergence["figures"].items()} if divergence else {}
        perplexity = figures.get("candidate_perplexity")
        if name == REFERENCE:
            perplexity = next((_reference_perplexity(other) for other in found.values() if "divergence" in other), None)
        agreement = figures.get("top1_agreement")
        rows.append(
            [
                CONFIGURATIONS[name],
                _estimate(figures.get("mean_kl"), ".4f"),
                f"{100 * agreement.value:.1f} %" if agreement else "-",
                _estimate(perplexity, ".3f"),
                _estimate(figures.get("perplexity_ratio"), ".4f"),
                _percent(Estimate(gsm8k["accuracy"], *gsm8k["confidence_interval"])) if gsm8k else "-",
                f"{100 * gsm8k['invalid']:.1f} %" if gsm8k else "-",
            ]
        )
    header = ["", "KL", "top-1 agreement", "perplexity", "perplexity over BF16's", "GSM8K", "no number"]
    return table(header, rows)


def _reference_perplexity(entry: Entry) -> Estimate:
    return Estimate(**entry["divergence"]["figures"]["reference_perplexity"])


def _ratio_table(found: Sequence[Ratio]) -> str:
    rows = [
        [
            f"{one.model}, {one.scheme.upper()}, {RECIPES[one.recipe]}",
            _estimate(one.kl, ".3f"),
            f"at most {AIM:.2f}" if one.met is not None else "-",
            {True: "yes", False: "NO", None: "-"}[one.met],
        ]
        for one in found
    ]
    return table(["", "ratio", "aim", "met"], rows)


def _spread_table(found: Sequence[Spread]) -> str:
    rows = [
        [
            f"{one.model}, {one.scheme.upper()}, {RECIPES[one.recipe]}",
            _estimate(one.kl, ".3f"),
            f"{min(one.ratios):.3f} to {max(one.ratios):.3f}",
            str(len(one.ratios)),
            f"at most {AIM:.2f}" if one.met is not None else "-",
            {True: "yes", False: "NO", None: "-"}[one.met],
        ]
        for one in found
    ]
    return table(["", "mean ratio", "range", "orders", "aim", "met"], rows)


def _flips(result: Result) -> Iterator[list[str]]:
    for model in models(result):
        of_model = entries(result, model)
        if "gsm8k" not in of_model.get(REFERENCE, {}):
            continue
        baseline = result_of(REFERENCE, of_model[REFERENCE]["gsm8k"])
        for name, entry in of_model.items():
            if name != REFERENCE and "gsm8k" in entry:
                found = pair(baseline, result_of(name, entry["gsm8k"]))
                points = Estimate(*(100 * x for x in (found.difference, *found.confidence_interval)))
                flips = [str(found.gained), str(found.lost), f"{found.p_value:.2g}"]
                yield [
                    f"{model}, {CONFIGURATIONS[name]}",
                    _estimate(points, "+.1f"),
                    *flips,
                ]


def _phase_table(result: Result) -> str:
    names = list(dict.fromkeys(name for entry in result["configurations"] for name in entry["phases"]))
    rows = [
        [
            f"{entry['model']}, {label(entry)}",
            *(f"{entry['phases'][name]:.1f}" if name in entry["phases"] else "-" for name in names),
        ]
        for entry in result["configurations"]
    ]
    return table(["seconds", *names], rows)


def _estimate(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "-"
    value, low, high = (format(number, form) for number in estimate)
    return f"{value} ({low} to {high})"


def _percent(estimate: Estimate) -> str:
    return _estimate(Estimate(*(100 * number for number in estimate)), ".1f") + " %"
