"""Labelled images: the forms that users have, k-shot samples, base and new classes, shifted digits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastprob.data.digitscenes import DigitScenes
from fastprob.data.images import open_rgb
from fastprob.data.labelled import LabelledImages, open_splits

CLASSES = ("abyssinian_cat", "beagle", "zebra")


def colour(label, i):
    return (40 * label, 10 * i, 0)


def image_file(path, label, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour(label, i)).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                image_file(tmp_path / split / name / f"{i}.png", label, i)
    return tmp_path


@pytest.fixture
def coop(tmp_path):
    """A split file as CoOp publishes them, beside the folder of its images."""
    rows = {}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        rows[split] = []
        for label, name in enumerate(CLASSES):
            for i in range(count):
                file = f"{name}/{split}-{i}.png"
                image_file(tmp_path / "images" / file, label, i)
                rows[split].append([file, label, name])
    path = tmp_path / "split_zhou_Pets.json"
    path.write_text(json.dumps(rows))
    return path


def pixels(data):
    return [np.asarray(data[i])[0, 0].tolist() for i in range(len(data))]


def test_folders(folders):
    splits = open_splits(str(folders))
    assert sorted(splits) == ["test", "train"]
    assert splits["train"].classnames == list(CLASSES)
    assert splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert pixels(splits["test"]) == [list(colour(label, i)) for label in range(3) for i in range(2)]
    (folders / "classnames.txt").write_text("zebra\tplains zebra\nbeagle small hound\nokapi\n")
    assert open_splits(str(folders))["test"].classnames == ["abyssinian_cat", "small hound", "plains zebra"]
    (folders / "test").rename(folders / "val")
    assert sorted(open_splits(str(folders))) == ["test", "train"]  # ImageNet's test split has no labels


def test_coop_split_files(coop, tmp_path):
    splits = open_splits(str(coop))
    assert {split: len(data) for split, data in splits.items()} == {"train": 9, "val": 3, "test": 6}
    assert splits["val"].classnames == list(CLASSES) and splits["val"].labels.tolist() == [0, 1, 2]
    assert pixels(splits["test"]) == [list(colour(label, i)) for label in range(3) for i in range(2)]
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert len(open_splits(f"{coop}@{tmp_path / 'elsewhere'}")["train"]) == 9


def test_sixteen_bits_are_scaled_and_torn_files_named(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.array_equal(np.asarray(open_rgb(tmp_path / "ramp.png"))[..., 1], ramp // 257)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: expected 8 or 16 bits a channel, got mode 'F'"):
        open_rgb(tmp_path / "float.tif")
    for kind in ("png", "jpg", "webp", "gif"):
        file = tmp_path / f"torn.{kind}"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(ValueError, match=rf"torn\.{kind}: "):
            open_rgb(file)
    with pytest.raises(FileNotFoundError):
        open_rgb(tmp_path / "none.png")


def test_few_shot_draws_by_seed_from_every_class():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] * 10)
    images = np.arange(22, dtype=np.uint8).reshape(22, 1, 1, 1).repeat(3, 3)
    data = LabelledImages("numbers", images, labels, ["a", "b", "c"])
    drawn = {seed: data.few_shot(4, seed) for seed in (1, 2)}
    assert drawn[1].labels.tolist() == [0] * 4 + [1] * 2 + [2] * 4  # class b has only two
    for few in drawn.values():
        which = [image[0] for image in pixels(few)]
        assert len(set(which)) == 10 and labels[which].tolist() == few.labels.tolist()
    assert pixels(drawn[1]) == pixels(data.few_shot(4, 1)) != pixels(drawn[2])
    assert all(image in pixels(drawn[1]) for image in pixels(data.few_shot(3, 1)))  # fewer are among more
    assert len(data.few_shot(0, 1)) == 22
    places = [(which[:4], [i - 12 for i in which[6:]]) for which in ([p[0] for p in pixels(d)] for d in drawn.values())]
    assert any(a != c for a, c in places)  # classes of one size are drawn from apart
    fingerprints = {drawn[1].fingerprint(), data.few_shot(4, 1).fingerprint(), drawn[2].fingerprint()}
    assert len(fingerprints) == 2


def test_base_and_new_classes_are_halves_with_labels_of_their_own(folders):
    data = open_splits(str(folders))["train"]
    base, new = data.of_classes("base"), data.of_classes("new")
    assert data.of_classes("all") is data
    assert base.classnames == list(CLASSES[:2]) and base.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert new.classnames == ["zebra"] and new.labels.tolist() == [0, 0, 0]
    assert pixels(base) + pixels(new) == pixels(data)


def test_shifted_digits():
    plain = open_splits("digits")
    scenes = DigitScenes("test", num_scenes=3000)
    lone = [i for i, row in enumerate(scenes.grid.tolist()) if sorted(row)[2] == -1]
    assert plain["test"].labels.tolist() == [max(scenes.grid[i].tolist()) for i in lone]
    assert np.array_equal(np.stack([np.asarray(plain["test"][i]) for i in range(50)]), scenes.pixels[lone[:50]])
    images = plain["val"].images.astype(int)
    inverted, thickened, rotated = (open_splits(f"digits:{s}")["val"] for s in ("inverted", "thickened", "rotated"))
    assert np.array_equal(inverted.images, 255 - images)
    assert (thickened.images >= images).all() and thickened.images[3, 5, 6, 1] == images[3, 4:7, 5:8, 1].max()
    assert np.array_equal(rotated.images[0], Image.fromarray(plain["val"].images[0]).rotate(
        10, Image.Resampling.BILINEAR, fillcolor=tuple(plain["val"].images[0][0, 0])))  # fmt: skip
    for data in (inverted, thickened, rotated):
        assert torch.equal(data.labels, plain["val"].labels) and data.template == "a lone {}"


def test_what_is_none_of_these_is_named(tmp_path, folders, coop):
    def message(spec):
        with pytest.raises(ValueError) as caught:
            open_splits(str(spec))
        return str(caught.value)

    assert "digits must be shifted by one of ['inverted', 'rotated', 'thickened'], got 'bent'" in message("digits:bent")
    assert "or a directory with train/ and test/; got 'nowhere', not found" in message("nowhere")
    assert "expected train/ and test/ (or val/) in it, got []" in message(tmp_path / "images")
    (folders / "test" / "zebra").rename(folders / "test" / "okapi")
    assert "expected the classes of train/ in test/, they differ by ['okapi', 'zebra']" in message(folders)
    (folders / "test" / "okapi" / "0.png").unlink()
    (folders / "test" / "okapi" / "1.png").unlink()
    assert "a folder of images for each class: Found no valid file for the classes okapi" in message(folders)
    rows = json.loads(coop.read_text())
    (tmp_path / "images" / rows["test"][1][0]).unlink()
    assert "1 of 6 images are missing, first" in message(coop)
    assert f"expected {rows['train'][0][0]} in {tmp_path / 'test'}" in message(f"{coop}@{tmp_path / 'test'}")
    coop.write_text(json.dumps({**rows, "train": [*rows["train"], ["a.png", 7, "lynx"]]}))
    assert "expected labels 0 to 3, got [0, 1, 2, 7]" in message(coop)
    coop.write_text(json.dumps({**rows, "test": [["a.png", 1, "lynx"]]}))
    assert "expected one name of label 1, got 'beagle', 'lynx'" in message(coop)
    coop.write_text(json.dumps({"train": rows["train"]}))
    assert "expected rows of 'train' and of 'test', got ['train']" in message(coop)
    for broken in ("[1]", "{", '{"train": [[1]]}'):
        coop.write_text(broken)
        assert "expected {train, val, test: [[path, label, name]]}, got" in message(coop)
