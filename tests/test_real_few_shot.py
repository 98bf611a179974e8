"""The few-shot tasks of real pictures and the small CLIP: sheets, splits, drawings and training, on tiny files."""

import json
import pathlib
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from bench.real import clip, emoji, few_shot, teacher
from fastprob.data.labelled import open_splits
from fastprob.encoders import load_encoder

VENDORS = (*emoji.VENDORS, emoji.HELD_OUT)


def row(number, name, subcategory, category="Food & Drink", but=()):
    has = {f"has_img_{vendor}": vendor not in but for vendor in VENDORS}
    names = {"name": name.upper(), "short_name": name, "short_names": [name, f"the_{name}"]}
    place = {"sheet_x": number % 4, "sheet_y": number // 4}
    return {**names, **place, **has, "category": category, "subcategory": subcategory}


ROWS = [row(i, f"fruit-{i}", "food-fruit") for i in range(emoji.LEAST)]
ROWS += [row(14, "tea", "drink"), row(15, "flag-x", "flag", "Flags"), row(16, "man-cook", "person-role")]


@pytest.fixture
def package(tmp_path):
    """Unpacked emoji: in the cell (x, y) of a vendor's sheet, all pixels are (vendor, x, y), but one is transparent."""
    for number, vendor in enumerate(VENDORS):
        sheet = np.zeros((5 * 34, 4 * 34, 4), np.uint8)
        for x in range(4):
            for y in range(5):
                sheet[34 * y + 1 : 34 * y + 33, 34 * x + 1 : 34 * x + 33] = (number, x, y, 255)
                sheet[34 * y + 5, 34 * x + 5, 3] = 0
        file = tmp_path / "emoji" / "package" / "img" / vendor / "sheets" / "32.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(sheet).save(file)
    rows = [{**each, "has_img_apple": each["name"] != "TEA"} for each in ROWS]
    (tmp_path / "emoji" / "package" / "emoji.json").write_text(json.dumps(rows))
    return tmp_path / "emoji"


def test_emoji_have_captions_without_their_group(package):
    found = emoji.read_emoji(package)
    assert len(found) == emoji.LEAST + 1  # no flag and no man's form
    assert found[3].captions == ["fruit-3", "an emoji of fruit-3", "fruit 3", "the fruit 3"]
    assert found[3].group == "food fruit" and found[-1].vendors == set(VENDORS) - {"apple"}


def test_a_drawing_is_the_vendors_own_cell(package):
    found = emoji.read_emoji(package)
    for number, vendor in enumerate(VENDORS):
        drawn = emoji.draw(package, vendor, found)
        assert [each for each, _ in drawn] == (found[:-1] if vendor == "apple" else found)
        for each, image in drawn:
            assert image.size == (32, 32) and image.getpixel((4, 4)) == (255, 255, 255)
            assert sorted(image.getcolors()) == [(1, (255, 255, 255)), (32 * 32 - 1, (number, *each.cell))]


def test_no_emoji_and_no_vendor_is_in_two_parts(package, monkeypatch):
    found = emoji.read_emoji(package)
    parts = emoji.split(found)
    names = [{each.name for each in of} for of in parts.values()]
    assert [len(of) for of in names] == [4 + 1, 4, 6]  # the smaller group is the CLIP's
    assert set.union(*names) == {each.name for each in found} and sum(map(len, names)) == len(found)
    assert parts == emoji.split(found)
    monkeypatch.setattr(few_shot, "fetch", lambda source, cache: package)
    vendors: dict[str, set] = {"train": set(), "test": set()}
    for part, _, image in few_shot.emoji_pictures(package):
        vendors[part].add(VENDORS[image.getpixel((0, 0))[0]])
    assert vendors == {"train": set(emoji.VENDORS), "test": {emoji.HELD_OUT}}


def test_cifar_sheets_hold_a_picture_a_row(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "package").mkdir()
    Image.fromarray(pixels.reshape(5, 1024, 3)).save(tmp_path / "package" / "test_batch.png")
    assert np.array_equal(teacher.read_cifar(tmp_path, "test_batch"), pixels)


def test_a_drawing_is_black_on_white():
    ink = np.zeros((28, 28))
    ink[2, 5], ink[3, 5], ink[4, 5] = 1, 0.5, 1.2
    drawn = few_shot.read_drawing(json.dumps(ink.reshape(-1).tolist()))
    assert [drawn.getpixel((5, y)) for y in (1, 2, 3, 4)] == [255, 0, 128, 0]


def test_a_task_is_a_directory_that_the_command_reads(tmp_path):
    image = Image.new("RGB", (4, 4))
    pictures = [(part, name, image) for part in ("train", "test") for name in ("ice cream", "tea") for _ in range(2)]
    few_shot.write_task(pictures, tmp_path / "task")
    splits = open_splits(str(tmp_path / "task"))
    assert {name: of.labels.tolist() for name, of in splits.items()} == {"train": [0, 0, 1, 1], "test": [0, 0, 1, 1]}
    assert splits["test"].classnames == ["ice cream", "tea"]


def test_every_run_has_a_directory_of_its_own():
    runs = [(task, config.directory) for task, config in few_shot.settings(few_shot.TASKS)]
    assert len(set(runs)) == len(runs)
    assert {config.init for task, config in few_shot.settings(["emoji"])} == {"an emoji of", None}


def test_words_of_the_vocabulary_and_imagenets_names():
    names = teacher.imagenet_names()
    assert len(names) == 1000 and names[1] == "goldfish"


# --------------------------------------------------------------------------------------------------- the CLIP


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (12, 3, teacher.SIDE, teacher.SIDE), generator=draw).byte()
    image, text = (torch.nn.functional.normalize(torch.randn(n, 384, generator=draw), dim=1) for n in (12, 9))
    return teacher.Lessons(pixels, image, [[i % 5, 5] for i in range(8)], [f"word {i}" for i in range(9)], text)


