"""Conformal sets: the coverage that is promised is had on new pairs, and sizes are counts."""

import pytest
import torch
from torch.nn.functional import normalize

from fastprob.adapters import PairedEmbeddings
from fastprob.evaluation.conformal import conformal_threshold, fewest_pairs, retrieval_sets, sets_by_threshold


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


@pytest.mark.parametrize(("coverage", "fewest"), [(0.8, 4), (0.9, 9), (0.95, 19), (0.5, 1), (0.99, 99)])
def test_the_fewest_pairs_are_enough(coverage, fewest):
    """(n + 1) (1 - coverage) is 1: floats that are less than that lose no pair, and its threshold is the smallest."""
    data = pairs(fewest, 0)
    assert fewest_pairs(coverage) == fewest
    assert conformal_threshold(data, coverage) == pytest.approx(float(cosines(data).diagonal().min()), abs=1e-6)
    if fewest > 1:
        with pytest.raises(ValueError, match=f"needs {fewest} pairs or more, got {fewest - 1}"):
            conformal_threshold(pairs(fewest - 1, 0), coverage)


def cosines(data):
    return normalize(data.text.double(), dim=1) @ normalize(data.image.double(), dim=1).T


def test_several_thresholds_are_counted_at_once(monkeypatch):
    monkeypatch.setattr("fastprob.evaluation.retrieval._ROWS", 64)
    monkeypatch.setattr("fastprob.evaluation.retrieval._COLUMNS", 48)
    data, thresholds = pairs(150, 0, texts_of=2), (0.7, -0.2, 0.4)
    cosine, owner = cosines(data), data.caption_image
    for got, least in zip(sets_by_threshold(data, thresholds), thresholds, strict=True):
        within, own = cosine >= least, cosine[torch.arange(300), owner] >= least
        images = len(owner[own].unique())
        assert got["text"].covered == float(own.double().mean()) and got["image"].covered == images / 150
        assert (got["text"].size, got["image"].size) == (int(within.sum()) / 300, int(within.sum()) / 150)
        assert retrieval_sets(data, least) == got
    assert sets_by_threshold(data, ()) == []
