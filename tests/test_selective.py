"""Selective prediction against sums over single queries, scikit-learn and repeated queries."""

import itertools
import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from fastprob.evaluation import selective
from fastprob.evaluation.selective import Bootstrap, Estimate, Ranked, aurc, auroc, estimate, same

SCORE, WRONG = torch.tensor([0.3, 0.1, 0.3, 0.9]), torch.tensor([1.0, 0, 0, 1])


def in_order(wrong):
    """AURC of queries in this order, each answered little by little."""
    shares = torch.arange(1, 4001, dtype=torch.float64) / 4000
    done = torch.zeros(0, dtype=torch.float64)
    for place in range(len(wrong)):
        done = torch.cat([done, (sum(wrong[:place]) + shares * wrong[place]) / (place + shares)])
    return float(done.mean())


def test_aurc_is_the_mean_over_the_orders_of_equal_scores():
    orders = [(1, 0, 2, 3), (1, 2, 0, 3)]
    expected = sum(in_order([float(WRONG[i]) for i in order]) for order in orders) / 2
    assert aurc(SCORE, WRONG) == pytest.approx(expected, abs=1e-3)
    assert aurc(torch.zeros(4), WRONG) == pytest.approx(0.5)
    everything = [in_order([float(WRONG[i]) for i in order]) for order in itertools.permutations(range(4))]
    assert aurc(WRONG, WRONG) == pytest.approx(min(everything), abs=1e-3)
    assert aurc(-WRONG, WRONG) == pytest.approx(max(everything), abs=1e-3)


def test_the_curve_ends_at_the_error_rate():
    coverage, risk = Ranked(SCORE, WRONG).curve()
    assert coverage.tolist() == [0.25, 0.75, 1.0] and risk.tolist() == [0.0, pytest.approx(1 / 3), 0.5]
    assert Ranked(SCORE, WRONG).accuracy().item() == 0.5


def test_auroc_against_sklearn_with_ties_and_weights():
    generator = torch.Generator().manual_seed(0)
    score, wrong = torch.randint(9, (200,), generator=generator), torch.rand(200, generator=generator) < 0.3
    weight = torch.randint(4, (3, 200), generator=generator).double()
    expected = [roc_auc_score(wrong, score, sample_weight=row) for row in weight]
    assert Ranked(score, wrong).auroc(weight).tolist() == pytest.approx(expected)
    assert auroc(score, wrong) == pytest.approx(roc_auc_score(wrong, score))
    assert math.isnan(auroc(score, torch.ones(200)))


def test_gain_is_one_at_best_and_zero_of_a_constant():
    wrong = (torch.arange(50) % 3 == 0).double()
    assert Ranked(wrong, wrong).gain().item() == pytest.approx(1)
    assert Ranked(torch.zeros(50), wrong).gain().item() == pytest.approx(0, abs=1e-12)
    assert Ranked(-wrong, wrong).gain().item() < -0.5
    assert math.isnan(Ranked(torch.arange(5), torch.ones(5)).gain().item())


@pytest.mark.parametrize("measure", ["aurc", "auroc", "gain", "accuracy"])
def test_a_weight_stands_for_so_many_queries(measure):
    generator = torch.Generator().manual_seed(0)
    score, wrong = torch.rand(9, generator=generator), torch.randint(2, (9,), generator=generator).double()
    count = torch.randint(3, (9,), generator=generator)
    repeated = Ranked(*(rows.repeat_interleave(count) for rows in (score, wrong)))
    got = getattr(Ranked(score, wrong), measure)(count[None].double())
    assert got.item() == pytest.approx(getattr(repeated, measure)().item())


def test_a_bootstrap_draws_groups_and_does_not_depend_on_its_blocks(monkeypatch):
    group = torch.tensor([0, 1, 0, 2])
    drawn = torch.cat(list(Bootstrap(group, draws=50, seed=3)))
    assert drawn.shape == (50, 4) and drawn[:, 0].equal(drawn[:, 2])
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all() and drawn[:, 1].unique().numel() > 2
    monkeypatch.setattr(selective, "_WEIGHTS", 12)
    assert torch.cat(list(Bootstrap(group, draws=50, seed=3))).equal(drawn)
    assert not torch.cat(list(Bootstrap(group, draws=50, seed=4))).equal(drawn)


def test_an_interval_is_as_wide_as_the_binomial_says():
    wrong = (torch.arange(400) % 5 == 0).double()
    got = estimate(Ranked(torch.zeros(400), wrong).accuracy, Bootstrap(400, draws=2000))
    wide = 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert got.value == pytest.approx(0.8) and got.high - got.low == pytest.approx(2 * wide, rel=0.1)
    assert (got.low + got.high) / 2 == pytest.approx(0.8, abs=0.01)
    four = estimate(Ranked(torch.zeros(400), wrong).accuracy, Bootstrap(torch.arange(400) // 20, draws=2000))
    assert four.low == four.high == four.value  # every group has the same share of wrong ones
    assert str(Estimate(0.1234, 0, 1)) == "0.123 [0.000, 1.000]"


def test_equal_values_are_one_group():
    assert same(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(
    ("score", "wrong", "message"),
    [
        (torch.zeros(3), torch.zeros(4), "must both be"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "must both be"),
        (torch.zeros(0), torch.zeros(0), "must both be"),
        (torch.tensor([0, math.nan]), torch.zeros(2), "must be finite"),
        (torch.zeros(2), torch.tensor([0, math.inf]), "must be finite"),
    ],
)
def test_bad_input(score, wrong, message):
    with pytest.raises(ValueError, match=message):
        Ranked(score, wrong)
