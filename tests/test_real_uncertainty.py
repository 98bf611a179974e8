"""The bench of all uncertainties: noisy pairs, recall of a ranking, and every method on a small part."""

import pathlib
import sys

import pytest
import torch
from torch.nn.functional import normalize

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from bench.real import rivals, uncertainty
from bench.real.measures import Judge
from bench.real.parts import Part
from fastprob.adapters import PairedEmbeddings
from fastprob.evaluation.selective import Ranked


def make_part(seed, images=60):
    """A picture has a caption of its own and "thing 0" to "thing 4", which is true of every fifth picture."""
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(images, 8, generator=generator), dim=1)
    things = normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(9)), dim=1)
    own = normalize(image + 0.4 * torch.randn(images, 8, generator=generator), dim=1)
    which, owner = torch.arange(images) % 5, torch.arange(images).repeat(2)
    captions = [f"own {seed} {i}" for i in range(images)] + [f"thing {i}" for i in which.tolist()]
    truth = torch.cat([torch.eye(images), (which[:, None] == which).float()]).bool()
    data = PairedEmbeddings(image, torch.cat([own, things[which]]), owner)
    return Part(data, captions, truth, torch.zeros(2 * images, dtype=torch.int64))


@pytest.fixture(scope="module")
def parts():
    return {name: make_part(seed) for seed, name in enumerate(("train", "val", "test"))}


def test_a_fifth_of_the_captions_is_given_to_pictures_that_they_are_not_true_of(parts):
    part = parts["test"]
    owner = rivals.noisy(part)
    swapped = owner != part.data.caption_image
    assert int(swapped.sum()) == 24 and owner.equal(rivals.noisy(part))
    assert not part.truth[swapped.nonzero()[:, 0], owner[swapped]].any()
    everything = Part(part.data, part.captions, torch.ones_like(part.truth), part.kind)
    assert rivals.noisy(everything).equal(part.data.caption_image)


def test_recall_of_a_ranking_by_either_rule(parts):
    """Text 0 finds its picture, text 60 ("thing 0") another true one; pictures 0 and 1 find "thing 0" and "thing 3"."""
    part = parts["test"]
    top_image, top_caption = torch.full((120,), 1), torch.full((60,), 2)
    top_image[0], top_image[60], top_caption[0], top_caption[1] = 0, 5, 60, 63
    top_image[1] = 0  # else text 1 would be right
    found = uncertainty._recall(
        [{"top|x|text": top_image, "top|x|image": top_caption}], "x", Judge(part, parts["train"])
    )
    own = {0, 61}  # "thing 1" of picture 1 finds it
    true = own | {60} | {i for i in range(60, 120) if i % 5 == 1}
    assert part.which[60] == 60 and part.which[61] == 61
    assert found["text -> image, own"] == [pytest.approx(len(own) / 120)]
    assert found["text -> image, true"] == [pytest.approx(len(true) / 120)]
    assert found["image -> text, own"] == found["image -> text, true"] == [pytest.approx(2 / 60)]


METHODS = (rivals.FREE, "PFE head", "PCME++ head", "ProbVLM, exact", "ProbVLM, paper", rivals.ENSEMBLE)


@pytest.fixture(scope="module")
def cache(parts, tmp_path_factory):
    """Runs of some methods, and of the two seeds that an ensemble is of."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "EPOCHS", 2)
        patch.setattr(rivals, "SETS", {"digitscenes": lambda _: parts})
        trials = [rivals.Trial("digitscenes", method, 0) for method in METHODS[:-1]]
        trials += [rivals.Trial("digitscenes", method, 1) for method in METHODS[3:5]]
        trials.append(rivals.Trial("digitscenes", rivals.ENSEMBLE, 0))
        patch.setattr(rivals, "trials", lambda _: trials)
        rivals.make(cache, ["digitscenes"])
    return cache


def test_every_method_says_something_of_every_query(cache):
    for method in METHODS:
        found = rivals.load(rivals.Trial("digitscenes", method, 0), cache)
        for name, of in found.items():
            assert of.isfinite().all(), (method, name)
            assert len(of) == (60 if name.endswith("|image") else 120), (method, name)
    every = uncertainty.rivals("digitscenes", cache)
    assert {"p(wrong)", "margin", "random", "PFE head: variance", "ensemble of 2: total"} <= {one.name for one in every}
    assert len(next(one for one in every if one.name == "ProbVLM, exact: total").runs) == 2
    assert rivals.load(rivals.Trial("digitscenes", "PFE head", 2), cache) is None


def test_a_score_is_judged_by_every_question(cache, parts):
    judge = Judge(parts["test"], parts["train"])
    every = {one.name: one for one in uncertainty.rivals("digitscenes", cache)}
    ours = every["p(wrong)"]
    areas = uncertainty.areas(ours, judge)
    itself, distance = (uncertainty.judged(each, areas, judge) for each in (ours, every["1 - max cosine"]))
    assert set(itself) == set(distance) and len(itself) == 4
    for (direction, rule), wrong in judge.wrong.items():
        one, question = distance[f"{direction}, {rule}"], f"{direction}, {rule}"
        score = every["1 - max cosine"].of(direction, rule)[0]
        assert one["AURC"][0] == pytest.approx(float(Ranked(score, wrong).aurc()))
        assert one["AURC"][1] < one["AURC"][0] < one["AURC"][2]
        assert one[uncertainty.LESS][0] == pytest.approx(one["AURC"][0] - itself[question]["AURC"][0])
        assert itself[question][uncertainty.LESS] == [0, 0, 0] and 0 <= itself[question]["ECE"] < 0.5
        assert "ECE" not in one
    assert not ours.of("text -> image", "own")[0].equal(ours.of("text -> image", "true")[0])


def test_the_report_says_first_where_probvlm_does_not_win(cache, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(uncertainty, "SETS", {"digitscenes": lambda _: parts})
    uncertainty.write(tmp_path, cache)
    written = (tmp_path / "uncertainty.md").read_text()
    assert written.splitlines()[2].startswith("On ") and " of the 4 questions " in written.splitlines()[2]
    assert "runs are missing" in written and "(error rate)" in written
    for name in ("ProbVLM, exact: posterior entropy", "ensemble of 2: epistemic", "frozen similarities: mutual doubt"):
        assert name in written
    assert (tmp_path / "uncertainty.json").exists() and (tmp_path / "risk-digitscenes.png").stat().st_size > 10_000


def test_pairs_that_belong_together_least_are_found(cache, parts):
    found = uncertainty.pairs("digitscenes", Judge(parts["test"], parts["train"]), cache)
    assert found["frozen similarities: 1 - cosine"][0] > 0.25  # random: 0.2


def test_every_run_has_a_file_of_its_own(tmp_path):
    files = [trial.file(tmp_path) for trial in rivals.trials()]
    assert len(set(files)) == len(files) == 2 * (3 * 10 + 1)
