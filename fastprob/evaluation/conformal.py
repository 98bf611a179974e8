"""Conformal retrieval: sets of gallery items that hold a query's own one as often as promised.

A set has all items whose cosine similarity with the query is at least a threshold. The threshold is the k-th smallest
similarity of n known pairs, with k = floor((n + 1) (1 - coverage)): for a new pair that is exchangeable with them the
probability that its similarity reaches the threshold is at least `coverage`, whatever the encoder and the gallery. What
a better encoder gives is smaller sets. Source: Angelopoulos and Bates, Conformal Prediction, 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastprob.data.pairs import Paired, check_paired
from fastprob.evaluation.retrieval import products

_ROWS = 65536


@dataclass(frozen=True)
class Sets:
    """Of the retrieval sets of one direction: share of the queries whose set holds their own item, and mean size."""

    covered: float
    size: float


def conformal_threshold(data: Paired, coverage: float) -> float:
    """The least similarity of an item of a set, from known pairs, a caption with its image each.

    Raises ValueError for unusable pairs, a coverage outside of (0, 1), or fewer pairs than it asks for.
    """
    check_paired("conformal_threshold", data)
    if not 0 < coverage < 1:
        raise ValueError(f"conformal_threshold: coverage must be between 0 and 1, got {coverage}")
    place = math.floor((len(data.text) + 1) * (1 - coverage) + 1e-9)
    if not place:
        raise ValueError(
            f"conformal_threshold: a coverage of {coverage} needs {math.ceil(1 / (1 - coverage)) - 1} pairs or more, "
            f"got {len(data.text)}"
        )
    return float(own_similarity(data).kthvalue(place).values)


def own_similarity(data: Paired) -> Tensor:
    """Cosine of each text and its image, [M]."""
    rows = torch.arange(len(data.text)).split(_ROWS)
    return torch.cat([cosine_similarity(data.text[some], data.image[data.caption_image[some]]) for some in rows])


def retrieval_sets(data: Paired, threshold: float) -> dict[str, Sets]:
    """What sets of this threshold hold: of the texts' images ("text") and of the images' texts ("image").

    A text is covered by its image, an image by one of its texts or more.
    """
    own = own_similarity(data).cpu() >= threshold
    of_image = torch.zeros(len(data.image), dtype=torch.bool).index_put_((data.caption_image.cpu()[own],), own[own])
    pairs = sum(int((similarity >= threshold).sum()) for similarity, _ in products(data.text, data.image, "sets"))
    return {
        "text": Sets(float(own.double().mean()), pairs / len(data.text)),
        "image": Sets(float(of_image.double().mean()), pairs / len(data.image)),
    }
