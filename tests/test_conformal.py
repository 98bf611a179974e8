"""Conformal sets: the coverage that is promised is had on new pairs, and sizes are counts."""

import pytest
import torch
from torch.nn.functional import normalize

from fastprob.adapters import PairedEmbeddings
from fastprob.evaluation.conformal import conformal_threshold, retrieval_sets


def pairs(images, seed, texts_of=1):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, 8, generator=generator)
    owner = torch.arange(images * texts_of) % images
    return PairedEmbeddings(image, image[owner] + torch.randn(len(owner), 8, generator=generator), owner)


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
def test_the_coverage_promised_is_had(coverage):
    had = [
        retrieval_sets(pairs(200, 2 * seed + 1), conformal_threshold(pairs(99, 2 * seed), coverage))["text"].covered
        for seed in range(200)
    ]
    assert sum(had) / 200 == pytest.approx(coverage, abs=0.012)


def test_sizes_and_coverage_of_a_known_case():
    image = torch.eye(3)
    text = normalize(torch.tensor([[1.0, 0, 0], [1.0, 0.9, 0], [0, 0, 1], [1, 0, 0.2]]), dim=1)
    data = PairedEmbeddings(image, text, torch.tensor([0, 1, 2, 2]))
    got = retrieval_sets(data, 0.6)
    assert (got["text"].covered, got["text"].size) == (0.75, 5 / 4)  # the last is its image's no more
    assert (got["image"].covered, got["image"].size) == (1.0, 5 / 3)
    assert retrieval_sets(data, 0.7)["image"].covered == pytest.approx(2 / 3)
    least = conformal_threshold(data, 0.8)  # floor(5 * 0.2) = 1: the smallest of four
    assert least == pytest.approx(0.2 / 1.04**0.5) and retrieval_sets(data, least)["text"].covered == 1


def test_bad_input():
    with pytest.raises(ValueError, match="coverage must be between 0 and 1, got 1"):
        conformal_threshold(pairs(9, 0), 1)
    with pytest.raises(ValueError, match=r"a coverage of 0.95 needs 19 pairs or more, got 9"):
        conformal_threshold(pairs(9, 0), 0.95)
    assert conformal_threshold(pairs(19, 0), 0.95)
