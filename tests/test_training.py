"""Training: exact resume, fused against reference, what is drawn, what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import fastprob
from fastprob.adapters import GGDAdapter, PairedEmbeddings, ProbVLM, TrainConfig, fit, nll, training
from fastprob.data.pairs import Pairs
from fastprob.training import run as training_run

DIM = 8


def pairs(images=22, seed=0):
    """Captions scatter around their image: one, two, three or four of them, more of later images, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(images, DIM, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(1 + torch.arange(images) // 6)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    text = normalize(image[owner] + 0.2 * torch.randn(len(owner), DIM, generator=generator), dim=1)
    return PairedEmbeddings(image, text, owner)


CONFIG = TrainConfig(epochs=3, batch_size=5, hidden=16, lr=3e-3, dropout=0.3)  # 5 steps an epoch, the last of 2


def run(directory=None, **options):
    options = {"data": pairs(), "validation": pairs(seed=1), "config": CONFIG, **options}
    return fit(**options, directory=directory, device="cpu", progress=False)


def same(one, other):
    weights = one.model.state_dict(), other.model.state_dict()
    return one.history == other.history and all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def stop_after(monkeypatch, steps, stop):
    """Call `stop` in the middle of the given step, counted from 1."""
    update, taken = training._Run.update, []

    def counted(self, image, text):
        loss = update(self, image, text)
        taken.append(1)
        if len(taken) == steps:
            stop()
        return loss

    monkeypatch.setattr(training._Run, "update", counted)


def test_training_lowers_the_nll_and_records_it(tmp_path):
    result = run(tmp_path, config=TrainConfig(epochs=20, batch_size=5, hidden=16, lr=3e-3))
    history = result.history
    assert result.nll_after < result.nll_before - 1
    assert [len(history[key]) for key in ("step_loss", "train_loss", "val_nll")] == [100, 20, 20]
    assert history["train_loss"][0] == pytest.approx(sum(history["step_loss"][:5]) / 5)
    assert result.nll_after == history["val_nll"][-1] == pytest.approx(nll(result.model, pairs(seed=1)), abs=1e-6)
    assert not result.model.training
    written = json.loads((tmp_path / "history.json").read_text())
    assert written.pop("config")["epochs"] == 20 and written == history
    best = ProbVLM.load(tmp_path / "best.safetensors")
    assert nll(best, pairs(seed=1)) == pytest.approx(min(history["val_nll"]), abs=1e-6)


@pytest.mark.parametrize("interrupted_after", [None, 1, 2])
def test_the_best_epoch_is_kept_though_scores_rise_again(tmp_path, monkeypatch, interrupted_after):
    scores, states = [5.0, 3.0, 1.0, 2.0], []  # before training, then of every epoch

    def scored(self):
        states.append({name: weight.clone() for name, weight in self.model.state_dict().items()})
        return scores[len(states) - 1]

    monkeypatch.setattr(training._Run, "score_nll", scored)
    if interrupted_after:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, 5 * interrupted_after, lambda: os.kill(os.getpid(), signal.SIGINT))
            run(tmp_path)
    result = run(tmp_path, resume=interrupted_after is not None)
    assert (result.nll_before, result.history["val_nll"], result.nll_after) == (5.0, [3.0, 1.0, 2.0], 2.0)
    best = ProbVLM.load(tmp_path / "best.safetensors").state_dict()
    assert all(weight.equal(states[2][name]) for name, weight in best.items())
    assert not all(weight.equal(states[3][name]) for name, weight in best.items())


def test_ctrl_c_before_the_first_step_waits_for_it(tmp_path, monkeypatch):
    """An interrupt in the constructor of the progress bar would leave half a bar, whose end prints a traceback."""
    bar = training_run.tqdm
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_run, "tqdm", lambda *_, **__: (os.kill(os.getpid(), signal.SIGINT), bar(*_, **__))[1])
        run(tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert same(run(tmp_path, resume=True), run())


def test_one_run_at_a_time_in_a_directory(tmp_path, monkeypatch):
    """What the first run has written stays, and the second one says who that is."""
    with monkeypatch.context() as patch:

        def meet():
            written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
            with pytest.raises(ValueError, match=f"fit: {tmp_path} is being written by process {os.getpid()} of "):
                run(tmp_path, resume=False)
            assert written == {file.name: file.read_bytes() for file in tmp_path.iterdir()}

        stop_after(patch, 3, meet)
        result = run(tmp_path)
    assert same(result, run())
    assert sorted(os.listdir(tmp_path)) == ["best.safetensors", "history.json", "last.pt"]


def test_without_validation_the_epoch_of_least_training_loss_is_kept(tmp_path, monkeypatch):
    losses = iter([3.0] * 5 + [1.0] * 5 + [2.0] * 5)
    update, saved = training._Run.update, []
    monkeypatch.setattr(training._Run, "update", lambda self, *batch: 0 * update(self, *batch) + next(losses))
    monkeypatch.setattr(ProbVLM, "save", lambda self, path: saved.append(path.name))
    assert run(tmp_path, validation=None).history["train_loss"] == [3.0, 1.0, 2.0]
    assert saved == ["best.safetensors"] * 2


def test_defaults_are_those_documented():
    assert asdict(TrainConfig()) == {
        "epochs": 100,
        "batch_size": 256,
        "lr": 1e-3,
        "cross_weight": 1.0,
        "l1_weight": 0.0,
        "nll_weight": 1.0,
        "form": "paper",
        "cross": "delta",
        "hidden": 256,
        "dropout": 0.1,
        "positive": "softplus",
        "power": None,
        "seed": 0,
    }
    assert ProbVLM().config == {"dim": 512, "hidden": 256, "dropout": 0.1, "positive": "softplus"}
    adapter = GGDAdapter()
    assert (adapter.dim, adapter.hidden, adapter.dropout, adapter.positive) == (512, 256, 0.1, "softplus")


def test_the_optimiser_is_adam_as_released(monkeypatch):
    runs = []
    monkeypatch.setattr(training._Run, "start", lambda self: runs.append(self))
    monkeypatch.setattr(training._Run, "train_epoch", lambda self, *_: setattr(self, "epoch", self.epochs))
    monkeypatch.setattr(training, "FitResult", lambda *_: None)
    run()
    (group,) = runs[0].optimizer.param_groups
    assert isinstance(runs[0].optimizer, torch.optim.Adam)
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-3, (0.9, 0.999), 1e-8, 0)
    weights = {"cross_weight": 1.0, "l1_weight": 0.0, "nll_weight": 1.0}
    assert runs[0].options == {**weights, "form": "paper", "cross": "delta"}


