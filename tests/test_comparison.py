"""Scores side by side: the better one first, a random one among them, calibration for probabilities alone."""

import math

import pytest
import torch
from sklearn.metrics import log_loss

from fastprob.evaluation.comparison import compare
from fastprob.evaluation.selective import aurc, auroc


def test_scores_side_by_side():
    generator = torch.Generator().manual_seed(5)
    p = torch.rand(2000, generator=generator)
    wrong = torch.rand(2000, generator=generator) < p
    got = compare({"p": p, "inverted": -p, "half": p / 2}, wrong, torch.arange(2000), probabilities=("p", "half"))
    assert got.error == pytest.approx(float(wrong.double().mean())) and got.best in ("p", "half")
    for name, score in (("p", p), ("inverted", -p)):
        one = got.scores[name]
        assert (one.aurc.value, one.auroc.value) == (aurc(score, wrong), auroc(score, wrong))
        assert one.aurc.low < one.aurc.value < one.aurc.high and one.auroc.low < one.auroc.value < one.auroc.high
    assert got.scores["inverted"].auroc.high < 0.5 < got.scores["p"].auroc.low
    assert got.scores["random"].aurc.low < got.error < got.scores["random"].aurc.high
    assert got.scores["p"].ece < 0.05 < 0.2 < got.scores["half"].ece and got.scores["inverted"].ece is None
    for name, score in (("p", p), ("half", p / 2)):
        assert got.scores[name].nll == pytest.approx(log_loss(wrong, score.double()), rel=1e-12)
    assert got.scores["p"].nll < got.scores["half"].nll and got.scores["inverted"].nll is None
    lines = got.table().splitlines()
    assert lines[-1].startswith("inverted") and lines[1].startswith(("p ", "half"))
    assert f"{got.scores['p'].aurc}" in got.table() and "AUROC" in lines[0]
    columns = {line.split()[0]: line.split()[-1] for line in lines[1:]}
    assert lines[0].endswith("NLL") and columns["half"] == f"{got.scores['half'].nll:.3f}"
    assert columns["inverted"].endswith("]") and columns["random"].endswith("]")  # no probabilities, no likelihood


def test_a_certainty_that_was_refuted_is_finite():
    """A query costs 100 nats at most: the second and the last were certain of the opposite, the third nearly."""
    p = torch.tensor([0, 0, math.exp(-200), 0.5, 1, 1], dtype=torch.float64)
    wrong = torch.tensor([False, True, True, True, True, False])
    got = compare({"p": p}, wrong, torch.arange(6), probabilities=("p",)).scores["p"]
    assert got.nll == pytest.approx((100 + 100 + math.log(2) + 100) / 6, rel=1e-12)


@pytest.mark.parametrize("bad", [-0.1, 1.5])
def test_what_is_no_probability_is_named(bad):
    score, wrong = torch.tensor([0.2, bad, 0.6]), torch.tensor([True, False, True])
    with pytest.raises(ValueError, match=rf"compare: p must be probabilities, from 0 to 1, got .*{bad}"):
        compare({"p": score}, wrong, torch.arange(3), probabilities=("p",))
    assert compare({"p": score}, wrong, torch.arange(3)).scores["p"].nll is None


def test_queries_of_a_group_widen_the_interval():
    generator = torch.Generator().manual_seed(0)
    score, wrong = torch.rand(40, generator=generator), torch.rand(40, generator=generator) < 0.5
    ten = [rows.repeat_interleave(10) for rows in (score, wrong)]
    apart, together = (
        compare({"s": ten[0]}, ten[1], group).scores["s"].aurc for group in (torch.arange(400), torch.arange(400) // 10)
    )
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_all_right_has_no_auroc():
    got = compare({"s": torch.arange(5.0)}, torch.zeros(5, dtype=torch.bool), torch.arange(5)).scores["s"]
    assert got.aurc.value == 0 and math.isnan(got.auroc.value)
