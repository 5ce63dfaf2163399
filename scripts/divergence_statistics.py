"""KL divergence from known log-probabilities, and the bootstrap over documents."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from divergence_scores import Scores
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 1000
PERCENTILES = (50, 90, 95, 99)
# log-softmax in fp32 leaves the sum of all probabilities off by about this: less than this is no mass, but rounding.
ROUNDING = 1e-6


class Positions(NamedTuple):
    """One value a scored position, of all documents: [N], fp64 (``agrees`` 0 or 1)."""

    kl: Tensor
    agrees: Tensor
    reference_nll: Tensor
    candidate_nll: Tensor
    outside: Tensor
    """The reference's probability of all tokens that are not known on both sides."""
    document: Tensor
    """Which document, int64."""


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def compare(reference: Scores, candidate: Scores, document: int) -> Positions:
    """KL(reference || candidate) in nats, and what goes with it, at every position of one document.

    Over all tokens where both sides know all. Otherwise over the tokens that both sides know, and one bucket that holds
    the rest of either side: a lower bound, since merging outcomes never increases a KL divergence.
    """
    p = reference.logprobs.double()
    if reference.ids is None and candidate.ids is None:
        q = candidate.logprobs.double()
        p, q = p - p.logsumexp(1, keepdim=True), q - q.logsumexp(1, keepdim=True)
        best, known = q.amax(1, keepdim=True), torch.ones_like(p, dtype=torch.bool)
        kl, outside = _terms(p, q).sum(1), torch.zeros(len(p), dtype=torch.float64)
    else:
        ids = torch.arange(p.shape[1]).expand_as(p) if reference.ids is None else reference.ids.long()
        q, known = _look_up(candidate, ids)
        best = candidate.logprobs.double().amax(1, keepdim=True)
        p_known, q_known = (x.masked_fill(~known, -torch.inf) for x in (p, q))
        p_rest, q_rest = ((1 - x.exp().sum(1)).clamp(ROUNDING) for x in (p_known, q_known))
        kl = _terms(p_known, q_known).sum(1) + p_rest * (p_rest.log() - q_rest.log())
        outside = p_rest
    # BF16 logits often have several largest: one in common is agreement.
    both_best = (p == p.amax(1, keepdim=True)) & (q == best) & known
    return Positions(
        kl=kl,
        agrees=both_best.any(1).double(),
        reference_nll=-reference.target.double(),
        candidate_nll=-candidate.target.double(),
        outside=outside,
        document=torch.full((len(kl),), document),
    )


def _terms(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q) of log-probabilities; 0 where p is 0."""
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))


def _look_up(scores: Scores, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of these tokens [P, K], and which of them are known."""
    logprobs = scores.logprobs.double()
    if scores.ids is None:
        known = (ids >= 0) & (ids < logprobs.shape[1])
        return logprobs.gather(1, ids.where(known, 0)), known
    have, order = scores.ids.long().sort(1)
    place = torch.searchsorted(have, ids.contiguous()).clamp(max=have.shape[1] - 1)
    known = have.gather(1, place) == ids  # empty places match one another, and have no probability
    return logprobs.gather(1, order.gather(1, place)), known


def join(parts: Iterable[Positions]) -> Positions:
    return Positions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def summarize(positions: Positions, seed: int) -> dict[str, Estimate]:
    """Figures over all positions, with intervals from resampling documents: positions of one are not independent."""
    sums = document_sums(positions)
    draws = resample(len(sums["positions"]), seed)
    found = {
        "mean_kl": _ratio(sums["kl"], sums["positions"], draws),
        **{f"kl_p{percent}": value for percent, value in _percentiles(positions, draws).items()},
        "top1_agreement": _ratio(sums["agrees"], sums["positions"], draws),
    }
    perplexities = {
        f"{side}_perplexity": _exp(_ratio(sums[f"{side}_nll"], sums["positions"], draws))
        for side in ("reference", "candidate")
    }
    change = _ratio(sums["candidate_nll"] - sums["reference_nll"], sums["positions"], draws)
    return {**found, **perplexities, "perplexity_ratio": _exp(change)}


def document_sums(positions: Positions) -> dict[str, Tensor]:
    """Sums over the positions of each document, [D] each: all that means and their bootstrap need."""
    count = int(positions.document.max()) + 1

    def total(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, positions.document, values)

    names = ("kl", "agrees", "reference_nll", "candidate_nll")
    values: dict[str, Tensor] = {name: total(getattr(positions, name)) for name in names}
    return {"positions": total(torch.ones_like(positions.kl)), **values}


def resample(documents: int, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """How often each document is drawn in each resample: [resamples, documents], fp64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(documents, (resamples, documents), generator=generator)
    counts = torch.zeros(resamples, documents, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def ratio(over: Sequence[float], under: Sequence[float], seed: int) -> Estimate:
    """Of two sums over the same documents: a resample draws the same ones for both."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (over, under))
    return _ratio(x, y, resample(len(x), seed))


def _ratio(over: Tensor, under: Tensor, draws: Tensor) -> Estimate:
    return _interval(float(over.sum() / under.sum()), (draws @ over) / (draws @ under))


def _interval(value: float, resampled: Tensor) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(*torch.tensor(estimate, dtype=torch.float64).exp().tolist())


def _percentiles(positions: Positions, draws: Tensor) -> dict[int, Estimate]:
    """The smallest KL that this share of positions does not exceed."""
    kl, order = positions.kl.sort()
    document = positions.document[order]
    shares = torch.tensor(PERCENTILES, dtype=torch.float64) / 100

    def at(weights: Tensor) -> Tensor:
        """With each document's positions counted so often."""
        reached = weights[document].cumsum(0)
        return kl[torch.searchsorted(reached, shares * reached[-1]).clamp(max=len(kl) - 1)]

    values, resampled = at(torch.ones(draws.shape[1], dtype=torch.float64)), torch.stack([at(draw) for draw in draws])
    return {percent: _interval(float(values[i]), resampled[:, i].contiguous()) for i, percent in enumerate(PERCENTILES)}
