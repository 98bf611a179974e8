"""Which score tells queries from outside: every AUROC by scikit-learn, of scores that the formulas give."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_error import pairs
from torch.nn.functional import normalize

from fastprob.adapters import TrainConfig, evaluate_store, fit, fit_error, predict
from fastprob.adapters import scores as module
from fastprob.adapters.error import SIDES
from fastprob.data import PairedEmbeddings, embed_arrays
from fastprob.evaluation.selective import Bootstrap, Ranked, estimate
from fastprob.evaluation.signals import signals

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = ["total uncertainty", "aleatoric", "epistemic", "1 - max cosine"]
FITTED = ["margin", "entropy", "p(wrong)"]


def elsewhere(images=35, texts_of=3):
    """Images and texts on one side of the sphere, away from most of `pairs`."""
    data = pairs(images, 9, texts_of)
    away = torch.tensor([1.5, 0, 0, 0, 0, 0, 0, 0])
    return PairedEmbeddings(data.image + away, data.text + away, data.caption_image)


def stored(data, path, **options):
    return embed_arrays(data.image, data.text, path, pairs=data.caption_image, progress=False, **options)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Of 60 images with two texts, a sixth of these twice, and of 35 images with three, called as the first are."""
    directory = tmp_path_factory.mktemp("scores")
    captions = [f"text {row % 100}" for row in range(120)]
    data = pairs(60, 1)
    data.text[100:] = data.text[:20]
    return stored(data, directory / "here", captions=captions), stored(elsewhere(), directory / "there")


@pytest.fixture(scope="module")
def adapter():
    return fit(pairs(80, 5), config=TrainConfig(epochs=3, hidden=16, batch_size=16, dropout=0.3)).model


@pytest.fixture(scope="module")
def error(adapter):
    return fit_error(pairs(100, 0), adapter=adapter, passes=4)


def queries(stores, side):
    """Rows of both stores, whether they are from outside, the distinct items that they ask for, and groups."""
    here, there = stores
    rows = torch.cat([getattr(here, side), getattr(there, side)])
    stranger = torch.arange(len(rows)) >= len(getattr(here, side))
    if side == "image":
        return rows, stranger, here.text[:100], torch.arange(95)
    group = torch.cat([torch.arange(120) % 100, 100 + torch.arange(105)])
    return rows, stranger, here.image, group


@pytest.mark.parametrize("side", SIDES)
def test_every_score_that_needs_no_fit(stores, adapter, side):
    got = evaluate_store(adapter, stores[0], outside=stores[1], passes=4, seed=3).outside
    rows, stranger, items, _ = queries(stores, side)
    cosine = normalize(rows, dim=1) @ normalize(items, dim=1).T
    predicted = predict(getattr(adapter, side), rows, passes=4, seed=3)
    expected = {
        "total uncertainty": predicted.total.mean(1),
        "aleatoric": predicted.aleatoric.mean(1),
        "epistemic": predicted.epistemic.mean(1),
        "1 - max cosine": -cosine.amax(1),
    }
    of_side = got[module.DIRECTIONS[side]]
    assert list(of_side) == [*PLAIN, "random"]
    for name, score in expected.items():
        assert of_side[name].value == pytest.approx(roc_auc_score(stranger, score), abs=1e-4), name
        assert of_side[name].low < of_side[name].value < of_side[name].high
    assert of_side["1 - max cosine"].low > of_side["random"].value
    assert of_side["random"].low < 0.5 < of_side["random"].high