RECIPE = clip.Recipe(epochs=2, steps=3, pairs=4, photos=2, words=3)


def test_batches_are_pictures_with_captions_of_their_own_then_photographs(data):
    run = clip._Run(data, RECIPE, None)
    for pictures, texts in run.batches():
        own, others = pictures[:4].tolist(), texts[4:]
        assert all(text in data.captions[picture] for picture, text in zip(own, texts[:4].tolist()))
        assert len(set(own)) == 4 and (pictures[4:] >= 8).all() and (others >= 6).all()


def test_the_clip_learns_and_is_read_by_open_clips_name(data, tmp_path):
    model = clip.train(data, clip.Recipe(epochs=1, steps=12, pairs=4, photos=2, words=3), progress=False)
    clip.save(model, tmp_path)
    encoder = load_encoder(f"local-dir:{tmp_path}")
    text = encoder.encode_text(encoder.tokenizer(data.texts))
    assert encoder.dim == 384
    assert (text * data.text).sum(1).mean() > 0.2  # of unrelated vectors 0.0, give or take 0.02
    image = Image.fromarray(data.pixels[0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        expected = model.half().float().encode_image(encoder.preprocess(image)[None], normalize=True)
    torch.testing.assert_close(encoder.encode_image(encoder.preprocess(image)[None]), expected)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(data, tmp_path, monkeypatch):
    whole, loss, steps = clip.train(data, RECIPE, progress=False), clip._Run.loss, []

    def interrupted(run, *batch):
        steps.append((run.epoch, run.step))
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return loss(run, *batch)

    monkeypatch.setattr(clip._Run, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clip.train(data, RECIPE, tmp_path, progress=False)
    resumed = clip.train(data, RECIPE, tmp_path, progress=False)
    assert steps == [(epoch, step) for epoch in (0, 1) for step in (0, 1, 2)]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_outlines_are_dark_where_the_picture_changes():
    gray = torch.zeros(1, 1, 6, 6)
    gray[..., 3:] = 1
    expected = torch.ones(6, 6)
    expected[:, 2:4] = 0
    assert torch.equal(clip.outlines(gray)[0, 0], expected)


def test_a_head_maps_features_to_the_captions_they_come_from():
    draw, count = torch.Generator().manual_seed(0), 1024
    text = torch.nn.functional.normalize(torch.randn(32, 8, generator=draw), dim=1)
    features = text[torch.arange(count) % 32] @ torch.randn(8, 64, generator=draw)
    lessons = teacher.Lessons(torch.empty(count, 0), features, [[i % 32] for i in range(count)], [""] * 32, text)
    found = (teacher._head(lessons)(features) @ text.T).argmax(1)
    assert (found == torch.arange(count) % 32).float().mean() > 0.8
