"""Calibration: recall, levels and correlations against hand-made cases, brute force and scipy."""

import builtins
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.functional import cosine_similarity

from fastprob.adapters import PairedEmbeddings, ProbVLM, predict, report
from fastprob.evaluation import figures, retrieval
from fastprob.evaluation.calibration import calibrate, evaluate, expected_calibration_error, uncertainty_levels
from fastprob.evaluation.retrieval import find_matches, match_rank, nearest, recall_at_k
from fastprob.evaluation.statistics import mean_std, spearman
from fastprob.evaluation.tables import markdown, percent


def graded(levels=5, per_level=20):
    """Queries [Q, 2] to the gallery (east, north): of level k, a share k / levels points the wrong way.

    Every query wants east; recall@1 of level k is 1 - k / levels exactly.
    """
    level = torch.arange(levels).repeat_interleave(per_level)
    wrong = torch.arange(per_level).repeat(levels) < level * per_level // levels
    query = torch.where(wrong[:, None], torch.tensor([0.1, 1.0]), torch.tensor([3.0, 0.1]))
    match = torch.tensor([True, False]).expand(len(query), 2)
    return query, torch.eye(2), level, match


def test_a_case_with_a_known_answer():
    query, gallery, level, match = graded()
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))
    uncertainty = 10.0**level + torch.linspace(0, 0.5, len(level))
    got = calibrate(query[order], gallery, uncertainty[order], match, levels=5)
    assert got.recall == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert (got.count, got.spearman) == ([20] * 5, pytest.approx(-1))
    assert got.r2 == pytest.approx(1) and got.score == pytest.approx(1)
    assert got.recall_at == {1: pytest.approx(0.6)}
    assert got.uncertainty == pytest.approx([float(uncertainty[level == k].mean()) for k in range(5)])
    upside_down = calibrate(query[order], gallery, -uncertainty[order], match, levels=5)
    assert upside_down.score == pytest.approx(-1)


def test_score_against_scipy_where_recall_is_neither_straight_nor_sorted():
    generator = torch.Generator().manual_seed(1)
    query, gallery = torch.randn(203, 6, generator=generator), torch.randn(50, 6, generator=generator)
    ids = torch.randint(7, (203,), generator=generator), torch.arange(50) % 7
    uncertainty = torch.rand(203, 4, generator=generator)
    got = calibrate(query, gallery, uncertainty, ids, levels=8)
    steps = list(range(8))
    assert sum(got.count) == 203 and set(got.count) == {25, 26}
    assert got.spearman == pytest.approx(scipy.stats.spearmanr(steps, got.recall).statistic)
    assert got.r2 == pytest.approx(scipy.stats.linregress(steps, got.recall).rvalue ** 2)
    assert got.score == -got.spearman * got.r2 and 0 < abs(got.score) < 1
    mean = uncertainty.double().mean(1)
    assert calibrate(query, gallery, mean, ids, levels=8) == got


def test_equal_recall_everywhere_has_no_score():
    _, gallery, level, match = graded()
    got = calibrate(gallery[:1].expand(100, 2), gallery, level, match, levels=5)
    assert got.recall == [1.0] * 5 and math.isnan(got.spearman) and math.isnan(got.r2) and math.isnan(got.score)
    assert "nan" in got.table()


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (4, 17), (31, 4), (1 << 11, 1 << 12)])
@pytest.mark.parametrize("kind", ["matrix", "ids"])
def test_ranks_against_brute_force(monkeypatch, rows, columns, kind):
    monkeypatch.setattr(retrieval, "_ROWS", rows)
    monkeypatch.setattr(retrieval, "_COLUMNS", columns)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(31, 5, generator=generator)
    gallery = torch.randn(17, 5, generator=generator) * torch.logspace(-3, 3, 17)[:, None]  # length must not matter
    ids = torch.arange(31) % 6, torch.arange(17) % 6
    matrix = ids[0][:, None] == ids[1]
    expected = []
    for q, matches in zip(query, matrix, strict=True):
        order = sorted(range(17), key=lambda g: -float(cosine_similarity(q, gallery[g], dim=0)))
        expected.append(next(place for place, g in enumerate(order) if matches[g]))
    match = matrix if kind == "matrix" else ids
    reverse = match.T if kind == "matrix" else match[::-1]
    assert match_rank(query, gallery, match).tolist() == expected
    found = find_matches(query, gallery, match)
    assert [each.rank.tolist() for each in found] == [expected, match_rank(gallery, query, reverse).tolist()]
    similar = cosine_similarity(query[:, None], gallery, dim=2)
    for each, along in zip(found, (1, 0)):
        assert each.first.tolist() == pytest.approx(similar.amax(along).tolist(), abs=1e-6)
    for k in (1, 3, 17):
        assert recall_at_k(query, gallery, match, k) == pytest.approx(sum(e < k for e in expected) / 31)


