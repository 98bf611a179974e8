"""Evaluation of tuned prompts: scores, tables, figures, the command line and the built-in run."""

import json
import math
import statistics

import pytest
import torch
from PIL import Image
from prompt_runs import DATA, config, run
from sklearn.metrics import accuracy_score, f1_score

import fastprob.cli as cli
from fastprob.data.labelled import LabelledImages
from fastprob.prompts import Inputs, Tuned, linear_probe, predict, scores, zero_shot
from fastprob.prompts.report import evaluate_runs

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_scores_against_scikit_learn():
    torch.manual_seed(0)
    probabilities, labels = torch.rand(500, 7).softmax(1), torch.randint(7, (500,))
    probabilities[:, 6] = 0  # a class that is never predicted
    probabilities = torch.nn.functional.pad(probabilities, (0, 1))  # and one that does not occur either
    got, predicted = scores(probabilities, labels), probabilities.argmax(1)
    assert got.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert got.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_expected_calibration_error_by_hand():
    """Confidences 0.9 (right, wrong) and 0.6 (right, right) in two bins: (|1 - 1.8| + |2 - 1.2|) / 4."""
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert scores(probabilities, torch.tensor([0, 1, 0, 0])).ece == pytest.approx(0.4)
    sure = torch.eye(2)[torch.tensor([0, 1, 1])]
    assert scores(sure, torch.tensor([0, 1, 1])).ece == 0


def test_cocoop_predicts_each_image_by_itself(splits, encoder, monkeypatch):
    tuned = run(splits, encoder, config("cocoop"))
    data = LabelledImages("few", splits["val"].images[:7], splits["val"].labels[:7], splits["val"].classnames)
    whole = predict(tuned, Inputs(data, encoder, progress=False))
    monkeypatch.setattr("fastprob.prompts.evaluation._PROMPTS", 20)  # two images at a time
    torch.testing.assert_close(predict(tuned, Inputs(data, encoder, progress=False)), whole)
    features = Inputs(data, encoder, progress=False).features
    torch.testing.assert_close(tuned.method(features[3:4]).softmax(1), whole[3:4])


def test_zero_shot_predictions_by_hand(splits, encoder):
    data = LabelledImages("few", splits["val"].images[:7], splits["val"].labels[:7], splits["val"].classnames)
    few = Inputs(data, encoder, progress=False)
    got = zero_shot(few, "a photo of a {}.")
    image = encoder.encode_image(torch.stack([encoder.preprocess(data[i]) for i in range(7)]))
    text = encoder.encode_text(encoder.tokenizer([f"a photo of a {name}." for name in data.classnames]))
    scale = math.exp(encoder.model.logit_scale)
    expected = [[math.exp(scale * (x @ y - 1)) for y in text] for x in image]
    torch.testing.assert_close(got, torch.tensor([[e / sum(row) for e in row] for row in expected]))


def test_linear_probe_fits_its_few_images(splits, encoder):
    train = Inputs(splits["train"].few_shot(8, 1), encoder, progress=False)
    assert scores(linear_probe(train, train), train.labels).accuracy > 0.9
    test = Inputs(splits["val"], encoder, progress=False)
    assert 0.7 < scores(linear_probe(train, test), test.labels).accuracy < 0.95


# ---- the command line -----------------------------------------------------------------------------------------------

FIT = ("--data", DATA, "--device", "cpu", "--epochs", 2, "--batch-size", 8, "--init", "a lone", "--visual-length", 2)


def succeed(*argv):
    assert cli.main(["prompt", *map(str, argv)]) == 0


