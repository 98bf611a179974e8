"""What to label next, and which fine-tuned model to take, by what is uncertain about unlabelled data.

    rows = choose(pool, 100, by="coreset")      # images of the pool to label
    name, uncertainty = rank_models({"a": Candidate(a, ...), "b": Candidate(b, ...)}, by="p_wrong")[0]

Measured on two data sets and three seeds (bench/results/real/selection.md): to label, only coreset was better than a
random choice, on pictures and not on digit scenes; the most uncertain ones were no better, mostly worse. To choose a
model, p_wrong found the best one every time, with an adapter or without, distance most times; total did not. Sources:
ProbVLM, ICCV 2023 (both by total uncertainty); Sener and Savarese, Active Learning for Convolutional Neural Networks: A
Core-Set Approach, ICLR 2018 (greedy k-centers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastprob._arguments import as_tensor, one_of
from fastprob.adapters.adapter import ProbVLM
from fastprob.adapters.error import SIDES, ErrorModels, variances
from fastprob.adapters.noisy import TEMPERATURE
from fastprob.data.pairs import Paired
from fastprob.evaluation.signals import signals

WAYS = ("total", "p_wrong", "coreset", "random")
MEASURES = ("p_wrong", "total", "distance", "entropy")


def choose(
    pool: Paired,
    count: int,
    *,
    by: str,
    adapter: ProbVLM | None = None,
    errors: ErrorModels | None = None,
    captions: Sequence[str] | None = None,
    passes: int = 20,
    seed: int = 0,
) -> Tensor:
    """Choose images of a pool to label: [count] int64 rows, the first choice first.

    Args:
        pool: its images, and texts that they may ask for; who belongs to whom is not looked at.
        by: "total", the largest total uncertainty (mean over D) under `adapter`; "p_wrong", the largest probability
            that the image's first match among the texts is wrong, of `errors` (and `adapter`, if they were fitted with
            one); "coreset", greedy k-centers of the image embeddings; "random".
        captions: what the texts are, so that equal ones count once in "p_wrong" (default: all are different).
        passes, seed: dropout passes of "total"; the seed is also that of "random" and of coreset's first image.

    Raises:
        ValueError: an option out of its range, or what `by` needs is missing.
    """
    one_of("choose", "by", by, WAYS)
    images = len(pool.image)
    if not isinstance(count, int) or not 1 <= count <= images:
        raise ValueError(f"choose: count must be an integer from 1 to the {images} images, got {count!r}")
    if by == "random":
        return torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count]
    if by == "coreset":
        return coreset(pool.image, count, seed=seed)
    if by == "total":
        score = _total(_given("choose", "adapter", adapter), pool, passes, seed)["image"]
    else:
        score = _given("choose", "errors", errors)(pool, captions=captions, adapter=adapter, seed=seed)["image"]
    return score.argsort(descending=True, stable=True)[:count]


def coreset(rows: Tensor, count: int, *, known: Tensor | None = None, seed: int = 0) -> Tensor:
    """Greedy k-centers: each choice is the row that is farthest from all chosen ones, [count] int64 in that order.

    Distances are Euclidean between rows of unit norm, which orders as the cosine does. Time is N x D a choice.

    Args:
        rows: embeddings [N, D].
        count: from 1 to N.
        known: embeddings [K, D] that count as chosen already (default: none, and the first choice is a random row).
        seed: of that first choice.

    Raises ValueError for another count.
    """
    rows = normalize(as_tensor("coreset: rows", rows).float(), dim=1)
    if not 1 <= count <= len(rows):
        raise ValueError(f"coreset: count must be from 1 to the {len(rows)} rows, got {count}")
    similarity = torch.full((len(rows),), -torch.inf)  # to the closest chosen one
    for centre in () if known is None else normalize(known.float(), dim=1):
        similarity = torch.maximum(similarity, rows @ centre)
    first = int(torch.randint(len(rows), (), generator=torch.Generator().manual_seed(seed)))
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(first if known is None and not chosen else int(similarity.argmin()))
        similarity = torch.maximum(similarity, rows @ rows[chosen[-1]])
        similarity[chosen[-1]] = torch.inf
    return torch.tensor(chosen)


@dataclass(frozen=True)
class Candidate:
    """A fine-tuned model: what it makes of the target data, and what tells how uncertain it is.

    data: its embeddings of the target's images and texts; who belongs to whom is not looked at. captions: what those
    texts are. adapter: of its embeddings, for "total". errors: fitted on its embeddings of labelled data, for "p_wrong"
    """

    data: Paired
    captions: Sequence[str] | None = None
    adapter: ProbVLM | None = None
    errors: ErrorModels | None = None


def rank_models(candidates: Mapping[str, Candidate], *, by: str = "p_wrong") -> list[tuple[str, float]]:
    """Names of the candidates with their mean uncertainty on the target, the least uncertain first.

    Args:
        by: "p_wrong", the mean probability that a first match is wrong; "total", the mean total variance under the
            adapter; "distance", 1 - the largest cosine; "entropy" of the softmax over all matches, at the temperature
            0.01, over the logarithm of their number. Each is the mean of the images' mean and the texts' mean.

    Raises:
        ValueError: an option out of its range, or what `by` needs is missing.
    """
    one_of("rank_models", "by", by, MEASURES)
    means = {name: _mean(name, candidate, by) for name, candidate in candidates.items()}
    return sorted(means.items(), key=lambda item: item[1])


def _mean(name: str, candidate: Candidate, by: str) -> float:
    of = f"rank_models: {name}"
    data, captions, adapter = candidate.data, candidate.captions, candidate.adapter
    if by == "p_wrong":
        scores = _given(of, "errors", candidate.errors)(data, captions=captions, adapter=adapter)
    elif by == "total":
        scores = _total(_given(of, "adapter", adapter), data, 20, 0)
    else:
        signal = {"distance": "distance", "entropy": "entropy_1"}[by]
        scores = {side: found.values[signal] for side, found in zip(SIDES, signals(data.image, data.text, TEMPERATURE))}
    return float(sum(score.double().mean() for score in scores.values())) / len(SIDES)


def _total(adapter: ProbVLM, data: Paired, passes: int, seed: int) -> dict[str, Tensor]:
    """Total uncertainty of every row, mean over D, by side."""
    return {side: sum(kinds.values()) for side, kinds in variances(adapter, data, passes, seed).items()}


def _given(name: str, argument: str, value):
    if value is None:
        raise ValueError(f"{name}: {argument} must be given for this choice, got None")
    return value
