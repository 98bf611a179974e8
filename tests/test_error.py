"""The probability of a wrong first match: its formula, its calibration at several sizes of gallery, its file."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from fastprob._files import read_tensors, write_tensors
from fastprob.adapters import PairedEmbeddings, ProbVLM
from fastprob.adapters.error import FILE, SIDES, ErrorModels, beside, fit_error, store_signals, variances
from fastprob.evaluation.calibration import expected_calibration_error
from fastprob.evaluation.error import C, fit_error_model
from fastprob.evaluation.retrieval import find_matches
from fastprob.evaluation.selective import aurc


def pairs(images, seed, texts_of=2, dim=8):
    """Images, and texts that are as far from theirs as a length of 0 to 1.5 says."""
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(images, dim, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(texts_of)
    noise = torch.randn(len(owner), dim, generator=generator) / dim**0.5
    return PairedEmbeddings(image, image[owner] + 1.5 * torch.rand(len(owner), 1, generator=generator) * noise, owner)


def wrong_of(data, truth=None):
    match = (torch.arange(len(data.image)), data.caption_image) if truth is None else truth.T
    return {side: found.rank > 0 for side, found in zip(SIDES, find_matches(data.image, data.text, match))}


@pytest.fixture(scope="module")
def fitted():
    return fit_error(pairs(300, 0))


def test_the_model_is_a_logistic_one_of_standardised_signals():
    generator = torch.Generator().manual_seed(0)
    values = {"a": 5 + 3 * torch.randn(4000, generator=generator), "b": torch.randn(4000, generator=generator)}
    wrong = torch.rand(4000, generator=generator) < torch.sigmoid(2 * values["a"] - 11)
    model = fit_error_model(values, wrong, torch.arange(4000))
    slopes = model.weight / model.deviation
    assert slopes.tolist() == pytest.approx([2, 0], abs=0.2)  # the L2 penalty alone leaves 1.5
    assert float(model.bias - slopes @ model.mean) == pytest.approx(-11, rel=0.1)
    assert model.names == ("a", "b")


def test_what_the_weights_learn_by_heart_is_scaled_down():
    """120 signals of noise, 160 queries: a logistic model alone is sure, and no better than chance on others."""
    generator = torch.Generator().manual_seed(0)
    values = {str(i): torch.randn(160, generator=generator) for i in range(120)}
    wrong = torch.rand(160, generator=generator) < 0.5
    sure = LogisticRegression(C=C).fit(np.stack([v.numpy() for v in values.values()], 1), wrong.numpy())
    spread = float(fit_error_model(values, wrong, torch.arange(160))(values).std())
    assert spread < 0.5 * sure.predict_proba(np.stack([v.numpy() for v in values.values()], 1))[:, 1].std()


def test_queries_of_a_group_share_a_fold():
    """Every query ten times: with copies in other folds, noise learnt by heart would seem to hold."""
    generator = torch.Generator().manual_seed(0)
    values = {str(i): torch.randn(100, generator=generator).repeat(10) for i in range(80)}
    wrong, group = (torch.rand(100, generator=generator) < 0.5).repeat(10), torch.arange(100).repeat(10)
    together, apart = (fit_error_model(values, wrong, each) for each in (group, torch.arange(1000)))
    assert together(values).std() < 0.5 * apart(values).std()


@pytest.mark.parametrize("images", [100, 300, 900])
@pytest.mark.parametrize("side", SIDES)
def test_calibrated_on_new_pairs_at_other_sizes_of_gallery(fitted, images, side):
    data = pairs(images, 1)
    wrong, p = wrong_of(data)[side], fitted(data)[side]
    assert 0.05 < wrong.double().mean() < 0.95
    assert expected_calibration_error(p, wrong, bins=8) < 0.09
    assert float(p.mean()) == pytest.approx(float(wrong.double().mean()), abs=0.07)
    values = store_signals(data, fitted.temperature)[side].values
    assert aurc(p, wrong) < min(aurc(values["distance"], wrong), aurc(values["margin_2"], wrong))


def test_truth_decides_what_is_wrong():
    """With every image's neighbour true as well, the first match is right more often, and p says so."""
    data, new = pairs(200, 0), pairs(200, 1)

    def truth(some):
        return some.caption_image[:, None] // 20 == torch.arange(len(some.image)) // 20

    own, true = fit_error(data)(new), fit_error(data, match=truth(data).T)(new)
    ids = torch.arange(200) // 20
    assert fit_error(data, match=(ids, ids[data.caption_image]))(new)["text"].equal(true["text"])
    for side in SIDES:
        expected = wrong_of(new, truth(new))[side].double().mean()
        assert (
            float(true[side].mean()) == pytest.approx(float(expected), abs=0.08)
            and true[side].mean() < own[side].mean()
        )


