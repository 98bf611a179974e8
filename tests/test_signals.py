"""Signals against their formulas over the whole matrix of similarities, in blocks of several sizes."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from fastprob.adapters import PairedEmbeddings
from fastprob.evaluation import retrieval
from fastprob.evaluation.signals import FACTORS, TEMPERATURES, fit_temperature, signals

T = 0.1


def rows(count, seed):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def expected(similar):
    """By name, of a matrix [Q, G]."""
    queries, items = similar.shape
    ordered, order = similar.sort(1, descending=True)
    best, top = ordered[:, 0], order[:, 0]
    found = {"distance": 1 - best, "mean": similar.mean(1), "deviation": similar.std(1, correction=0)}
    found |= {f"margin_{k}": ordered[:, min(k, items) - 1] - best for k in (2, 5, 10)}
    found["z"] = (found["mean"] - best) / found["deviation"]
    for factor in FACTORS:
        own, its = (similar / (factor * T)).log_softmax(1), (similar / (factor * T)).log_softmax(0)
        found[f"entropy_{factor:g}"] = -(own.exp() * own).sum(1) / math.log(items)
        found[f"doubt_{factor:g}"] = -own.gather(1, top[:, None])[:, 0] - math.log(items)
        found[f"reverse_{factor:g}"] = -its.gather(1, top[:, None])[:, 0] - math.log(queries)
        both = -(own + its) - math.log(items) - math.log(queries)
        found[f"mutual_{factor:g}"] = both.gather(1, order[:, :10]).amin(1)
    closest = similar.amax(0)[top]
    found["hubness"] = (torch.bincount(top, minlength=items)[top] * items / queries).log()
    found |= {"rival": closest - best, "best": closest, "popularity": similar.mean(0)[top]}
    return found | {"gallery": torch.full((queries,), math.log(items))}, order[:, :10]


@pytest.mark.parametrize("block", [(1, 3), (7, 5), (50, 11), (2048, 4096)])
@pytest.mark.parametrize("sizes", [(23, 31), (40, 4)])
def test_signals_are_their_formulas(monkeypatch, block, sizes):
    monkeypatch.setattr(retrieval, "_ROWS", block[0])
    monkeypatch.setattr(retrieval, "_COLUMNS", block[1])
    query, gallery = rows(sizes[0], 0), rows(sizes[1], 1)
    similar = normalize(query.double(), dim=1) @ normalize(gallery.double(), dim=1).T
    for got, matrix in zip(signals(query, gallery, T), (similar, similar.T)):
        values, items = expected(matrix)
        assert got.values.keys() == values.keys() and got.items.equal(items)
        for name, value in values.items():
            assert got.values[name].tolist() == pytest.approx(value.tolist(), abs=2e-5, rel=2e-5), name


def test_a_low_temperature_neither_overflows_nor_vanishes():
    query, gallery = rows(5, 0), rows(8, 1)
    for side in signals(query, gallery, 1e-4):
        assert all(value.isfinite().all() for value in side.values.values())


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_the_temperature_is_the_most_likely_of_the_pairs(monkeypatch, noise):
    monkeypatch.setattr(retrieval, "_ROWS", 7)
    monkeypatch.setattr(retrieval, "_COLUMNS", 5)
    image, owner = rows(20, 0), torch.arange(40) % 20
    text = image[owner] + noise * rows(40, 1)
    similar = normalize(text.double(), dim=1) @ normalize(image.double(), dim=1).T

    def nll(temperature):
        return -sum((similar / temperature).log_softmax(axis)[torch.arange(40), owner].mean() for axis in (0, 1))

    assert fit_temperature(PairedEmbeddings(image, text, owner)) == min(TEMPERATURES, key=nll)


def test_rows_of_signals():
    got, _ = signals(rows(6, 0), rows(5, 1), T)
    some = got.rows(torch.tensor([4, 4, 0]))
    assert some.items.equal(got.items[[4, 4, 0]]) and some.values["z"].equal(got.values["z"][[4, 4, 0]])
