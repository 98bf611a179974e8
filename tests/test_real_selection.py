"""The study of selection: what is swapped, tuned and ranked, on tiny data whose answer is known."""

import pathlib
import sys

import pytest
import torch
from torch.nn.functional import normalize

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from bench.real import selection, targets
from bench.real.selection_report import agreement, shortfall, verdict
from bench.real.towers import Rows


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
def test_swapped_captions_are_of_other_images_and_none_is_lost(share):
    owner = torch.tensor([0] * 6 + [1] * 5 + list(range(2, 41)))
    source = selection.swap(owner, share, torch.Generator().manual_seed(0))
    assert sorted(source.tolist()) == list(range(50))
    moved = source != torch.arange(50)
    assert int(moved.sum()) == round(share * 50) and (owner[source] != owner)[moved].all()


def rows(images):
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(images, 6, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(2)
    return Rows(image, image[owner].roll(1, 1) + 0.1 * torch.randn(len(owner), 6, generator=generator), owner)


def test_some_pictures_keep_their_captions():
    data, chosen = rows(10), torch.tensor([7, 2])
    found = targets.some(data, chosen)
    assert found.image.equal(data.image[chosen]) and found.text.equal(data.text[[4, 5, 14, 15]])
    assert found.caption_image.tolist() == [1, 1, 0, 0]
    both = targets.joined(found, found)
    assert both.caption_image.tolist() == [1, 1, 0, 0, 3, 3, 2, 2] and both.image.equal(found.image.repeat(2, 1))


def test_tuned_heads_find_what_the_first_do_not():
    """Texts are their images' with the axes turned by one, which the identity cannot know. The first heads stay."""
    data = rows(60)
    first = targets.Unit(6), targets.Unit(6)
    target = targets.Target({"test": data}, data.caption_image[:, None] == torch.arange(60), first)
    assert selection.recall(target, first)["own"] < 0.3
    tuned = targets.tune(first, data, 150, 1e-2, 0)
    assert min(selection.recall(target, tuned).values()) > 0.7
    assert first[0].linear.weight.equal(torch.eye(6))


def test_agreement_is_one_where_the_least_uncertain_is_the_best():
    run = {
        name: {"recall": {"own": recall}, "uncertainty": {"right": 1 - recall, "wrong": recall}}
        for name, recall in {"a": 0.1, "b": 0.4, "c": 0.3}.items()
    }
    assert agreement(run, "right", "own") == pytest.approx(1) and shortfall(run, "right", "own") == 0
    assert agreement(run, "wrong", "own") == pytest.approx(-1)
    assert shortfall(run, "wrong", "own") == pytest.approx(0.3)


def test_a_verdict_needs_all_seeds():
    assert verdict([0.1, 0.2]) == "**better** in every seed (+0.150)"
    assert verdict([-0.1, -0.2]) == "**worse** in every seed (-0.150)"
    assert verdict([0.3, -0.1]) == "no difference that all seeds show (+0.100)"
