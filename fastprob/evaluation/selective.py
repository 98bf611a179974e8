"""Selective prediction: how much error is left when only the queries that a score calls certain are answered.

Queries are sorted by a score (larger is less certain). At coverage c the share c of them is answered; the risk is the
share of wrong answers among those. AURC is the mean of the risk over all coverages, and AUROC the probability that a
wrong query has the larger score of a wrong and a right one. Queries of equal score stand in random order, and the mean
over all orders is taken: a constant score has the error rate for its AURC, and an AUROC of 1/2.

Sources: El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, JMLR 2010; Geifman and
El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastprob._arguments import as_tensor
from fastprob._memory import giving_back

Name = TypeVar("Name", bound=Hashable)
Measure = Callable[[Tensor | None], Tensor]
"""Of queries with weights [B, Q], or of all alike: [B]."""

_WEIGHTS = 1 << 20
"""Weights of a bootstrap held at a time, 8 MB."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval of 95 % over resampled queries."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Ranked:
    """Queries sorted by a score, of which every measure and its bootstrap is computed.

    Args:
        score: of Q queries [Q], larger for less certain; finite.
        wrong: whether each query's answer is wrong [Q], bool, or a probability.

    Raises:
        ValueError: for other shapes, no query, or values that are not finite.
    """

    def __init__(self, score: Tensor, wrong: Tensor):
        score, wrong = as_tensor("score", score).cpu().double(), as_tensor("wrong", wrong).cpu().double()
        if score.dim() != 1 or score.shape != wrong.shape or not len(score):
            shapes = f"{tuple(score.shape)} and {tuple(wrong.shape)}"
            raise ValueError(f"Ranked: score and wrong must both be [Q >= 1], got {shapes}")
        if not (score.isfinite().all() and wrong.isfinite().all()):
            raise ValueError("Ranked: score and wrong must be finite")
        self.wrong = wrong
        self.group = score.unique(return_inverse=True)[1]  # [Q], the queries of equal score, the most certain first
        self.groups = int(self.group.max()) + 1

    def _masses(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and weight of the wrong of every group, [B, G] each, of the queries' weights [B, Q]."""
        weight = torch.ones(1, len(self.wrong), dtype=torch.float64) if weight is None else weight
        empty = torch.zeros(len(weight), self.groups, dtype=torch.float64)
        return empty.index_add(1, self.group, weight), empty.index_add(1, self.group, weight * self.wrong)

    def curve(self) -> tuple[Tensor, Tensor]:
        """Coverage and risk after each group of equal scores, [G] each."""
        mass, error = self._masses(None)
        return mass.cumsum(1)[0] / mass.sum(), error.cumsum(1)[0] / mass.cumsum(1)[0]

    def aurc(self, weight: Tensor | None = None) -> Tensor:
        """Area under the risk-coverage curve, [B], of weights [B, Q].

        A group of weight w and error e, after weight W and error E, adds the integral of (E + x e/w) / (W + x) over
        x in 0..w.
        """
        mass, error = self._masses(weight)
        before, error_before = mass.cumsum(1) - mass, error.cumsum(1) - error
        rate = torch.where(mass > 0, error / mass.clamp(min=1e-9), 0)
        grown = torch.where(before > 0, torch.log1p(mass / before.clamp(min=1e-9)), 0)
        return (error + (error_before - rate * before) * grown).sum(1) / mass.sum(1)

    def auroc(self, weight: Tensor | None = None) -> Tensor:
        """Probability that of a wrong and a right query the wrong one has the larger score, [B]; NaN without both."""
        mass, wrong = self._masses(weight)
        right = mass - wrong
        below = right.cumsum(1) - right / 2
        return (wrong * below).sum(1) / (wrong.sum(1) * right.sum(1))

    def gain(self, weight: Tensor | None = None) -> Tensor:
        """How much of what the best order saves over a random one this order saves, [B]: 1 best, 0 random.

        NaN where all queries are right, or all are wrong.
        """
        mass, error = self._masses(weight)
        rate = error.sum(1) / mass.sum(1)
        return (rate - self.aurc(weight)) / (rate - Ranked(self.wrong, self.wrong).aurc(weight))

    def accuracy(self, weight: Tensor | None = None) -> Tensor:
        """Share of the queries that are right, [B]."""
        mass, error = self._masses(weight)
        return 1 - error.sum(1) / mass.sum(1)


def aurc(score: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve of a score; see the top of this module and `Ranked` for the arguments."""
    return float(Ranked(score, wrong).aurc())


def auroc(score: Tensor, wrong: Tensor) -> float:
    """Area under the receiver operating characteristic of a score as a detector of wrong queries; NaN without both."""
    return float(Ranked(score, wrong).auroc())


def estimate(measure: Measure, draws: Bootstrap) -> Estimate:
    """A measure of queries, such as `Ranked(score, wrong).aurc`, with its bootstrap interval (percentiles)."""
    return estimates({None: measure}, draws)[None]


def estimates(measures: Mapping[Name, Measure], draws: Bootstrap) -> dict[Name, Estimate]:
    """`estimate` of several measures of the same queries, each draw made once for all of them."""
    found: dict[Name, list[Tensor]] = {name: [] for name in measures}
    for weight in giving_back(draws):
        for name, measure in measures.items():
            found[name].append(measure(weight))
    return {name: _estimate(float(measure(None)), torch.cat(found[name])) for name, measure in measures.items()}


def _estimate(value: float, drawn: Tensor) -> Estimate:
    drawn = drawn[drawn.isfinite()]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = drawn.quantile(ends).tolist() if len(drawn) else (math.nan, math.nan)
    return Estimate(value, low, high)


class Bootstrap:
    """How often each of Q queries is drawn, block by block of the draws: yields [B, Q] float64.

    Queries of one group, such as those of the same text, are drawn together: they are right or wrong together.

    Args:
        group: which group each query is of, [Q] int64, numbered from 0 without a gap; or their number Q, each its own.
        draws, seed: of the bootstrap. Equal arguments give equal draws, so methods are compared on the same.
    """

    def __init__(self, group: Tensor | int, draws: int = 1000, seed: int = 0):
        self.group = torch.arange(group) if isinstance(group, int) else group
        self.draws, self.seed = draws, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        groups = int(self.group.max()) + 1
        at_once = max(1, _WEIGHTS // max(len(self.group), groups))
        for start in range(0, self.draws, at_once):
            block = min(at_once, self.draws - start)
            drawn = torch.randint(groups, (block, groups), generator=generator)
            count = torch.zeros(block, groups, dtype=torch.float64)
            count.scatter_add_(1, drawn, torch.ones_like(count))
            yield count[:, self.group]


def same(values: Iterable) -> Tensor:
    """Number equal values alike, in the order of their first occurrence: groups for a `Bootstrap`, [Q] int64."""
    number: dict = {}
    return torch.tensor([number.setdefault(value, len(number)) for value in values], dtype=torch.int64)
