"""`fastprob calibrate`, and what eval, predict and rank make of it, on arrays as people have them."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from test_cli import fail, succeed
from test_error import pairs, wrong_of

from fastprob.adapters import ProbVLM
from fastprob.adapters.error import SIDES, ErrorModels
from fastprob.data import EmbeddingStore, embed_arrays

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Stores val and test of 80 images with two texts each, and an adapter of a few epochs in run/."""
    directory = tmp_path_factory.mktemp("calibrate")
    for seed, name in enumerate(("train", "val", "test")):
        data = pairs(80, seed)
        embed_arrays(data.image, data.text, directory / name, pairs=data.caption_image, progress=False)
    options = ("--epochs", 3, "--hidden", 8, "--batch-size", 32)
    succeed("fit", "--store", directory / "train", "--out", directory / "run", *options)
    return directory


@pytest.fixture(scope="module")
def calibrated(there):
    succeed("calibrate", "--store", there / "val", "--checkpoint", there / "run")
    return there


def of(directory, name="test", run="run"):
    return "--store", directory / name, "--checkpoint", directory / run


def expected(directory):
    store = EmbeddingStore(directory / "test")
    model, adapter = (
        ErrorModels.load(directory / "run/error.safetensors"),
        ProbVLM.load(directory / "run/best.safetensors"),
    )
    return store, model(store, captions=store.captions, adapter=adapter)


def test_eval_judges_it_beside_its_signals(calibrated, tmp_path, capsys):
    succeed("eval", *of(calibrated), "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())["comparisons"]
    store, _ = expected(calibrated)
    assert list(report) == ["image -> text, own", "text -> image, own"]
    for side, one in zip(SIDES, report.values()):
        names = {
            "total uncertainty",
            "aleatoric",
            "epistemic",
            "1 - max cosine",
            "margin",
            "entropy",
            "p(wrong)",
            "random",
        }
        assert one["scores"].keys() == names and one["error"] == float(wrong_of(store)[side].double().mean())
        judged = one["scores"]["p(wrong)"]
        assert judged["aurc"]["low"] < judged["aurc"]["value"] < one["error"] and judged["ece"] < 0.2
        assert judged["aurc"]["value"] < one["scores"]["random"]["aurc"]["low"]
    assert "p(wrong)" in capsys.readouterr().out and (tmp_path / "risk_coverage.png").stat().st_size > 9000
    assert "Which score tells wrong from right?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_another_truth_is_another_question(calibrated, tmp_path):
    store = EmbeddingStore(calibrated / "test")
    truth = (store.caption_image[:, None] // 8 == torch.arange(80) // 8).numpy()
    np.save(tmp_path / "truth.npy", truth)
    succeed("eval", *of(calibrated), "--truth", tmp_path / "truth.npy", "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())["comparisons"]
    assert list(report)[2:] == ["image -> text, true", "text -> image, true"]
    assert report["text -> image, true"]["error"] < report["text -> image, own"]["error"]
    assert "p(wrong)" not in report["text -> image, true"]["scores"]  # it was fitted to the other question


def test_predict_and_rank_say_it(calibrated, tmp_path, capsys):
    succeed("predict", *of(calibrated), "--out", tmp_path)
    _, p = expected(calibrated)
    for side in SIDES:
        with open(tmp_path / f"{side}s.csv", newline="", encoding="utf-8") as file:
            got = [float(row["p_wrong"]) for row in csv.DictReader(file)]
        assert got == pytest.approx(p[side].tolist(), abs=1e-6)
    assert "the probability that the first match is wrong" in (tmp_path / "index.html").read_text(encoding="utf-8")
    capsys.readouterr()
    succeed("rank", "text:7", *of(calibrated))
    said = re.search(r"the first match by cosine is wrong with probability (\d\.\d\d)", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(float(p["text"][7]), abs=0.01)


def test_without_it_nothing_is_said(there, tmp_path, capsys):
    ProbVLM.load(there / "run/best.safetensors").save(tmp_path / "adapter.safetensors")
    succeed("predict", "--store", there / "test", "--checkpoint", tmp_path / "adapter.safetensors", "--out", tmp_path)
    assert "p_wrong" not in (tmp_path / "texts.csv").read_text()
    capsys.readouterr()
    succeed("rank", "text:7", "--store", there / "test", "--checkpoint", tmp_path / "adapter.safetensors")
    assert "probability" not in capsys.readouterr().out


def test_mistakes(calibrated, tmp_path, capsys):
    np.save(tmp_path / "truth.npy", np.ones((80, 160), bool))
    assert "error.safetensors exists already; replace it by --overwrite" in fail(
        capsys, "calibrate", *of(calibrated, "val")
    )
    wrong = fail(capsys, "calibrate", *of(calibrated, "val"), "--truth", tmp_path / "truth.npy", "--overwrite")
    assert "truth must be bool [160, 80], got bool [80, 160]" in wrong
    (tmp_path / "text.npy").write_text("no array")
    wrong = fail(capsys, "eval", *of(calibrated), "--truth", tmp_path / "text.npy")
    assert "--truth: truth must be an .npy file" in wrong
    other = tmp_path / "other"
    other.mkdir()
    ProbVLM(8, hidden=4).save(other / "best.safetensors")
    (other / "error.safetensors").write_bytes((calibrated / "run/error.safetensors").read_bytes())
    wrong = fail(capsys, "predict", "--store", calibrated / "test", "--checkpoint", other, "--out", tmp_path / "out")
    assert "adapter must be the one that it was fitted with, got another" in wrong and not (tmp_path / "out").exists()
