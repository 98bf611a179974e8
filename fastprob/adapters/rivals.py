"""ProbVLM's uncertainty and its rivals behind one interface: what is fitted on pairs, and gives scores of new ones.

    scorer = probvlm(TrainConfig(epochs=50))(train, validation, seed=0)
    scores = scorer(test)                       # by name, larger for less certain
    scores["total"]["text"]                     # [M]

    similarities    without training: distance, margin, entropy and mutual doubt of frozen cosines, and random numbers
    probvlm         aleatoric, epistemic and total variance; Gaussian and Laplace adapters by `TrainConfig.power`
    ensemble        of adapters: the mean of their variances and the variance of their means
    posterior       which of the first ten items is the match, by an adapter's exact match likelihood
    pfe, pcme       heads that learn a variance by pairs alone (`fastprob.adapters.heads`)

All but the last two stand here. The rivals that need more than embeddings, the Laplace approximation of a projection
and test-time augmentation, are in `fastprob.adapters.projection` and `fastprob.encoders.augmentation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import fastprob
from fastprob.adapters.adapter import ProbVLM
from fastprob.adapters.error import SIDES, store_signals, variances
from fastprob.adapters.training import TrainConfig, fit
from fastprob.adapters.uncertainty import predict
from fastprob.data.pairs import Paired
from fastprob.evaluation.selective import same
from fastprob.evaluation.signals import fit_temperature

Scores = dict[str, dict[str, Tensor]]
"""Name of a score -> side -> of each image [N] and of each text [M], larger for less certain."""

SIGNALS = {"1 - max cosine": "distance", "margin": "margin_2", "entropy": "entropy_1", "mutual doubt": "mutual_1"}
PASSES = 20
TEMPERATURES = tuple(2.0**i for i in range(-2, 13))  # of a posterior whose likelihoods are sums over D dimensions
_QUERIES = 128  # whose likelihoods are worked on at a time: at D = 512 and ten items 2.6 MB a tensor


class Scorer(Protocol):
    """Gives the scores of images and texts that look for each other; who belongs to whom is not looked at."""

    def __call__(self, data: Paired, captions: Sequence[str] | None = None) -> Scores:
        """captions: what the texts are, so that equal ones are one item (default: all are different)."""


class Method(Protocol):
    """Fits a `Scorer` to pairs; captions are those of `validation`, as a scorer takes them."""

    def __call__(
        self, train: Paired, validation: Paired, seed: int = 0, captions: Sequence[str] | None = None
    ) -> Scorer: ...


@dataclass(frozen=True)
class Similarities:
    """Scores that need no training but a temperature of the softmax; `seed` is that of the random one."""

    temperature: float
    seed: int = 0

    def __call__(self, data: Paired, captions: Sequence[str] | None = None) -> Scores:
        found = store_signals(data, self.temperature, captions)
        scores = {name: {side: found[side].values[signal] for side in SIDES} for name, signal in SIGNALS.items()}
        generator = torch.Generator().manual_seed(self.seed)
        scores["random"] = {side: torch.rand(len(getattr(data, side)), generator=generator) for side in SIDES}
        return scores


def similarities(
    train: Paired, validation: Paired, seed: int = 0, captions: Sequence[str] | None = None
) -> Similarities:
    """A `Method`: the temperature is the one of `fit_temperature` on the validation pairs."""
    return Similarities(fit_temperature(validation), seed)


@dataclass(frozen=True)
class Adapters:
    """Scores of one adapter, or of an ensemble.

    aleatoric   mean over the adapters of the variance of what they predict
    epistemic   variance over the adapters of the means that they predict; of one adapter, over its dropout passes
    total       aleatoric + epistemic                                             all means over D
    """

    models: Sequence[ProbVLM]
    seed: int = 0

    def __call__(self, data: Paired, captions: Sequence[str] | None = None) -> Scores:
        if len(self.models) == 1:
            known = variances(self.models[0], data, PASSES, self.seed)
        else:
            known = {side: self._of_ensemble(side, getattr(data, side)) for side in SIDES}
        for of_side in known.values():
            of_side["total"] = of_side["aleatoric"] + of_side["epistemic"]
        return {kind: {side: known[side][kind] for side in SIDES} for kind in ("total", "aleatoric", "epistemic")}

    def _of_ensemble(self, side: str, rows: Tensor) -> dict[str, Tensor]:
        each = [predict(getattr(model, side), rows) for model in self.models]
        means = torch.stack([one.mu for one in each])  # [models, rows, D]
        return {
            "aleatoric": torch.stack([one.aleatoric for one in each]).mean((0, 2)),
            "epistemic": means.var(0, correction=0).mean(1),
        }


def probvlm(config: TrainConfig | None = None) -> Method:
    """The method that trains an adapter by this config, but for its seed."""
    return ensemble(1, config)


def ensemble(members: int, config: TrainConfig | None = None) -> Method:
    """The method that trains so many adapters, by this config with seeds of their own: members * seed + 0, 1, ..."""

    def method(train: Paired, validation: Paired, seed: int = 0, captions: Sequence[str] | None = None) -> Adapters:
        seeds = range(members * seed, members * (seed + 1))
        configs = [replace(config or TrainConfig(), seed=each) for each in seeds]
        return Adapters([fit(train, config=each, progress=False).model for each in configs], seed)

    return method


@dataclass(frozen=True)
class Posterior:
    """Which of a query's first ten items is its match: their probabilities under an adapter, all equally likely before.

        p_g = softmax_g(-E_qg / T),   E_qg = -log integral G_q(z) G_g(z) dz

    with `fastprob.ggd_match_nll` summed over the D dimensions. The scores are the entropy of p, the posterior error
    1 - max p, which is the probability that the item of the greatest p is not the match, and the one that the first
    item by cosine is not, 1 - p_1. T is a temperature of each side: dimensions are not as independent as the sum takes
    them.
    """

    model: ProbVLM
    cosine: float
    """Temperature of the softmax over cosines, of the signals that find the first ten."""
    temperature: dict[str, float]

    def __call__(self, data: Paired, captions: Sequence[str] | None = None) -> Scores:
        return self.scores(self.energies(data, captions))

    def scores(self, energies: dict[str, tuple[Tensor, Tensor]]) -> Scores:
        """The scores of what `energies` gives."""
        scores: Scores = {"posterior entropy": {}, "posterior error": {}, "posterior error of the first": {}}
        for side, (energy, _) in energies.items():
            p = (-energy / self.temperature[side]).softmax(1)  # [Q, k]
            scores["posterior entropy"][side] = torch.special.entr(p).sum(1)
            scores["posterior error"][side] = 1 - p.amax(1)
            scores["posterior error of the first"][side] = 1 - p[:, 0]
        return scores

    def energies(self, data: Paired, captions: Sequence[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Side -> E of each query and its first ten items by cosine [Q, 10] in nats, and these items [Q, 10]."""
        return energies(self.model, data, self.cosine, captions)


