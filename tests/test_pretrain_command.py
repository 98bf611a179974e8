"""`fastprob pretrain`: fit, eval, caption and filter on files, one after another."""

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastprob.cli import main
from fastprob.data import DigitScenes, EmbeddingStore, open_dataset
from fastprob.data.captions import captions_of
from fastprob.data.pixels import ImagesOf, Pixels
from fastprob.pretraining import config as configs
from fastprob.pretraining.capfilt import match_probabilities, save_captions, write_captions
from fastprob.pretraining.config import Pretrained, Size
from fastprob.pretraining.text import ImageKeys

SCENES = DigitScenes("train", num_scenes=12)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(configs.SIZES, "small", Size(32, 16, 16, 2, 2, 20, 8))


@pytest.fixture
def table(tmp_path):
    """Pictures with two captions each, in a folder of their own."""
    lines = ["image,caption"]
    for number in range(len(SCENES)):
        image, captions = SCENES[number]
        file = tmp_path / "pictures" / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        lines += [f'{file.relative_to(tmp_path / "pictures")},"{caption}"' for caption in captions[:2]]
    path = tmp_path / "pictures" / "captions.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(capsys, *argv):
    code = main(["pretrain", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def fitted(capsys, table, directory, *options):
    given = ["--data", table, "--out", directory, "--epochs", 2, "--batch-size", 5, "--queue", 7, *options]
    return run(capsys, "fit", *given)


def test_fit_eval_caption_filter(capsys, table, tmp_path):
    checkpoint = tmp_path / "run"
    code, out, err = fitted(capsys, table, checkpoint)
    assert code == 0 and out.startswith(f"{checkpoint}/model.safetensors: loss "), err
    losses = json.loads((checkpoint / "history.json").read_text())["losses"]
    assert out.endswith(" (" + ", ".join(f"{name} {values[1]:.4f}" for name, values in losses.items()) + ")\n")
    assert (checkpoint / "losses.png").read_bytes().startswith(b"\x89PNG")
    of = ["--data", table, "--checkpoint", checkpoint]
    code, out, _ = run(capsys, "eval", *of, "--first", 5, "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    ways = [f"{way}, by {by}" for way in ("image -> text", "text -> image") for by in ("contrast", "matching")]
    assert code == 0 and list(found) == ways and all(list(each) == ["1", "5"] for each in found.values())
    assert [line.split("   ")[0] for line in out.splitlines()[1:]] == ways
    for way in ("image -> text", "text -> image"):  # the same five, in another order
        assert found[f"{way}, by contrast"]["5"] == found[f"{way}, by matching"]["5"]

    both, page = tmp_path / "written" / "both.json", ("--page", tmp_path / "captions.html")
    code, out, _ = run(capsys, "caption", *of, "--out", both, "--with-own", "--seed", 3, "--min-new-tokens", 4, *page)
    assert code == 0 and out == f"12 captions of 12 images, for --data {both}@{tmp_path / 'pictures'}\n"
    data = open_dataset(out.split("--data ")[1].strip(), progress=False)
    assert [own[:2] for own in captions_of(data)] == [SCENES[i][1][:2] for i in order_of(data)]
    assert all(len(own) == 3 for own in captions_of(data))
    text = html.unescape(page[1].read_text(encoding="utf-8"))
    assert text.count("<img") == 12 and text.count("its own: ") == 24
    for own in captions_of(data):
        assert f">its own: {own[1]}</li>" in text and f">{own[2]}</li>" in text

    kept = tmp_path / "kept.json"
    of = ["--data", f"{both}@{tmp_path / 'pictures'}", "--checkpoint", checkpoint]
    made = Pretrained.load(checkpoint)
    matches = match_probabilities(made.model, Pixels(ImagesOf(data), made.preprocess), captions_of(data))
    middle = sorted(value for own in matches for value in own)[18]
    page = tmp_path / "kept.html"
    code, out, _ = run(capsys, "filter", *of, "--out", kept, "--threshold", middle, "--page", page)
    assert code == 0 and out.startswith("18 of 36 captions, of ")
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert text.count("<img") == 12 and text.count(": left out</li>") == 18
    least = min((value, caption) for own in zip(matches, captions_of(data)) for value, caption in zip(*own))
    assert f">{least[0]:.2f} {least[1]}: left out</li>" in text
    expected = [[c for c, p in zip(*both) if p >= middle] for both in zip(captions_of(data), matches)]
    assert captions_of(open_dataset(f"{kept}@{tmp_path / 'pictures'}")) == [own for own in expected if own]
    code, _, err = run(capsys, "filter", *of, "--out", tmp_path / "none.json", "--threshold", 1)
    assert code == 2 and "no caption of 36 is a match by --threshold 1.0" in err
    assert not (tmp_path / "none.json").exists()


def order_of(data):
    return [int(image.stem) for image in data.images]


def test_a_run_is_an_encoder_for_embed(capsys, table, tmp_path):
    fitted(capsys, table, tmp_path / "run")
    model = f"run:{tmp_path / 'run'}"
    assert main(["embed", "--data", str(table), "--model", model, "--out", str(tmp_path / "store")]) == 0
    store, made = EmbeddingStore(tmp_path / "store"), Pretrained.load(tmp_path / "run")
    assert store.encoder["model"] == model and store.lost.cut == 0
    with torch.no_grad():
        for row, image in enumerate(store.ids):
            scene = SCENES[int(Path(image).stem)]
            wanted = made.model.towers.images(made.preprocess(scene[0])[None])[0][0]
            torch.testing.assert_close(store.image[row], wanted)
        texts = made.model.towers.texts(made.model.tokenize(store.captions))[0]
    torch.testing.assert_close(store.text, texts)
    code = main(["embed", "--data", str(table), "--model", model, "--pretrained", "x", "--out", str(tmp_path / "o")])
    assert code == 2 and f"pretrained must be None for '{model}', got 'x'" in capsys.readouterr().err


def test_what_is_somebody_elses_stays(capsys, table, tmp_path):
    fitted(capsys, table, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, _, err = fitted(capsys, table, tmp_path / "run")
    assert code == 2 and "holds a run already; go on with it by --resume, or choose another --out" in err
    assert fitted(capsys, table, tmp_path / "run", "--resume")[0] == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    for command in ("eval", "caption", "filter"):
        given = ["--data", table, "--checkpoint", tmp_path / "run", "--out", mine]
        code, _, err = run(capsys, command, *given)
        assert code == 2 and f"--out must be a new file, {mine} exists already" in err
    for command in ("caption", "filter"):
        given = ["--data", table, "--checkpoint", tmp_path / "run", "--out", tmp_path / "new.json", "--page", mine]
        code, _, err = run(capsys, command, *given)
        assert code == 2 and f"--page must be a new file, {mine} exists already" in err
    assert mine.read_text() == "mine" and not (tmp_path / "new.json").exists()


def test_torchrun_trains_one_model_as_one_process_does(capsys, table, tmp_path):
    given = ["--data", table, "--size", "tiny", "--epochs", "2", "--batch-size", "6", "--queue", "7", "--out"]
    assert run(capsys, "fit", *given, tmp_path / "alone", "--device", "cpu")[0] == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastprob", "pretrain"]
    command += ["fit", *given, tmp_path / "both", "--device", "cpu"]
    both = subprocess.run([sys.executable, *map(str, command)], check=True, text=True, stdout=subprocess.PIPE)
    assert both.stdout.count("model.safetensors: loss ") == 1
    alone, joint = (json.loads((tmp_path / way / "history.json").read_text()) for way in ("alone", "both"))
    assert joint["step_loss"] == pytest.approx(alone["step_loss"], rel=1e-4)
    for name, values in alone["losses"].items():
        assert joint["losses"][name] == pytest.approx(values, rel=1e-4)
    alone, joint = (dict(Pretrained.load(tmp_path / way).model.named_parameters()) for way in ("alone", "both"))
    assert max((joint[name] - weight).abs().max().item() for name, weight in alone.items()) < 1e-3


def test_mistakes_are_named(capsys, table, tmp_path):
    fitted(capsys, table, tmp_path / "run", "--objective", "albef")
    of = ["--data", table, "--checkpoint", tmp_path / "run"]
    code, _, err = run(capsys, "caption", *of, "--out", tmp_path / "out.json")
    assert code == 2 and "must be a run of blip to write captions, got albef" in err
    code, _, err = run(capsys, "filter", *of, "--out", tmp_path / "out.json", "--threshold", 50)
    assert code == 2 and "--threshold must be in 0..1, got 50.0" in err
    code, _, err = run(capsys, "eval", *of, "--batch-size", 0)
    assert code == 2 and "--batch-size must be at least 1, got 0" in err
    code, _, err = run(capsys, "eval", "--data", table, "--checkpoint", tmp_path / "nowhere")
    assert code == 2 and "nowhere/model.safetensors" in err
    code, _, err = run(capsys, "fit", "--data", table, "--out", tmp_path / "new", "--tokenizer", tmp_path / "nowhere")
    assert code == 2 and "--tokenizer" in err and not (tmp_path / "new").exists()


def test_without_transformers_its_extra_is_named(capsys, table, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for command in ("fit", "caption"):
        code, _, err = run(capsys, command, "--data", table)
        assert code == 2
        assert "pretrain: needs transformers; install it with `pip install fastprob[pretrain]`" in err
    code = main(["embed", "--data", str(table), "--model", "run:x", "--out", "y"])
    assert code == 2 and "load_encoder: needs transformers" in capsys.readouterr().err


def test_pictures_that_are_no_files_are_written_beside_their_captions(tmp_path):
    captions = [["one", "two"], [], ["drei, “vier”"]]
    spec = save_captions(tmp_path / "out" / "few.json", ImagesOf(SCENES), [None] * 3, captions)
    data = open_dataset(spec, progress=False)
    assert captions_of(data) == [captions[0], captions[2]]
    assert [image.name for image in data.images] == ["0000000.png", "0000002.png"]
    assert data[1][0].tobytes() == SCENES[2][0].tobytes()


def test_written_captions_depend_on_the_seed_alone(capsys, table, tmp_path):
    fitted(capsys, table, tmp_path / "run")
    made = Pretrained.load(tmp_path / "run")
    pixels = Pixels(ImagesOf(SCENES), made.preprocess, batch_size=5)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    once, again, other = (
        write_captions(made.model, pixels, seed=seed, do_sample=True, progress=False) for seed in (1, 1, 2)
    )
    assert once == again != other and torch.rand(3).equal(expected)


def test_a_match_is_of_the_image_itself(capsys, table, tmp_path):
    fitted(capsys, table, tmp_path / "run")
    made = Pretrained.load(tmp_path / "run")
    pixels = Pixels(ImagesOf(SCENES), made.preprocess, batch_size=5)
    captions = [SCENES[i][1][: i % 4] for i in range(len(SCENES))]
    found = match_probabilities(made.model, pixels, captions, progress=False)
    for i, (own, probabilities) in enumerate(zip(captions, found)):
        assert len(own) == len(probabilities)
        for caption, probability in zip(own, probabilities):
            image = made.preprocess(SCENES[i][0])[None]
            read = made.model.towers.texts(made.model.tokenize([caption]))[1]
            logits = made.model.match(read, ImageKeys(made.model.towers.images(image)[1])).detach()
            assert probability == pytest.approx(float(logits.softmax(1)[0, 1]), abs=1e-5)
    assert match_probabilities(made.model, pixels, [[]] * len(SCENES)) == [[]] * len(SCENES)
