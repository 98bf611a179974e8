"""The command line: the whole way on real digits, and every mistake that users make, through `main` itself."""

import base64
import errno
import importlib.metadata
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
import toy_clip
from PIL import Image

import fastprob.cli as cli
from fastprob.adapters import ProbVLM, nll, predict
from fastprob.adapters.pages import write_report_page
from fastprob.adapters.report import Report, evaluate_store
from fastprob.data import digitscenes
from fastprob.data.arrays import embed_arrays
from fastprob.data.digitscenes import DigitScenes
from fastprob.data.store import EmbeddingStore, embed
from fastprob.data.tokens import Lost
from fastprob.encoders import load_encoder
from fastprob.evaluation.calibration import Calibration, Evaluation, calibrate, uncertainty_levels
from fastprob.evaluation.retrieval import recall_at_k
from fastprob.evaluation.statistics import spearman

SCENES = {"train": "digitscenes:val", "val": "digitscenes:test"}
COUNT = 200  # scenes of each
FIT = ("--epochs", "2", "--hidden", "16", "--batch-size", "64", "--device", "cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        for split in ("val", "test"):
            patch.setitem(digitscenes.DEFAULT_SCENES, split, COUNT)
        yield


def succeed(*argv):
    assert cli.main([str(word) for word in argv]) == 0


def fail(capsys, *argv):
    """Run a command that must fail as a user's mistake does; return its one line."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    name = " ".join(argv[: 1 + (argv[0] in cli.GROUPS)])
    assert error.startswith(f"fastprob {name}: error: ") and error.endswith("\n") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Directory with the config of the model toy-cli and its weights toy-cli-0.pt and toy-cli-1.pt."""
    directory = tmp_path_factory.mktemp("toy")
    toy_clip.register(directory, "toy-cli")
    for seed in (0, 1):
        toy_clip.weights(directory, "toy-cli", seed)
    return directory


@pytest.fixture(scope="module")
def model(toy):
    return ("--model", "toy-cli", "--pretrained", toy / "toy-cli-0.pt", "--device", "cpu")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("stores")
    for name, data in SCENES.items():
        succeed("embed", "--data", data, "--out", directory / name, *model)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, stores):
    directory = tmp_path_factory.mktemp("run") / "run"
    succeed("fit", "--store", stores / "train", "--val-store", stores / "val", "--out", directory, *FIT)
    return directory


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A store of width 40."""
    directory = tmp_path_factory.mktemp("wide")
    toy_clip.register(directory, "toy-wide", dim=40)
    encoder = load_encoder("toy-wide", pretrained=toy_clip.weights(directory, "toy-wide", 0))
    embed(DigitScenes("test", num_scenes=20), encoder, directory / "store", progress=False)
    return directory / "store"


# ------------------------------------------------------------------------------------------ the whole way


def test_a_report_explains_its_figures_and_warns_of_inverted_ones():
    def calibration(spearman):
        return Calibration([1.0, 2.0], [0.5, 0.5], [1, 1], spearman, 0.25, {1: 0.5})

    def told(image_to_text, text_to_image, match="image"):
        evaluation = Evaluation(calibration(image_to_text), calibration(text_to_image))
        return Report({}, match, 0, 0, 0.0, evaluation, {}, torch.zeros(2), torch.zeros(4), None).table()

    assert "WARNING" not in told(-0.9, 0.5) and "WARNING" not in told(math.nan, -1.0)
    right = told(-0.9, 0.73)
    assert "-1 is right" in right and right.count("WARNING") == 1
    assert right.splitlines()[-1] == (
        "WARNING: text -> image is inverted: the more uncertain a query, the more often it is right (S +0.73)"
    )
    assert told(0.6, 0.7).count("WARNING: image -> text is inverted") == 1
    assert "A match is the image that a caption was written for here." in right
    assert "A match is an image of the caption's class here." in told(0.0, 0.0, match="class")


def test_report_says_what_the_library_says(capsys, tmp_path, stores, run):
    capsys.readouterr()
    succeed("eval", "--store", stores / "val", "--checkpoint", run, "--out", tmp_path / "report", "--device", "cpu")
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    store, adapter, scenes = EmbeddingStore(stores / "val"), ProbVLM.load(run / "best.safetensors"), DigitScenes("test")
    ids = torch.arange(len(store.image))
    assert report["nll"] == pytest.approx(nll(adapter, store), rel=1e-6)
    for direction, recall in (
        ("image_to_text", recall_at_k(store.image, store.text, (ids, store.caption_image), 5)),
        ("text_to_image", recall_at_k(store.text, store.image, (store.caption_image, ids), 5)),
    ):
        assert report[direction]["recall_at"]["5"] == recall
        assert len(report[direction]["recall"]) == 10
    assert report["match"] == "image" and report["source"]["dataset"] == SCENES["val"]
    of_rows = {
        "image_to_text": predict(adapter.image, store.image, passes=20),
        "text_to_image": predict(adapter.text, store.text, passes=20),
    }
    uncertainty = {name: of.aleatoric.mean(1) + of.epistemic.mean(1) for name, of in of_rows.items()}
    for direction, of_queries in uncertainty.items():
        level = uncertainty_levels(of_queries, 10)
        expected = [float(of_queries[level == k].double().mean()) for k in range(10)]
        assert report[direction]["uncertainty"] == pytest.approx(expected, rel=1e-6)
    expected = spearman(scenes.matches().sum(1), uncertainty["text_to_image"])
    assert report["ambiguity_spearman"] == pytest.approx(expected, abs=1e-9)
    assert (report["passes"], report["seed"]) == (20, 0)
    for text in ("image -> text", "text -> image", "recall@5", f"NLL {report['nll']:.4f}", "caption ambiguity"):
        assert text in printed


def test_figures(tmp_path, stores, run, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    arguments = ("eval", "--store", stores / "val", "--checkpoint", run, "--passes", "0")
    succeed(*arguments, "--out", tmp_path / "with")
    for name in ("recall_by_level.png", "uncertainty_by_ambiguity.png"):
        assert (tmp_path / "with" / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    succeed(*arguments, "--out", tmp_path / "without")
    assert sorted(os.listdir(tmp_path / "without")) == ["report.html", "report.json"]
    with_figures, without = ((tmp_path / name / "report.html").read_text() for name in ("with", "without"))
    assert with_figures.count("<figure>") == 3 and "<figure>" not in without
    assert "no figures: figures need matplotlib: pip install" in capsys.readouterr().err


def test_pages_show_the_pictures_of_the_data(tmp_path, stores, run, capsys):
    adapter = ("--store", stores / "val", "--checkpoint", run, "--passes", "0", "--shown", "2", "--device", "cpu")
    data = ("--data", SCENES["val"])
    capsys.readouterr()
    for command, page in (("eval", "report.html"), ("predict", "index.html")):
        succeed(command, *adapter, *data, "--out", tmp_path / "with")
        assert capsys.readouterr().out.endswith(f"{tmp_path / 'with' / page}\n")
        succeed(command, *adapter, "--out", tmp_path / "without")
        with_pictures, without = ((tmp_path / name / page).read_text() for name in ("with", "without"))
        assert with_pictures.count("data:image/png;base64,") == (3 if command == "eval" else 0) + 4 + 4 + 4 * 3
        assert with_pictures.count("<article>") == without.count("<article>") == 8
        assert "--data" in without and "--data" not in with_pictures and f"<dd>{run}</dd>" in without
        assert with_pictures.count('class="right"') + with_pictures.count('class="wrong"') == 24 * (command == "eval")
    found = re.findall(r'<img src="[^,]+,([^"]+)"[^>]*>\s*<div>\s*<h4[^>]*>image (\d+)</h4>', with_pictures)
    assert len(found) == 4  # the images, each by its own picture
    for data, row in found:
        shown = Image.open(io.BytesIO(base64.b64decode(data))).resize((32, 32), Image.Resampling.NEAREST)
        assert shown.tobytes() == DigitScenes("test")[int(row)][0].tobytes()


def test_page_mistakes(tmp_path, stores, run, capsys):
    adapter = ("--store", stores / "val", "--checkpoint", run)
    for command in ("eval", "predict"):
        arguments = (command, *adapter, "--out", tmp_path / "out")
        error = fail(capsys, *arguments, "--data", SCENES["train"])
        assert "was made from another data set: dataset is 'digitscenes:test' there, 'digitscenes:val' here" in error
        assert "images is 200 there, 150 here" in fail(capsys, *arguments, "--data", SCENES["val"], "--limit", "150")
        assert f"--limit is not for {command} without --data" in fail(capsys, *arguments, "--limit", "150")
        assert "shown must be at least 1, got 0" in fail(capsys, *arguments, "--shown", "0")
    assert "--data is not for eval without --out" in fail(capsys, "eval", *adapter, "--data", SCENES["val"])
    assert not (tmp_path / "out").exists()


def test_undefined_correlation_is_null_in_json(tmp_path):
    constant = Calibration([0.1, 0.2], [0.5, 0.5], [2, 2], spearman=math.nan, r2=math.nan, recall_at={1: 0.5})
    report = Report({}, "image", 0, 0, 0.0, Evaluation(constant, constant), {}, torch.zeros(4), torch.zeros(4), None)
    report.save(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["image_to_text"]["spearman"] is None and written["text_to_image"]["score"] is None
    assert written["image_to_text"]["recall"] == [0.5, 0.5]


def test_classes_decide_what_matches_where_there_are_labels(tmp_path, toy):
    encoder = load_encoder("toy-cli", pretrained=str(toy / "toy-cli-0.pt"))
    store = embed(Captioned(60), encoder, tmp_path / "store", progress=False)
    model = ProbVLM(toy_clip.DIM, 8)
    report = evaluate_store(model, store, passes=3, seed=5, levels=4)
    assert report.match == "class" and report.ambiguity is None
    images, texts = store.labels, store.labels[store.caption_image]
    assert len(images.bincount().unique()) > 1 and len(texts) == 120
    found = report.evaluation
    for got, said, adapter, query, gallery, match in (
        (found.image_to_text, report.image_uncertainty, model.image, store.image, store.text, (images, texts)),
        (found.text_to_image, report.text_uncertainty, model.text, store.text, store.image, (texts, images)),
    ):
        uncertainty = predict(adapter, query, passes=3, seed=5).total.mean(1)
        assert got == calibrate(query, gallery, uncertainty, match[0][:, None] == match[1], levels=4)
        assert said.allclose(uncertainty)


class Captioned(toy_clip.Digits):
    """Digits with one to three captions each, of which no two are equal."""

    def __getitem__(self, i):
        picture, _ = super().__getitem__(i)
        return picture, [f"number {i}, {way}" for way in ("thin", "thick", "torn")[: 1 + i % 3]]


SLOW = {"open_clip", "sklearn", "matplotlib"}  # beside torch, which `import fastprob` takes


def imported_by(*argv):
    """What the command printed, its exit code and which slow modules it imported, in a process of its own."""
    code = (
        "import sys; from fastprob.cli import main\n"
        "try: code = main()\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print(code, *sorted({SLOW} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    *output, last = ran.stdout.splitlines()
    code, *modules = last.split()
    return "\n".join(output) + ran.stderr, int(code), modules


def test_help_and_mistyped_options_wait_for_nothing():
    output, code, modules = imported_by("--help")
    assert (code, modules) == (0, [])
    for command in {name.split()[0] for name in cli.COMMANDS}:
        assert f"\n    {command}" in output
    for argv, message in (
        (["eval", "--help"], "--checkpoint"),
        (["embed", "--modle", "tiny"], "the following arguments are required: --out"),
        (["demo", "probvln"], "invalid choice: 'probvln'"),
        (["prompt"], "the following arguments are required: command"),
    ):
        output, code, modules = imported_by(*argv)
        assert message in output and (code, modules) == (0 if "--help" in argv else 2, [])


def test_info_waits_for_nothing_else():
    output, code, modules = imported_by("info")
    assert code == 0 and "probvlm_loss" in output and modules == []


@pytest.mark.parametrize("command", [("eval",), ("rank", "text:3")])
def test_what_is_stored_waits_for_no_encoder(stores, run, command):
    adapter = ("--store", str(stores / "val"), "--checkpoint", str(run), "--passes", "0", "--device", "cpu")
    _, code, modules = imported_by(*command, *adapter)
    assert (code, modules) == (0, [])


def test_module_is_the_command():
    ran = subprocess.run([sys.executable, "-m", "fastprob", "embed"], capture_output=True, text=True)
    assert ran.returncode == 2 and "fastprob embed: error: the following arguments are required" in ran.stderr


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert cli.COMMANDS[command].help in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["fit", "prompt predict"])
def test_an_unknown_option_shows_the_options_of_its_command(capsys, command):
    needed = {"fit": ["--store", "store", "--out", "run"], "prompt predict": ["x.png", "--checkpoint", "run"]}[command]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), *needed, "--speed", "9"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"usage: fastprob {command} [-h] ") and needed[-2] in error
    assert error.endswith(f"fastprob {command}: error: unrecognized arguments: --speed 9\n")


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastprob {importlib.metadata.version('fastprob')}\n"


def test_defaults_of_eval_are_the_librarys():
    args = cli._parser("eval").parse_args(["eval", "--store", "store", "--checkpoint", "run"])
    options = inspect.signature(evaluate_store).parameters
    assert {name: options[name].default for name in ("passes", "levels", "seed")} == {
        "passes": args.passes,
        "levels": args.levels,
        "seed": args.seed,
    }
    assert (args.passes, args.levels, args.seed) == (20, 10, 0)
    assert args.shown == inspect.signature(write_report_page).parameters["shown"].default == 8


# ------------------------------------------------------------------------------------------- mistakes


def test_embed_mistakes(capsys, tmp_path, model, stores, toy):
    out = tmp_path / "store"
    assert "no-such-model" in fail(capsys, "embed", "--data", SCENES["val"], "--out", out, "--model", "no-such-model")
    missing = ("--model", "toy-cli", "--pretrained", toy / "none.pt")
    assert "none.pt" in fail(capsys, "embed", "--data", SCENES["val"], "--out", out, *missing)
    assert "holidays" in fail(capsys, "embed", "--data", "digitscenes:holidays", "--out", out, *model)
    assert "none.json" in fail(capsys, "embed", "--data", tmp_path / "none.json", "--out", out, *model)
    assert "batch_size" in fail(capsys, "embed", "--data", SCENES["val"], "--out", out, *model, "--batch-size", "0")
    assert not out.exists()
    other = ("--model", "toy-cli", "--pretrained", toy / "toy-cli-1.pt")
    line = fail(capsys, "embed", "--data", SCENES["val"], "--out", stores / "val", *other)
    assert "another source: fingerprint is" in line and "--overwrite" not in line
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fail(capsys, "embed", "--data", SCENES["val"], "--out", tmp_path / "file" / "x", *model)


def test_weights_that_cannot_be_downloaded(capsys, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("the hub is out of reach")

    monkeypatch.setattr("open_clip.factory.download_pretrained", unreachable)
    model = ("--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k")
    line = fail(capsys, "embed", "--data", SCENES["val"], "--out", tmp_path / "store", *model)
    assert "--model ViT-B-32: " in line and "the hub is out of reach" in line


def test_unusable_device(capsys, tmp_path):
    for device in ("abacus", *(() if torch.cuda.is_available() else ("cuda",))):
        line = fail(capsys, "embed", "--data", SCENES["val"], "--out", tmp_path / "store", "--device", device)
        assert f"--device {device}: " in line


def test_store_mistakes(capsys, tmp_path, stores, run):
    for command, rest in (("fit", ("--out", tmp_path / "run")), ("eval", ("--checkpoint", run))):
        assert f"{tmp_path}: no embedding store here" in fail(capsys, command, "--store", tmp_path, *rest)
        broken = shutil.copytree(stores / "val", tmp_path / command)
        size = (broken / "text.npy").stat().st_size
        os.truncate(broken / "text.npy", size - 1)
        message = f"{broken / 'text.npy'}: expected {size} bytes, got {size - 1} bytes"
        assert message in fail(capsys, command, "--store", broken, *rest)


def test_fit_on_the_exact_likelihood(capsys, tmp_path, stores):
    out = ("--out", tmp_path / "run")
    succeed("fit", "--store", stores / "train", "--val-store", stores / "val", *out, *FIT, "--cross", "exact")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["config"]["cross"] == "exact" and len(history["val_nll_exact"]) == 2
    before, after = history["nll_before"], history["nll_after"]
    assert f"NLL {before:.4f} -> {after:.4f} nats" in capsys.readouterr().out and after < before


def test_fit_mistakes(capsys, tmp_path, stores, run, wide):
    train, out = ("--store", stores / "train"), tmp_path / "run"
    assert "dropout must be in [0, 1), got 1.5" in fail(capsys, "fit", *train, "--out", out, "--dropout", "1.5")
    assert "form must be" in fail(capsys, "fit", *train, "--out", out, "--form", "draft")
    assert "cross must be" in fail(capsys, "fit", *train, "--out", out, "--cross", "both")
    assert "power must be" in fail(capsys, "fit", *train, "--out", out, "--power", "-1")
    assert "different encoders" in fail(capsys, "fit", *train, "--val-store", wide, "--out", out)
    assert not out.exists()
    assert "last.pt" in fail(capsys, "fit", *train, "--out", out, "--resume")
    assert "holds a run already" in fail(capsys, "fit", *train, "--out", run)
    assert "trained with lr=0.001" in fail(
        capsys, "fit", *train, "--val-store", stores / "val", "--out", run, "--resume", *FIT, "--lr", "0.01"
    )
    assert "different encoders" in fail(capsys, "fit", "--store", wide, "--out", run, "--resume", *FIT)


def test_eval_mistakes(capsys, tmp_path, stores, run, wide, toy):
    store = ("--store", stores / "val")
    missing = tmp_path / "none.safetensors"
    assert str(missing) in fail(capsys, "eval", *store, "--checkpoint", missing)
    (tmp_path / "garbage").write_bytes(b"garbage" * 100)
    assert f"{tmp_path / 'garbage'}" in fail(capsys, "eval", *store, "--checkpoint", tmp_path / "garbage")
    assert "different encoders" in fail(capsys, "eval", "--store", wide, "--checkpoint", run)
    bare = shutil.copy(run / "best.safetensors", tmp_path / "bare.safetensors")
    assert f"{bare} takes dimension 24, {wide} has 40" in fail(capsys, "eval", "--store", wide, "--checkpoint", bare)
    assert "passes must be 0 or >= 2, got 1" in fail(capsys, "eval", *store, "--checkpoint", run, "--passes", "1")
    assert "levels must be" in fail(capsys, "eval", *store, "--checkpoint", run, "--levels", "1001")


def test_checkpoint_of_an_encoder_of_equal_width(capsys, tmp_path, run, toy):
    """The width cannot tell, the fingerprint does."""
    encoder = load_encoder("toy-cli", pretrained=str(toy / "toy-cli-1.pt"))
    embed(DigitScenes("test", num_scenes=20), encoder, tmp_path / "store", progress=False)
    line = fail(capsys, "eval", "--store", tmp_path / "store", "--checkpoint", run)
    assert f"{run} and {tmp_path / 'store'} are of different encoders" in line


def test_error_of_a_loading_process_is_one_line(tmp_path, toy):
    encoder, dataset = load_encoder("toy-cli", pretrained=str(toy / "toy-cli-0.pt")), toy_clip.Digits()
    dataset.fail_at = {1: ValueError("picture 1 is torn")}
    with pytest.raises(ValueError) as caught:
        embed(dataset, encoder, tmp_path / "store", num_workers=1, progress=False)
    assert cli._one_line(caught.value) == "ValueError: picture 1 is torn"


def test_no_space(capsys, tmp_path, model, stores, monkeypatch):
    arguments = ("embed", "--data", SCENES["val"], "--out", tmp_path / "store", *model)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
        assert "MiB needed, 0.0 MiB free): 0 of 200 images are stored" in fail(capsys, *arguments)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        assert f"{tmp_path / 'store'}: disk full (No space left): 0 of 200" in fail(capsys, *arguments)
    succeed(*arguments)
    assert_same_store(tmp_path / "store", stores / "val")


# -------------------------------------------------------------------------------------- predict and rank


def test_predict_writes_what_the_library_says(capsys, tmp_path, stores, run):
    arguments = (
        "predict",
        "--store",
        stores / "val",
        "--checkpoint",
        run,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    capsys.readouterr()
    succeed(*arguments, "--passes", "3", "--levels", "4", "--seed", "5", "--format", "npy")
    files = [
        tmp_path / "out" / name for name in ("images.npy", "image_mean.npy", "texts.npy", "text_mean.npy", "index.html")
    ]
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files]
    expected = predict(
        ProbVLM.load(run / "best.safetensors").text, EmbeddingStore(stores / "val").text, passes=3, seed=5
    )
    table = np.load(files[2])
    assert torch.from_numpy(table["total"].copy()).allclose(expected.total.mean(1), rtol=1e-5)
    assert sorted(set(table["level"].tolist())) == [1, 2, 3, 4]
    assert "images.npy exists already" in fail(capsys, *arguments, "--format", "npy")
    succeed(*arguments, "--format", "npy", "--overwrite")
    assert sorted(set(np.load(files[2])["level"].tolist())) == list(range(1, 11))
    assert "format must be one of" in fail(capsys, *arguments, "--format", "xls")


def test_rank_takes_texts_files_and_rows(capsys, tmp_path, stores, run):
    adapter = ("--store", stores / "val", "--checkpoint", run, "--device", "cpu")
    store, scenes = EmbeddingStore(stores / "val"), DigitScenes("test")
    scenes[7][0].save(tmp_path / "7.png")

    def printed(query, *options):
        capsys.readouterr()
        succeed("rank", query, *adapter, *options)
        return capsys.readouterr().out

    assert printed(tmp_path / "7.png") == printed("image:7")  # by the encoder that the store names
    assert printed(store.captions[12], "--top", "4") == printed("text:12", "--top", "4")
    best = int((store.image @ store.text[12]).argmax())
    assert printed("text:12").splitlines()[2].endswith(f"  {best}: {store.captions[5 * best]}")
    assert printed("text:12", "--by", "likelihood") != printed("text:12")
    assert "image rows of" in (error := fail(capsys, "rank", "image:200", *adapter)) and "are 0..199, got 200" in error
    arrays = tmp_path / "arrays"
    embed_arrays(store.image, store.text, arrays, pairs=store.caption_image, encoder_name="toy-cli", progress=False)
    adapter = ("--store", arrays, "--checkpoint", run, "--device", "cpu")
    assert "no encoder is known: query image:ROW or text:ROW" in fail(capsys, "rank", "a three", *adapter)
    assert printed("image:7").count("\n") == 12


def test_rank_needs_the_weights_of_the_store(capsys, tmp_path, stores, run, toy):
    """The file is another since."""
    other = shutil.copytree(stores / "val", tmp_path / "store")
    metadata = json.loads((other / "metadata.json").read_text())
    metadata["source"]["pretrained"] = str(toy / "toy-cli-1.pt")
    (other / "metadata.json").write_text(json.dumps(metadata))
    error = fail(capsys, "rank", "a three", "--store", other, "--checkpoint", run, "--device", "cpu")
    assert f"is not the one that made {other}: its weights are others" in error


# ------------------------------------------------------------------------------------- other people's data


@pytest.fixture
def pictures(tmp_path):
    """A table of ten pictures with captions of twelve words, 15 tokens."""
    captions = [f"this is a picture of number {i} and of nothing else here" for i in range(10)]
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{caption}" for i, caption in enumerate(captions)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    return tmp_path / "captions.csv"


def test_own_pictures_need_a_model(capsys, pictures, model):
    out = pictures.parent / "store"
    error = fail(capsys, "embed", "--data", pictures, "--out", out)
    assert f"--model is needed for {pictures}, as --model ViT-B-32 --pretrained laion2b_s34b_b79k" in error
    for name, tag in re.findall(r"(ViT[^ ]+)(?: --pretrained| and) (\w+)", error):
        assert (name, tag) in open_clip.list_pretrained()
    succeed("embed", "--data", pictures, "--out", out, *model)
    assert capsys.readouterr().out.endswith("\n0.0% of the captions are cut off, 0.0% of their tokens are unknown\n")


def test_limit_and_shard_size(capsys, tmp_path, pictures, model, stores):
    """The first images, as the whole store has them, and shards of so many."""
    arguments = ("--out", tmp_path / "store", *model, "--limit", "25", "--shard-size", "10")
    succeed("embed", "--data", SCENES["val"], *arguments)
    store, whole = EmbeddingStore(tmp_path / "store"), EmbeddingStore(stores / "val")
    assert [shard["image.npy"]["rows"] for shard in store.metadata["shards"]] == [10, 10, 5]
    assert store.captions == whole.captions[:125] and store.image.allclose(whole.image[:25], atol=1e-6)
    arguments = ("embed", "--data", pictures, *model, "--limit")
    succeed(*arguments, "4", "--out", tmp_path / "four")
    assert EmbeddingStore(tmp_path / "four").captions[3:] == ["this is a picture of number 3 and of nothing else here"]
    for limit, count in (("10", 10), ("11", 10)):
        succeed(*arguments, limit, "--out", tmp_path / limit)
        assert len(EmbeddingStore(tmp_path / limit).image) == count
    assert "limit must be at least 1, got 0" in fail(capsys, *arguments, "0", "--out", tmp_path / "none")


def test_captions_that_a_tokenizer_cuts_off_are_refused(capsys, pictures):
    out = pictures.parent / "store"
    arguments = ("embed", "--data", pictures, "--out", out, "--model", "tiny")  # of digits, 14 tokens
    error = fail(capsys, *arguments)
    cut = "100.0% of the captions are cut off, 0.0% of their tokens are unknown"
    assert f"tiny does not read these captions: {cut}; expected at most 10.0% (max_lost)" in error
    assert "expected at most 99.0% (max_lost)" in fail(capsys, *arguments, "--max-lost", "0.99")
    assert not (out / "metadata.json").exists()
    succeed(*arguments, "--max-lost", "1")
    assert capsys.readouterr().out.endswith(f"\n{cut}\n")
    assert EmbeddingStore(out).lost == Lost(1.0, 0.0)
    succeed(*arguments)  # whole: nothing to refuse


def test_a_run_resumes_on_its_own_data_only(capsys, tmp_path, stores):
    """Two stores of equal counts."""
    arguments = ("fit", "--out", tmp_path / "run", *FIT)
    succeed(*arguments, "--store", stores / "train", "--val-store", stores / "val")
    for option, other in (("--store", stores / "val"), ("--val-store", stores / "train")):
        both = {"--store": stores / "train", "--val-store": stores / "val", option: other}
        error = fail(capsys, *arguments, "--resume", *(word for pair in both.items() for word in pair))
        field = "data" if option == "--store" else "validation"
        assert f"last.pt was trained with {field}={{'images': 200, 'captions': 1000, 'dim': 24, 'sha256': '" in error


def test_a_changed_value_is_found_before_anything_is_computed(capsys, tmp_path, stores, run):
    changed = shutil.copytree(stores / "val", tmp_path / "store")
    image = np.load(changed / "image.npy", mmap_mode="r+")
    image[3, 4] = 1e30
    image.flush()
    message = f"{changed / 'image.npy'}: shard 0: expected sha256 "
    whole = ("--store", stores / "train", "--out", tmp_path / "run", *FIT)
    assert message in fail(capsys, "fit", *whole, "--val-store", changed)
    assert message in fail(capsys, "fit", "--store", changed, "--out", tmp_path / "run", *FIT)
    assert not (tmp_path / "run").exists()
    assert message in fail(capsys, "eval", "--store", changed, "--checkpoint", run)


# ------------------------------------------------------------------------------------------- Ctrl-C


def assert_same_store(path, other):
    for file in other.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes(), file.name


SLOWLY = f"""
import os, signal, sys, time
import open_clip, torch
from fastprob.cli import main
from fastprob.data import digitscenes

