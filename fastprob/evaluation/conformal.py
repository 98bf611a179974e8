"""Conformal retrieval: sets of gallery items that hold a query's own one as often as promised.

A set has all items whose cosine similarity with the query is at least a threshold. The threshold is the k-th smallest
similarity of n known pairs, with k = floor((n + 1) (1 - coverage)): for a new pair that is exchangeable with them the
probability that its similarity reaches the threshold is at least `coverage`, whatever the encoder and the gallery. What
a better encoder gives is smaller sets. The promise is of a text and the image that it was written for, whatever else
counts as a match. An image with several texts is more often covered by one of them, which is not promised. Texts of one
image are alike, so that n of them tell less than n of different images. Source: Angelopoulos and Bates, Conformal
Prediction, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastprob.data.pairs import Paired, check_paired
from fastprob.evaluation.retrieval import products

COVERAGES = (0.8, 0.9, 0.95)  # that are promised where nothing else is asked for
_ROWS = 65536
_SLACK = 1e-9  # of (n + 1) (1 - coverage): 10 (1 - 0.9) is less than 1 in floats


EXPLANATION = """\
A set has every item whose cosine with the query is at least a threshold, which calibrate chose so that a new pair like
its own, a text and the image that it was written for, reaches it as often as promised. What texts had, on these pairs,
differs from that by chance; where it is far less, these pairs are not like those. To images, which have one of their
texts or more in their set, nothing was promised. Sizes are means: of two encoders the one of smaller sets is better."""
HEADER = ("promised", "texts had", "mean size", "images had", "mean size")


@dataclass(frozen=True)
class Sets:
    """Of the retrieval sets of one direction: share of the queries whose set holds their own item, and mean size."""

    covered: float
    size: float


def table_rows(sets: Mapping[float, Mapping[str, Sets]]) -> list[tuple[str, ...]]:
    """What stands under `HEADER`, of promised coverage -> what `retrieval_sets` found."""

    def cells(of: Sets) -> tuple[str, str]:
        return f"{of.covered:.3f}", f"{of.size:.1f}"

    return [(f"{coverage:g}", *cells(of["text"]), *cells(of["image"])) for coverage, of in sets.items()]


def conformal_threshold(data: Paired, coverage: float) -> float:
    """The least similarity of an item of a set, from known pairs, a caption with its image each.

    Raises ValueError for unusable pairs, a coverage outside of (0, 1), or fewer pairs than it asks for.
    """
    check_paired("conformal_threshold", data)
    if not 0 < coverage < 1:
        raise ValueError(f"conformal_threshold: coverage must be between 0 and 1, got {coverage}")
    pairs, fewest = len(data.text), fewest_pairs(coverage)
    if pairs < fewest:
        raise ValueError(f"conformal_threshold: a coverage of {coverage} needs {fewest} pairs or more, got {pairs}")
    return float(own_similarity(data).kthvalue(math.floor((pairs + 1) * (1 - coverage) + _SLACK)).values)


def fewest_pairs(coverage: float) -> int:
    """The pairs that a promise of this coverage, in (0, 1), takes: the least n with (n + 1) (1 - coverage) >= 1."""
    return math.ceil((1 - _SLACK) / (1 - coverage)) - 1


def own_similarity(data: Paired) -> Tensor:
    """Cosine of each text and its image, [M]."""
    rows = torch.arange(len(data.text)).split(_ROWS)
    return torch.cat([cosine_similarity(data.text[some], data.image[data.caption_image[some]]) for some in rows])


def retrieval_sets(data: Paired, threshold: float) -> dict[str, Sets]:
    """What sets of this threshold hold: of the texts' images ("text") and of the images' texts ("image").

    A text is covered by its image, an image by one of its texts or more.
    """
    return sets_by_threshold(data, [threshold])[0]


def sets_by_threshold(data: Paired, thresholds: Sequence[float]) -> list[dict[str, Sets]]:
    """`retrieval_sets` of each threshold, over one product of all pairs."""
    similarity, pairs = own_similarity(data).cpu(), [0] * len(thresholds)
    for block, _ in products(data.text, data.image, "sets"):
        pairs = [so_far + int((block >= least).sum()) for so_far, least in zip(pairs, thresholds)]
    return [_sets(data, similarity >= least, count) for least, count in zip(thresholds, pairs)]


def _sets(data: Paired, own: Tensor, pairs: int) -> dict[str, Sets]:
    """Of texts that have their image in their set or not, [M], and the number of all pairs within a set."""
    of_image = torch.zeros(len(data.image), dtype=torch.bool).index_put_((data.caption_image.cpu()[own],), own[own])
    return {
        "text": Sets(float(own.double().mean()), pairs / len(data.text)),
        "image": Sets(float(of_image.double().mean()), pairs / len(data.image)),
    }