def test_ranks_of_both_directions_want_a_match_of_both():
    rows, ids = torch.eye(3), torch.arange(3)
    assert match_rank(rows[:2], rows, (ids[:2], ids)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="find_matches: every gallery item needs a match, item 2 has none"):
        find_matches(rows[:2], rows, (ids[:2], ids))
    with pytest.raises(ValueError, match="match_rank: every query needs a match, query 2 has none"):
        find_matches(rows, rows[:2], (ids, ids[:2]))


def test_a_tie_with_the_best_match_counts_against_it():
    gallery = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    for place in range(3):
        match = torch.zeros(1, 4, dtype=torch.bool).index_fill(1, torch.tensor([place]), True)
        assert match_rank(torch.tensor([[1.0, 0]]), gallery, match).tolist() == [2]
    nearly = torch.tensor([[1.0, 3e-7], [1, 0], [1, 0], [0, 1]])  # a rounding below, for the query to the south-east
    match = torch.tensor([[False, True, False, False]])
    assert match_rank(torch.tensor([[1.0, -1]]), nearly, match).tolist() == [2]
    both = torch.tensor([[True, True, False, False]])
    assert match_rank(torch.tensor([[1.0, 0]]), gallery, both).tolist() == [1]
    assert match_rank(torch.tensor([[1.0, 0]]), gallery, torch.ones(1, 4, dtype=torch.bool)).tolist() == [0]


@pytest.mark.parametrize("kind", [np.asarray, torch.Tensor.tolist])
def test_arrays_and_lists_are_taken_for_tensors(kind):
    generator = torch.Generator().manual_seed(4)
    image, text = torch.rand(9, 3, generator=generator), torch.rand(18, 3, generator=generator)
    owner, doubt = torch.arange(18) % 9, torch.rand(27, generator=generator)
    data, taken = PairedEmbeddings(image, text, owner), PairedEmbeddings(*map(kind, (image, text, owner)))
    assert taken.image.equal(image) and taken.caption_image.equal(owner)
    for match in (None, torch.arange(9)[:, None] == owner, (torch.arange(9), owner)):
        given = tuple(map(kind, match)) if isinstance(match, tuple) else match if match is None else kind(match)
        expected = evaluate(data, doubt[:9], doubt[9:], match=match, levels=3)
        got = evaluate(taken, kind(doubt[:9]), kind(doubt[9:]), match=given, levels=3)
        assert str(got) == str(expected)  # NaN and all
    assert spearman(kind(doubt), kind(doubt)) == pytest.approx(1)


def test_mean_and_deviation():
    assert mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_std(iter([0.25])) == (0.25, 0.0)
    assert all(math.isnan(value) for value in mean_std([1.0, math.nan, 2.0]))


def test_what_is_no_array_is_named():
    rows, ids = torch.rand(4, 3), torch.arange(4)
    expected = "must be a tensor or an array, got str: "
    with pytest.raises(ValueError, match=f"PairedEmbeddings: text {expected}"):
        PairedEmbeddings(rows, "rows", ids)
    with pytest.raises(ValueError, match=f"match_rank: gallery {expected}"):
        match_rank(rows, "rows", (ids, ids))
    with pytest.raises(ValueError, match=f"match_rank: ids {expected}"):
        match_rank(rows, rows, (ids, "rows"))
    with pytest.raises(ValueError, match="match_rank: match must be a tensor or an array, got list: "):
        match_rank(rows, rows, [[1], [1, 2]])
    with pytest.raises(ValueError, match=f"calibrate: uncertainty {expected}"):
        calibrate(rows, rows, "rows", (ids, ids), levels=2)
    with pytest.raises(ValueError, match=f"predict: x {expected}"):
        predict(ProbVLM(3, hidden=4).image, "rows")


