"""Draws and what is nearest to them, against torch and scipy; the grid by its pixels; `fastprob draw` on real files."""

import csv
import re

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import toy_clip
from PIL import Image
from torch.nn.functional import normalize

import fastprob
import fastprob.cli as cli
from fastprob.adapters import GGDAdapter, ProbVLM
from fastprob.adapters.draws import SHOWN, Draws, draw, neighbours
from fastprob.data.arrays import embed_arrays
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.grid import picture_grid

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200), (90, 60, 20)]
NAMES = ["red", "green", "blue", "yellow", r"$\x$ and $", "cyan", "brown"]


def adapter_of(width: float, dim: int = toy_clip.DIM) -> GGDAdapter:
    """mu is the embedding itself, and every dimension a Laplace of this scale."""
    adapter = GGDAdapter(dim, hidden=4, positive="relu").requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.zero_()
    first, _, last = adapter.block_mu
    first.weight.copy_(torch.eye(dim))
    last.weight.copy_(torch.eye(dim))
    first.bias.fill_(4)  # above 0 for its ReLU, with which the head would not be linear
    last.bias.fill_(-4)
    adapter.block_alpha[2].bias.fill_(1 / width)
    adapter.block_beta[2].bias.fill_(1)
    return adapter


def save(path, width):
    model = ProbVLM(toy_clip.DIM, hidden=4, positive="relu")
    model.image, model.text = adapter_of(width), adapter_of(width)
    model.save(path)
    return path


# --------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("training", [True, False])
def test_draws_and_what_is_nearest(training):
    torch.manual_seed(0)
    adapter = GGDAdapter(6, hidden=8, dropout=0.9).train(training)
    query, gallery = torch.randn(6), torch.randn(50, 6)
    found = draw(adapter, query, gallery, draws=40, seed=3)
    with torch.no_grad():
        mu, inv_alpha, beta = adapter.eval()(query)
    torch.testing.assert_close(found.mean, normalize(mu, dim=0))
    expected = normalize(fastprob.ggd_sample(mu, inv_alpha, beta, n=40, seed=3), dim=1)
    torch.testing.assert_close(found.draws, expected)
    nearest = (expected @ normalize(gallery, dim=1).T).argmax(1)
    assert found.nearest == nearest.tolist() and len(set(found.nearest)) > 5
    assert found.nearest_to_mean == int((normalize(gallery, dim=1) @ mu).argmax())
    rows, counts = nearest.unique(return_counts=True)
    assert sorted(found.counts) == list(zip(rows.tolist(), counts.tolist()))
    assert [count for _, count in found.counts] == sorted(counts.tolist(), reverse=True)
    assert found.perplexity == pytest.approx(np.exp(scipy.stats.entropy(counts)))


def test_the_mode_stays():
    adapter = adapter_of(1.0).train()
    draw(adapter, torch.ones(toy_clip.DIM), torch.eye(toy_clip.DIM))
    assert all(module.training for module in adapter.modules())