def test_every_loss_option_reaches_the_loss(monkeypatch):
    options = {"cross_weight": 0.25, "l1_weight": 0.5, "nll_weight": 2.0, "form": "released"}
    seen, loss = [], fastprob.probvlm_loss
    monkeypatch.setattr(fastprob, "probvlm_loss", lambda *t, **o: (seen.append(o), loss(*t, **o))[1])
    run(config=TrainConfig(**{**vars(CONFIG), **options, "epochs": 1}), validation=None)
    trained = [used for used in seen if "l1_weight" in used]
    assert trained == [options] * 5
    assert all(used == {"cross_weight": 0.25, "form": "released"} for used in seen if "l1_weight" not in used)


def test_nll_is_the_mean_over_all_captions(monkeypatch):
    torch.manual_seed(0)
    model, data = ProbVLM(DIM, 16, 0.5).train(), pairs()
    monkeypatch.setattr(training, "_NLL_ROWS", 4)
    got = nll(model, data, cross_weight=0.25, form="released")
    assert model.training and model.image.mod.training
    model.eval()
    total = 0
    for caption, image in enumerate(data.caption_image):
        z_v, z_t = data.image[image], data.text[caption]
        of_v, of_t = model(z_v, z_t)
        for weight, of, z in ((1, of_v, z_v), (1, of_t, z_t), (0.25, of_v, z_t), (0.25, of_t, z_v)):
            total += weight * fastprob.ggd_nll(*of, z, form="released").item()
    assert got == pytest.approx(total / len(data.text), rel=1e-5)