RANKS = """
import pathlib, sys, torch
from fastprob.evaluation.retrieval import match_rank
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # KiB
def ranks(rows):
    ids = torch.arange(rows)
    match_rank(torch.rand(rows, 2), torch.rand(rows, 2), (ids, ids))
ranks(2000)
before = peak()
ranks(40000)
print(peak() - before)
"""


def test_memory_of_ranks_is_of_a_block():
    """A twentieth of the matrix of similarities; twice as many rows would take as much."""
    run = subprocess.run([sys.executable, "-c", RANKS], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40000**2 * 4 / 1024 / 20


@pytest.mark.parametrize(("queries", "levels"), [(10, 10), (11, 10), (19, 10), (1000, 7), (3, 2)])
def test_every_query_is_in_exactly_one_level_of_equal_count(queries, levels):
    uncertainty = torch.rand(queries, generator=torch.Generator().manual_seed(0))
    level = uncertainty_levels(uncertainty, levels)
    count = torch.bincount(level, minlength=levels)
    assert len(level) == queries and len(count) == levels and count.max() - count.min() <= 1 and count.min() >= 1
    assert level[uncertainty.argsort()].diff().min() >= 0


def test_ties_in_uncertainty_keep_the_order_given():
    assert uncertainty_levels(torch.zeros(6), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert uncertainty_levels(torch.tensor([1.0, 0, 1, 0, 1, 0]), 3).tolist() == [1, 0, 2, 0, 2, 1]
    many = uncertainty_levels(torch.zeros(100_000), 4)  # long enough for an unstable sort to show
    assert many.equal(torch.arange(100_000) // 25_000)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 5]),
        ([1, 2, 2, 2, 5, 1], [3, 1, 1, 4, 4, 4]),
        ([0, -1.5, math.inf, 2, 2], [7, 7, 7, 1, 0]),
    ],
)
def test_spearman_against_scipy(x, y):
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-14)
    assert spearman(x, -y) == pytest.approx(-spearman(x, y), abs=1e-14)


def test_spearman_edges():
    assert math.isnan(spearman(torch.ones(4), torch.arange(4)))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(9, (500,), generator=generator) for _ in range(2))
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-14)
    for x, y in ((torch.ones(1), torch.ones(1)), (torch.ones(3), torch.ones(4)), (torch.ones(2, 2), torch.ones(2, 2))):
        with pytest.raises(ValueError, match="must both be"):
            spearman(x, y)
    with pytest.raises(ValueError, match="free of NaN"):
        spearman(torch.tensor([1.0, math.nan]), torch.ones(2))


@pytest.mark.parametrize("bins", [4, 15])
def test_bins_of_the_calibration_error_are_closed_above(bins):
    """A prediction on an edge belongs to the bin below, where it makes up for one that errs the other way."""
    edge = 1 / bins
    confidence = torch.tensor([edge, edge / 2, edge * 3 / 2], dtype=torch.float64)
    right = torch.tensor([True, False, False])
    gap_of_first, gap_of_second = abs(1 - edge - edge / 2), edge * 3 / 2
    assert expected_calibration_error(confidence, right, bins) == pytest.approx((gap_of_first + gap_of_second) / 3)
    ends = torch.tensor([0.0, 1.0, 1.0])  # 0 is in the first bin, 1 in the last
    assert expected_calibration_error(ends, torch.tensor([True, True, False]), bins) == pytest.approx((1 + 1) / 3)


