"""`fastprob explain`: overlays, the page and the picture say what the method says, and mistakes are told."""

import base64
import html
import inspect
import io
import os
import re
import sys

import numpy as np
import pytest
import torch
import toy_clip
from PIL import Image

from fastprob import attribution, cli
from fastprob.attribution import M2IB, NIB, GradCAM
from fastprob.attribution.figures import Tile, draw_tiles, overlay
from fastprob.attribution.pages import explained, shaded
from fastprob.cli import explain
from fastprob.data import DigitScenes
from fastprob.encoders import load_encoder
from fastprob.evaluation.page import HEAT

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = ("--model", "tiny", "--device", "cpu")
TEXT = "a lone nine at the top right"


def succeed(*argv):
    assert cli.main([str(word) for word in argv]) == 0


def fail(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["explain", *(str(word) for word in argv)]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("fastprob explain: error: ") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def scenes():
    return DigitScenes("test", num_scenes=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, scenes):
    directory = tmp_path_factory.mktemp("data") / "pictures"
    directory.mkdir()
    for i, (picture, _) in enumerate(scenes):
        picture.save(directory / f"{i}.png")
    (directory / "notes.md").write_text("no picture")
    return directory


# ---- overlays -------------------------------------------------------------------------------------------------------


def test_overlay():
    colours = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    heat = torch.linspace(0, 1, 2000).view(50, 40)
    shown = np.asarray(overlay(Image.fromarray(colours), heat)).astype(float)
    assert shown.shape == (150, 120, 3)  # three times
    grey = np.asarray(Image.fromarray(colours).convert("L")).astype(float)[..., None]
    alpha = 0.75 * heat.numpy()[..., None]
    expected = (1 - alpha) * grey + alpha * np.array(HEAT)
    assert np.abs(shown[1::3, 1::3] - expected).max() <= 1  # the middle of each magnified pixel
    assert np.abs(shown[0, 0] - grey[0, 0]).max() <= 1 and np.abs(shown[-1, -1] - expected[-1, -1]).max() <= 1


def test_a_map_is_stretched_over_a_greater_picture():
    heat = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    shown = np.asarray(overlay(Image.new("RGB", (400, 200)), heat)).astype(float)
    assert shown.shape == (200, 400, 3)
    assert np.abs(shown[10, 390] - 0.75 * np.array(HEAT)).max() <= 1
    assert shown[10, 10].max() == 0 and 0 < shown[100, 390, 0] < shown[10, 390, 0]


def test_tiles(tmp_path):
    pytest.importorskip("matplotlib")
    words = [("$5 & co,", 0.0), ("x" * 40, 1.0), *[("word", 0.5)] * 9]
    rows = [[Tile(Image.new("RGB", (8, 8)), "one", words, [(1, 1, 4, 4)]), Tile(Image.new("RGB", (300, 200)))]] * 2
    path = draw_tiles(rows, tmp_path / "tiles.png")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width == 540
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    orange = np.array([0.75 * channel + 0.25 * 255 for channel in HEAT])  # the greatest value, on white
    assert (np.abs(pixels - orange).max(1) <= 1).sum() > 200


def test_words_without_room_have_no_value(pictures):
    encoder = load_encoder("tiny")
    text = "a three above a seven, with a two and a six and a nine"
    seen, found = explained(
        GradCAM(encoder.model, encoder.tokenizer), encoder.preprocess, Image.new("L", (99, 50)), [text]
    )
    words = shaded(found, 0, text)
    assert seen.size == (32, 32) and seen.mode == "RGB"
    assert [word for word, _ in words] == text.split()
    assert words[: len(found.words[0])] == found.of_words(0) and len(found.words[0]) < len(words)
    assert all(value == 0 for _, value in words[len(found.words[0]) :])


# ---- the command ----------------------------------------------------------------------------------------------------


def test_an_image(tmp_path, capsys, scenes, pictures):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "explained.png"
    options = ("--beta", "1", "--layer", "0", "--steps", "4", "--samples", "3", "--seed", "7")
    succeed("explain", pictures / "0.png", TEXT, "--out", out, *MODEL, *options)
    printed = capsys.readouterr().out.splitlines()
    encoder = load_encoder("tiny")
    method = M2IB(encoder.model, encoder.tokenizer, beta=1, layer=0, steps=4, samples=3, seed=7)
    found = method(encoder.preprocess(scenes[0][0])[None], [TEXT])
    words = [f"{value:.2f} {word}" for word, value in found.of_words(0)]
    assert printed == [f"cosine {float(found.scores[0]):.3f}", *words, str(out)]
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 900
    assert os.listdir(out.parent) == ["explained.png"]


def cards(path):
    """Of every picture on a page: name or shaded words, cosine or None, and the picture itself."""
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and "default-src 'none'" in page
    for item in re.findall(r'<li class="item">(.*?)</li>', page, re.DOTALL):
        (data,) = re.findall(r"base64,([^\"]+)", item)
        words = re.findall(r'<span class="word" style="background: rgb\(255 122 26 / ([\d.]+)\)">(.*?)</span>', item)
        name = re.findall(r'<p dir="auto">([^<]+)</p>', item)
        cosine = re.findall(r"<dt>cosine</dt><dd>([\d.-]+)</dd>", item)
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        yield name or [(html.unescape(word), float(value)) for value, word in words], cosine, picture


def assert_page(path, names, rows, texts, method, encoder, scenes):
    shown = list(cards(path))
    assert len(shown) == len(rows) * (1 + len(texts[0]))
    for name, row, of_row in zip(names, rows, texts):
        picture, found = explained(method, encoder.preprocess, scenes[row][0], of_row)
        title, cosine, itself = shown.pop(0)
        assert title == [name] and cosine == [] and np.array_equal(itself.resize((32, 32), 0), scenes[row][0])
        for pair in range(len(of_row)):
            words, cosine, heat = shown.pop(0)
            expected = [(word, pytest.approx(0.7 * value, abs=0.006)) for word, value in found.of_words(pair)]
            assert words == expected and cosine == [f"{float(found.scores[pair]):.3f}"]
            assert np.array_equal(heat, overlay(picture, found.image[pair]))


def test_a_data_set(tmp_path, capsys, scenes):
    out, encoder = tmp_path / "page.html", load_encoder("tiny")
    succeed("explain", "digitscenes:test", "--limit", 2, "--out", out, "--method", "nib", "--steps", 3)
    assert capsys.readouterr().out == f"{out}\n"
    method, texts = NIB(encoder.model, encoder.tokenizer, steps=3), [scenes[row][1] for row in (0, 1)]
    assert_page(out, ["picture 0", "picture 1"], (0, 1), texts, method, encoder, scenes)
    page = out.read_text(encoding="utf-8")
    assert "digitscenes:test, 2 pictures" in page and "nib, steps 3" in page and "tiny, digitscenes" in page


def test_a_directory_of_images_and_a_text(tmp_path, scenes, pictures):
    out, encoder = tmp_path / "page.html", load_encoder("tiny")
    succeed("explain", pictures, "a <nine> & more", "--out", out, "--method", "gradcam", *MODEL)
    method = GradCAM(encoder.model, encoder.tokenizer)
    names = [f"{i}.png" for i in range(3)]
    assert_page(out, names, range(3), [["a <nine> & more"]] * 3, method, encoder, scenes)
    assert "pictures, 3 pictures" in out.read_text(encoding="utf-8")
    succeed("explain", pictures, TEXT, "--limit", 1, "--out", tmp_path / "one.html", "--method", "gradcam", *MODEL)
    assert len(list(cards(tmp_path / "one.html"))) == 2


@pytest.mark.parametrize("name", explain.METHODS)
def test_every_method(tmp_path, capsys, monkeypatch, pictures, name):
    pytest.importorskip("matplotlib")
    method = getattr(attribution, explain.METHODS[name])
    takes = [option for option in explain.OPTIONS if option in inspect.signature(method).parameters]
    values = {"layer": 1, "beta": 0.5, "steps": 2, "samples": 2, "masks": 20, "seed": 1}
    options = [word for option in takes for word in (f"--{option}", values[option])]
    succeed("explain", pictures / "1.png", TEXT, "--method", name, *options, "--out", tmp_path / "x.png", *MODEL)
    for option in explain.OPTIONS.keys() - set(takes):
        arguments = (pictures / "1.png", TEXT, "--method", name, f"--{option}", values[option], *MODEL)
        assert f"--{option} is not for --method {name}" in fail(capsys, *arguments, "--out", tmp_path / "y.png")


def test_another_model(tmp_path, capsys, pictures):
    pytest.importorskip("matplotlib")
    toy_clip.register(tmp_path, "toy-explain")
    model = ("--model", "toy-explain", "--pretrained", toy_clip.weights(tmp_path, "toy-explain", 0))
    succeed("explain", pictures / "0.png", "a cat", "--method", "gradcam", "--out", tmp_path / "a.png", *model)
    assert "cosine" in capsys.readouterr().out


def test_mistakes(tmp_path, capsys, monkeypatch, pictures):
    image, out = pictures / "0.png", tmp_path / "out.png"
    assert f"{tmp_path / 'none.png'}: No such file" in fail(capsys, tmp_path / "none.png", TEXT, "--out", out, *MODEL)
    assert "notes.md: not an image" in fail(capsys, pictures / "notes.md", TEXT, "--out", out, *MODEL)
    assert f"TEXT is needed for an image, {image}" in fail(capsys, image, "--out", out, *MODEL)
    assert "expected its captions in 0.txt" in fail(capsys, pictures, "--out", out, *MODEL)
    assert "--model is needed for" in fail(capsys, image, TEXT, "--out", out)
    assert "no-such-model" in fail(capsys, image, TEXT, "--out", out, "--model", "no-such-model")
    assert "--limit is not for an image" in fail(capsys, image, TEXT, "--limit", 3, "--out", out, *MODEL)
    assert "--template is not for a directory" in fail(capsys, pictures, TEXT, "--template", "{}", "--out", out, *MODEL)
    assert "--limit must be at least 1, got 0" in fail(capsys, pictures, TEXT, "--limit", 0, "--out", out, *MODEL)
    assert "layer must be from 0 to 1" in fail(capsys, image, TEXT, "--layer", 2, "--out", out, *MODEL)
    (tmp_path / "empty").mkdir()
    assert "expected images in it, got none" in fail(capsys, tmp_path / "empty", TEXT, "--out", out, *MODEL)
    assert not out.exists()
    out.write_text("mine")
    assert f"--out must be a new file, {out} exists already" in fail(capsys, image, TEXT, "--out", out, *MODEL)
    assert out.read_text() == "mine"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ("--method", "gradcam", "--out", tmp_path / "no.png", *MODEL)
    assert "figures need matplotlib" in fail(capsys, image, TEXT, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["empty", "out.png"]
