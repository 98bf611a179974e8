"""How well a score of uncertainty tells right retrievals from wrong ones, and what it goes with.

Two rules say when a query is right at rank 1: "own", it found what it was written for; "true", anything that is true
of it. Queries are captions (text -> image) or pictures (image -> text), the ranking is by frozen cosine similarity.

    gain    of `fastprob.evaluation.selective`: 1 for the best order of the queries, 0 for a random one, negative where
            it is inverted
    S       Spearman correlation of ten levels of uncertainty with their recall@1, as `evaluate` has it: -1 is right
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprob.evaluation.calibration import uncertainty_levels
from fastprob.evaluation.retrieval import match_rank
from fastprob.evaluation.selective import Bootstrap, Ranked
from fastprob.evaluation.statistics import spearman

from .parts import Part

DIRECTIONS, RULES = ("text -> image", "image -> text"), ("own", "true")
LEVELS = 10
DRAWS = 400  # of the bootstrap


@dataclass(frozen=True)
class Judge:
    """What scores on a test part are judged by; `train` says how often a caption was seen."""

    test: Part
    train: Part

    @cached_property
    def wrong(self) -> dict[tuple[str, str], Tensor]:
        """(direction, rule) -> [Q] 1 where rank 1 is wrong, else 0."""
        data, truth = self.test.data, self.test.truth
        own = torch.arange(len(data.image)), data.caption_image
        ranks = {
            ("text -> image", "own"): match_rank(data.text, data.image, own[::-1]),
            ("text -> image", "true"): match_rank(data.text, data.image, truth),
            ("image -> text", "own"): match_rank(data.image, data.text, own),
            ("image -> text", "true"): match_rank(data.image, data.text, truth.T),
        }
        return {key: (rank > 0).double() for key, rank in ranks.items()}

    @cached_property
    def ambiguity(self) -> dict[str, Tensor]:
        """Direction -> [Q] how many items are true of each query."""
        truth = self.test.truth
        return {"text -> image": truth.sum(1).double(), "image -> text": truth.sum(0).double()}

    @cached_property
    def frequency(self) -> Tensor:
        """[U] how often each distinct caption stands in the training part."""
        seen = Counter(self.train.captions)
        return torch.tensor([seen[self.test.captions[i]] for i in self.test.distinct.tolist()]).double()

    @cached_property
    def distance(self) -> Tensor:
        """[U] of the distinct captions of the test part."""
        return distance(self.test)

    @cached_property
    def draws(self) -> dict[str, Tensor]:
        """Direction -> [DRAWS, Q] how often a bootstrap draws each query; captions of one text come together."""
        queries = {"text -> image": self.test.which, "image -> text": len(self.test.data.image)}
        return {direction: torch.cat(list(Bootstrap(group, DRAWS))) for direction, group in queries.items()}

    def baselines(self) -> dict[str, dict[str, list[Tensor]]]:
        """Scores that no adapter makes: name -> direction -> [Q] of every seed."""
        data = self.test.data
        similar = F.normalize(data.text.double(), dim=1) @ F.normalize(data.image.double(), dim=1).T  # [M, N]
        ways = {"text -> image": similar, "image -> text": similar.T}
        generator = torch.Generator().manual_seed(0)
        words = torch.tensor([len(caption.split()) for caption in self.test.captions]).double()
        return {
            "random": {way: list(torch.rand(5, len(rows), generator=generator)) for way, rows in ways.items()},
            "1 - max cosine": {way: [1 - rows.amax(1)] for way, rows in ways.items()},
            "1 - mean cosine": {way: [1 - rows.mean(1)] for way, rows in ways.items()},
            "- margin of the first two": {way: [-_margin(rows)] for way, rows in ways.items()},
            "fewer words": {"text -> image": [-words]},
            "seldom in the training part": {"text -> image": [-self.frequency[self.test.which]]},
        }


def distance(part: Part) -> Tensor:
    """[U] mean 1 - cosine of each distinct caption and the pictures that it was written for."""
    data = part.data
    cosine = F.cosine_similarity(data.text, data.image[data.caption_image]).double()  # [M]
    total = torch.zeros(len(part.distinct), dtype=torch.float64).index_add_(0, part.which, 1 - cosine)
    return total / torch.bincount(part.which)


def _margin(similar: Tensor) -> Tensor:
    """Of the first cosine over the next lower one: equal captions count once."""
    first = similar.amax(1, keepdim=True)
    return (first - similar.masked_fill(similar > first - 1e-6, -1).amax(1, keepdim=True))[:, 0]


def gain_interval(scores: Sequence[Tensor], wrong: Tensor, draws: Tensor) -> tuple[float, float, float]:
    """Mean gain of a score's seeds, and the interval of 95 % over resampled queries and seeds."""
    ranked = [Ranked(score, wrong) for score in scores]
    mean = torch.cat([each.gain() for each in ranked]).mean()
    return float(mean), *seeds_interval(torch.stack([each.gain(draws) for each in ranked]))


def seeds_interval(by_seed: Tensor) -> tuple[float, float]:
    """The interval of 95 % over resampled queries and seeds, of a measure at every seed and draw [seeds, DRAWS]."""
    seeds = torch.randint(len(by_seed), by_seed.shape, generator=torch.Generator().manual_seed(0))
    low, high = by_seed.gather(0, seeds).mean(0).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def level_spearman(score: Tensor, wrong: Tensor) -> float:
    """S, over ten levels."""
    level = uncertainty_levels(score, LEVELS)
    recall = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, 1 - wrong) / torch.bincount(level)
    return spearman(torch.arange(LEVELS), recall)


def partial_spearman(x: Tensor, y: Tensor, given: Tensor) -> float:
    """Spearman correlation of x and y, all [n], with the rank of `given` held fixed."""
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    return (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5