def test_wide_distributions_have_more_nearest_images():
    gallery = normalize(torch.randn(300, toy_clip.DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    found = [draw(adapter_of(width), gallery[7], gallery, draws=64) for width in (1e-4, 0.1, 10)]
    assert found[0].counts == [(7, 64)] and found[0].perplexity == 1
    assert 1 < found[1].perplexity < found[2].perplexity < 64
    assert all(each.nearest_to_mean == 7 for each in found)
    assert str(found[0]) == "64 draws, 1 nearest image, perplexity 1.0"
    assert str(found[2]).startswith(f"64 draws, {len(found[2].counts)} different nearest images, perplexity ")


def test_huge_draws_have_unit_norm():
    adapter = adapter_of(1.0)
    adapter.block_beta[2].bias.fill_(0.05)
    query = torch.ones(toy_clip.DIM)
    assert fastprob.ggd_sample(*adapter(query), n=4).abs().amax(1).min() > 1e20  # the squares leave float32
    found = draw(adapter, query, torch.eye(toy_clip.DIM), draws=4)
    torch.testing.assert_close(found.draws.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (torch.ones(24), {"draws": 0}, "draws must be at least 1, got 0"),
        (torch.ones(23), {}, r"query must be \[24\], got \(23,\)"),
        (torch.ones(1, 24), {}, r"query must be \[24\], got \(1, 24\)"),
        (torch.full((24,), torch.nan), {}, "must have finite draws"),
    ],
)
def test_what_can_not_be_drawn(query, options, message):
    with pytest.raises(ValueError, match=f"draw: .*{message}"):
        draw(adapter_of(1.0), query, torch.eye(24), **options)


# ---------------------------------------------------------------------------------------------- grid


def squares(path, colour):
    """Centres (row, column) of the areas of exactly this colour, in reading order."""
    areas, count = scipy.ndimage.label((np.asarray(Image.open(path).convert("RGB")) == colour).all(2))
    centres = scipy.ndimage.center_of_mass(areas > 0, areas, range(1, count + 1))
    sizes = np.bincount(areas.ravel())[1:]
    return sorted(centre for centre, size in zip(centres, sizes) if size > 5000)


def picture(row):
    return Image.new("RGB", (20, 20), COLOURS[row])


def test_a_grid_shows_every_tile_in_its_place(tmp_path):
    tiles = [
        (r"a text of $\x$ letters", "query"),
        *((picture(row), f"{row}\n$\\x$ {'word ' * 30}") for row in range(7)),
    ]
    path = picture_grid(tiles, r"title of $\x$", tmp_path / "new" / "grid.png")
    places = [squares(path, colour) for colour in COLOURS]
    assert [len(place) for place in places] == [1] * 7
    row, column = np.array(places)[:, 0].T
    assert np.ptp(row[:5]) < 2 and np.ptp(row[5:]) < 2 and row[5] > row[0] + 200  # six in a row, the text is the first
    assert (np.diff(column[:5]) > 200).all() and column[5] < column[0] < column[6] + 2
    pixels = np.asarray(Image.open(path).convert("L"))
    left, top = int(column[0] - (column[1] - column[0])), int(row[0])
    assert (pixels[top - 40 : top + 40, left - 100 : left + 100] < 100).any()  # the text's letters
    assert list(path.parent.iterdir()) == [path]


def test_a_grid_replaces_another_in_one_step(tmp_path):
    path, link = tmp_path / "grid.png", tmp_path / "link"
    path.write_text("old")
    link.hardlink_to(path)
    picture_grid([(picture(0), "")], "", path)
    assert link.read_text() == "old" and len(squares(path, COLOURS[0])) == 1


def test_a_grid_has_the_most_frequent_of_many(tmp_path):
    rows = [0] + [row for row in range(SHOWN + 5) for _ in range(1 + (row == 3))]
    store = embed_arrays(torch.eye(30), torch.eye(30), tmp_path, captions=[f"text {i}" for i in range(30)])
    found = Draws(torch.zeros(1), torch.zeros(len(rows), 1), 5, rows)
    tiles = neighbours(store, found, lambda row: Image.new("L", (2000, 1000) if row == 5 else (20, 10), row))
    assert [shown.getpixel((9, 9)) for shown, _ in tiles] == [5, 0, 3, 1, 2, *range(4, SHOWN)]
    assert tiles[0][0].size == (512, 256) and tiles[1][0].size == (20, 10)
    said = [
        "nearest to the mean\n5: text 5",
        *(f"nearest to 2 of {len(rows)} draws\n{row}: text {row}" for row in (0, 3)),
    ]
    assert [below for _, below in tiles[:3]] == said


# ------------------------------------------------------------------------------------------- command


def run(capsys, *argv, code=0):
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == code
    output, error = capsys.readouterr()
    if code:
        assert output == "" and error.startswith("fastprob draw: error: ") and error.count("\n") == 1
    return error if code else output


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A table of pictures of one colour each, a store of it, and adapters: sharp.safetensors, wide.safetensors."""
    directory = tmp_path_factory.mktemp("draw")
    for row in range(len(COLOURS)):
        picture(row).save(directory / f"{row}.png")
    with open(directory / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *([f"{row}.png", name] for row, name in enumerate(NAMES))])
    toy_clip.register(directory, "toy-draw")
    model = ["--model", "toy-draw", "--pretrained", toy_clip.weights(directory, "toy-draw", 0), "--device", "cpu"]
    argv = ["embed", "--data", directory / "data.csv", "--out", directory / "store", *model]
    assert cli.main([str(word) for word in argv]) == 0
    save(directory / "sharp.safetensors", 1e-5)
    save(directory / "wide.safetensors", 1.0)
    return directory


def options(files, adapter="wide"):
    return ["--store", files / "store", "--checkpoint", files / f"{adapter}.safetensors", "--device", "cpu"]


def test_draw_prints_how_often_each_image_is_nearest(capsys, files):
    store = EmbeddingStore(files / "store")
    output = run(capsys, "draw", "text:4", *options(files), "--draws", 20, "--seed", 5).splitlines()
    found = draw(adapter_of(1.0), store.text[4], store.image, draws=20, seed=5)
    assert output[0] == f"{found} (from 1, all the same, to 20)" and output[1] == "draws  image"
    named = {row: f"{row}.png: {name}" for row, name in enumerate(NAMES)}
    assert output[2].split(maxsplit=1) == ["mean", named[found.nearest_to_mean]]
    assert [line.split(maxsplit=1) for line in output[3:]] == [[str(n), named[row]] for row, n in found.counts]
    assert len(found.counts) > 2
    text = run(capsys, "draw", r"$\x$ and $", *options(files), "--draws", 20, "--seed", 5)
    assert text.splitlines() == output  # of the same text
    assert run(capsys, "draw", files / "2.png", *options(files)) == run(capsys, "draw", "image:2", *options(files))


def test_a_certain_query_has_one_nearest_image(capsys, tmp_path, files):
    out = tmp_path / "grid.png"
    output = run(capsys, "draw", "image:3", *options(files, "sharp"), "--data", files / "data.csv", "--out", out)
    assert output.startswith("16 draws, 1 nearest image, perplexity 1.0") and f"Written to {out}" in output
    places = [squares(out, colour) for colour in COLOURS]
    assert [len(place) for place in places] == [0, 0, 0, 3, 0, 0, 0]  # the query, of the mean, of the draws


def test_the_grid_is_ordered_by_frequency(capsys, tmp_path, files):
    out = tmp_path / "grid.png"
    query = ["draw", files / "6.png", *options(files), "--draws", 30]
    output = run(capsys, *query, "--data", files / "data.csv", "--out", out)
    mean, *rows = (int(row) for row in re.findall(r"(\d)\.png", output))
    assert len(rows) > 3
    shown = {tuple(map(round, place)): row for row, colour in enumerate(COLOURS) for place in squares(out, colour)}
    lines = sorted({place[0] for place in shown})
    assert len(lines) <= 2
    assert [shown[place] for place in sorted(shown)] == [6, mean, *rows]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--out", "grid.png"], "--out is not for draw without --data or --diffusion"),
        (["--data", "data.csv"], "--data is not for draw without --out"),
        (["--diffusion", "pipe"], "--diffusion is not for draw without --out"),
        (["--limit", "3"], "--limit is not for draw without --data"),
        (["--draws", "0"], "draw: draws must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_together(capsys, files, given, message):
    assert message in run(capsys, "draw", "image:0", *options(files), *given, code=2)


def test_other_data_and_other_rows(capsys, tmp_path, files):
    for row in (0, 1):
        picture(row).save(tmp_path / f"{row}.png")
    (tmp_path / "data.csv").write_text("image,caption\n0.png,red\n1.png,green\n")
    grid = ["--data", tmp_path / "data.csv", "--out", tmp_path / "grid.png"]
    assert "another data set" in run(capsys, "draw", "image:0", *options(files), *grid, code=2)
    assert not (tmp_path / "grid.png").exists()
    assert "draw: image rows of" in run(capsys, "draw", "image:7", *options(files), code=2)