def test_a_run_of_a_fixed_power_says_so_and_resumes(tmp_path):
    gaussian = TrainConfig(**{**vars(CONFIG), "power": 2.0})
    result = run(tmp_path, config=gaussian)
    _, _, beta = result.model.text(pairs().text)
    assert (
        torch.allclose(beta, torch.tensor(2 - 1e-4))
        and ProbVLM.load(tmp_path / "best.safetensors").config["power"] == 2
    )
    with pytest.raises(ValueError, match=r"was trained with power=2\.0, got power=None"):
        run(tmp_path, resume=True)
    assert same(run(tmp_path, config=gaussian, resume=True), result)


# ---- the exact cross-modal likelihood -------------------------------------------------------------------------------

EXACT = TrainConfig(**{**vars(CONFIG), "cross": "exact"})


def match_by_quadrature(mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta):
    """-log integral G_1 G_2 for shapes above 1, by 400 nodes a piece, drawn to the cusps: elements [...] of float64."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(400))
    y, weights = (1 + nodes) / 2, weights / 2  # [Q]
    near, far = y**5, (1 - y) ** 5
    x, weights = near / (near + far), weights * 5 * near * far / (y * (1 - y) * (near + far) ** 2)
    a, b, c, d = inv_alpha + 1e-4, beta + 1e-4, other_inv_alpha + 1e-4, other_beta + 1e-4
    left, right = torch.minimum(mu, other_mu), torch.maximum(mu, other_mu)
    tail = 40 / torch.minimum(a, c)
    integral = 0
    for start, length in ((left - tail, tail), (left, right - left), (right, tail)):
        z = start[..., None] + length[..., None] * x  # [..., Q]
        phi = ((z - mu[..., None]).abs() * a[..., None]) ** b[..., None]
        phi = phi + ((z - other_mu[..., None]).abs() * c[..., None]) ** d[..., None]
        integral = integral + length * ((-phi).exp() * weights).sum(-1)
    norms = torch.lgamma(1 + 1 / b) - a.log() + torch.lgamma(1 + 1 / d) - c.log() + 2 * math.log(2)
    return norms - integral.log()


def test_the_exact_loss_and_its_gradients_are_those_of_a_plain_transcription():
    def single(mu, inv_alpha, beta, z):
        a, b = inv_alpha + 1e-4, beta + 1e-4
        nll = (((mu - z).abs() * a) ** b).clamp(1e-4, 1e3) - a.log() + torch.lgamma(1 + 1 / b)
        return (0.7 * nll + 0.2 * (mu - z).abs()).mean()

    image, text, *random = torch.randn(8, 6, 9, dtype=torch.float64)
    leaves = [image + random[0], random[1].abs() + 0.5, random[2].abs() + 1.05]
    leaves += [text + random[3], random[4].abs() + 0.5, random[5].abs() + 1.05]
    of_image, of_text = (tuple(t.requires_grad_() for t in leaves[i : i + 3]) for i in (0, 3))
    weights = {"cross_weight": 0.3, "nll_weight": 0.7, "l1_weight": 0.2}
    got = training._loss(of_image, of_text, image, text, cross="exact", form="paper", **weights)
    expected = single(*of_image, image) + single(*of_text, text)
    expected = expected + 0.3 * 0.7 * match_by_quadrature(*of_image, *of_text).mean()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


def match_nll(model, data):
    of_image, of_text = model.eval()(data.image, data.text)
    return fastprob.ggd_match_nll(*(of[data.caption_image] for of in of_image), *of_text).item()


@pytest.mark.parametrize("positive", ["relu", "softplus"])
def test_training_on_the_exact_likelihood_improves_it_on_held_out_pairs(positive):
    """Over the same run on the delta approximation, which improves it too."""
    held_out, config = pairs(seed=1), {**vars(CONFIG), "epochs": 20, "positive": positive}
    delta, exact = (run(config=TrainConfig(**{**config, "cross": cross})) for cross in ("delta", "exact"))
    untrained = run(config=TrainConfig(**{**config, "epochs": 1, "lr": 1e-9}))
    assert match_nll(exact.model, held_out) < match_nll(delta.model, held_out) - 0.05
    assert match_nll(delta.model, held_out) < match_nll(untrained.model, held_out) - 0.5
    assert exact.history["val_nll_exact"][-1] == pytest.approx(nll(exact.model, held_out, cross="exact"), abs=1e-6)
    assert exact.nll_after == exact.history["val_nll"][-1] == pytest.approx(nll(exact.model, held_out), abs=1e-6)


def test_before_training_both_runs_report_the_same_nll():
    exact, delta = run(config=EXACT), run()
    assert exact.nll_before == delta.nll_before and "val_nll_exact" not in delta.history
    assert exact.history["step_loss"] != delta.history["step_loss"]


def test_a_run_on_the_exact_likelihood_keeps_the_epoch_that_is_best_by_it(tmp_path, monkeypatch):
    scores, saved = {"delta": iter([9.0, 3.0, 2.0, 1.0]), "exact": iter([2.0, 1.0, 3.0])}, []
    monkeypatch.setattr(training._Run, "score_nll", lambda self, cross="delta": next(scores[cross]))
    monkeypatch.setattr(ProbVLM, "save", lambda self, path: saved.append(path.name))
    history = run(tmp_path, config=EXACT).history
    assert (history["val_nll"], history["val_nll_exact"]) == ([3.0, 2.0, 1.0], [2.0, 1.0, 3.0])
    assert history["nll_after"] == 1.0 and saved == ["best.safetensors"] * 2


def test_a_run_on_the_exact_likelihood_resumes_bit_for_bit(tmp_path, monkeypatch):
    expected = run(config=EXACT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(tmp_path, config=EXACT)
    with pytest.raises(ValueError, match="was trained with cross='exact', got cross='delta'"):
        run(tmp_path, resume=True)
    assert same(run(tmp_path, config=EXACT, resume=True), expected)


def test_a_run_from_before_there_was_a_choice_resumes_as_what_it_is(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["identity"]["cross"], state["identity"]["power"]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="was trained with cross='delta', got cross='exact'"):
        run(tmp_path, config=EXACT, resume=True)
    assert same(run(tmp_path, resume=True), run())


def test_the_exact_likelihood_of_pairs_is_the_mean_over_all_captions(monkeypatch):
    torch.manual_seed(0)
    model, data = ProbVLM(DIM, 16, 0.5).eval(), pairs()
    monkeypatch.setattr(training, "_NLL_ROWS", 4)
    own = nll(model, data, cross_weight=0.0)
    got = nll(model, data, cross_weight=0.25, cross="exact")
    assert got == pytest.approx(own + 0.25 * match_nll(model, data), rel=1e-5)


def test_the_released_residual_has_no_exact_likelihood():
    options = {"form": "released", "cross": "exact"}
    message = "form must be 'paper' where cross is 'exact', got 'released'"
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig(**options)
    with pytest.raises(ValueError, match=f"nll: {message}"):
        nll(ProbVLM(DIM), pairs(), **options)


# ---- what is drawn, saved and refused -------------------------------------------------------------------------------


def test_an_epoch_draws_each_image_once_with_a_caption_of_its_own():
    data = PairedEmbeddings(  # rows that name themselves; images have 1, 2 and 3 captions, in mixed order
        torch.arange(3.0)[:, None], torch.arange(6.0)[:, None], torch.tensor([2, 1, 0, 2, 1, 2])
    )
    train, drawn = Pairs(data, torch.device("cpu")), set()
    for epoch in range(60):
        batches = list(train.epoch(seed=4, epoch=epoch, batch_size=2))
        assert [len(image) for image, _ in batches] == [2, 1]
        image, text = (torch.cat(rows).squeeze(1).long() for rows in zip(*batches, strict=True))
        assert sorted(image.tolist()) == [0, 1, 2]
        assert data.caption_image[text].equal(image)
        drawn.update(text.tolist())
        later = list(train.epoch(4, epoch, 2, first=1))
        assert len(later) == 1 and later[0][1].equal(batches[1][1])
    assert drawn == set(range(6))
    epochs = [torch.cat([text for _, text in train.epoch(4, epoch, 2)]) for epoch in range(20)]
    assert len({tuple(texts.flatten().tolist()) for texts in epochs}) > 5
    other = [torch.cat([text for _, text in train.epoch(5, epoch, 2)]) for epoch in range(20)]
    assert any(not a.equal(b) for a, b in zip(epochs, other, strict=True))


@pytest.mark.parametrize("steps", [1, 5, 7, 14])
def test_ctrl_c_leaves_a_run_that_resumes_bit_for_bit(tmp_path, monkeypatch, steps):
    """A real SIGINT in the middle of a step: mid-epoch, and at the last step of an epoch."""
    expected = run(tmp_path / "whole")
    stop_after(monkeypatch, steps, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == divmod(steps, 5)
    assert same(run(tmp_path, resume=True), expected)
    for name in ("best.safetensors", "history.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_callers_handler_of_ctrl_c_is_put_back():
    def mine(*_):
        pass

    before = signal.signal(signal.SIGINT, mine)
    try:
        run()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once_and_the_run_still_resumes(tmp_path, monkeypatch):
    expected = run()

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_after(monkeypatch, 8, twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert same(run(tmp_path, resume=True), expected)


def test_a_crash_before_the_first_epoch_ends_resumes_from_the_start(tmp_path, monkeypatch):
    expected = run()

    def crash():
        raise RuntimeError("power cut")

    stop_after(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path)
    assert same(run(tmp_path, resume=True), expected)


def test_resuming_a_finished_run_returns_it(tmp_path):
    assert same(run(tmp_path), run(tmp_path, resume=True))


def test_the_learning_rate_falls_to_zero_along_a_cosine(monkeypatch):
    update, rates = training._Run.update, []

    def noted(self, image, text):
        loss = update(self, image, text)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(training._Run, "update", noted)
    run()
    assert rates == pytest.approx([3e-3 * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)])


def test_seed_decides_everything_and_the_callers_random_state_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = run()
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert same(run(), one)
    assert not same(run(config=TrainConfig(**{**vars(CONFIG), "seed": 1})), one)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": TrainConfig(**{**vars(CONFIG), "lr": 1e-2})}, r"lr=0\.003, got lr=0\.01"),
        ({"config": TrainConfig(**{**vars(CONFIG), "epochs": 4})}, "epochs=3, got epochs=4"),
        ({"data": pairs(images=23)}, "data=.*22.*got data=.*23"),
        ({"validation": None}, "validation=.*got validation=None"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_field(tmp_path, changed, message):
    run(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=True, **changed)


def test_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume needs the directory"):
        run(resume=True)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="must be a checkpoint of format"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(("form", "cross"), [("paper", "delta"), ("released", "delta"), ("paper", "exact")])
@pytest.mark.parametrize("positive", ["relu", "softplus"])
def test_fused_training_follows_the_reference(form, cross, positive):
    """Same seed, same batches, 20 steps; Adam divides by the gradient's own size, which lets rounding grow."""
    loss = {"form": form, "cross": cross, "l1_weight": 0.1}
    config = TrainConfig(epochs=4, batch_size=5, hidden=16, lr=3e-3, positive=positive, **loss)
    fused = torch.tensor(run(config=config).history["step_loss"])
    with fastprob.backend("reference"):
        reference = torch.tensor(run(config=config).history["step_loss"])
    torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-5)
    assert reference[-5:].mean() < reference[:5].mean()


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    update, taken = training._Run.update, []

    def poisoned(self, image, text):
        taken.append(1)
        return update(self, image, text) * (torch.inf if len(taken) == 8 else 1)

    monkeypatch.setattr(training._Run, "update", poisoned)
    with pytest.raises(FloatingPointError, match=r"loss \(inf\) stopped being finite at epoch 1, step 2.*last\.pt"):
        run(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)