def test_calibration_error_against_bucketize():
    generator = torch.Generator().manual_seed(0)
    confidence, right = torch.rand(500, generator=generator), torch.rand(500, generator=generator) < 0.4
    which = torch.bucketize(confidence.double(), torch.linspace(0, 1, 16, dtype=torch.float64)[1:-1])
    groups = [which == number for number in range(15)]
    gaps = [group.float().mean() * (right[group].float().mean() - confidence[group].mean()).abs() for group in groups]
    assert expected_calibration_error(confidence, right) == pytest.approx(float(sum(gaps)), rel=1e-5)


@pytest.mark.parametrize(
    ("shares", "sign", "text"),
    [([], "", ""), ([0.5], "+", "+50.0"), ([0.25, 0.75], "", "50.0 ± 35.4"), ([-0.5, -0.25], "+", "-37.5 ± 17.7")],
)
def test_shares_in_percent(shares, sign, text):
    assert percent(iter(shares), sign) == text


def test_markdown_table():
    table = markdown(("method", "shots"), [("coop", 1), ("vpt", "all")])
    assert table == "| method | shots |\n|---|---|\n| coop | 1 |\n| vpt | all |"


def paired():
    """Ten images; captions 0..9 sit on their image, captions 10..19 on the next one."""
    image = torch.eye(10)
    owner = torch.arange(20) % 10
    return PairedEmbeddings(image, image[torch.cat([owner[:10], (owner[10:] + 1) % 10])], owner)


def test_both_directions():
    data = paired()
    text_uncertainty = (torch.arange(20) >= 10).float()
    got = evaluate(data, torch.arange(10.0), text_uncertainty, levels=2)
    assert got.text_to_image.recall == [1.0, 0.0] and got.text_to_image.score == pytest.approx(1)
    assert got.text_to_image.recall_at[1] == 0.5
    # Each image has a right caption at similarity 1, but another image's caption ties with it.
    assert got.image_to_text.recall_at == {1: 0.0, 5: 1.0, 10: 1.0}
    anything = torch.ones(10, 20, dtype=torch.bool)
    assert evaluate(data, torch.arange(10.0), text_uncertainty, match=anything).image_to_text.recall_at[1] == 1
    by_class = torch.zeros(10), torch.zeros(20)
    assert evaluate(data, torch.arange(10.0), text_uncertainty, match=by_class).text_to_image.recall_at[1] == 1
    assert "image -> text" in got.table() and "text -> image" in got.table()


def test_table_shows_each_level_and_the_summary():
    query, gallery, level, match = graded()
    lines = calibrate(query, gallery, level, match, levels=5).table().splitlines()
    assert len(lines) == 1 + 5 + 2
    assert lines[2].split() == ["2", "1", "0.800", "20"]
    assert lines[-1] == "S -1.000   R2 1.000   -S*R2 1.000"


