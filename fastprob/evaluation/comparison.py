"""Uncertainties of the same queries side by side: which of them tells best what is wrong, by how much, how surely."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from fastprob.evaluation.calibration import expected_calibration_error
from fastprob.evaluation.selective import Bootstrap, Estimate, Ranked, estimates
from fastprob.evaluation.tables import aligned

RANDOM = "random"
DRAWS = 400  # of a bootstrap
HEADER = ("score", "AURC [95 %]", "AUROC [95 %]", "ECE", "NLL")


@dataclass(frozen=True)
class Judged:
    """What a score is worth as an uncertainty; see `fastprob.evaluation.selective`."""

    aurc: Estimate
    auroc: Estimate
    ece: float | None
    """Expected calibration error of a score that is a probability of error, else None."""
    nll: float | None
    """Mean negative log-likelihood in nats of a score that is a probability p of error, else None: -log p of a wrong
    query, -log(1 - p) of a right one, each at most 100, so that it is finite where a p of 0 or 1 was refuted."""
    risk: list[float]
    """Share of wrong ones among the most certain 1 %, 2 %, ... 100 % of the queries."""


@dataclass(frozen=True)
class Comparison:
    """Scores of the queries of one direction, by one rule of what a match is."""

    error: float
    """Share of the queries whose first match is wrong: the AURC of a constant."""
    scores: dict[str, Judged]

    @property
    def best(self) -> str:
        """The score of least AURC."""
        return min(self.scores, key=lambda name: self.scores[name].aurc.value)

    def table(self) -> str:
        """A line a score, the best first, as text."""
        return aligned(HEADER, self.rows())

    def rows(self) -> list[tuple[str, ...]]:
        """What stands under `HEADER`, the best score first."""
        best_first = sorted(self.scores.items(), key=lambda item: item[1].aurc.value)
        return [(name, str(one.aurc), str(one.auroc), _cell(one.ece), _cell(one.nll)) for name, one in best_first]


EXPLANATION = """\
AURC is the share of wrong answers among the answered queries, the most certain first, averaged over all shares that are
answered: less is better, and a score that says nothing has the error rate. AUROC is the probability that a wrong query
has the larger score of a wrong and a right one: 0.5 says nothing, below that the score is inverted. ECE is how far a
probability of error is from the share that is wrong. NLL is its mean negative log-likelihood in nats, -log of the
probability that was given to what came out, at most 100 a query: less is better, and the error rate e, said of every
query, has -e log e - (1 - e) log(1 - e)."""


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def compare(
    scores: Mapping[str, Tensor],
    wrong: Tensor,
    group: Tensor,
    *,
    probabilities: Collection[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Judge scores of Q queries, and a random one beside them.

    Args:
        scores: name -> [Q], larger for less certain.
        wrong: whether each query's first match is wrong, [Q] bool.
        group: [Q] int64, queries that a bootstrap draws together, such as those of the same text.
        probabilities: names of the scores that are probabilities of error.
        draws, seed: of the bootstrap; seed also of the random score.

    Raises:
        ValueError: as `Ranked`, or a probability outside of [0, 1].
    """
    ranked = {name: Ranked(score, wrong) for name, score in with_random(scores, len(wrong), seed).items()}
    found = estimates(
        {(name, measure): getattr(one, measure) for name, one in ranked.items() for measure in ("aurc", "auroc")},
        Bootstrap(group, draws, seed),
    )
    judged = {}
    for name, one in ranked.items():
        ece, nll = _of_probability(name, scores[name], wrong) if name in probabilities else (None, None)
        judged[name] = Judged(found[name, "aurc"], found[name, "auroc"], ece, nll, _risks(one))
    return Comparison(float(wrong.double().mean()), judged)


def with_random(scores: Mapping[str, Tensor], queries: int, seed: int = 0) -> dict[str, Tensor]:
    """The scores, and a random one of as many queries behind them."""
    return {**scores, RANDOM: torch.rand(queries, generator=torch.Generator().manual_seed(seed))}


def _of_probability(name: str, p: Tensor, wrong: Tensor) -> tuple[float, float]:
    """Expected calibration error and negative log-likelihood."""
    if p.min() < 0 or p.max() > 1:
        raise ValueError(
            f"compare: {name} must be probabilities, from 0 to 1, got {float(p.min())} to {float(p.max())}"
        )
    return expected_calibration_error(p, wrong), float(binary_cross_entropy(p.double(), wrong.double()))


def _risks(ranked: Ranked) -> list[float]:
    coverage, risk = (values.numpy() for values in ranked.curve())
    return np.interp(np.arange(1, 101) / 100, coverage, risk).tolist()