def test_texts_of_the_same_words_are_one():
    data = pairs(30, 0)
    captions = [f"text {i % 50}" for i in range(60)]
    twice = data.text.clone()
    twice[50:] = twice[:10]
    same = PairedEmbeddings(data.image, twice, data.caption_image)
    found = store_signals(same, 0.1, captions)
    alone = store_signals(same, 0.1)
    once = store_signals(PairedEmbeddings(data.image, twice[:50], torch.arange(50) % 30), 0.1)
    for name, value in once["text"].values.items():
        assert found["text"].values[name].tolist() == torch.cat([value, value[:10]]).tolist(), name
    assert found["image"].values["margin_2"].equal(once["image"].values["margin_2"])
    assert not found["image"].values["margin_2"].equal(alone["image"].values["margin_2"])
    assert found["image"].items.max() < 50


def test_an_adapter_adds_the_variances_of_the_query_and_of_its_match():
    torch.manual_seed(0)
    data, adapter = pairs(100, 0), ProbVLM(8, hidden=6).eval()
    known = variances(adapter, data, passes=4)
    found = store_signals(data, 0.1, known=known)
    for side, other in zip(SIDES, SIDES[::-1]):
        for kind in ("aleatoric", "epistemic"):
            first = found[side].items[:, 0]
            assert found[side].values[kind].exp().tolist() == pytest.approx(known[side][kind].tolist())
            assert found[side].values[f"match_{kind}"].exp().tolist() == pytest.approx(
                known[other][kind][first].tolist()
            )
    model = fit_error(data, adapter=adapter, passes=4)
    assert "match_epistemic" in model.text.names and model.passes == 4
    assert "epistemic" not in fit_error(data, adapter=adapter, passes=0).text.names
    with pytest.raises(ValueError, match="adapter must be the one that it was fitted with"):
        model(data)
    assert model(data, adapter=adapter)["text"].shape == (200,)


VARIANCES = """
import pathlib, sys, torch
from fastprob.adapters import PairedEmbeddings, ProbVLM
from fastprob.adapters import error
error.ROWS = 64
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # KiB
adapter, rows = ProbVLM(256, hidden=4), torch.randn(40000, 256)
data = PairedEmbeddings(rows[:64], rows, torch.arange(40000) % 64)
error.variances(adapter, PairedEmbeddings(rows[:64], rows[:64], torch.arange(64)), 0)
before = peak()
error.variances(adapter, data, 0)
print(peak() - before)
"""


