"""Few-shot training, checkpoints, evaluation and reports of prompts, on real digits and the tiny CLIP."""

import json
import os
import signal
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from fastprob import cli
from fastprob.data.labelled import LabelledImages, open_splits
from fastprob.encoders import load_encoder
from fastprob.prompts import (
    Inputs,
    PromptConfig,
    Tuned,
    fit,
    inputs,
    linear_probe,
    predict,
    scores,
    training,
    zero_shot,
)
from fastprob.prompts.report import evaluate_runs

METHODS = {
    "coop": {"init": "a lone"},
    "cocoop": {"context_length": 2},
    "vpt": {"visual_length": 2, "deep": True, "dropout": 0.1},
    "dapt": {"init": "a lone", "visual_length": 2},
}
DATA = "digits:thickened"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Waking a second thread costs more than these small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("tiny")


@pytest.fixture(scope="module")
def splits():
    return open_splits(DATA)


def config(method="coop", **options):
    return PromptConfig(**{"method": method, "shots": 2, "epochs": 3, "batch_size": 8, **METHODS[method], **options})


def run(splits, encoder, config, directory=None, **options):
    return fit(splits["train"], encoder, config=config, directory=directory, progress=False, **options)


def same(one, other):
    states = one.method.state_dict(), other.method.state_dict()
    return one.history == other.history and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_beats_the_zero_shot_predictions(splits, encoder, method):
    """On 300 held-out digits, from 16 of each; the untrained vectors are worse than the trained ones."""
    test = LabelledImages("test", splits["test"].images[:300], splits["test"].labels[:300], splits["test"].classnames)
    test = Inputs(test, encoder, progress=False)
    options = {"shots": 16, "epochs": 15, "batch_size": 32, "dropout": 0.0, "visual_length": 4, "lr": 0.01}
    tuned = run(splits, encoder, config(method, **options))
    before = scores(zero_shot(test, splits["test"].template), test.labels)
    after = scores(predict(tuned, test), test.labels)
    assert after.accuracy > before.accuracy and after.ece < before.ece
    losses = tuned.history["train_loss"]
    assert len(losses) == 15 and losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_leaves_a_run_that_resumes_bit_for_bit(splits, encoder, tmp_path, monkeypatch, method):
    options = {"augment": True} if method in ("cocoop", "dapt") else {}
    whole = run(splits, encoder, config(method, **options), tmp_path / "whole")
    update, taken = training._Run.update, []

    def interrupted(self, *batch):
        loss = update(self, *batch)
        taken.append(1)
        if len(taken) == 5:  # of 9
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(training._Run, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(splits, encoder, config(method, **options), tmp_path / "part")
    assert len(taken) == 5
    assert not (tmp_path / "part" / training.CHECKPOINT).exists()
    resumed = run(splits, encoder, config(method, **options), tmp_path / "part", resume=True)
    assert len(taken) == 9 and same(resumed, whole)
    saved = [(tmp_path / name / training.CHECKPOINT).read_bytes() for name in ("whole", "part")]
    assert saved[0] == saved[1]


def test_the_learning_rate_is_the_released_one(splits, encoder, monkeypatch):
    """One epoch of warm-up, then the cosine from its start, by epochs: 1e-5, 2e-3, 1.9980e-3 of 50, as CoOp logs it."""
    update, rates = training._Run.update, []

    def noted(self, *batch):
        loss = update(self, *batch)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(training._Run, "update", noted)
    run(splits, encoder, config(shots=1, epochs=0, batch_size=5))
    assert rates[:6] == pytest.approx([1e-5, 1e-5, 2e-3, 2e-3, 1.99803e-3, 1.99803e-3], rel=1e-5)
    assert len(rates) == 2 * 50


def test_seed_decides_images_and_vectors_and_the_random_state_is_left_alone(splits, encoder, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, "Inputs", lambda data, *_, **__: drawn.append(data) or Inputs(data, encoder, **__))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runs = [run(splits, encoder, config(context_length=2, init="", seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert [np.array_equal(data.images, splits["train"].few_shot(2, 1).images) for data in drawn] == [True, True, False]
    assert np.array_equal(drawn[2].images, splits["train"].few_shot(2, 2).images)


def test_other_images_are_another_run(splits, encoder, tmp_path):
    run(splits, encoder, config(), tmp_path)
    with pytest.raises(ValueError, match=r"last\.pt was trained with images="):
        run(open_splits("digits:inverted"), encoder, config(), tmp_path, resume=True)


def test_a_run_that_is_replaced_leaves_no_checkpoint_behind(splits, encoder, tmp_path, monkeypatch):
    checkpoint = tmp_path / training.CHECKPOINT
    tuned = run(splits, encoder, config(), tmp_path)
    checkpoint.unlink()
    assert same(run(splits, encoder, config(), tmp_path, resume=True), tuned) and checkpoint.exists()

    def crash(self, *batch):
        raise ZeroDivisionError

    monkeypatch.setattr(training._Run, "update", crash)
    with pytest.raises(ZeroDivisionError):
        run(splits, encoder, config(lr=0.1), tmp_path)
    assert not checkpoint.exists()
    (tmp_path / "last.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"last\.pt must be a checkpoint, it can't be read"):
        run(splits, encoder, config(lr=0.1), tmp_path, resume=True)


def test_images_that_are_not_kept_give_the_same_run(splits, encoder, monkeypatch):
    kept = run(splits, encoder, config("dapt"))
    monkeypatch.setattr(inputs, "KEEP", 0)
    assert same(run(splits, encoder, config("dapt"), workers=1), kept)


def test_augmented_images_are_other_crops_every_epoch_and_nothing_else_changes(splits, encoder):
    data = Inputs(splits["train"].few_shot(1, 1), encoder, augment=True, progress=False)
    rows = [torch.tensor([3, 1])]
    once, again, other = (next(data.images(rows, seed)) for seed in (7, 7, 8))
    assert once.shape == (2, 3, 32, 32) and torch.equal(once, again) and not torch.equal(once, other)
    plain = Inputs(splits["train"].few_shot(1, 1), encoder, progress=False)
    assert torch.equal(data.features, plain.features)
    assert torch.equal(next(plain.images(rows))[1], encoder.preprocess(plain.data[1]))


@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_follows_float32(splits, encoder, method, precision):
    full, half = (run(splits, encoder, config(method, dropout=0.0, precision=p)) for p in ("fp32", precision))
    assert full.history["train_loss"] != half.history["train_loss"]
    assert half.history["train_loss"] == pytest.approx(full.history["train_loss"], rel=0.05)
    test = Inputs(splits["val"], encoder, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert half.method(next(test.images([torch.arange(2)]))).dtype == torch.float32  # the logits
    assert predict(half, test).dtype == torch.float32
    assert (predict(full, test) - predict(half, test)).abs().mean() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(splits, encoder, tmp_path, method, precision):
    options = config(method, dropout=0.0, precision=precision)
    expected = run(splits, encoder, config(method, dropout=0.0))
    on_gpu = load_encoder("tiny", device="cuda")
    tuned = run(splits, on_gpu, options, tmp_path)
    assert tuned.history["train_loss"] == pytest.approx(expected.history["train_loss"], rel=0.05)
    assert same(run(splits, on_gpu, options, tmp_path, resume=True), tuned)
    loaded = Tuned.load(tmp_path / training.CHECKPOINT, device="cuda")
    test = Inputs(splits["val"], on_gpu, progress=False)
    assert torch.equal(predict(loaded, test), predict(tuned, test))


def test_checkpoints_of_another_run_are_refused_by_field(splits, encoder, tmp_path):
    run(splits, encoder, config(), tmp_path)
    with pytest.raises(ValueError, match=r"last\.pt was trained with lr=0\.002, got lr=0\.1"):
        run(splits, encoder, config(lr=0.1), tmp_path, resume=True)
    with pytest.raises(FileNotFoundError):
        run(splits, encoder, config(), tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="resume needs the directory"):
        run(splits, encoder, config(), resume=True)


BAD = {
    "method": ("clip", "method must be one of 'coop', 'cocoop', 'vpt', 'dapt', got 'clip'"),
    "precision": ("fp8", "precision must be one of 'fp32', 'amp', 'amp_bf16', got 'fp8'"),
    "classes": ("old", "classes must be one of 'all', 'base', 'new', got 'old'"),
    "class_position": ("top", "class_position must be one of 'end', 'middle', 'front', got 'top'"),
    "shots": (2.5, "shots must be an integer of at least 0, got 2.5"),
    "batch_size": (0, "batch_size must be an integer of at least 1, got 0"),
    "beta_v": (float("nan"), "beta_v must be finite and >= 0, got nan"),
    "lr": (0.0, "lr must be finite and > 0, got 0.0"),
    "dropout": (1.0, r"dropout must be in \[0, 1\), got 1.0"),
    "template": ("a {} or {}", r"template must hold one \{\} for the name, got 'a \{\} or \{\}'"),
    "class_specific": (True, "class_specific must be False for 'dapt', got True"),
    "context_length": (3, "context_length must be 0 with init, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    value, message = BAD[name]
    with pytest.raises(ValueError, match=f"PromptConfig: {message}"):
        PromptConfig(**{"init": "a", name: value})


def test_a_class_without_images_is_named(encoder, splits):
    data = LabelledImages("two", splits["val"].images[:2], torch.tensor([0, 2]), ["zero", "one", "two"])
    with pytest.raises(ValueError, match="data must have an image of every class, got none of 'one'"):
        fit(data, encoder, config=config(), progress=False)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_predicts_the_same_and_on_new_classes(splits, encoder, tmp_path, method):
    tuned = run(splits, encoder, config(method, classes="base"), tmp_path)
    loaded = Tuned.load(tmp_path / training.CHECKPOINT)
    assert loaded.config == tuned.config and loaded.classnames == ["zero", "one", "two", "three", "four"]
    base, new = (Inputs(splits["val"].of_classes(c), encoder, progress=False) for c in ("base", "new"))
    assert torch.equal(predict(loaded, base), predict(tuned, base))
    other = loaded.for_classes(new.data.classnames)
    assert all(torch.equal(v, tuned.method.state_dict()[k]) for k, v in other.method.state_dict().items())
    assert scores(predict(other, new), new.labels).accuracy > 0.6  # nothing was learnt of them


def test_contexts_of_each_class_are_for_these_alone(splits, encoder):
    tuned = run(splits, encoder, config(class_specific=True))
    assert tuned.for_classes(tuned.classnames) is tuned
    with pytest.raises(ValueError, match="class_specific must be False for other classes"):
        tuned.for_classes(["six"])


def test_other_files_and_encoders_are_refused(splits, encoder, tmp_path):
    path = tmp_path / "prompt.safetensors"
    run(splits, encoder, config()).save(path)
    other = load_encoder("tiny")
    other.model.logit_scale.data += 1
    with pytest.raises(ValueError, match=r"must be for Encoder\(tiny.*got one for tiny"):
        Tuned.load(path, other)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Tuned.load(path)


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


def quickly(splits, encoder, directory, **options):
    run(splits, encoder, config(**{"epochs": 1, "batch_size": 40, **options}), directory)


def test_runs_that_stand_for_the_same_are_refused(splits, encoder, tmp_path):
    for lr in (0.1, 0.2):
        quickly(splits, encoder, tmp_path / str(lr), lr=lr)
    with pytest.raises(ValueError, match=r"must differ in .*0\.1/.* and .*0\.2/.* \(lr 0\.1 and 0\.2\)"):
        evaluate_runs(tmp_path, splits, progress=False)


def test_runs_on_base_and_new_classes_are_kept_apart(splits, encoder, tmp_path):
    """Those on new classes are no result of base to new, and contexts of each class are scored on their own alone."""
    quickly(splits, encoder, tmp_path / "a", classes="base", init="", class_specific=True, context_length=2)
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
