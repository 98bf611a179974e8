"""Choosing images and ranking models: toy pools whose best choice is known."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import fastprob.cli as cli
from fastprob.adapters import PairedEmbeddings, ProbVLM, predict
from fastprob.adapters.error import FILE, SIDES, fit_error
from fastprob.adapters.selection import MEASURES, Candidate, choose, coreset, rank_models
from fastprob.data.arrays import embed_arrays


def pairs(images, seed, spread=0.5, dim=8):
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(images, dim, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(2)
    noise = torch.randn(len(owner), dim, generator=generator)
    return PairedEmbeddings(image, image[owner] + spread * noise, owner)


@pytest.fixture(scope="module")
def adapter():
    torch.manual_seed(0)
    adapter = ProbVLM(8, hidden=6, dropout=0.3).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


@pytest.fixture(scope="module")
def errors():
    return fit_error(pairs(300, 0))


def test_the_most_uncertain_come_first(adapter, errors):
    pool = pairs(40, 1)
    total = predict(adapter.image, pool.image, passes=6, seed=3).total.mean(1)
    assert choose(pool, 5, by="total", adapter=adapter, passes=6, seed=3).tolist() == total.topk(5).indices.tolist()
    assert choose(pool, 40, by="p_wrong", errors=errors).tolist() == errors(pool)["image"].topk(40).indices.tolist()


def test_equal_captions_count_once_in_p_wrong(errors):
    pool = pairs(40, 1)
    captions = ["the same" for _ in range(80)]
    expected = errors(pool, captions=captions)["image"].argsort(descending=True, stable=True)
    assert choose(pool, 40, by="p_wrong", errors=errors, captions=captions).equal(expected)
    assert not choose(pool, 40, by="p_wrong", errors=errors).equal(expected)


def test_random_is_another_choice_by_seed_and_no_image_twice():
    pool = pairs(40, 1)
    first, again, other = (choose(pool, 20, by="random", seed=seed) for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other) and len(first.unique()) == 20


def on_circle(*degrees):
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_coreset_takes_the_farthest_from_all_chosen():
    rows = on_circle(0, 10, 80, 170, 181) * torch.tensor([1, 2, 3, 1, 5])[:, None]  # lengths don't matter
    assert coreset(rows, 3, known=on_circle(5)).tolist() == [4, 2, 3]
    assert coreset(rows, 5, known=on_circle(5)).tolist()[:3] == [4, 2, 3]
    assert coreset(rows, 1, known=on_circle(175, 1)).tolist() == [2]


@pytest.mark.parametrize("seed", range(4))
def test_coreset_reaches_every_cluster_before_any_twice(seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(8).repeat_interleave(torch.tensor([50, 1, 2, 1, 9, 1, 30, 6]), 0)
    pool = PairedEmbeddings(centres + 0.01 * torch.randn(100, 8, generator=generator), centres, torch.arange(100))
    assert len(centres[choose(pool, 8, by="coreset", seed=seed)].argmax(1).unique()) == 8
    assert len(choose(pool, 100, by="coreset", seed=seed).unique()) == 100


def test_equal_rows_are_each_chosen_once():
    assert sorted(coreset(torch.eye(3)[[0, 0, 0, 0]], 4).tolist()) == [0, 1, 2, 3]


def test_models_are_ranked_by_how_uncertain_they_are(errors):
    """The same images, captions ever farther from them: every measure that looks at both says so."""
    candidates = {str(spread): Candidate(pairs(150, 1, spread), errors=errors) for spread in (0.8, 0.1, 0.4)}
    for by in ("p_wrong", "distance", "entropy"):
        ranked = rank_models(candidates, by=by)
        assert [name for name, _ in ranked] == ["0.1", "0.4", "0.8"], by
        assert sorted(value for _, value in ranked) == [value for _, value in ranked]


def test_a_models_number_is_the_mean_of_both_sides(adapter, errors):
    data = pairs(50, 1)
    candidate = {"a": Candidate(data, adapter=adapter, errors=errors)}
    similarity = normalize(data.image, dim=1) @ normalize(data.text, dim=1).T
    entropy = []
    for axis in (0, 1):
        p = (similarity / 0.01).softmax(axis)
        entropy.append(torch.special.entr(p).sum(axis).mean() / math.log(p.shape[axis]))
    expected = {
        "p_wrong": sum(errors(data)[side].mean() for side in SIDES) / 2,
        "total": sum(predict(getattr(adapter, s), getattr(data, s), passes=20).total.mean() for s in SIDES) / 2,
        "distance": 1 - (similarity.amax(1).mean() + similarity.amax(0).mean()) / 2,
        "entropy": sum(entropy) / 2,
    }
    assert tuple(sorted(expected)) == tuple(sorted(MEASURES))
    for by, value in expected.items():
        ((name, found),) = rank_models(candidate, by=by)
        assert name == "a" and found == pytest.approx(float(value), rel=1e-4), by


def test_what_is_refused(adapter, errors):
    pool = pairs(10, 1)
    for options, message in (
        ({"count": 3, "by": "best"}, "choose: by must be one of 'total', .*, got 'best'"),
        ({"count": 11, "by": "random"}, "choose: count must be an integer from 1 to the 10 images, got 11"),
        ({"count": 0, "by": "coreset"}, "choose: count must be an integer from 1 to the 10 images, got 0"),
        ({"count": 3, "by": "total"}, "choose: adapter must be given for this choice, got None"),
        ({"count": 3, "by": "p_wrong"}, "choose: errors must be given for this choice, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(pool, **options)
    with pytest.raises(ValueError, match="coreset: count must be from 1 to the 10 rows, got 11"):
        coreset(pool.image, 11)
    with pytest.raises(ValueError, match=r"rank_models: by must be one of 'p_wrong', .*, got 'best'"):
        rank_models({}, by="best")
    with pytest.raises(ValueError, match="rank_models: b: errors must be given for this choice, got None"):
        rank_models({"a": Candidate(pool, errors=errors), "b": Candidate(pool)})


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("by", ["total", "p_wrong", "coreset", "random"])
def test_the_command_writes_ids_or_rows(adapter, errors, tmp_path, capsys, by, named):
    ids = [f"{i}.png" for i in range(40)] if named else None
    pool, captions = pairs(40, 1), [f"caption {i % 50}" for i in range(80)]
    options = {"pairs": pool.caption_image, "captions": captions, "ids": ids, "progress": False}
    store = embed_arrays(pool.image, pool.text, tmp_path / "store", **options)
    adapter.save(tmp_path / "run" / "best.safetensors")
    command = ["select", "--store", store.path, "--count", 7, "--by", by, "--seed", 2, "--out", tmp_path / "rows.txt"]
    command = [str(word) for word in [*command, "--checkpoint", tmp_path / "run", "--device", "cpu"]]
    if by == "p_wrong":
        assert cli.main(command) == 2
        assert f"--by p_wrong needs {tmp_path / 'run' / FILE}" in capsys.readouterr().err
    errors.save(tmp_path / "run" / FILE)
    assert cli.main(command) == 0
    rows = choose(store, 7, by=by, adapter=adapter, errors=errors, captions=captions, seed=2).tolist()
    written = (tmp_path / "rows.txt").read_text().split()
    assert written == ([f"{row}.png" for row in rows] if named else [str(row) for row in rows])
    assert cli.main(command) == 2
    assert "error: --out must be a new file" in capsys.readouterr().err
