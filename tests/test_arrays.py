"""Own embeddings as a store: what is stored is what was given, and what can't be is named."""

import json
import os

import numpy as np
import pytest
import torch

import fastprob.cli as cli
from fastprob.adapters import ProbVLM
from fastprob.data import arrays
from fastprob.data.arrays import embed_arrays
from fastprob.data.store import EmbeddingStore

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(rows, dim=6, seed=0):
    values = np.random.default_rng(seed).standard_normal((rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def embed(path, image, text, **options):
    return embed_arrays(image, text, path, progress=False, **options)


@pytest.fixture
def files(tmp_path):
    """Four images, seven texts and the image of each, as files."""
    np.save(tmp_path / "image.npy", unit(4))
    np.save(tmp_path / "text.npy", unit(7, seed=1))
    np.save(tmp_path / "pairs.npy", np.array([2, 0, 1, 2, 3, 2, 0]))
    (tmp_path / "captions.txt").write_text("\n".join("abcdefg") + "\n")
    (tmp_path / "ids.txt").write_text("one\ntwo\nthree\nfour\n\n")
    return tmp_path


def command(files, *more):
    return [str(word) for word in ("embed", "--from-arrays", files / "image.npy", files / "text.npy", *more)]


# ------------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("rows", [2, 8192])  # texts and images of several shards, of one
def test_texts_stand_in_the_order_of_their_images(files, rows, monkeypatch):
    monkeypatch.setattr(arrays, "_ROWS", rows)
    image, text = np.load(files / "image.npy"), np.load(files / "text.npy")
    names = {"captions": list("abcdefg"), "ids": ["one", "two", "three", "four"]}
    store = embed(files / "store", files / "image.npy", files / "text.npy", pairs=files / "pairs.npy", **names)
    assert np.array_equal(store.image, image)
    assert np.array_equal(store.text, text[[1, 6, 2, 0, 3, 5, 4]])
    assert store.captions == list("bgcadfe") and store.ids == names["ids"]
    assert store.caption_image.tolist() == [0, 0, 1, 2, 2, 2, 3] and store.labels is None
    store.verify()


def test_without_pairs_text_i_is_image_is(tmp_path):
    store = embed(tmp_path / "store", unit(5), unit(5, seed=1))
    assert store.caption_image.tolist() == [0, 1, 2, 3, 4] and np.array_equal(store.text, unit(5, seed=1))
    assert store.captions == [f"text {i}" for i in range(5)] and store.ids is None
    assert "EmbeddingStore(" in repr(store) and "arrays, unnamed encoder, 5 images, 5 captions, dim 6)" in repr(store)


@pytest.mark.parametrize("kind", ["float16", "float32", ">f4", "float64", "bfloat16", "fortran", "strided", "list"])
def test_kinds_of_arrays(tmp_path, kind):
    """What float32 can hold is stored as it is."""
    rows = torch.tensor([[0.5, 0.5, -0.5, 0.5, 0], [0, -0.5, 0.5, 0.5, 0.5], [0, 0, -1, 0, 0]])
    given = {
        "bfloat16": rows.bfloat16,
        "fortran": lambda: np.asfortranarray(rows.numpy()),
        "strided": lambda: rows.repeat_interleave(2, dim=1)[:, ::2],
        "list": rows.tolist,
    }.get(kind, lambda: rows.numpy().astype(kind))()
    if isinstance(given, np.ndarray):
        np.save(tmp_path / "given.npy", given)
        given = tmp_path / "given.npy"
    store = embed(tmp_path / "store", given, given)
    assert torch.equal(store.image, rows) and torch.equal(store.text, rows)
    assert store.metadata["source"]["normalised"] == []


def test_rows_get_unit_norm_where_some_have_not(tmp_path):
    lengths = np.array([[1], [1], [20], [1e-20]], np.float64)
    image = unit(4).astype(np.float64) * lengths
    store = embed(tmp_path / "store", image, unit(4).astype(np.float16))
    np.testing.assert_allclose(store.image, image / lengths, rtol=1e-6, atol=1e-7)
    assert np.array_equal(store.text, unit(4).astype(np.float16).astype(np.float32))
    assert store.metadata["source"]["normalised"] == ["image"]


# --------------------------------------------------------------------------------------- once, resumed


def test_once_and_other_arrays_are_another_source(files, monkeypatch):
    store = files / "store"
    embed(store, unit(4), unit(4))
    before = (store / "image.npy").stat().st_mtime_ns
    embed(store, unit(4), unit(4))
    assert (store / "image.npy").stat().st_mtime_ns == before
    changed = unit(4)
    changed[3, 5] = -changed[3, 5]
    for name, options in {
        "image": {"image": changed, "text": unit(4)},
        "text": {"image": unit(4), "text": changed},
        "pairs": {"image": unit(4), "text": unit(4), "pairs": [1, 0, 2, 3]},
        "captions": {"image": unit(4), "text": unit(4), "captions": list("abcd")},
        "model": {"image": unit(4), "text": unit(4), "encoder_name": "mine"},
    }.items():
        with pytest.raises(ValueError, match=f"this store has another source: {name} is "):
            embed(store, **options)
    with pytest.raises(ValueError, match=r"expected a new or empty directory or an embedding store, got one with "):
        embed(files, unit(4), unit(4), overwrite=True)
    assert np.array_equal(np.load(files / "image.npy"), unit(4))


def test_an_interrupted_store_is_resumed_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_ROWS", 3)
    pairs = np.random.default_rng(0).permutation(np.arange(20) % 8)
    data = {"image": unit(8) * 3, "text": unit(20, seed=1), "pairs": pairs}
    embed(tmp_path / "whole", **data)

    def stop(self, image, line=arrays._Arrays._line):
        if image == 5:
            raise KeyboardInterrupt
        return line(self, image)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(arrays._Arrays, "_line", stop)
        embed(tmp_path / "resumed", **data)
    assert json.loads((tmp_path / "resumed" / "metadata.json").read_text())["images"] == 3
    embed(tmp_path / "resumed", **data)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / file.name).read_bytes() == file.read_bytes(), file.name


def test_files_are_not_held_whole(tmp_path, monkeypatch):
    """The process's own memory, without what it maps, grows by blocks of 4 MiB; the files have 64 MiB each."""

    def own():
        status = open("/proc/self/status").read()  # noqa: SIM115
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    large, peak = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.float32, (16384, 1024)), []
    large[:] = unit(1, dim=1024) * 2
    monkeypatch.setattr(arrays, "_ROWS", 512)
    norms = arrays._norms
    monkeypatch.setattr(arrays, "_norms", lambda rows: (norms(rows), peak.append(own()))[0])
    before = own()
    embed(tmp_path / "store", tmp_path / "large.npy", tmp_path / "large.npy", pairs=np.arange(16384)[::-1])
    assert len(peak) == 4 * 32 and max(peak) - before < 32