Q, G, U, M = torch.ones(4, 3), torch.ones(5, 3), torch.ones(4), torch.ones(4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 5}, "levels must be from 2 to the 4 queries, got 5"),
        ({"levels": 1}, "levels must be from 2 to the 4 queries, got 1"),
        ({"uncertainty": torch.ones(5)}, r"uncertainty must be \[4\] or \[4, D\], got \(5,\)"),
        ({"uncertainty": torch.tensor([1, math.inf, math.nan, 1])}, "finite, 2 of 4 queries are not"),
        ({"query": torch.ones(4, 2)}, "one width, got 2 and 3"),
        ({"query": Q * math.nan}, "query has a NaN"),
        ({"gallery": G[:0]}, r"gallery must be .* got \(0, 3\)"),
        ({"gallery": G.long()}, "gallery must be .* got .*int64"),
        ({"match": M[:, :4]}, r"match must be bool \[4, 5\], got torch.bool \(4, 4\)"),
        ({"match": M.float()}, "match must be bool .*float32"),
        ({"match": (torch.ones(4), torch.ones(4))}, r"ids must be \[4\] and \[5\], got \(4,\) and \(4,\)"),
        ({"match": M.index_fill(0, torch.tensor([2]), False)}, "every query needs a match, query 2 has none"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(**{"query": Q, "gallery": G, "uncertainty": U, "match": M, "levels": 2, **arguments})


def test_recall_needs_a_k_within_the_gallery():
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 5 gallery items, got {k}"):
            recall_at_k(Q, G, M, k)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_nearest_is_the_head_of_a_sort(monkeypatch, block):
    monkeypatch.setattr(retrieval, "_ROWS", 4)
    monkeypatch.setattr(retrieval, "_COLUMNS", block)
    generator = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(13, 4, generator=generator), torch.randn(40, 4, generator=generator).double()
    among = torch.randperm(40, generator=generator)[:30]
    for rows, options in ((torch.arange(40), {}), (among, {"among": among})):
        cosine = cosine_similarity(query.double()[:, None], gallery[rows], dim=2)
        order = cosine.argsort(dim=1, descending=True)[:, :5]
        similarity, found = nearest(query, gallery, 5, **options)
        assert found.equal(rows[order]) and similarity.double().allclose(cosine.gather(1, order), atol=1e-6)
    assert nearest(query, gallery, 30, among=among)[1].sort(1).values.equal(among.sort().values.expand(13, -1))
    tied = nearest(torch.tensor([[2.0, 0]]), torch.eye(2)[[1, 0, 0, 1, 0, 0]], 3, among=torch.tensor([0, 5, 3, 2, 1]))
    assert tied[0].tolist() == [[1, 1, 1]] and tied[1].tolist() == [[5, 2, 1]]
    for k in (0, 31):
        with pytest.raises(ValueError, match=f"nearest: k must be from 1 to the 30 gallery items, got {k}"):
            nearest(query, gallery, k, among=among)


def history(epochs=3, steps=4):
    losses = torch.linspace(2, -1, epochs * steps).tolist()
    return {"step_loss": losses, "train_loss": losses[::steps], "val_nll": losses[::steps]}


def test_figures_show_what_they_are_given(tmp_path, monkeypatch):
    drawn = {}
    save = figures.save_figure

    def keep(figure, path):
        drawn[path.name] = figure
        return save(figure, path)

    for module in (figures, report):
        monkeypatch.setattr(module, "save_figure", keep)
    query, gallery, level, match = graded()
    result = calibrate(query, gallery, level, match, levels=5)
    ambiguity = torch.tensor([1.0, 2, 4, 8, 900, 1000])
    paths = [
        figures.recall_by_level({"text to image": result}, tmp_path / "new" / "recall.png"),
        figures.uncertainty_by_ambiguity(ambiguity, ambiguity.log(), tmp_path / "ambiguity.png"),
        report.training_curves(history(), tmp_path / "training.png"),
    ]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    points, fit = drawn["recall.png"].axes[0].lines
    assert list(points.get_ydata()) == result.recall
    assert list(fit.get_ydata()) == pytest.approx(result.recall)  # a straight line already
    assert "Spearman 1.00" in drawn["ambiguity.png"].axes[0].get_title()
    (medians,) = drawn["ambiguity.png"].axes[0].lines
    assert (medians.get_ydata()[1:] > medians.get_ydata()[:-1]).all() and len(medians.get_ydata()) > 3
    steps, epochs, validation = drawn["training.png"].axes[0].lines
    assert list(steps.get_ydata()) == history()["step_loss"] and steps.get_xdata()[-1] == epochs.get_xdata()[-1] == 3
    assert list(validation.get_ydata()) == history()["val_nll"]


def test_figures_refuse_nothing_to_show(tmp_path):
    for call in (
        lambda: figures.recall_by_level({}, tmp_path / "x.png"),
        lambda: report.training_curves(history(epochs=0), tmp_path / "x.png"),
        lambda: figures.uncertainty_by_ambiguity(torch.zeros(3), torch.ones(3), tmp_path / "x.png"),
        lambda: figures.uncertainty_by_ambiguity(torch.ones(3), torch.ones(4), tmp_path / "x.png"),
    ):
        with pytest.raises(ValueError, match="must"):
            call()
    assert not list(tmp_path.iterdir())


def test_figures_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"fastprob\[plot\]"):
        report.training_curves(history(), tmp_path / "x.png")