def test_variances_are_held_a_block_at_a_time():
    """Less than one of the four [M, D] tensors that a prediction of all rows has."""
    run = subprocess.run([sys.executable, "-c", VARIANCES], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40000 * 256 * 4 / 1024


def test_an_adapter_is_known_by_its_weights():
    torch.manual_seed(0)
    data, adapter, other = pairs(100, 0), ProbVLM(8, hidden=6), ProbVLM(8, hidden=6)
    model = fit_error(data, adapter=adapter, passes=0)
    with pytest.raises(ValueError, match="must be the one that it was fitted with, got another"):
        model(data, adapter=other)
    other.load_state_dict(adapter.state_dict())
    assert model(data, adapter=other)["text"].equal(model(data, adapter=adapter)["text"])


@pytest.mark.parametrize("side", SIDES)
def test_one_query_is_as_among_all(fitted, side):
    """A row of the store is not held against itself; the texts of the same words are one."""
    data, captions = pairs(60, 3), [f"text {i}" for i in range(120)]
    every = fitted(data, captions=captions)[side]
    for row in (0, 7, 59):
        got = fitted.of_query(getattr(data, side)[row], side, data, captions=captions)
        assert got == pytest.approx(float(every[row]), abs=1e-4)


def test_a_query_is_held_against_some_of_many(fitted, monkeypatch):
    data = pairs(60, 3)
    every = fitted(data)["text"]
    monkeypatch.setattr("fastprob.adapters.error._OTHERS", 40)
    few = torch.tensor([fitted.of_query(data.text[row], "text", data) for row in range(0, 120, 5)])
    assert not torch.allclose(few.double(), every[::5], atol=1e-3) and (few - every[::5]).abs().mean() < 0.15


def test_saved_and_loaded(fitted, tmp_path):
    fitted.save(tmp_path / FILE)
    fitted.save(tmp_path / "again")
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "again").read_bytes()
    loaded, data = beside(tmp_path / "best.safetensors"), pairs(20, 2)
    assert beside(tmp_path).rule == loaded.rule == "own"
    assert all(loaded(data)[side].equal(fitted(data)[side]) for side in SIDES)
    assert beside(tmp_path / "elsewhere" / "best.safetensors") is None
    ProbVLM(8, hidden=4).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="must be what `save` writes"):
        ErrorModels.load(tmp_path / "adapter")


def test_thresholds_of_conformal_sets(fitted, tmp_path):
    """Of 600 pairs the floor(601 (1 - c))-th smallest cosine; of 18 no promise of 0.95 can be kept, which takes 19."""
    data = pairs(300, 0)
    own = sorted((normalize(data.text, dim=1) * normalize(data.image, dim=1)[data.caption_image]).sum(1).tolist())
    assert fitted.conformal == pytest.approx({0.8: own[119], 0.9: own[59], 0.95: own[29]}, abs=1e-6)
    assert list(fit_error(pairs(9, 2, dim=2)).conformal) == [0.8, 0.9]
    truth = data.caption_image[:, None] // 20 == torch.arange(300) // 20
    assert fit_error(data, match=truth.T, rule="true").conformal == fitted.conformal  # own pairs, whatever the rule
    fitted.save(tmp_path / FILE)
    assert beside(tmp_path).conformal == fitted.conformal


def test_files_from_before_have_no_thresholds(fitted, tmp_path):
    fitted.save(tmp_path / FILE)
    tensors, metadata = read_tensors("test", tmp_path / FILE)
    about = json.loads(metadata["error"])
    before = {name: value for name, value in about.items() if name != "conformal"}
    write_tensors(tmp_path / FILE, tensors, {"error": json.dumps(before)})
    loaded, data = beside(tmp_path), pairs(20, 2)
    assert loaded.conformal == {} and loaded(data)["text"].equal(fitted(data)["text"])
    for damaged in (3, [[0.8]], [["most", 0.1]]):
        write_tensors(tmp_path / FILE, tensors, {"error": json.dumps(about | {"conformal": damaged})})
        with pytest.raises(ValueError, match="must be what `save` writes"):
            beside(tmp_path)


def test_what_can_not_be_fitted_is_named(fitted):
    data = pairs(12, 0)
    exact = PairedEmbeddings(data.image, data.image[data.caption_image], data.caption_image)
    with pytest.raises(ValueError, match="wrong queries must be of 5 groups or more, got"):
        fit_error(exact)
    with pytest.raises(ValueError, match=r"match must be bool \[12, 24\], got torch.float32"):
        fit_error(data, match=torch.ones(12, 24))
    with pytest.raises(ValueError, match="a must be finite, 1 values are not"):
        fit_error_model({"a": torch.tensor([0.0, math.nan])}, torch.tensor([True, False]), torch.arange(2))
    with pytest.raises(ValueError, match="signals must have"):
        fitted.text({"distance": torch.zeros(3)})
