"""The demo of attribution, with few scenes: its tables hold what the library finds, and it goes on where it stopped."""

import json
import re

import pytest
import torch
from torch.nn import functional as F

from fastprob.attribution import RISE, Pairs, confidence, deletion, insertion, mass_in_box, pointing_game, roar_loss
from fastprob.data import DigitScenes
from fastprob.demo import explain, explain_maps
from fastprob.encoders import load_encoder
from fastprob.evaluation.statistics import mean_std

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.long]
SIZE = explain_maps.Size(scenes=6, chosen_on=3, checked=2, tuned_on=8, steps=2, batch=4, masks=10)
OPTIONS = {"size": SIZE, "seeds": (0, 1), "betas": (0.1, 2.0)}


@pytest.fixture(autouse=True, scope="module")
def here():
    """In this process, so that nothing is imported anew, and by short curves."""
    with pytest.MonkeyPatch.context() as patch:
        for metric in (insertion, deletion):
            patch.setitem(metric.__kwdefaults__, "steps", 3)
        patch.setattr(explain, "LAYERS", (1,))
        patch.setattr(explain, "each_on_a_thread", lambda function, settings, _: [function(each) for each in settings])
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    explain.run(directory, **OPTIONS)
    return directory


def test_files(out):
    text = (out / "report.md").read_text(encoding="utf-8")
    figures = re.findall(r"\]\((\w+\.png)\)", text)
    assert figures == ["grid.png", "settings.png", "sanity.png"]
    for file in figures:
        assert (out / file).read_bytes().startswith(b"\x89PNG")
    for line in text.splitlines():
        assert "nan" not in line and "{" not in line, line


def rows_of(out, side):
    """Method -> cells, of the table of a side."""
    headings = {"image": "## Images", "text": "## Texts", "both": "## Both"}
    _, _, section = (out / "report.md").read_text(encoding="utf-8").partition(headings[side])
    lines = [line.strip("| ").split(" | ") for line in section.partition("\n## ")[0].splitlines() if "± " in line]
    return {cells[0]: [cell.strip("*") for cell in cells[1:]] for cells in lines}


def rise(seed, level, split="test", count=6):
    """RISE's maps of scenes chosen by a reading of their captions."""
    scenes, encoder = DigitScenes(split, seed=seed, num_scenes=3 * count + 20), load_encoder("tiny")
    several = [i for i, boxes in enumerate(scenes.boxes) if len({box.label for box in boxes}) > 1][:count]
    images = torch.stack([encoder.preprocess(scenes[i][0]) for i in several])
    texts = [scenes[i][1][level] for i in several]
    found = RISE(encoder.model, encoder.tokenizer, masks=10, seed=seed)(images, texts)
    pairs = Pairs(encoder.model, encoder.tokenizer, images, texts, blank=explain_maps.blank())
    boxes = [
        [box[1:] for box in scenes.boxes[i] if explain_maps.NAMES[box.label] in scenes[i][1][level]] for i in several
    ]
    return encoder.model, pairs, found, boxes


def test_the_tables_say_what_the_library_finds(out):
    expected = {"image": [], "text": []}
    for seed in (0, 1):
        model, pairs, found, boxes = rise(seed, 2)
        of_image = [100 * pointing_game(found.image, boxes, margin=2), 100 * mass_in_box(found.image, boxes)]
        of_image += [*confidence(pairs, found, "image"), insertion(pairs, found), deletion(pairs, found)]
        _, full, of_full, _ = rise(seed, 0)
        of_text = [*confidence(full, of_full, "text"), *(area(full, of_full, "text") for area in (insertion, deletion))]
        _, train, of_train, _ = rise(seed, 0, "train", 8)
        options = {"steps": 2, "batch_size": 4, "seed": seed}
        whole = roar_loss(model, train, full, None, **options)
        for side, values in (("image", of_image), ("text", of_text)):
            roar = roar_loss(model, train, full, of_train, side=side, **options) - whole
            expected[side].append([*(float(value.double().mean()) for value in values), roar])
    for side, values in expected.items():
        for cell, of_seeds in zip(rows_of(out, side)["RISE"], zip(*values), strict=True):
            mean, std = (float(number) for number in cell.split(" ± "))
            assert (mean, std) == pytest.approx(mean_std(of_seeds), abs=0.51 if "." not in cell else 0.06), (side, cell)


def test_the_best_is_bold_and_named(out):
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    mean = {}
    for each in results["methods"]:
        mean.setdefault(each["of"]["name"], []).append(each["image"]["deletion"])
    mean = {name: sum(values) / 2 for name, values in mean.items() if name != "the truth"}
    assert len(mean) == 10
    best = min(mean, key=mean.get)
    text = (out / "report.md").read_text(encoding="utf-8").partition("## Texts")[0]
    assert re.search(rf"^\| {re.escape(best)} \|.*\| \*\*{mean[best]:.3f} ± [\d.]+\*\* \|", text, re.MULTILINE)
    place = sorted(mean, key=mean.get).index("M2IB") + 1
    assert re.search(rf"M2IB: place [^.]*\b{place} by deletion", text)


def test_settings_are_chosen_by_insertion_less_deletion(out):
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert len(results["settings"]) == 2 * 2
    for side in ("image", "text"):
        gains = {}
        for each in results["settings"]:
            key = each["of"]["layer"], each["of"]["beta"]
            gains[key] = gains.get(key, 0) + each[side]["insertion"] - each[side]["deletion"]
        assert tuple(results["chosen"][side]) == max(gains, key=gains.get)


def test_trivial_maps_and_true_ones():
    scenes = explain_maps.scenes_of("test", 6, 0)
    chosen = {side: explain_maps.Setting(0, 0.1) for side in ("image", "text")}
    ink, truth = (explain_maps.maps(SIZE, chosen, 0, name, scenes, 0) for name in ("ink and letters", "the truth"))
    for i, row in enumerate(scenes.rows):
        cells = torch.zeros(1, 1, 2, 2)
        for cell, digit in enumerate(scenes.all.grid[row].tolist()):
            if digit != -1:  # a full caption names all digits
                cells[0, 0, cell // 2, cell % 2] = 1
        torch.testing.assert_close(truth.image[i], F.interpolate(cells, (32, 32), mode="bilinear")[0, 0])
        words = scenes.texts(0)[i].split()
        assert [value for _, value in truth.of_words(i)] == [
            float(word.strip(",") in explain_maps.NAMES) for word in words
        ]
        letters = [len(word) for word in words]
        expected = [(n - min(letters)) / (max(letters) - min(letters)) for n in letters]
        assert [value for _, value in ink.of_words(i)] == pytest.approx(expected)
        far = (scenes.images[i] - explain_maps.blank()).square().sum(0).sqrt()
        torch.testing.assert_close(ink.image[i], (far - far.min()) / (far.max() - far.min()))


def test_it_goes_on_with_what_is_missing(out, monkeypatch, capsys):
    before, measured = (out / "report.md").read_text(), []
    (out / "runs" / "RISE-seed1.json").unlink()
    monkeypatch.setattr(explain, "_sanity", lambda *arguments: measured.append(arguments[2:]) or sanity(*arguments))
    explain.run(out, **OPTIONS)
    assert measured == [(1, "RISE")] and (out / "report.md").read_text() == before
    assert before in capsys.readouterr().out
    monkeypatch.setattr(explain, "_sanity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # another size is another run
        explain.run(out, **OPTIONS | {"size": explain_maps.Size(**vars(SIZE) | {"masks": 11})})
    assert (out / "report.md").read_text() == before


sanity = explain._sanity
