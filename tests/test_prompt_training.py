"""Few-shot training of prompts and its checkpoints, on real digits and the tiny CLIP."""

import itertools
import json
import os
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from prompt_runs import METHODS, config, run, same
from safetensors import safe_open
from safetensors.torch import save_file

from fastprob.data import pixels
from fastprob.data.labelled import LabelledImages, open_splits
from fastprob.encoders import load_encoder
from fastprob.prompts import Inputs, PromptConfig, Tuned, fit, predict, scores, training, zero_shot

pytestmark = pytest.mark.usefixtures("one_thread")


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
    run(splits, encoder, config(shots=1, epochs=None, batch_size=5))
    assert rates[:6] == pytest.approx([1e-5, 1e-5, 2e-3, 2e-3, 1.99803e-3, 1.99803e-3], rel=1e-5)
    assert len(rates) == 2 * 50


def test_the_optimiser_is_the_released_one(splits, encoder, monkeypatch):
    """The first steps by hand: SGD, momentum 0.9, weight decay 5e-4."""
    update, seen = training._Run.update, []

    def noted(self, *batch):
        group = self.optimizer.param_groups[0]
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
        before = self.model.ctx.detach().clone()
        loss = update(self, *batch)
        seen.append((before, self.model.ctx.grad.clone(), group["lr"]))
        return loss

    monkeypatch.setattr(training._Run, "update", noted)
    run(splits, encoder, config(lr=0.1))
    velocity = 0
    for (before, grad, lr), (after, _, _) in itertools.pairwise(seen):
        velocity = 0.9 * velocity + grad + 5e-4 * before
        torch.testing.assert_close(after, before - lr * velocity)


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (5, 200), (8, 200), (16, 200)])
def test_epochs_by_shots_are_the_released_ones(shots, epochs):
    assert training.released_epochs(shots) == epochs


def test_defaults_are_the_released_ones():
    assert asdict(PromptConfig()) == {
        "method": "dapt", "shots": 16, "classes": "all", "epochs": None, "batch_size": 32, "lr": 2e-3,
        "context_length": None, "class_position": "end", "class_specific": False, "init": None, "visual_length": 16,
        "deep": False, "dropout": 0.0, "beta_t": 0.1, "beta_v": 0.1, "template": None, "augment": False,
        "precision": "fp32", "chunk": None, "recompute": False, "seed": 1,
    }  # fmt: skip


def test_the_seed_decides_the_batches(splits, encoder, monkeypatch):
    """On the same images in the same order, and with words to start from, nothing else is left to it."""
    monkeypatch.setattr(LabelledImages, "few_shot", lambda self, shots, seed: self)
    few = {"train": splits["val"]}
    options = {"epochs": 1, "batch_size": 40, "init": "a lone"}
    runs = [run(few, encoder, config(seed=seed, **options)) for seed in (1, 1, 2)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_seed_decides_images_and_vectors_and_the_random_state_is_left_alone(splits, encoder, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, "Inputs", lambda data, *_, **__: drawn.append(data) or Inputs(data, encoder, **__))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runs = [run(splits, encoder, config(context_length=2, init=None, seed=seed)) for seed in (1, 1, 2)]
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
    monkeypatch.setattr(pixels, "KEEP", 0)
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
    "epochs": (0, "epochs must be an integer of at least 1 or None, got 0"),
    "chunk": (0, "chunk must be an integer of at least 1 or None, got 0"),
    "init": (" ", "init must be words or None, got ' '"),
    "batch_size": (0, "batch_size must be an integer of at least 1, got 0"),
    "beta_v": (float("nan"), "beta_v must be finite and >= 0, got nan"),
    "lr": (0.0, "lr must be finite and > 0, got 0.0"),
    "dropout": (1.0, r"dropout must be in \[0, 1\), got 1.0"),
    "template": ("a {} or {}", r"template must hold one \{\} for the name, got 'a \{\} or \{\}'"),
    "class_specific": (True, "class_specific must be False for 'dapt', got True"),
    "context_length": (3, "context_length must be None with init, got 3"),
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


def test_runs_of_the_first_version_load(splits, encoder, tmp_path):
    """Their options say 0 and "" for as released."""
    path = tmp_path / "prompt.safetensors"
    tuned = run(splits, encoder, config("cocoop", context_length=None))
    tuned.save(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fastprob.prompts/1"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about["config"] |= {"context_length": 0, "init": "", "chunk": 0, "template": ""}
    save_file(weights, path, {"fastprob.prompts/1": json.dumps(about)})
    loaded = Tuned.load(path)
    assert loaded.config == replace(tuned.config, template=None)
    assert torch.equal(loaded.method.ctx, tuned.method.ctx)


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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda about: "{", "must say in JSON how it was tuned, got: "),
        (lambda about: [about], "must say its classnames, config and encoder, got ["),
        (lambda about: {"config": about["config"]}, "must say its classnames, config and encoder, got {"),
        (lambda about: {**about, "classnames": ["a", 7]}, "must say its classnames, config and encoder, got {"),
        (lambda about: {**about, "encoder": {"model": "tiny"}}, "must say its classnames, config and encoder, got {"),
        (lambda about: {**about, "config": {"depth": 2}}, "must have the options of this version: "),
        (lambda about: {**about, "config": {"shots": "x"}}, "must have the options of this version: "),
        (lambda about: {**about, "classnames": about["classnames"] * 2}, "must hold what its options tune: "),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(splits, encoder, tmp_path, change, expected):
    path = tmp_path / "prompt.safetensors"
    tuned = run(splits, encoder, config(class_specific=True))
    about = {"config": asdict(tuned.config), "classnames": tuned.classnames, "encoder": {
        "model": "tiny", "pretrained": None, "fingerprint": encoder.fingerprint()}}  # fmt: skip
    about = change(about)
    save_file(tuned.method.state_dict(), path, {
        "fastprob.prompts/1": about if isinstance(about, str) else json.dumps(about)})  # fmt: skip
    with pytest.raises(ValueError) as caught:
        Tuned.load(path, encoder)
    assert str(caught.value).startswith(f"Tuned: {path} {expected}")