@pytest.mark.parametrize("side", SIDES)
def test_what_is_fitted_and_its_signals(stores, adapter, error, side):
    got = evaluate_store(adapter, stores[0], error=error, outside=stores[1], passes=4).outside[module.DIRECTIONS[side]]
    rows, stranger, items, group = queries(stores, side)
    first = torch.tensor(
        [int((group == number).nonzero()[0]) for number in range(len(group.unique()))]
    )  # of each query
    found = signals(rows[first], items, error.temperature)[0].rows(group)
    values, other = dict(found.values), SIDES[1 - SIDES.index(side)]
    for name, of, asked in (("", side, rows), ("match_", other, items[found.items[:, 0]])):
        predicted = predict(getattr(adapter, of), asked, passes=4)
        values |= {
            f"{name}{kind}": getattr(predicted, kind).mean(1).double().log() for kind in ("aleatoric", "epistemic")
        }
    cosine = normalize(rows.double(), dim=1) @ normalize(items.double(), dim=1).T
    two, p = cosine.topk(2).values, (cosine / error.temperature).softmax(1)
    expected = {
        "1 - max cosine": -two[:, 0],
        "margin": two[:, 1] - two[:, 0],
        "entropy": -(p * p.log()).sum(1),
        "p(wrong)": getattr(error, side)(values),
    }
    assert list(got) == [*PLAIN, *FITTED, "random"]
    for name, score in expected.items():
        assert got[name].value == pytest.approx(roc_auc_score(stranger, score), abs=1e-3), name
    drawn = estimate(Ranked(expected["margin"], stranger.double()).auroc, Bootstrap(group, 400))
    assert (got["margin"].low, got["margin"].high) == pytest.approx((drawn.low, drawn.high), abs=1e-3)


def test_what_is_here_too_is_not_told(stores, adapter, error):
    """Another store of the same rows: as many are before their twins as behind, but for rounding."""
    got = evaluate_store(adapter, stores[0], error=error, outside=stores[0], passes=4).outside
    for of in got.values():
        assert all(of[name].value == pytest.approx(0.5, abs=0.02) for name in (*PLAIN, *FITTED))


def test_the_own_queries_are_judged_as_without_others(stores, adapter, error):
    alone, beside = (
        evaluate_store(adapter, stores[0], error=error, outside=outside, passes=4) for outside in (None, stores[1])
    )
    assert beside.comparisons == alone.comparisons and alone.outside == {} and alone.outside_source is None
    assert beside.outside_source == stores[1].metadata["source"]


@pytest.mark.parametrize("fitted", [False, True])
def test_one_query_from_outside(stores, adapter, error, tmp_path, fitted):
    data = elsewhere()
    one = stored(PairedEmbeddings(data.image[:1], data.text[:1], torch.zeros(1, dtype=torch.int64)), tmp_path / "one")
    got = evaluate_store(adapter, stores[0], error=error if fitted else None, outside=one, passes=4).outside
    for side, items in (("image", stores[0].text), ("text", stores[0].image)):
        distance = 1 - (getattr(stores[0], side) @ items.T).amax(1)
        its = 1 - (getattr(one, side) @ items.T).amax()
        value = got[module.DIRECTIONS[side]]["1 - max cosine"]
        assert value.value == pytest.approx(float((distance < its).double().mean()), abs=0.02)
        assert value.low <= value.value <= value.high


def test_an_infinite_variance_is_the_greatest(stores, adapter, monkeypatch):
    def one_is_infinite(model, store, passes, seed):
        known = given(model, store, passes, seed)
        known["text"]["aleatoric"][7] = math.inf
        return known

    given = module.variances
    monkeypatch.setattr(module, "variances", one_is_infinite)
    got = evaluate_store(adapter, stores[0], outside=stores[1], passes=0).outside["text -> image"]
    rows, stranger, _, _ = queries(stores, "text")
    aleatoric = predict(adapter.text, rows).aleatoric.mean(1)
    aleatoric[127] = 1e9
    assert got["aleatoric"].value == pytest.approx(roc_auc_score(stranger, aleatoric), abs=1e-4)
    assert got["total uncertainty"] == got["aleatoric"] and "epistemic" not in got


def test_another_encoder_is_refused(stores, adapter, tmp_path):
    wide = pairs(20, 0, dim=12)
    with pytest.raises(ValueError, match=f"takes dimension 8, {tmp_path}/wide has 12"):
        evaluate_store(adapter, stores[0], outside=stored(wide, tmp_path / "wide"))
    first, second = (stored(pairs(20, 0), tmp_path / name, encoder_name=name) for name in ("first", "second"))
    with pytest.raises(ValueError, match=f"{tmp_path}/first and {tmp_path}/second are of different encoders"):
        evaluate_store(adapter, first, outside=second)
    assert evaluate_store(adapter, first, outside=stores[1], passes=0).outside  # of no name: nothing is known