def test_weights_that_become_nan_in_the_last_step_of_an_epoch_are_not_saved(tmp_path, monkeypatch):
    def poison(self, image, text):
        loss = update(self, image, text)
        if self.epoch == 1 and self.step == 4:
            self.model.text.after_dropout.weight.data[0, 0] = torch.nan
        return loss

    update = training._Run.update
    monkeypatch.setattr(training._Run, "update", poison)
    with pytest.raises(FloatingPointError, match="weights stopped being finite at epoch 1, step 4"):
        run(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_without_validation_the_training_pairs_are_scored(tmp_path):
    result = run(tmp_path, validation=None)
    assert result.history["val_nll"] == []
    assert result.nll_after == pytest.approx(nll(result.model, pairs()), abs=1e-6)
    assert (tmp_path / "best.safetensors").exists()


IMAGE, TEXT, OWNER = torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("image", "text", "owner", "message"),
    [
        (torch.ones(2, 5), TEXT, OWNER, "one width, got 5 and 4"),
        (torch.ones(4), TEXT, OWNER, r"image must be .* got \(4,\)"),
        (torch.ones(0, 4), TEXT, OWNER, r"image must be .* got \(0, 4\)"),
        (IMAGE, TEXT.long(), OWNER, "text must be a floating-point .*int64"),
        (IMAGE, TEXT, OWNER[:2], r"caption_image must be int64 \[3\], got \(2,\)"),
        (IMAGE, TEXT, OWNER.int(), "caption_image must be int64 .*int32"),
        (IMAGE, TEXT, OWNER + 1, r"caption_image must be in 0\.\.1, got 1\.\.2"),
        (IMAGE, TEXT, OWNER - 1, r"caption_image must be in 0\.\.1, got -1\.\.0"),
        (IMAGE, TEXT, torch.ones(3).long(), "image 0 has none"),
        (IMAGE, torch.tensor([1, torch.nan, 1])[:, None].expand(3, 4), OWNER, "text row 1 has a NaN"),
        (torch.tensor([1, torch.inf])[:, None].expand(2, 4), TEXT, OWNER, "image row 1 has a NaN or inf"),
    ],
)
def test_bad_pairs(image, text, owner, message):
    with pytest.raises(ValueError, match=f"PairedEmbeddings: .*{message}"):
        PairedEmbeddings(image, text, owner)


