"""DigitScenes: disjoint splits, captions whose truth an independent reading of the text confirms, boxes, data sets."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastprob.data.captions import open_dataset
from fastprob.data.digitscenes import EMPTY, LEVELS, NAMES, Caption, DigitScenes, truth

PLACE = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}


@pytest.fixture(scope="module")
def scenes():
    return DigitScenes("val", num_scenes=400)


def read(text: str, scene: list[int]) -> bool:
    """Whether `text` is true of the scene (digit in each cell), from the words alone."""
    total = sum(digit != EMPTY for digit in scene)
    if text == "handwriting":
        return True
    if match := re.fullmatch(r"(one|two|three) digits?", text):
        return total == NAMES.index(match[1])
    if match := re.fullmatch(r"an? lone (\w+)(?: at the (\w+ \w+))?", text):
        cell = scene.index(NAMES.index(match[1])) if NAMES.index(match[1]) in scene else None
        return total == 1 and cell is not None and (match[2] is None or PLACE[match[2]] == cell)
    digits = [NAMES.index(word) for word in re.findall(r"(?:\ban?|another) (\w+)", text)]
    claims = set(re.findall(r"above|below|left|right", text))
    for cells in itertools.permutations(range(4), len(digits)):
        if [scene[cell] for cell in cells] != digits:
            continue
        row, column = (cells[0] // 2 - cells[1] // 2, cells[0] % 2 - cells[1] % 2) if claims else (0, 0)
        true = {name for name, holds in [("above", row < 0), ("below", row > 0)] if holds}
        true |= {name for name, holds in [("left", column < 0), ("right", column > 0)] if holds}
        if claims <= true:
            return True
    return False


def test_splits_share_no_digit_image():
    used = {}
    for split, seed in [("train", 0), ("val", 1), ("test", 2)]:
        index = DigitScenes(split, seed=seed).digit_index
        used[split] = set(index[index != EMPTY].tolist())
    assert len(used["train"]) > 1000
    assert min(len(used["val"]), len(used["test"])) > 200
    for one, other in itertools.combinations(used.values(), 2):
        assert not one & other


def test_every_caption_is_true_of_its_own_scene(scenes):
    own = scenes.matches()[torch.arange(len(scenes.captions)), scenes.caption_image]
    assert own.all()


def test_truth_is_what_the_text_says(scenes):
    matches, grid = scenes.matches(), scenes.grid.tolist()
    rows = torch.randperm(len(scenes.captions), generator=torch.Generator().manual_seed(0))[:400].tolist()
    for row in rows:
        said = [read(scenes.captions[row], scene) for scene in grid]
        assert matches[row].tolist() == said, scenes.captions[row]


@pytest.mark.parametrize(
    ("caption", "text", "scene", "true"),
    [
        (Caption((3, 7), "above"), "a three above a seven", [3, EMPTY, 7, EMPTY], True),
        (Caption((3, 7), "above"), "a three above a seven", [7, EMPTY, 3, EMPTY], False),
        (Caption((3, 7), "above"), "a three above a seven", [EMPTY, 3, 7, EMPTY], True),
        (Caption((3, 7), "above"), "a three above a seven", [3, 7, EMPTY, EMPTY], False),
        (Caption((8, 8)), "an eight and another eight", [8, EMPTY, 1, EMPTY], False),
        (Caption((8, 8), "left of"), "an eight left of another eight", [1, EMPTY, 8, 8], True),
        (Caption((3,), "", 1), "a lone three", [3, 7, EMPTY, EMPTY], False),
        (Caption((1, 1, 2)), "a one, another one and a two", [1, 2, EMPTY, 1], True),
        (Caption(count=1), "one digit", [EMPTY, EMPTY, EMPTY, 0], True),
        (Caption(count=2), "two digits", [1, 2, 3, EMPTY], False),
    ],
)
def test_captions_by_hand(caption, text, scene, true):
    assert caption.text == text
    assert caption.true_of(torch.tensor([scene])).tolist() == [true]


def test_captions_are_read_from_their_text(scenes):
    for statement in scenes.statements:
        assert Caption.read(statement.text) == statement
    place = Caption.read("a three at the top left")  # which no scene is captioned with, but a model may write
    assert place.true_of(torch.tensor([[3, -1, 5, -1], [5, 3, -1, -1]])).tolist() == [True, False]
    assert Caption.read("a two, another two and an eight") == Caption((2, 2, 8))
    assert [Caption.read(text) for text in ("an three", "four digits", "", "a two and a two")] == [None] * 4


def test_ambiguity_rises_as_captions_become_general(scenes):
    ambiguity = scenes.ambiguity()
    assert torch.equal(ambiguity, scenes.matches().sum(dim=1))
    means = [ambiguity[scenes.caption_level == level].float().mean().item() for level in range(LEVELS)]
    assert all(2 * low < high for low, high in itertools.pairwise([*means[:2], means[3]]))
    assert means == sorted(means)
    assert means[-1] == len(scenes)
    # and within a scene every level 1 caption follows from its level 0 caption
    table = scenes.matches().view(-1, LEVELS, len(scenes))
    assert (table[:, 0] <= table[:, 1]).all()
    assert (table[:, 1] <= table[:, 2]).all()


def test_boxes_hold_all_the_ink_and_nothing_else(scenes):
    for i in range(100):
        image = np.asarray(scenes[i][0]).astype(int)
        paper = image[15:17, 15:17].reshape(-1, 3).min(axis=0)  # the centre may hold a digit's margin: take the darkest
        ink = (image - paper > 0).any(axis=-1)  # [32, 32]
        for _, x0, y0, x1, y1 in scenes.boxes[i]:
            inside = ink[y0:y1, x0:x1]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            ink[y0:y1, x0:x1] = False
        assert not ink.any()


def test_boxes_are_the_grids_digits(scenes):
    for boxes, cells in zip(scenes.boxes, scenes.grid.tolist()):
        at = {(box.y0 + box.y1) // 32 * 2 + (box.x0 + box.x1) // 32: box.label for box in boxes}
        assert at == {cell: digit for cell, digit in enumerate(cells) if digit != EMPTY}


def test_named_boxes_are_of_the_digits_in_the_text(scenes):
    several = 0
    for row, text in enumerate(scenes.captions):
        words = re.findall(r"[a-z]+", text)
        said = {NAMES.index(word) for word in words if word in NAMES and "digit" not in text}
        named, boxes = scenes.named(row), scenes.boxes[row // LEVELS]
        assert named == [box for box in boxes if box.label in said], text
        several += 0 < len(named) < len(boxes)
    assert several > 100


def test_deterministic_by_seed_and_prefix():
    one, again, longer = (DigitScenes("test", num_scenes=n) for n in (30, 30, 60))
    other = DigitScenes("test", num_scenes=30, seed=1)
    assert np.array_equal(one.pixels, again.pixels) and one.captions == again.captions
    assert np.array_equal(one.pixels, longer.pixels[:30]) and one.captions == longer.captions[:150]
    assert not np.array_equal(one.pixels, other.pixels) and one.captions != other.captions


def test_item_is_an_image_and_its_five_captions(scenes):
    image, captions = scenes[-1]
    assert (image.mode, image.size, captions) == ("RGB", (32, 32), scenes.captions[-5:])
    with pytest.raises(IndexError):
        scenes[len(scenes)]


def test_truth_of_no_scene_or_caption():
    assert truth([], torch.zeros(3, 4, dtype=torch.long)).shape == (0, 3)
    assert truth([Caption((1,))], torch.zeros(0, 4, dtype=torch.long)).shape == (1, 0)


@pytest.mark.parametrize("options", [{"split": "dev"}, {"num_scenes": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="DigitScenes: "):
        DigitScenes(**options)


# ------------------------------------------------------------------------------------- published formats


def picture(path, colour=(9, 9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_open_digitscenes():
    val = open_dataset("digitscenes:val")
    assert (val.name, len(val), val.labels) == ("digitscenes:val", 1000, None)
    assert open_dataset("digitscenes").name == "digitscenes:train"


def coco(root, annotations):
    images = [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}]
    path = root / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_coco(tmp_path):
    notes = [(3, "A cat. "), (7, "Two dogs"), (3, "A pet")]
    path = coco(tmp_path, [{"image_id": image, "caption": text} for image, text in notes])
    for folder in ("val2017", "elsewhere"):
        picture(tmp_path / folder / "a.jpg", (255, 0, 0))
        picture(tmp_path / folder / "b.jpg")
    for spec in (str(path), f"{path}@{tmp_path / 'elsewhere'}"):
        data = open_dataset(spec)
        assert [data[i][1] for i in range(2)] == [["Two dogs"], ["A cat.", "A pet"]]
        assert data[1][0].getpixel((4, 4))[0] > 200
        assert data.labels is None
    (tmp_path / "val2017" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"images\[0\]: .*b\.jpg: No such file"):
        open_dataset(str(path))


@pytest.mark.parametrize("annotation", [{"image_id": 3}, {"image_id": 99, "caption": "?"}, "text"])
def test_coco_bad_annotation(tmp_path, annotation):
    with pytest.raises(ValueError, match=r"expected .*, got "):
        open_dataset(str(coco(tmp_path, [annotation])))


def test_flickr30k_with_its_published_broken_row(tmp_path):
    picture(tmp_path / "1.jpg")
    rows = ["image_name| comment_number| comment", "1.jpg| 0| Two men , outside .", "1.jpg| 4   A dog runs | fast ."]
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    data = open_dataset(str(tmp_path / "results.csv"))
    assert data[0][1] == ["Two men , outside .", "A dog runs | fast ."]
    (tmp_path / "results.csv").write_text("\n".join([*rows, "2.jpg, 1, commas"]))
    with pytest.raises(ValueError, match=r"line 4: expected 'image\| number\| caption', got '2\.jpg, 1, commas'"):
        open_dataset(str(tmp_path / "results.csv"))


def test_cub(tmp_path):
    for name, bird in [("002.Gull", "y"), ("001.Crow", "x"), ("001.Crow", "z")]:
        picture(tmp_path / "images" / name / f"{bird}.jpg")
        text = tmp_path / "text_c10" / name / f"{bird}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"bird {bird}\n\nit flies\n")
    data = open_dataset(str(tmp_path))
    assert [data[i][1][0] for i in range(3)] == ["bird x", "bird z", "bird y"]
    assert data[0][1] == ["bird x", "it flies"]
    assert data.labels.tolist() == [0, 0, 1]


def test_flowers(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    for i in (1, 2):
        picture(tmp_path / "jpg" / f"image_0000{i}.jpg")
    scipy_io.savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[77, 1]])})
    data = open_dataset(str(tmp_path))
    assert data.labels.tolist() == [76, 0]
    assert data[0][1] == []
    (tmp_path / "jpg" / "image_00002.jpg").unlink()
    with pytest.raises(ValueError, match=r"expected a label for every .*, got 2 for 1 images"):
        open_dataset(str(tmp_path))
    (tmp_path / "imagelabels.mat").write_bytes(b"torn" * 50)
    with pytest.raises(ValueError, match=r"imagelabels\.mat: expected a \.mat file, got: "):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("spec", ["nothing/here", "digits", ""])
def test_unknown_data_set(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"expected digitscenes.*; got '{spec}'"):
        open_dataset(spec)