def fail(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["prompt", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastprob prompt {argv[0]}: error: ") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    many = ("--method", "coop", "dapt", "--shots", 1, 2, "--seeds", 1, 2)
    succeed("fit", *FIT, "--out", out / "all", *many)
    succeed("fit", *FIT, "--out", out / "base", "--method", "coop", "--shots", 2, "--seeds", 1, 2, "--classes", "base")
    return out


def test_fit_eval_and_their_report(runs, tmp_path, capsys, splits, encoder):
    succeed("eval", "--data", DATA, "--runs", runs, "--out", tmp_path, "--device", "cpu")
    table = capsys.readouterr().out
    assert table.strip() in (tmp_path / "report.md").read_text()
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    kinds = {(r["method"], r["shots"], r["trained_on"], r["scored_on"]) for r in rows}
    assert kinds == {
        *((method, k, "all", "all") for method in ("coop", "dapt", "linear probe") for k in (1, 2)),
        *(("coop", 2, "base", "base"), ("coop", 2, "base", "new"), ("linear probe", 2, "base", "base")),
        *(("zero-shot", None, None, on) for on in ("all", "base", "new")),
    }
    tuned = Tuned.load(runs / "all" / "dapt" / "2-shot" / "seed2" / "prompt.safetensors")
    test = Inputs(splits["test"], encoder, progress=False)
    accuracy = {r["seed"]: r["scores"]["accuracy"] for r in rows if (r["method"], r["shots"]) == ("dapt", 2)}
    assert accuracy[2] == scores(predict(tuned, test), test.labels).accuracy
    values = [100 * accuracy[seed] for seed in (1, 2)]
    assert f"| dapt | 2 | 2 | {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} |" in table
    harmonic = []
    for seed in (1, 2):
        tuned = Tuned.load(runs / "base" / "coop" / "2-shot" / f"seed{seed}" / "prompt.safetensors")
        shares = []
        for classes in ("base", "new"):
            part = Inputs(splits["test"].of_classes(classes), encoder, progress=False)
            shares.append(scores(predict(tuned.for_classes(part.data.classnames), part), part.labels).accuracy)
        harmonic.append(100 * 2 / (1 / shares[0] + 1 / shares[1]))
    assert table.splitlines()[-1].endswith(f"| {statistics.mean(harmonic):.1f} ± {statistics.stdev(harmonic):.1f} |")
    train = Inputs(splits["train"].few_shot(2, 1), encoder, progress=False)
    probe = next(r["scores"] for r in rows if (r["method"], r["shots"], r["seed"]) == ("linear probe", 2, 1))
    assert probe["accuracy"] == scores(linear_probe(train, test), test.labels).accuracy
    for name in ("accuracy_by_shots", "accuracy_by_shots_base_new", "class_embeddings", "class_distances"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500


def test_embeddings_are_of_the_most_shots_and_the_first_seed(runs, splits):
    report = evaluate_runs(runs / "all", splits, probe=False, progress=False)
    assert list(report.embeddings) == ["zero-shot", "coop", "dapt"]
    for method in ("coop", "dapt"):
        tuned = Tuned.load(runs / "all" / method / "2-shot" / "seed1" / "prompt.safetensors")
        torch.testing.assert_close(report.embeddings[method], tuned.method.text_features().detach())


def quickly(splits, encoder, directory, **options):
    run(splits, encoder, config(**{"epochs": 1, "batch_size": 40, **options}), directory)


def test_runs_that_stand_for_the_same_are_refused(splits, encoder, tmp_path):
    for lr in (0.1, 0.2):
        quickly(splits, encoder, tmp_path / str(lr), lr=lr)
    with pytest.raises(ValueError, match=r"must differ in .*0\.1/.* and .*0\.2/.* \(lr 0\.1 and 0\.2\)"):
        evaluate_runs(tmp_path, splits, progress=False)


def test_runs_on_base_and_new_classes_are_kept_apart(splits, encoder, tmp_path):
    """Those on new classes are no result of base to new, and contexts of each class are scored on their own alone."""
    quickly(splits, encoder, tmp_path / "a", classes="base", init=None, class_specific=True, context_length=2)
    quickly(splits, encoder, tmp_path / "b", classes="new")
    quickly(splits, encoder, tmp_path / "c", method="vpt", classes="base", shots=0)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "last.pt").touch()
    with pytest.warns(UserWarning, match="1 unfinished runs are left out, first .*d"):
        report = evaluate_runs(tmp_path, splits, progress=False)
    kinds = {(r.method, r.trained_on, r.scored_on) for r in report.results if r.shots is not None}
    probes = {("linear probe", "base", "base"), ("linear probe", "new", "new")}
    assert kinds == {
        ("coop", "base", "base"),
        ("coop", "new", "new"),
        ("vpt", "base", "base"),
        ("vpt", "base", "new"),
        *probes,
    }
    rows = report.base_to_new().splitlines()
    assert [row.split(" | ")[:2] for row in rows[3:]] == [
        ["| linear probe", "2"], ["| linear probe", "all"], ["| coop", "2"], ["| vpt", "all"],
    ]  # fmt: skip
    assert rows[5].endswith(" |  |  |") and "## New classes, by prompts of their own" in report.table()
    report.draw(tmp_path / "figures")
    assert (tmp_path / "figures" / "accuracy_by_shots_new_new.png").exists()


def test_classes_of_another_data_set_and_a_single_class(splits, encoder, tmp_path):
    two = splits["train"].of_classes("base")
    run({"train": two}, encoder, config(epochs=1), tmp_path / "other")
    report = evaluate_runs(tmp_path, splits, progress=False)
    assert {(r.method, r.trained_on) for r in report.results} == {("coop", "other"), ("zero-shot", None)}
    assert "## All classes, by prompts of other ones" in report.table()
    rows = (splits["val"].labels == 3).nonzero()[:, 0]
    one = LabelledImages("threes", splits["val"].images[rows], torch.zeros(len(rows), dtype=torch.long), ["three"])
    run({"train": one}, encoder, config(epochs=1), tmp_path / "one")
    report = evaluate_runs(tmp_path / "one", {"train": one, "test": one}, progress=False)
    assert {r.scores.accuracy for r in report.results} == {1.0}
    report.draw(tmp_path / "figures")
    with pytest.raises(ValueError, match=r"threes must have two classes or more, got \['three'\]"):
        one.of_classes("new")


def test_fit_resumes_what_is_missing_and_keeps_what_is_there(runs, tmp_path, capsys):
    many = ("--method", "coop", "--seeds", 1, 2, "--shots", 1, "--out", tmp_path)
    succeed("fit", *FIT, *many[:-4], "--seeds", 1, *many[-4:])
    assert "seed1 holds a run already; go on with it by --resume" in fail(capsys, "fit", *FIT, *many)
    first = tmp_path / "coop" / "1-shot" / "seed1" / "prompt.safetensors"
    before = first.stat().st_mtime_ns
    succeed("fit", *FIT, *many, "--resume")
    assert first.stat().st_mtime_ns == before
    for seed in (1, 2):
        ours, theirs = (d / "coop" / "1-shot" / f"seed{seed}" / "prompt.safetensors" for d in (tmp_path, runs / "all"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_predict_names_the_classes_of_image_files(runs, tmp_path, capsys, splits, encoder):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, i in zip(files, (0, 9)):
        splits["test"][i].save(file)
    checkpoint = runs / "all" / "coop" / "2-shot" / "seed1"
    succeed("predict", "--checkpoint", checkpoint, "--top", 2, *files, "--device", "cpu")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(file) for file in files]
    expected = predict(Tuned.load(checkpoint / "prompt.safetensors"), Inputs(splits["test"], encoder, progress=False))
    for line, i in zip(lines, (0, 9)):
        top = expected[i].topk(2)
        names = [splits["test"].classnames[c] for c in top.indices]
        assert line[1:] == [f"{name} {value:.3f}" for name, value in zip(names, top.values.tolist())]


def test_mistakes(capsys, tmp_path, runs):
    arguments = ("fit", *FIT, "--out", tmp_path / "out")
    assert "method must be one of 'coop', 'cocoop'" in fail(capsys, *arguments, "--method", "clip")
    long = ("fit", "--data", DATA, "--out", tmp_path / "out", "--method", "coop")
    assert "leave room for 16 context vectors among 14 tokens" in fail(capsys, *long)
    assert "got 'nowhere', not found" in fail(capsys, "fit", *FIT, "--out", tmp_path / "out", "--data", "nowhere")
    assert "runs must be a directory with" in fail(capsys, "eval", "--data", DATA, "--runs", tmp_path)
    wrong = ("eval", "--data", DATA, "--runs", runs, "--split", "dev")
    assert "--split must be one of ['test', 'train', 'val'], got 'dev'" in fail(capsys, *wrong)
    missing = ("predict", "--checkpoint", runs / "all" / "coop" / "2-shot" / "seed1", tmp_path / "no.png")
    assert "no.png" in fail(capsys, *missing)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.jpg")
    torn = tmp_path / "torn.jpg"
    torn.write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    assert "torn.jpg: " in fail(capsys, *missing[:-1], torn)
    assert "--top must be at least 1, got 0" in fail(capsys, *missing, "--top", 0)
    template = ("eval", "--data", DATA, "--runs", runs, "--template", "a photo")
    assert "template must hold one {} for the name, got 'a photo'" in fail(capsys, *template)


def test_built_in_run(tmp_path, monkeypatch, capsys):
    """The whole table, in small: a row for every method, both splits of classes, and what the dispersion adds."""
    from fastprob.demo import prompts

    def in_this_process(function, settings, description):
        return [function(setting) for setting in settings]

    monkeypatch.setattr(prompts, "each_on_a_thread", in_this_process)
    prompts.run(tmp_path, shifts=("thickened",), shots=(2,), seeds=(1,), epochs=1)
    report = (tmp_path / "report.md").read_text()
    for method in ("zero-shot", "linear probe", *prompts.METHODS):
        assert report.count(f"\n| {method} |") == 2 + method.startswith("dapt")
    rows = json.loads((tmp_path / "thickened" / "results.json").read_text())["results"]
    at = {r["method"]: r["scores"]["accuracy"] for r in rows if r["shots"] == 2 and r["scored_on"] == "all"}
    for method in ("dapt", "dapt-t10-v100"):
        assert f"| {method} | thickened | 2 | {100 * (at[method] - at['coop+vpt']):+.1f} |" in report
    assert (tmp_path / "thickened" / "class_distances.png").exists()