def test_bad_pairs_are_refused_by_fit_whatever_holds_them():
    class Store:
        image, text, caption_image = IMAGE, TEXT.index_fill(0, torch.tensor([2]), torch.nan), OWNER

    with pytest.raises(ValueError, match="fit: data: text row 2 has a NaN"):
        fit(Store, progress=False)
    with pytest.raises(ValueError, match="fit: validation must have the width of data, 8, got 4"):
        run(validation=PairedEmbeddings(IMAGE, TEXT, OWNER))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1.5),
        ("seed", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("cross_weight", -1.0),
        ("l1_weight", float("inf")),
        ("nll_weight", float("nan")),
        ("form", "other"),
        ("cross", "other"),
        ("hidden", 0),
        ("dropout", 1.0),
        ("positive", "exp"),
    ],
)
def test_bad_config(argument, value):
    with pytest.raises(ValueError, match=f"TrainConfig: {argument} must .*got {value!r}"):
        TrainConfig(**{argument: value})


@pytest.mark.parametrize("part", ["identity", "history", "model", "optimizer", "losses", "random"])
def test_a_damaged_checkpoint_is_named(tmp_path, part):
    run(tmp_path)
    path = tmp_path / "last.pt"
    state = torch.load(path, weights_only=True)
    for damaged in ({key: value for key, value in state.items() if key != part}, {**state, part: "nothing"}):
        torch.save(damaged, path)
        with pytest.raises(ValueError, match=rf"fit: {path} must be a checkpoint of a run, its state can't be used: "):
            run(tmp_path, resume=True)


def limited_to(kilobytes, directory):
    """Train in a process that may write no file beyond a size, as where the disk is full; what it raises."""
    code = f"""
import resource, sys, test_training
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes} * 1024,) * 2)
try:
    test_training.run(Path(sys.argv[1]))
except OSError as error:
    print(error.filename, error.strerror, sep=": ")
"""
    command = [sys.executable, "-c", code, directory]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parent)


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path):
    ran = limited_to(8, tmp_path / "run")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{tmp_path / 'run' / 'last.pt'}: File too large\n"
    assert [file.name for file in (tmp_path / "run").iterdir()] == []
