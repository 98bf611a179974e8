"""`fastprob calibrate`, and what eval, predict and rank make of it, on arrays as people have them."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
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
    store, p = expected(calibrated)
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
        assert judged["nll"] == pytest.approx(log_loss(wrong_of(store)[side], p[side]), rel=1e-6)
        assert one["scores"]["entropy"]["nll"] is None
    assert "p(wrong)" in capsys.readouterr().out and (tmp_path / "risk_coverage.png").stat().st_size > 9000
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Which score tells wrong from right?" in page and f"<td>{judged['nll']:.3f}</td></tr>" in page


def test_conformal_sets_are_promised_and_counted(there, tmp_path, capsys):
    """A promise is of a text's own image, whatever rule p(wrong) was fitted to."""
    truth = EmbeddingStore(there / "val").caption_image[:, None] // 8 == torch.arange(80) // 8
    np.save(tmp_path / "truth.npy", truth.numpy())
    ProbVLM.load(there / "run/best.safetensors").save(tmp_path / "best.safetensors")
    succeed("calibrate", "--store", there / "val", "--checkpoint", tmp_path, "--truth", tmp_path / "truth.npy")
    said, thresholds = capsys.readouterr().out, ErrorModels.load(tmp_path / "error.safetensors").conformal
    succeed("eval", "--store", there / "test", "--checkpoint", tmp_path, "--out", tmp_path / "report")
    told, page = capsys.readouterr().out, (tmp_path / "report/report.html").read_text(encoding="utf-8")
    report, store = (
        json.loads((tmp_path / "report/report.json").read_text())["conformal"],
        EmbeddingStore(there / "test"),
    )
    assert list(report) == ["0.8", "0.9", "0.95"] and list(thresholds) == [0.8, 0.9, 0.95]
    cosine, owner = store.text @ store.image.T, store.caption_image
    for (coverage, least), of in zip(thresholds.items(), report.values()):
        within = cosine >= least
        own = within[torch.arange(160), owner]
        images = within & (owner[:, None] == torch.arange(80))
        assert of["text"] == {"covered": float(own.double().mean()), "size": int(within.sum()) / 160}
        assert of["image"] == {"covered": float(images.any(0).double().mean()), "size": int(within.sum()) / 80}
        assert f"their own image has a cosine of {least:.3f} or more with a probability of {coverage}" in said
        row = (
            f"{coverage:g}",
            *(f"{of[side][what]:.{n}f}" for side in ("text", "image") for what, n in (("covered", 3), ("size", 1))),
        )
        assert re.search(r"\s+".join(map(re.escape, row)), told)
        assert f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) in page
    assert "nothing was promised" in told and "nothing was promised" in page


@pytest.fixture(scope="module")
def outside(there):
    """A store of 40 images with a text each, on one side of the sphere; its texts are called as those of the others."""
    data = pairs(40, 7, texts_of=1)
    away = torch.tensor([1.5, 0, 0, 0, 0, 0, 0, 0])
    embed_arrays(data.image + away, data.text + away, there / "outside", progress=False)
    return there / "outside"


def test_eval_says_which_score_tells_what_has_no_match(calibrated, outside, tmp_path, capsys):
    succeed("eval", *of(calibrated), "--outside", outside, "--out", tmp_path)
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    page, (store, _), other = (tmp_path / "report.html").read_text(), expected(calibrated), EmbeddingStore(outside)
    names = {*report["comparisons"]["image -> text, own"]["scores"]}
    assert report["outside_source"] == other.metadata["source"] and list(report["outside"]) == [
        "image -> text",
        "text -> image",
    ]
    for side, items, found in zip(SIDES, (store.text, store.image), report["outside"].values()):
        rows = torch.cat([getattr(store, side), getattr(other, side)])
        stranger = torch.arange(len(rows)) >= len(getattr(store, side))
        expected_value = roc_auc_score(stranger, -(rows @ items.T).amax(1))
        assert found.keys() == names and found["1 - max cosine"]["value"] == pytest.approx(expected_value, abs=1e-4)
        for one in found.values():
            cell = f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
            assert one["low"] < one["value"] < one["high"] and cell in printed and f"<td>{cell}</td>" in page
        assert found["random"]["high"] < found["1 - max cosine"]["value"] < found["p(wrong)"]["high"]
    assert "From outside, arrays: AUROC" in printed and "Which score tells what has no match here?" in page


def test_without_what_it_needs_a_report_has_no_such_part(there, tmp_path, capsys):
    ProbVLM.load(there / "run/best.safetensors").save(tmp_path / "adapter.safetensors")
    succeed("eval", "--store", there / "test", "--checkpoint", tmp_path / "adapter.safetensors", "--out", tmp_path)
    report, page = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.html").read_text()
    assert report["conformal"] == report["outside"] == {} and report["outside_source"] is None
    assert "promised" not in page and "outside" not in page and "promised" not in capsys.readouterr().out


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
    named = pairs(20, 0)
    for name in ("one", "two"):
        embed_arrays(
            named.image, named.text, tmp_path / name, pairs=named.caption_image, encoder_name=name, progress=False
        )
    adapter = "--checkpoint", calibrated / "run/best.safetensors", "--out", tmp_path / "out"
    wrong = fail(capsys, "eval", "--store", tmp_path / "one", *adapter, "--outside", tmp_path / "two")
    assert f"{tmp_path / 'one'} and {tmp_path / 'two'} are of different encoders" in wrong
    wrong = fail(capsys, "eval", *of(calibrated), "--outside", tmp_path / "none")
    assert "no embedding store here" in wrong and not (tmp_path / "out").exists()
    other = tmp_path / "other"
    other.mkdir()
    ProbVLM(8, hidden=4).save(other / "best.safetensors")
    (other / "error.safetensors").write_bytes((calibrated / "run/error.safetensors").read_bytes())
    wrong = fail(capsys, "predict", "--store", calibrated / "test", "--checkpoint", other, "--out", tmp_path / "out")
    assert "adapter must be the one that it was fitted with, got another" in wrong and not (tmp_path / "out").exists()