# ------------------------------------------------------------------------------------- the whole way


def test_fit_and_eval_on_arrays(files, capsys):
    fit = ["--epochs", "1", "--hidden", "4", "--device", "cpu"]
    more = ("--pairs", files / "pairs.npy", "--captions", files / "captions.txt", "--ids", files / "ids.txt")
    for name, encoder in (("plain", ()), ("mine", ("--encoder-name", "mine")), ("other", ("--encoder-name", "other"))):
        assert cli.main(command(files, *more, "--out", files / name, *encoder)) == 0
    store = EmbeddingStore(files / "mine")
    assert store.ids == ["one", "two", "three", "four"] and store.encoder["model"] == "mine"

    def run(*argv):
        capsys.readouterr()
        return cli.main([str(word) for word in argv]), capsys.readouterr()

    code, _ = run("fit", "--store", files / "mine", "--val-store", files / "plain", "--out", files / "run", *fit)
    assert code == 0 and ProbVLM.load(files / "run" / "best.safetensors").config["dim"] == 6
    code, got = run("fit", "--store", files / "mine", "--val-store", files / "other", "--out", files / "x", *fit)
    assert code == 2 and "mine and " in got.err and "are of different encoders" in got.err
    evaluation = ("--checkpoint", files / "run", "--levels", 2, "--passes", 0, "--device", "cpu")
    for name in ("mine", "plain"):  # of the second one nothing is known that could differ
        code, got = run("eval", "--store", files / name, *evaluation)
        assert code == 0 and "NLL" in got.out
    code, got = run("eval", "--store", files / "other", *evaluation)
    assert code == 2 and "are of different encoders" in got.err


def test_what_was_divided_is_said(files, capsys):
    np.save(files / "text.npy", unit(4) * 2)
    assert cli.main(command(files, "--out", files / "store")) == 0
    assert "fastprob embed: rows of text were divided by their norms, which were not all 1\n" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- bad input


def changed(rows, row, value):
    values = unit(rows)
    values[row] = value
    return values


