"""The demo of pretraining, with few scenes: its tables hold what the library finds, and it goes on where it stopped."""

import dataclasses
import json
import re

import pytest
import torch

from fastprob.data import DigitScenes
from fastprob.data.digitscenes import Caption
from fastprob.data.pixels import ImagesOf, Pixels
from fastprob.demo import pretrain
from fastprob.evaluation.statistics import mean_std
from fastprob.pretraining import training
from fastprob.pretraining.capfilt import match_probabilities
from fastprob.pretraining.config import Pretrained
from fastprob.pretraining.retrieval import retrieve

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.long]
SIZE = pretrain.Size(web=80, clean=12, held=4, test=16, epochs=2, tuning=1, false=0.3)
THRESHOLD = pretrain._threshold
MODELS = [f"BLIP, {captions}" for captions in ("web", "filtered", "captioned + filtered", "true")]


@pytest.fixture(autouse=True, scope="module")
def here():
    """In this process, so that nothing is imported anew; so raw a filter has no threshold that keeps a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "each_on_a_thread", lambda function, settings, _: [function(each) for each in settings])
        patch.setattr(pretrain, "_threshold", lambda *of: 0.2)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    pretrain.run(directory, size=SIZE, seeds=(0, 1))
    return directory


@pytest.fixture(scope="module")
def capfilt(out):
    return [json.loads((out / "runs" / f"capfilt-seed{seed}.json").read_text())["scenes"] for seed in (0, 1)]


def row(out, name):
    text = (out / "report.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    return found[1].split(" | ")


def same(cell, values, scale=100.0):
    mean, std = (float(number) for number in cell.split(" ± "))
    assert (mean, std) == pytest.approx(mean_std([scale * value for value in values]), abs=0.051)


def true(caption, grid):
    read = Caption.read(caption)
    return read is not None and read.true_of(grid[None]).item()


def test_files(out):
    text = (out / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+\.png)\)", text) == ["web.png", "captions.png"]
    for file in ("web.png", "captions.png"):
        assert (out / file).read_bytes().startswith(b"\x89PNG")
    assert "{" not in text and "30 % of which" in text
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| BLIP")] == MODELS


def test_the_webs_captions_are_true_but_for_their_share_of_false_ones():
    web = pretrain.Web(pretrain.Size(web=1000), 3)
    shown = torch.tensor([true(caption, grid) for caption, grid in zip(web.captions, web.scenes.grid)])
    assert torch.equal(shown, web.true) and 0.55 < shown.double().mean() < 0.65
    assert all(true(caption, grid) for caption, grid in zip(web.true_captions, web.scenes.grid))
    assert all(a == b for a, b, kept in zip(web.captions, web.true_captions, web.true) if kept)
    levels = [Caption.read(caption).digits for caption in web.true_captions]
    assert all(levels) and {len(digits) for digits in levels} == {1, 2, 3}
    assert pretrain.Web(pretrain.Size(web=1000), 4).captions != web.captions


def test_what_the_filter_keeps(out, capfilt):
    for name, side in (("the web's", "web"), ("drawn (nucleus)", "nucleus"), ("three beams", "beam")):
        of_seeds = []
        for seed, scenes in enumerate(capfilt):
            grids = DigitScenes("train", seed=seed, num_scenes=SIZE.web).grid
            is_true = [true(scene[side][0], grid) for scene, grid in zip(scenes, grids)]
            kept = [scene[side][1] >= 0.2 for scene in scenes]
            both = sum(a and b for a, b in zip(is_true, kept))
            texts = [scene[side][0] for scene in scenes]
            of_seeds.append([sum(is_true) / 80, sum(kept) / 80, (both, sum(kept)), (both, sum(is_true))])
            of_seeds[-1].append(len(set(texts)) / 80)
        cells = row(out, name)
        del cells[1]
        for position in (0, 1, 4):
            same(cells[position], [each[position] for each in of_seeds])
        for position in (2, 3):
            shares = [each[position] for each in of_seeds]
            if all(of for _, of in shares):
                same(cells[position], [part / of for part, of in shares])
            else:
                assert "nan" in cells[position]
    areas = []
    for seed, scenes in enumerate(capfilt):
        is_true, matches = pretrain.Web(SIZE, seed).true, torch.tensor([scene["web"][1] for scene in scenes])
        apart = matches[is_true][:, None] - matches[~is_true]
        areas.append(((apart > 0).double() + (apart == 0).double() / 2).mean().item())
    same(row(out, "the web's")[1], areas)
    same(row(out, "the web's")[0], [pretrain.Web(SIZE, seed).true.double().mean().item() for seed in (0, 1)])


def test_the_filter_and_the_captioner_are_tuned_apart(out, capfilt):
    start, captioner, judge = (
        Pretrained.load(out / "runs" / "seed1" / name) for name in ("blip-web", "captioner", "filter")
    )
    at = start.model.towers.text_projection.weight
    assert torch.equal(captioner.model.towers.text_projection.weight, at)  # no part in writing
    assert not torch.equal(judge.model.towers.text_projection.weight, at)
    pixels = Pixels(ImagesOf(DigitScenes("train", seed=1, num_scenes=80)), judge.preprocess)
    texts = [[scene["web"][0], scene["nucleus"][0]] for scene in capfilt[1]]
    matches = match_probabilities(judge.model, pixels, texts, progress=False)
    kept = [[scene["web"][1], scene["nucleus"][1]] for scene in capfilt[1]]
    assert torch.allclose(torch.tensor(matches), torch.tensor(kept), atol=1e-5)


def test_models_are_trained_on_what_was_kept(out, capfilt):
    for captions, sides in (("filtered", ["web"]), ("captioned + filtered", ["web", "nucleus"])):
        setting = pretrain.Setting(1, "blip", captions)
        made = pretrain._captions(out / "runs", SIZE, setting, pretrain.Web(SIZE, 1))
        assert made == [[scene[side][0] for side in sides if scene[side][1] >= 0.2] for scene in capfilt[1]]
        assert any(made)


def test_retrieval_and_captions(out):
    of_seeds = []
    for seed in (0, 1):
        made = Pretrained.load(out / "runs" / f"seed{seed}" / "blip-true")
        scenes = DigitScenes("test", seed=seed, num_scenes=16)
        texts = [caption for i, caption in enumerate(scenes.captions) if i % 5 < 3]
        pixels = Pixels(ImagesOf(scenes), made.preprocess)
        to_texts, to_images = (
            each.by_matching[:, 0].tolist() for each in retrieve(made.model, pixels, texts, first=32, progress=False)
        )
        written = made.model.caption(next(pixels.read([torch.arange(16)])), num_beams=3, min_new_tokens=5)
        of_seeds.append(
            [
                sum(text // 3 == i for i, text in enumerate(to_texts)) / 16,
                sum(true(texts[text], scenes.grid[i]) for i, text in enumerate(to_texts)) / 16,
                sum(image == i // 3 for i, image in enumerate(to_images)) / 48,
                sum(true(texts[i], scenes.grid[image]) for i, image in enumerate(to_images)) / 48,
                sum(true(caption, grid) for caption, grid in zip(written, scenes.grid)) / 16,
                len(set(written)) / 16,
            ]
        )
    cells = row(out, "BLIP, true")
    for cell, values in zip(cells[:6], zip(*of_seeds), strict=True):
        same(cell, values)


def test_chance_and_the_best_constant_caption(out):
    of_seeds = []
    for seed in (0, 1):
        scenes = DigitScenes("test", seed=seed, num_scenes=16)
        texts = [caption for i, caption in enumerate(scenes.captions) if i % 5 < 3]
        shares = [sum(true(text, grid) for grid in scenes.grid) / 16 for text in texts]
        of_seeds.append([1 / 16, sum(shares) / 48, max(shares)])
    cells = row(out, "chance; the best constant caption")
    for position, at in enumerate((0, 1, 0, 1, 2)):
        same(cells[position], [each[at] for each in of_seeds])


def test_it_goes_on_with_what_is_missing(out, monkeypatch):
    text = (out / "report.md").read_text(encoding="utf-8")
    (out / "runs" / "blip-true-seed0.json").unlink()

    def fail(*args, **options):
        raise AssertionError("trained anew")

    monkeypatch.setattr(training._Run, "update", fail)
    pretrain.run(out, size=SIZE, seeds=(0, 1))
    assert (out / "report.md").read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match="was trained with "):  # not taken for one of other scenes
        pretrain.run(out, size=dataclasses.replace(SIZE, web=81), seeds=(0, 1))


def test_of_one_seed_there_is_no_deviation(out):
    pretrain.run(out, size=SIZE)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Percent, 1 seed of" in text and "±" not in text and "BLIP, true | " in text


def test_the_threshold_tells_own_captions_from_the_next_scenes_best(out):
    """Of all thresholds, by hand."""
    judge, val = Pretrained.load(out / "runs" / "seed0" / "filter"), DigitScenes("val", num_scenes=12)
    said, pixels = [val[i][1][:3] for i in range(12)], Pixels(ImagesOf(val), judge.preprocess)
    pairs = [[] if i < 5 else [*said[i], *said[i + 1 if i < 11 else 5]] for i in range(12)]
    of_pairs = match_probabilities(judge.model, pixels, pairs, progress=False)[5:]
    own, others = ([value for each in of_pairs for value in each[part]] for part in (slice(3), slice(3, 6)))

    def gain(threshold):
        return sum(value >= threshold for value in own) - sum(value >= threshold for value in others)

    assert gain(THRESHOLD(judge, pixels, said, 5)) == max(map(gain, own)) > 0