def posterior(model: ProbVLM, validation: Paired, captions: Sequence[str] | None = None) -> Posterior:
    """The posterior of a trained adapter, at the temperatures of `TEMPERATURES` that are likeliest on validation pairs.

    Of each side it is the one of the greatest mean log-probability of a query's own items, over the queries that have
    one among their first ten. Raises ValueError where no query has.
    """
    cosine = fit_temperature(validation)
    which = torch.arange(len(validation.text)) if captions is None else same(captions)
    found = energies(model, validation, cosine, captions)
    images, texts = torch.arange(len(validation.image))[:, None], int(which.max()) + 1
    own = {  # [N, 10] and [M, 10]
        "image": torch.isin(images * texts + which[found["image"][1]], validation.caption_image * texts + which),
        "text": found["text"][1] == validation.caption_image[:, None],
    }
    return Posterior(model, cosine, {side: _likeliest(found[side][0], own[side]) for side in SIDES})


def _likeliest(energy: Tensor, own: Tensor) -> float:
    """Of energies [Q, k], and which of the items are the query's own."""
    there = own.any(1)
    if not there.any():
        raise ValueError("posterior: validation must have queries whose first ten items hold their own, got none")
    energy, others = energy[there], torch.where(own[there], 0.0, -torch.inf)
    fits = [((-energy / each).log_softmax(1) + others).logsumexp(1).mean() for each in TEMPERATURES]
    return TEMPERATURES[int(torch.stack(fits).argmax())]


@torch.no_grad()
def energies(
    model: ProbVLM, data: Paired, temperature: float, captions: Sequence[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """As `Posterior.energies`, at this temperature of the softmax over cosines; equal captions are worked on once."""
    found = store_signals(data, temperature, captions)
    device = next(model.parameters()).device
    of = {side: getattr(model, side)(getattr(data, side).to(device, torch.float32)) for side in SIDES}
    which = torch.arange(len(data.text)) if captions is None else same(captions)
    first = torch.from_numpy(np.unique(which, return_index=True)[1])  # [U] of the different captions
    result = {}
    for side, other in zip(SIDES, SIDES[::-1]):
        rows = first if side == "text" else torch.arange(len(data.image))
        blocks = [_energy(of[side], of[other], block, found[side].items[block]) for block in rows.split(_QUERIES)]
        energy = torch.cat(blocks)
        result[side] = (energy[which] if side == "text" else energy, found[side].items)
    return result


def _energy(query, gallery, rows: Tensor, items: Tensor) -> Tensor:
    """Of the queries `rows` [B] and their items [B, k]: [B, k] float64 on the CPU."""
    one = [of[rows][:, None].expand(-1, items.shape[1], -1) for of in query]  # three of [B, k, D]
    other = [of[items] for of in gallery]
    return fastprob.ggd_match_nll(*one, *other, reduction="none").double().sum(-1).cpu()