FLOATS = "image must be floats [rows, D] with at least one row, got "
BAD = {
    "widths": ({"text": unit(4, dim=7)}, "image and text must have one width, got 6 and 7"),
    "counts": ({"text": unit(5)}, "without pairs, image and text must have as many rows, got 4 and 5"),
    "NaN": ({"text": changed(4, 2, np.nan)}, "text row 2 has a NaN or infinite value"),
    "infinite": ({"image": changed(4, (1, 3), np.inf)}, "image row 1 has a NaN or infinite value"),
    "zero": ({"image": changed(4, 3, 0)}, "image row 3 is zero"),
    "integers": ({"image": np.ones((4, 6), int)}, FLOATS + "int64 (4, 6)"),
    "objects": ({"image": np.array([[None]])}, FLOATS + "object (1, 1)"),
    "one row": ({"image": unit(4)[0]}, FLOATS + "float32 (6,)"),
    "no row": ({"image": unit(4)[:0]}, FLOATS + "float32 (0, 6)"),
    "pairs of floats": ({"pairs": np.zeros(4)}, "pairs must be integers [4], got float64 (4,)"),
    "pairs of another length": ({"pairs": [0, 1]}, "pairs must be integers [4], got int64 (2,)"),
    "pairs too high": ({"pairs": [0, 1, 2, 4]}, "pairs must be in 0..3, got 4 for text 3"),
    "pairs below 0": ({"pairs": [0, -1, 2, 3]}, "pairs must be in 0..3, got -1 for text 1"),
    "an image without text": ({"pairs": [0, 1, 1, 3]}, "pairs must give every image a text, image 2 has none"),
    "captions": ({"captions": ["a"]}, "captions must be 4 texts, got 1"),
    "ids": ({"ids": ["a", "b", 3, "d"]}, "ids must be texts in UTF-8, got 3 in row 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(tmp_path, name):
    given, expected = BAD[name]
    with pytest.raises(ValueError) as caught:
        embed(tmp_path / "store", **{"image": unit(4), "text": unit(4), **given})
    assert str(caught.value) == f"embed_arrays: {expected}" and not (tmp_path / "store").exists()


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, a=unit(4))


def truncated(path):
    np.save(path, unit(4))
    os.truncate(path, path.stat().st_size - 1)


FILES = {
    "text": (lambda path: path.write_text("text"), "image must be an .npy file, got {file}: "),
    "empty": (lambda path: path.write_bytes(b""), "image must be an .npy file, got {file}: No data left in file"),
    "truncated": (truncated, "image must be an .npy file, got {file}: mmap length is greater than file size"),
    "pickled": (lambda path: np.save(path, [{}], allow_pickle=True), "image must be an .npy file, got {file}: "),
    "archive": (archive, "image must be an .npy file, got {file}, an archive"),
    "flat": (lambda path: np.save(path, unit(4)[0]), "{file}: image must be floats [rows, D] with "),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_bad_files(files, capsys, name):
    write, expected = FILES[name]
    write(files / "image.npy")
    assert cli.main(command(files, "--out", files / "store")) == 2
    error = capsys.readouterr().err
    expected = f"fastprob embed: error: embed_arrays: {expected.format(file=files / 'image.npy')}"
    assert error.startswith(expected) and error.count("\n") == 1 and not (files / "store").exists()


def test_mistakes_of_the_command(files, capsys):
    def fail(*more):
        assert cli.main(command(files, "--out", files / "store", *more)) == 2
        return capsys.readouterr().err

    assert "without pairs, image and text must have as many rows, got 4 and 7" in fail()
    pairs = ("--pairs", str(files / "pairs.npy"))
    assert f"{files / 'none.txt'}: No such file or directory" in fail(*pairs, "--captions", str(files / "none.txt"))
    assert "captions must be 7 texts, got 4" in fail(*pairs, "--captions", str(files / "ids.txt"))
    (files / "captions.txt").write_bytes(b"a\nb\ncaf\xe9\nd\ne\nf\ng\n")
    assert "captions must be texts in UTF-8, got 'caf\\udce9' in row 2" in fail(
        *pairs, "--captions", str(files / "captions.txt")
    )
    assert "--split is not for --from-arrays" in fail(*pairs, "--split", "test")
    assert cli.main(["embed", "--data", "digitscenes", "--out", str(files / "store"), *pairs]) == 2
    assert "--pairs is not for --data" in capsys.readouterr().err


def test_names_from_clip_retrievals_metadata(files, capsys):
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image_path": list("wxyz"), "caption": ["A", "B", "C", "D"]})
    tables.write_table(table, files / "metadata_0.parquet")
    np.save(files / "text.npy", unit(4).astype(np.float16))
    metadata = ("--captions", files / "metadata_0.parquet", "--ids", files / "metadata_0.parquet")
    assert cli.main(command(files, "--out", files / "store", *metadata)) == 0
    store = EmbeddingStore(files / "store")
    assert store.captions == ["A", "B", "C", "D"] and store.ids == list("wxyz")
