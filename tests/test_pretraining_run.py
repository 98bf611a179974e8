"""Runs of ALBEF and BLIP: written, read, interrupted and resumed, and as two ranks."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers")

from fastprob.data import DigitScenes
from fastprob.data.captions import Recaptioned, captions_of
from fastprob.pretraining import config as configs
from fastprob.pretraining import training
from fastprob.pretraining.config import PretrainConfig, Pretrained, Size
from fastprob.pretraining.tokens import words_of
from fastprob.pretraining.training import fit

SCENES = DigitScenes("train", num_scenes=20)
TINY = Size(32, 16, 16, 2, 2, 20, 8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(configs.SIZES, "small", TINY)


def options(objective, **changes):
    return PretrainConfig(**{"objective": objective, "epochs": 2, "batch_size": 8, "queue": 13, "lr": 1e-2} | changes)


def run(objective, directory=None, resume=False, **changes):
    return fit(SCENES, config=options(objective, **changes), directory=directory, resume=resume, progress=False)


def weights(made):
    return {name: weight.detach() for name, weight in made.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("objective", ["albef", "blip"])
def test_a_run_learns_and_its_model_is_read_again(objective, tmp_path):
    made, history = run(objective, tmp_path, epochs=30, alpha=0.0)
    assert sum(history["train_loss"][-10:]) < 0.9 * sum(history["train_loss"][:10])  # where few words are hidden, noisy
    read = Pretrained.load(tmp_path)
    assert same(weights(read), weights(made)) and read.config == made.config and not read.model.training
    assert read.model.tokenizer.get_vocab() == made.model.tokenizer.get_vocab()
    image = made.preprocess(SCENES[0][0])
    assert read.preprocess(SCENES[0][0]).equal(image)
    texts = made.model.tokenize(SCENES[0][1])
    for each in (made.model, read.model):
        assert each.towers.texts(texts)[0].equal(made.model.towers.texts(texts)[0])
    if objective == "blip":
        assert read.model.caption(image[None]) == made.model.caption(image[None])


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("objective", ["albef", "blip"])
def test_resumed_is_uninterrupted(objective, stop, tmp_path, monkeypatch):
    """After a step of the first epoch, between two, and in the first step of the second epoch."""
    whole, history = run(objective, tmp_path / "whole", captions=2)
    update, left = training._Run.update, [stop]

    def stopping(self, *batch):
        left[0] -= 1
        if left[0] < 0:
            self.save()
            raise KeyboardInterrupt
        return update(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Run, "update", stopping)
        run(objective, tmp_path / "cut", captions=2)
    resumed, again = run(objective, tmp_path / "cut", resume=True, captions=2)
    assert again == history and same(weights(resumed), weights(whole))
    for name in ("model.safetensors", "tokenizer.json", "history.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = (torch.load(tmp_path / way / "last.pt", weights_only=True) for way in ("cut", "whole"))
    assert same(ours["extras"]["teacher"], theirs["extras"]["teacher"])


def test_a_run_of_other_captions_or_settings_is_not_resumed(tmp_path, monkeypatch):
    run("blip", tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"trained with alpha=0\.4, got alpha=0\.3"):
        run("blip", tmp_path, resume=True, epochs=1, alpha=0.3)
    changed = DigitScenes("train", num_scenes=20)
    changed.captions[3], changed.captions[4] = changed.captions[4], changed.captions[3]
    with pytest.raises(ValueError, match="was trained with data="):
        fit(changed, config=options("blip", epochs=1), directory=tmp_path, resume=True, progress=False)
    words = words_of(["other words"])
    with pytest.raises(ValueError, match="was trained with tokens="):
        fit(SCENES, config=options("blip", epochs=1), tokenizer=words, directory=tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="resume needs the directory of the run, got None"):
        run("blip", resume=True)


OBJECTIVES = ("albef", "blip")


def test_a_run_goes_on_from_another_ones_weights(tmp_path):
    made, _ = run("blip", epochs=1)
    few = Recaptioned(SCENES, [own[:1] if number % 3 else [] for number, own in enumerate(captions_of(SCENES))])
    settings = {"config": options("blip", epochs=1, lr=1e-9, momentum=1.0), "directory": tmp_path, "progress": False}
    after, _ = fit(few, start=made, **settings)
    for name, weight in weights(made).items():
        torch.testing.assert_close(weights(after)[name], weight)
    twin = torch.load(tmp_path / "last.pt", weights_only=True)["extras"]["teacher"]
    assert twin["twin.visual.conv1.weight"].equal(made.model.towers.visual.conv1.weight)
    assert after.model.tokenizer.get_vocab() == made.model.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="was trained with start="):
        fit(few, start=after, resume=True, **settings)
    with pytest.raises(ValueError, match="start must have objective 'albef', got 'blip'"):
        fit(few, start=made, config=options("albef"))
    with pytest.raises(ValueError, match="tokenizer must be None with start, which has its own"):
        fit(few, start=made, config=options("blip"), tokenizer=words_of(["a"]))


@pytest.mark.parametrize(("losses", "still"), [("lm", "towers.text_projection.weight"), ("itc,itm", "decoder.cls.")])
def test_only_the_losses_that_are_named_train(losses, still):
    """And the loss is of them alone, while the history has all."""
    before, _ = run("blip", epochs=1)
    settings = {"start": before, "progress": False}
    after, history = fit(SCENES, config=options("blip", epochs=1, losses=losses), **settings)
    _, whole = fit(SCENES, config=options("blip", epochs=1), **settings)
    assert 0.1 * whole["step_loss"][0] < history["step_loss"][0] < 0.9 * whole["step_loss"][0]
    fixed = {name for name, weight in weights(before).items() if weights(after)[name].equal(weight)}
    assert any(name.startswith(still) for name in fixed)
    assert "towers.visual.conv1.weight" not in fixed
    means = {name: values[0] for name, values in history["losses"].items()}
    assert list(means) == ["itc", "itm", "lm"]
    assert sum(means[name] for name in losses.split(",")) == pytest.approx(history["train_loss"][0], rel=1e-5)
    matched = "matching.weight" not in fixed
    assert matched == ("itm" in losses)


def test_augmented_images_are_others_every_epoch_and_the_same_when_resumed(monkeypatch):
    shown, update = [], training._Run.update

    def seen(self, pixels, *others):
        shown.append(pixels)
        return update(self, pixels, *others)

    monkeypatch.setattr(training._Run, "update", seen)
    whole = [run("blip", augment=True)[0] for _ in range(2)]
    assert same(*map(weights, whole))
    assert all(a.equal(b) for a, b in zip(shown[:6], shown[6:], strict=True))
    assert [len(pixels) for pixels in shown[:6]] == [8, 8, 4, 8, 8, 4]
    preprocess = whole[0].preprocess
    plain = {preprocess(SCENES[i][0]).numpy().tobytes() for i in range(20)}
    every = [{image.numpy().tobytes() for pixels in part for image in pixels} for part in (shown[:3], shown[3:6])]
    assert len(every[0] | every[1]) > 38 and len(plain & (every[0] | every[1])) <= 2


def fit_on_rank(rank, directory):
    configs.SIZES["small"] = TINY
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=2)
    for objective in OBJECTIVES:
        made, history = run(objective, directory / f"{objective}{rank}", captions=2, batch_size=10)
        last = weights(made) | {"losses": torch.tensor(history["step_loss"])}
        torch.save(last, directory / f"{objective}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one_process_does(tmp_path):
    torch.multiprocessing.spawn(fit_on_rank, (tmp_path,), nprocs=2)
    for objective in OBJECTIVES:
        alone, history = run(objective, tmp_path / "alone", captions=2, batch_size=10)
        first, second = (torch.load(tmp_path / f"{objective}{rank}.pt", weights_only=True) for rank in range(2))
        assert same(first, second)
        assert first["losses"].tolist() == pytest.approx(history["step_loss"], rel=1e-5)
        for name, weight in weights(alone).items():
            if name.endswith("in_proj_bias"):
                weight, first[name] = (each.view(3, -1)[::2] for each in (weight, first[name]))
            if not name.endswith("key.bias"):  # a key's bias changes nothing: its gradient is rounding
                torch.testing.assert_close(first[name], weight, rtol=1e-2, atol=1e-4)
        files = [tmp_path / way / "last.pt" for way in ("alone", f"{objective}0")]
        ids = [torch.load(file, weights_only=True)["extras"]["teacher"]["queue.ids"] for file in files]
        assert ids[0].equal(ids[1]) and (ids[0] >= 0).all()
        assert not (tmp_path / f"{objective}1").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "clip"}, "objective must be one of 'albef', 'blip', got 'clip'"),
        ({"losses": "lm,mlm"}, "losses must be all, or of itc,itm,lm, got 'lm,mlm'"),
        ({"objective": "albef", "losses": "lm"}, "losses must be all, or of itc,itm,mlm, got 'lm'"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"momentum": 1.5}, r"momentum must be in 0\.\.1, got 1\.5"),
        ({"lr": float("nan")}, "lr must be finite and > 0, got nan"),
        ({"weight_decay": -1.0}, r"weight_decay must be finite and >= 0, got -1\.0"),
        ({"pretrained": "openai"}, "model must be given with pretrained, 'openai'; got None"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=f"PretrainConfig: {message}"):
        PretrainConfig(**changes)


def test_an_image_without_a_caption_is_named(tmp_path):
    data = DigitScenes("train", num_scenes=4)
    data.captions, data.caption_image = data.captions[:15], data.caption_image[:15]
    with pytest.raises(ValueError, match="data must have a caption of every image, image 3 has none"):
        fit(data, directory=tmp_path / "run")
    with pytest.raises(ValueError, match="data must have at least one image, got none"):
        fit(Recaptioned(data, [[], [], [], []]), directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_of_another_kind_are_refused(tmp_path):
    made, _ = run("albef", tmp_path, epochs=1)
    with pytest.raises(FileNotFoundError):
        Pretrained.load(tmp_path / "nowhere")
    other = dataclasses.replace(made, config=options("blip", epochs=1))
    other.save(tmp_path / "other")  # the config of BLIP, the weights of ALBEF
    with pytest.raises(ValueError, match="must have the weights of its config, got others"):
        Pretrained.load(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Pretrained.load(tmp_path)


def test_words_are_the_captions_own():
    captions = [caption for own in captions_of(SCENES) for caption in own]
    tokenizer = words_of(captions)
    assert all(tokenizer.unk_token_id not in tokenizer(caption)["input_ids"] for caption in captions)
    assert tokenizer.get_vocab() == words_of(reversed(captions)).get_vocab()
    assert tokenizer.decode(tokenizer("A three at the top left")["input_ids"][1:-1]) == "a three at the top left"
    few = words_of(["one two two", "two three"], size=5 + 2 * 7 + 1)
    assert few.tokenize("two one") == ["two", "o", "##n", "##e"]
    with pytest.raises(ValueError, match=r"size must be at least 19 for these captions' characters, got 18"):
        words_of(["one two two", "two three"], size=18)
    assert json.loads(few.backend_tokenizer.to_str())["model"]["type"] == "WordPiece"
