"""Predictions of whole stores as files, and rankings, against `predict` and torch row by row."""

import csv
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import fastprob
from fastprob.adapters import ProbVLM, predict, predictions
from fastprob.adapters.predictions import lines, rank, write_predictions
from fastprob.data.arrays import embed_arrays

OWNER = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6])
CAPTIONS = [f'caption {i}, "quoted"' for i in range(11)]
FILES = ["image_mean.npy", "images.csv", "index.html", "text_mean.npy", "texts.csv"]


@pytest.fixture
def model():
    """Every row has another uncertainty."""
    torch.manual_seed(0)
    model = ProbVLM(5, hidden=8, dropout=0.3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def store(tmp_path):
    generator = torch.Generator().manual_seed(1)
    image, text = (normalize(torch.randn(rows, 5, generator=generator), dim=1) for rows in (7, 11))
    ids = [f"{i}.png" for i in range(7)]
    return embed_arrays(image, text, tmp_path / "store", pairs=OWNER, captions=CAPTIONS, ids=ids, progress=False)


def expected(adapter, rows, levels=3, passes=4, seed=2):
    found = predict(adapter, rows, passes=passes, seed=seed)
    numbers = {name: getattr(found, name).mean(1) for name in ("aleatoric", "epistemic", "total")}
    place = numbers["total"].argsort().argsort()
    return found.mu, {**numbers, "level": 1 + place * levels // len(rows)}


def write(model, store, directory, **options):
    options = {"levels": 3, "passes": 4, "seed": 2, "progress": False, **options}
    return write_predictions(model, store, directory, **options)


@pytest.mark.parametrize("rows_at_once", [2, 16384])
def test_csv(tmp_path, model, store, monkeypatch, rows_at_once):
    monkeypatch.setattr(predictions, "ROWS", rows_at_once)
    files = write(model, store, tmp_path / "out")
    assert sorted(file.name for file in files) == sorted(os.listdir(tmp_path / "out")) == FILES
    about = {
        "image": {"id": store.ids},
        "text": {"image": [store.ids[i] for i in OWNER], "caption": CAPTIONS},
    }
    for side, names in about.items():
        mean, numbers = expected(getattr(model, side), getattr(store, side))
        with open(tmp_path / "out" / f"{side}s.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert list(table[0]) == [*names, *numbers]
        for name, values in names.items():
            assert [row[name] for row in table] == values
        for name, values in numbers.items():
            assert torch.tensor([float(row[name]) for row in table]).allclose(values.float(), rtol=1e-5), name
        assert torch.from_numpy(np.load(tmp_path / "out" / f"{side}_mean.npy")).allclose(mean, atol=1e-6)


def test_npy_and_parquet(tmp_path, model, store):
    write(model, store, tmp_path / "out", format="npy")
    _, numbers = expected(model.text, store.text)
    table = np.load(tmp_path / "out" / "texts.npy", allow_pickle=False)
    assert table.dtype.names == tuple(numbers) and table["level"].tolist() == numbers["level"].tolist()
    assert torch.from_numpy(table["epistemic"].copy()).allclose(numbers["epistemic"], rtol=1e-5)
    parquet = pytest.importorskip("pyarrow.parquet")
    write(model, store, tmp_path / "parquet", format="parquet")
    table = parquet.read_table(tmp_path / "parquet" / "texts.parquet").to_pydict()
    assert list(table) == ["image", "caption", *numbers] and table["caption"] == CAPTIONS
    assert table["level"] == numbers["level"].tolist()


def test_a_store_without_ids_has_rows(tmp_path, model, store):
    bare = embed_arrays(store.image, store.text, tmp_path / "bare", pairs=OWNER, progress=False)
    write(model, bare, tmp_path / "out")
    assert [line.split(",")[0] for line in (tmp_path / "out" / "images.csv").read_text().splitlines()][1:] == list(
        "0123456"
    )


def test_files_of_somebody_are_kept(tmp_path, model, store):
    own = tmp_path / "out" / "texts.csv"
    own.parent.mkdir()
    own.write_text("own")
    with pytest.raises(ValueError, match=r"texts\.csv exists already; overwrite it or choose another directory"):
        write(model, store, own.parent)
    assert os.listdir(own.parent) == ["texts.csv"] and own.read_text() == "own"
    (own.parent / "other.csv").write_text("own")
    write(model, store, own.parent, overwrite=True)
    assert own.read_text().startswith("image,caption,") and (own.parent / "other.csv").read_text() == "own"


def test_a_page_of_somebody_is_kept(tmp_path, model, store):
    page = tmp_path / "out" / "index.html"
    page.parent.mkdir()
    page.write_text("own")
    with pytest.raises(ValueError, match=r"index\.html exists already; overwrite it or choose another directory"):
        write(model, store, page.parent)
    assert os.listdir(page.parent) == ["index.html"] and page.read_text() == "own"
    write(model, store, page.parent, overwrite=True)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_page_has_the_numbers_of_the_tables(tmp_path, model, store):
    write(model, store, tmp_path, shown=2, checkpoint="run")
    _, numbers = expected(model.image, store.image)
    certain = int(numbers["total"].argmin())
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    first = text.index(f'<h4 dir="auto">{store.ids[certain]}</h4>', text.index("The most certain images"))
    assert f"<dd>{numbers['total'][certain]:#.3g}</dd>" in text[first : first + 800]
    assert "<dd>1 of 3</dd>" in text[first : first + 800] and text.count("<h4") == 8
    assert "<dd>run</dd>" in text and "4 dropout passes, seed 2" in text


def test_an_error_leaves_no_half_of_a_file(tmp_path, model, store, monkeypatch):
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return predict(*arguments, **options)

    monkeypatch.setattr(predictions, "ROWS", 4)
    monkeypatch.setattr(predictions, "predict", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        write(model, store, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_an_error_leaves_no_half_of_a_table(tmp_path, model, store, monkeypatch):
    def failing(path, texts, numbers):
        path.write_text("id,")
        raise RuntimeError("power cut")

    monkeypatch.setitem(predictions._WRITERS, "csv", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        write(model, store, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["image_mean.npy"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"format": "xls"}, r"format must be one of \('csv', 'parquet', 'npy'\), got 'xls'"),
        ({"levels": 0}, "levels must be from 1 to the 7 images, got 0"),
        ({"levels": 8}, "levels must be from 1 to the 7 images, got 8"),
        ({"shown": 0}, "shown must be at least 1, got 0"),
    ],
)
def test_bad_options(tmp_path, model, store, option, message):
    with pytest.raises(ValueError, match=f"write_predictions: {message}"):
        write(model, store, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows_at_once", [3, 16384])
@pytest.mark.parametrize("by", ["cosine", "likelihood"])
def test_ranking(model, store, monkeypatch, by, rows_at_once):
    monkeypatch.setattr(predictions, "ROWS", rows_at_once)
    query = store.image[4]
    mu, inv_alpha, beta = (x.expand(11, 5) for x in model.image(query[None]))
    # with all constants: the density of beta / (2 alpha Gamma(1 / beta)) exp(-(|x - mu| / alpha)^beta)
    likelihood = -(fastprob.ggd_nll(mu, inv_alpha, beta, store.text, reduction="none") + np.log(2)).mean(1)
    cosine = store.text @ query
    order = (cosine if by == "cosine" else likelihood).argsort(descending=True)[:6]
    got = rank(model.image, query, model.text, store.text, top=6, by=by, passes=4, seed=2)
    assert got.rows == order.tolist()
    assert got.cosine == pytest.approx(cosine[order].tolist(), abs=1e-6)
    assert got.log_likelihood == pytest.approx(likelihood[order].tolist(), abs=1e-5)
    assert got.uncertainties == pytest.approx(expected(model.text, store.text)[1]["total"][order].tolist(), rel=1e-5)
    assert got.uncertainty == pytest.approx(float(expected(model.image, query[None])[1]["total"]), rel=1e-5)


def test_a_ranking_names_images_by_their_first_caption(model, store):
    ranking = rank(model.text, store.text[3], model.image, store.image, top=7)
    first, header, *rows = lines(store, "image", ranking)
    assert first == f"uncertainty of the query {ranking.uncertainty:.4g}" and header.split()[-1] == "image"
    captions = {0: 0, 1: 2, 2: 3, 3: 6, 4: 7, 5: 8, 6: 9}
    assert [row.split("  ")[-1] for row in rows] == [f"{i}.png: {CAPTIONS[captions[i]]}" for i in ranking.rows]
    texts = [row.split("  ")[-1] for row in list(lines(store, "text", ranking))[2:]]
    assert texts == [CAPTIONS[i] for i in ranking.rows]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"top": 0}, "top must be from 1 to the 11 items, got 0"),
        ({"top": 12}, "top must be from 1 to the 11 items, got 12"),
        ({"by": "luck"}, "by must be 'cosine' or 'likelihood', got 'luck'"),
    ],
)
def test_bad_rankings(model, store, option, message):
    with pytest.raises(ValueError, match=f"rank: {message}"):
        rank(model.image, store.image[0], model.text, store.text, **{"top": 3, **option})