def slow(function, seconds):
    return lambda *arguments: (time.sleep(seconds), function(*arguments))[1]

digitscenes.DigitScenes.__getitem__ = slow(digitscenes.DigitScenes.__getitem__, 0.05)  # embed takes 10 s
os.replace = slow(os.replace, 0.05)  # fit replaces two files or more each epoch
digitscenes.DEFAULT_SCENES.update(val={COUNT}, test={COUNT})
torch.set_num_threads(1)
open_clip.add_model_config(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
sys.exit(main(sys.argv[2:]))
"""


def interrupt(toy, awaited, *argv):
    """Run a command slowly, send it SIGINT soon after `awaited` exists; return its stderr and exit code."""
    command = [sys.executable, "-c", SLOWLY, toy / "toy-cli.json", *argv]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not awaited.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # its progress bar stands by then
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=60)[1], process.returncode
    finally:
        process.kill()


def test_ctrl_c_in_embed(tmp_path, toy, model, stores):
    out = tmp_path / "store"
    arguments = ("embed", "--data", SCENES["val"], "--out", out, *model)
    error, code = interrupt(toy, out / "metadata.json", *arguments)
    assert code == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "fastprob embed: interrupted: the same command, without --overwrite, resumes"
    assert not json.loads((out / "metadata.json").read_text())["complete"]
    succeed(*arguments)
    assert_same_store(out, stores / "val")


def test_ctrl_c_in_fit(tmp_path, toy, stores):
    long = ("--epochs", "60", *FIT[2:])
    arguments = ("fit", "--store", stores / "train", "--out", tmp_path / "run", *long)
    error, code = interrupt(toy, tmp_path / "run" / "history.json", *arguments)
    assert code == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "fastprob fit: interrupted: the same command with --resume goes on from there"
    history = tmp_path / "run" / "history.json"
    before = json.loads(history.read_text())["step_loss"]
    assert len(before) < 60 * 4  # steps
    succeed(*arguments, "--resume")
    after = json.loads(history.read_text())["step_loss"]
    assert len(after) == 60 * 4 and after[: len(before)] == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": "tiny"}', "7"])
def test_damaged_encoder_file_of_a_run_is_named(capsys, tmp_path, stores, run, content):
    damaged = shutil.copytree(run, tmp_path / "run")
    (damaged / "encoder.json").write_text(content)
    for command in (
        ("eval", "--store", stores / "val", "--checkpoint", damaged),
        ("fit", "--store", stores / "train", "--val-store", stores / "val", "--out", damaged, "--resume", *FIT),
    ):
        assert f"{damaged / 'encoder.json'}: expected " in fail(capsys, *command)
