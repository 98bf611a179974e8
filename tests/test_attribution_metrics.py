"""Metrics of maps: each is what its formula says, by open_clip's own forward passes, pair by pair; and ROAR+."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from explained import CONTEXT, SIZE, TEXTS, build, pairs, tokenizer
from torch.nn import functional as F

from fastprob.attribution import GradCAM, Random
from fastprob.attribution.metrics import (
    SIDES,
    Pairs,
    confidence,
    deletion,
    insertion,
    mass_in_box,
    pointing_game,
    sanity_check,
)
from fastprob.attribution.roar import roar_loss
from fastprob.evaluation.statistics import spearman

BLANK = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)[:, None, None]


@pytest.fixture
def model(tmp_path):
    return build(tmp_path)


@pytest.fixture
def found(model):
    """Maps in which every value differs, but for pixels of the first map that tie."""
    result = Random(model, tokenizer, seed=3)(*pairs())
    image = result.image.double()
    image[0, :3] = image[0, 3:6] = 0.5
    return dataclasses.replace(result, image=image)


def cosine(model, image, text, left=None):
    """Of one pair. left: [T] of the tokens, for the embeddings; None leaves all."""
    ids = tokenizer([text])

    def hook(_, __, embedded):
        padding = model.text.token_embedding.weight[0]  # CLIP's tokenizer pads with 0
        return left[:, None] * embedded + (1 - left[:, None]) * padding

    handle = model.text.token_embedding.register_forward_hook(hook) if left is not None else None
    result = F.cosine_similarity(model.encode_image(image[None]), model.encode_text(ids))[0]
    if handle is not None:
        handle.remove()
    return result


def left_of(image, mask):
    return mask * image + (1 - mask) * BLANK


def tokens(values, words):
    """[T] double, 1 at tokens of no word."""
    result = torch.ones(CONTEXT, dtype=torch.float64)
    for word, value in zip(words, values):
        result[word.start : word.stop] = value
    return result


# ---- what a map leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_confidence(model, side):
    images, texts = pairs(12)
    found = Random(model, tokenizer, seed=3)(images, texts)
    result = confidence(Pairs(model, tokenizer, images, texts, blank=BLANK), found, side)
    changes = []
    for i, (image, text) in enumerate(zip(images, texts)):
        left = tokens([value for _, value in found.of_words(i)], found.words[i])
        masked = image if side == "text" else left_of(image, found.image[i])
        changes.append(cosine(model, masked, text, None if side == "image" else left) - cosine(model, image, text))
    changes = torch.stack(changes)
    assert {*changes.sign().tolist()} == {-1, 1}  # both are seen
    torch.testing.assert_close(result.drop, 100 * (-changes).clamp(min=0))
    assert result.increase.tolist() == [100.0 if change > 0 else 0.0 for change in changes]


def areas(model, found, side, steps, out):
    """By sorting and loops. out: whether the most important parts are taken out, not put in."""
    images, texts = pairs()
    result = []
    for i, (image, text) in enumerate(zip(images, texts)):
        pixels = found.image[i].flatten().tolist()
        by_pixel = sorted(range(len(pixels)), key=lambda at: -pixels[at])  # stable
        values = [value for _, value in found.of_words(i)]
        by_word = sorted(range(len(values)), key=lambda at: -values[at])
        curve = []
        for step in range(steps + 1):
            mask, words = torch.zeros(len(pixels), dtype=torch.float64), torch.zeros(len(values), dtype=torch.float64)
            mask[by_pixel[: math.ceil(len(pixels) * step / steps)]] = 1
            words[by_word[: math.ceil(len(values) * step / steps)]] = 1
            if out:
                mask, words = 1 - mask, 1 - words
            masked = image if side == "text" else left_of(image, mask.view(SIZE))
            curve.append(float(cosine(model, masked, text, None if side == "image" else tokens(words, found.words[i]))))
        result.append(np.trapezoid(curve, dx=1 / steps))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("side", SIDES)
def test_insertion_and_deletion(model, found, side):
    subject = Pairs(model, tokenizer, *pairs(), blank=BLANK)
    actual = insertion(subject, found, side, steps=5)
    torch.testing.assert_close(actual, areas(model, found, side, 5, out=False))
    torch.testing.assert_close(deletion(subject, found, side, steps=5), areas(model, found, side, 5, out=True))


def test_by_default_blank_is_zero_and_the_sides_are_those_of_the_source(model, found):
    images, texts = pairs()
    subject, zero = Pairs(model, tokenizer, images, texts), Pairs(model, tokenizer, images, texts, blank=0 * BLANK)
    assert torch.equal(confidence(subject, found).drop, confidence(zero, found, "both").drop)
    assert torch.equal(insertion(subject, found), insertion(zero, found, "image", steps=16))
    assert not torch.equal(insertion(subject, found), insertion(Pairs(model, tokenizer, images, texts, blank=1), found))


def test_pairs_do_not_depend_on_how_many_go_at_once(model, found, monkeypatch):
    subject = Pairs(model, tokenizer, *pairs(), blank=BLANK)
    before = confidence(subject, found)
    monkeypatch.setattr("fastprob.attribution.metrics.AT_ONCE", 3)
    torch.testing.assert_close(confidence(subject, found), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_towers(tmp_path, dtype):
    model, (images, texts) = build(tmp_path, dtype=dtype), pairs(dtype=dtype)
    found = Random(model, tokenizer)(images, texts)
    with torch.inference_mode():
        drop = confidence(Pairs(model, tokenizer, images, texts), found).drop
    assert drop.dtype == torch.float32
    exact = confidence(Pairs(model.double(), tokenizer, images.double(), texts), found).drop
    torch.testing.assert_close(drop.double(), exact, rtol=0, atol=5)  # of 100


# ---- boxes ----------------------------------------------------------------------------------------------------------

MAPS = torch.zeros(4, 3, 5)
MAPS[0, 1, 2], MAPS[0, 0, 4] = 0.75, 0.25
MAPS[1, 0, :4], MAPS[1, 2, 0] = 0.5, 0.25
MAPS[2, 2, 4] = 1.0
BOXES = [
    [(2, 1, 3, 2)],
    [(0, 0, 1, 3), (3, 0, 5, 1), (3, 0, 4, 1)],
    [(3, 0, 4, 2)],
    [(0, 0, 2, 3)],
]


def test_pointing_game():
    assert pointing_game(MAPS, BOXES).tolist() == pytest.approx([1, 2 / 4, 0, 6 / 15])
    assert pointing_game(MAPS, BOXES, margin=1).tolist() == pytest.approx([1, 4 / 4, 1, 9 / 15])


def test_mass_in_box():
    assert mass_in_box(MAPS, BOXES).tolist() == pytest.approx([0.75, 1.25 / 2.25, 0, 6 / 15])


# ---- random weights -------------------------------------------------------------------------------------------------


def test_sanity_check_shuffles_block_by_block_and_at_last_all(tmp_path):
    model, (images, texts) = build(tmp_path, text_tower="class token"), pairs(2)
    seen = []

    def spy(model):
        seen.append({name: weight.clone() for name, weight in model.named_parameters()})
        return lambda *_: GradCAM(model, tokenizer)(images, texts)

    found = sanity_check(spy, model, images, texts, seed=4)
    before, stages = seen[0], seen[1:]
    assert [stage.weights for stage in found] == ["last block", "last 2", "last 3", "last 4", "all"]
    depths = {"visual": 4, "text": 3}
    for last, weights in enumerate(stages, start=1):
        for name, weight in weights.items():
            tower, _, block = name.partition(".transformer.resblocks.")
            shuffled = last == 5 or (block and int(block.split(".")[0]) >= depths[tower] - last)
            if not shuffled:
                assert torch.equal(weight, before[name]), (last, name)
            else:
                assert torch.equal(weight.flatten().sort()[0], before[name].flatten().sort()[0])
                assert len(weight.unique()) < 2 or not torch.equal(weight, before[name]), (last, name)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_sanity_check_compares_the_maps(model):
    images, texts = pairs()
    maps = [Random(model, tokenizer, seed=seed)(images, texts) for seed in range(6)]
    given = iter(maps)
    found = sanity_check(lambda _: lambda *_: next(given), model, images, texts)
    for stage, after in zip(found, maps[1:]):
        of_images = [spearman(a.flatten(), b.flatten()) for a, b in zip(maps[0].image, after.image)]
        assert stage.image == pytest.approx(np.mean(of_images), abs=1e-6)
        of_texts = [
            spearman(*(torch.tensor([value for _, value in of.of_words(i)]) for of in (maps[0], after)))
            for i in range(3)  # the last text has one word, in which nothing can be compared
        ]
        assert stage.text == pytest.approx(np.mean(of_texts), abs=1e-6)
    assert all(stage[1:] == (1, 1) for stage in sanity_check(lambda m: Random(m, tokenizer), model, images, texts))


# ---- ROAR+ ----------------------------------------------------------------------------------------------------------


def degraded(images, found, side, share):
    """Images and token ids without their most important parts, by sorting and loops."""
    images, ids = images.clone(), tokenizer((TEXTS * 2)[: len(images)])
    for i, image in enumerate(images):
        pixels = found.image[i].flatten().tolist()
        gone = sorted(range(len(pixels)), key=lambda at: -pixels[at])[: math.ceil(share * len(pixels))]
        if side != "text":
            for at in gone:
                image[:, at // SIZE[1], at % SIZE[1]] = BLANK[:, 0, 0]
        values = [value for _, value in found.of_words(i)]
        gone = sorted(range(len(values)), key=lambda at: -values[at])[: math.ceil(share * len(values))]
        if side != "image":
            for at in gone:
                ids[i, found.words[i][at].start : found.words[i][at].stop] = 0
    return images.float(), ids


def clip_loss(model, images, ids):
    image, text = F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(ids), dim=-1)
    logits, own = model.logit_scale.exp() * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@pytest.mark.parametrize("side", SIDES)
def test_roar_loss(model, side):
    images, texts = pairs(8)
    found = Random(model, tokenizer, seed=1)(images, texts)
    train, test = Pairs(model, tokenizer, images, texts, blank=BLANK), Pairs(model, tokenizer, *pairs(6))
    options = {"steps": 3, "batch_size": 3, "lr": 1e-3, "seed": 2}
    actual = roar_loss(model, train, test, found, side=side, share=0.3, **options)
    tuned, inputs = copy.deepcopy(model).float().requires_grad_(True), degraded(images, found, side, 0.3)
    adam = torch.optim.AdamW(tuned.parameters(), 1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(2)
    epochs = [torch.randperm(8, generator=generator) for _ in range(2)]
    for rows in (epochs[0][3:6], epochs[0][:3], epochs[1][3:6]):
        adam.zero_grad()
        clip_loss(tuned, *(of[rows] for of in inputs)).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        adam.step()
    clean = pairs(6)[0].float(), tokenizer(pairs(6)[1])
    with torch.no_grad():
        expected = np.mean([float(clip_loss(tuned, *(of[rows] for of in clean))) for rows in ([0, 1, 2], [3, 4, 5])])
    assert actual == pytest.approx(expected, abs=2e-4)
    assert abs(actual - roar_loss(model, train, test, None, **options)) > 1e-3
    assert not any(weight.requires_grad for weight in model.parameters())


def test_roar_loss_of_no_step_is_the_model_s(model):
    subject = Pairs(model, tokenizer, *pairs(3))
    images, ids = pairs(3)[0].float(), tokenizer(TEXTS[:3])
    expected = float(clip_loss(copy.deepcopy(model).float(), images, ids))
    assert roar_loss(model, subject, subject, None, steps=0, batch_size=3) == pytest.approx(expected, abs=1e-5)


def test_parts_that_matter_are_missed(model):
    """A model tuned on images of one colour knows nothing of images; one on whole pairs learns them."""
    images, texts = pairs()
    subject, found = Pairs(model, tokenizer, images, texts), Random(model, tokenizer)(images, texts)
    options = {"steps": 40, "batch_size": 4, "lr": 1e-3}
    whole = roar_loss(model, subject, subject, None, **options)
    assert roar_loss(model, subject, subject, found, side="image", share=1.0, **options) > whole + 0.5


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_errors(model, found):
    images, texts = pairs()
    subject = Pairs(model, tokenizer, images, texts)
    for bad, got in ((texts[:3], "3"), ("a cat", "'a cat'")):
        with pytest.raises(ValueError, match=f"Pairs: texts must be a list of 4, one for each image, got {got}"):
            Pairs(model, tokenizer, images, bad)
    for metric in (confidence, insertion, deletion):
        with pytest.raises(ValueError, match=f"{metric.__name__}: side must be one of 'image', 'text', 'both', got 'x"):
            metric(subject, found, "x")
    for metric in (insertion, deletion):
        with pytest.raises(ValueError, match=f"{metric.__name__}: steps must be at least 1, got 0"):
            metric(subject, found, steps=0)
    for metric, boxes in itertools.product((pointing_game, mass_in_box), (BOXES[:3], [*BOXES[:3], []])):
        expected = f"{metric.__name__}: boxes must be a list of 4, with one box or more for each map, got {len(boxes)} "
        with pytest.raises(ValueError, match=expected):
            metric(MAPS, boxes)
    with pytest.raises(ValueError, match="roar_loss: side must be one of"):
        roar_loss(model, subject, subject, found, side="x", batch_size=2)
    with pytest.raises(ValueError, match=r"roar_loss: share must be from 0 to 1, got 1.5"):
        roar_loss(model, subject, subject, found, share=1.5, batch_size=2)
    with pytest.raises(ValueError, match="roar_loss: train must be at least a batch of 64 pairs, got 4"):
        roar_loss(model, subject, subject, found)
