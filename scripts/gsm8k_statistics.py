"""What a number of right answers says: intervals, tests for pairs, and what a set of questions can resolve."""

import math
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8


class Interval(NamedTuple):
    low: float
    high: float


def quantile(confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided interval reaches: 1.96 for 95 %."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def standard_error(successes: int, n: int) -> float:
    """Of a proportion, from the sample variance with n - 1, as lm-eval reports it. 0 for one trial."""
    p = successes / n
    return math.sqrt(p * (1 - p) / max(n - 1, 1))


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a proportion: sound for small n and for proportions near 0 and 1."""
    p, z = successes / n, quantile(confidence)
    middle = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(max(0.0, (middle - reach) / (1 + z * z / n)), min(1.0, (middle + reach) / (1 + z * z / n)))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p: how likely flips split at least this unevenly if both directions are equally likely."""
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << n))


def paired_difference(gained: int, lost: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the difference of two proportions over the same n trials (Bonett and Price 2012).

    Wald's interval with one flip added each way, which keeps its coverage where flips are few.
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle, reach = up - down, quantile(confidence) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Interval(max(-1.0, middle - reach), min(1.0, middle + reach))


def smallest_difference(n: int, flips: int, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """The smallest true difference in accuracy that the exact McNemar test would have found with this power.

    ``flips`` of the ``n`` questions were answered differently. The rate of flips is taken as it was, or as the
    difference itself where that is larger. None where no difference reaches the power: too few questions.
    """
    if _power(n, flips / n, 1.0, alpha) < power:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if _power(n, flips / n, middle, alpha) >= power else (middle, high)
    return high


def _power(n: int, flip_rate: float, difference: float, alpha: float) -> float:
    """The chance that p <= alpha: the number of flips is binomial, and so is the share of them that goes up."""
    rate = max(flip_rate, difference)
    up = (1 + difference / rate) / 2
    # Beyond eight standard deviations nothing is left that could be seen in the sum.
    reach = 8 * math.sqrt(n * rate * (1 - rate)) + 1
    total = 0.0
    for m in range(max(0, math.floor(n * rate - reach)), min(n, math.ceil(n * rate + reach)) + 1):
        fewer = _largest_significant(m, alpha)
        found = math.fsum(_binomial(k, m, up) + _binomial(m - k, m, up) for k in range(fewer + 1))
        total += _binomial(m, n, rate) * found
    return total


@cache
def _largest_significant(m: int, alpha: float) -> int:
    """The largest number of flips in the rarer direction, of m flips, whose p is at most alpha; -1 if none is."""
    tail, k = 0.0, 0
    while 2 * (tail := tail + _binomial(k, m, 0.5)) <= alpha:
        k += 1
    return k - 1


def _binomial(k: int, n: int, p: float) -> float:
    """Probability of k successes in n trials."""
    if p in (0.0, 1.0):
        return float(k == n * p)
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))
