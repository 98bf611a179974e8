"""Words of texts, and M2IB's rivals: each is what its formula says, by open_clip's own forward passes and hooks."""

import itertools
import json

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("open_clip")

import open_clip
from explained import CONTEXT, IMAGE_TOWERS, SIZE, TEXT_TOWERS, TEXTS, build, pairs, tokenizer

from fastprob.attribution import (
    M2IB,
    NIB,
    RISE,
    AttentionRollout,
    GradCAM,
    GradientInput,
    Random,
    RawAttention,
    Word,
)
from fastprob.attribution.words import words_of
from fastprob.encoders.towers import ImageTower, TextTower

METHODS = (NIB, GradientInput, GradCAM, RawAttention, AttentionRollout, RISE, Random)


# ---- words ----------------------------------------------------------------------------------------------------------


def test_pieces_are_joined_to_words():
    """Against the marks that CLIP's byte pairs carry."""
    pieces = open_clip.get_tokenizer("ViT-B-32")
    texts = ["a kaleidoscope of axolotl's photographs", "Two  DOGS, in 2023!\n"]
    ids, words = words_of(tokenizer, texts)
    assert torch.equal(ids, tokenizer(texts))
    assert [word.text for word in words[0]] == texts[0].split()
    assert [word.text for word in words[1]] == ["Two", "DOGS,", "in", "2023!"]
    assert max(word.stop - word.start for word in words[0]) > 1
    for row, of_text in zip(ids, words):
        assert of_text[0].start == 1
        for word, after in itertools.pairwise(of_text):
            assert word.stop == after.start
        for word in of_text:
            joined = "".join(pieces.decoder[int(i)] for i in row[word.start : word.stop])
            assert joined.replace("</w>", "") == word.text.lower()
        assert row[of_text[-1].stop] == 49407


def test_a_text_that_is_cut_off_has_the_words_that_are_left():
    ids, (words,) = words_of(tokenizer, ["a " * (CONTEXT - 4) + "kaleidoscope of dogs"])
    assert [word.text for word in words] == ["a"] * (CONTEXT - 4) + ["kaleidoscope"]
    assert words[-1].stop == CONTEXT - 1 and ids[0, -1] == 49407


def test_words_of_a_tokenizer_with_other_marks(tmp_path):
    """WordPiece's, by transformers: no byte pairs, another padding, punctuation apart."""
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "##dish", "axo", "##lo", "##tl", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "wordpiece")
    pieces = open_clip.tokenizer.HFTokenizer(str(tmp_path / "wordpiece"), context_length=9)
    _, words = words_of(pieces, ["a reddish axolotl.", "red", ""])
    assert words == [[Word("a", 1, 2), Word("reddish", 2, 4), Word("axolotl.", 4, 8)], [Word("red", 1, 2)], []]


# ---- towers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", IMAGE_TOWERS)
def test_image_features_are_open_clip_s(tmp_path, tower):
    model, (images, _) = build(tmp_path, tower), pairs()
    image = ImageTower(model)
    for first in (0, 1, 3):
        states = image.run(image.enter(images), image.blocks[:first])
        torch.testing.assert_close(image.features(states, first), model.encode_image(images))


@pytest.mark.parametrize("tower", TEXT_TOWERS)
@pytest.mark.parametrize("texts", [TEXTS, ["cat", "a photograph of an axolotl in the snow with a kaleidoscope"]])
def test_text_features_are_open_clip_s(tmp_path, tower, texts):
    model, ids = build(tmp_path, text_tower=tower), tokenizer(texts)
    text = TextTower(model)
    for first in (0, 1, 2):
        states = text.run(text.enter(text.embed(ids), ids), text.blocks[:first])
        torch.testing.assert_close(text.features(states, first), model.encode_text(ids))
        again = states.with_states(torch.stack([states.x, 2 * states.x]))
        twice = text.features(again, first).unflatten(0, (2, -1))
        torch.testing.assert_close(twice[0], model.encode_text(ids))
        torch.testing.assert_close(twice[1], text.features(states.with_states(2 * states.x[None]), first))


# ---- rivals ---------------------------------------------------------------------------------------------------------


def scaled(x):
    return ((x - x.min()) / (x.max() - x.min())).nan_to_num()


def assert_image_map(actual, patches):
    """patches: [N, d] or [N] of the class token and the patches, their sums over d count."""
    grid = (patches.sum(1) if patches.dim() == 2 else patches)[1:].view(1, 1, 3, 2)
    torch.testing.assert_close(actual, scaled(F.interpolate(grid, SIZE, mode="bilinear")[0, 0]))


def assert_words(result, pair, tokens):
    values = torch.stack([tokens[word.start : word.stop].sum() for word in result.words[pair]])
    assert [word for word, _ in result.of_words(pair)] == TEXTS[pair].split()
    torch.testing.assert_close(torch.tensor([value for _, value in result.of_words(pair)]).double(), scaled(values))


class Run:
    """One pair through open_clip: the cosine, and what went into a module, with its gradient."""

    def __init__(self, model, module, image, text, change=lambda x: x):
        def hook(_, inputs):
            self.x = change(inputs[0].detach()).requires_grad_()
            return (self.x,)

        handle = module.register_forward_pre_hook(hook)
        self.cosine = F.cosine_similarity(model.encode_image(image[None]), model.encode_text(tokenizer([text])))
        handle.remove()
        self.gradient = torch.autograd.grad(self.cosine.sum(), self.x)[0][0]
        self.x = self.x.detach()[0]


@pytest.fixture
def model(tmp_path):
    return build(tmp_path)


def test_gradient_times_input(model):
    images, texts = pairs()
    result = GradientInput(model, tokenizer)(images, texts)
    for i, (image, text) in enumerate(zip(images, texts)):
        pixels = Run(model, model.visual.conv1, image, text)
        torch.testing.assert_close(result.image[i], scaled((pixels.x * pixels.gradient).sum(0)))
        embedded = Run(model, model.text.transformer, image, text)
        embedding = model.text.token_embedding(tokenizer([text])[0])
        assert_words(result, i, (embedding * embedded.gradient).sum(1))
    assert not images.requires_grad


def test_grad_cam(model):
    images, texts = pairs()
    result = GradCAM(model, tokenizer)(images, texts)
    for i, (image, text) in enumerate(zip(images, texts)):
        run = Run(model, model.visual.transformer.resblocks[-1], image, text)
        assert_image_map(result.image[i], torch.relu(run.x @ run.gradient[1:].mean(0)))
        run = Run(model, model.text.transformer.resblocks[-1], image, text)
        end = result.words[i][-1].stop
        assert_words(result, i, torch.relu(run.x @ run.gradient[1:end].mean(0)))


def attentions(tower, call):
    """[N, N] of every block in `call`, as its attention itself returns them, the mean over heads."""
    weights = []

    def hook(module, inputs, options, _):
        weights.append(module.forward(*inputs, **options | {"need_weights": True})[1][0])

    handles = [block.attn.register_forward_hook(hook, with_kwargs=True) for block in tower.transformer.resblocks]
    call()
    for handle in handles:
        handle.remove()
    return weights


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
@pytest.mark.parametrize("tower", ["class token", "mean of patches"])
def test_attention(tmp_path, method, tower):
    model, (images, texts) = build(tmp_path, tower, "padding masked"), pairs()
    result = method(model, tokenizer)(images, texts)

    def flow(weights):
        one = torch.eye(len(weights[0]), dtype=torch.float64)
        flows = [(each + one) / 2 for each in weights] if method is AttentionRollout else weights[-1:]
        return torch.linalg.multi_dot([*flows[::-1], one])

    for i, (image, text) in enumerate(zip(images, texts)):
        ids = tokenizer([text])
        rows = flow(attentions(model.visual, lambda image=image: model.encode_image(image[None])))
        assert_image_map(result.image[i], rows[0] if tower == "class token" else rows[1:].mean(0))
        rows = flow(attentions(model.text, lambda ids=ids: model.encode_text(ids)))
        assert_words(result, i, rows[ids[0].argmax()])


def test_nib(model):
    images, texts = pairs()
    result = NIB(model, tokenizer, layer=1, steps=5)(images, texts)

    def transcribed(tower, image, text):
        behind = tower.transformer.resblocks[2]
        whole = Run(model, behind, image, text).x
        runs = [Run(model, behind, image, text, lambda x, i=i: x * i / 5) for i in range(1, 6)]
        return whole * sum(run.gradient for run in runs) / 5

    for i, (image, text) in enumerate(zip(images, texts)):
        assert_image_map(result.image[i], transcribed(model.visual, image, text))
        assert_words(result, i, transcribed(model.text, image, text).sum(1))


def test_rise_on_images(model):
    images, texts = pairs(3)
    options = {"masks": 50, "cells": 3, "keep": 0.4, "seed": 2}
    result = RISE(model, tokenizer, **options)(images, texts)
    generator = torch.Generator().manual_seed(2)
    cells = (torch.rand(50, 3, 3, generator=generator) < 0.4).double()
    corners = (torch.rand(50, 2, generator=generator) * torch.tensor([8, 6])).long()
    for i, (image, text) in enumerate(zip(images, texts)):
        masks, cosines = [], []
        for cell, (y, x) in zip(cells, corners.tolist()):
            smooth = F.interpolate(cell[None, None], (32, 24), mode="bilinear")[0, 0]
            masks.append(smooth[y : y + SIZE[0], x : x + SIZE[1]])
            features = model.encode_image((image * masks[-1])[None]), model.encode_text(tokenizer([text]))
            cosines.append(F.cosine_similarity(*features))
        cosines = torch.stack(cosines) - sum(cosines) / 50
        expected = (cosines[..., None] * torch.stack(masks)).sum(0)
        torch.testing.assert_close(result.image[i], scaled(expected), rtol=0, atol=1e-5)


def test_rise_on_texts(model):
    """Against the exact means over all ways to keep words of one token each."""
    images, text = pairs(1)[0], "two red dogs"
    result = RISE(model, tokenizer, masks=3000)(images, [text])
    kept, cosines = torch.tensor([*itertools.product([0.0, 1.0], repeat=3)], dtype=torch.float64), []
    for each in kept:
        mask = torch.ones(CONTEXT, dtype=torch.float64)
        mask[1:4] = each
        handle = model.text.token_embedding.register_forward_hook(lambda _, __, x, mask=mask: x * mask[:, None])
        cosines.append(F.cosine_similarity(model.encode_image(images), model.encode_text(tokenizer([text]))))
        handle.remove()
    cosines = torch.cat(cosines)
    expected = torch.stack([cosines[kept[:, i] == 1].mean() - cosines.mean() for i in range(3)])
    actual = torch.tensor([value for _, value in result.of_words(0)], dtype=torch.float64)
    torch.testing.assert_close(actual, scaled(expected), rtol=0, atol=0.1)


def test_random_is_drawn_by_the_pair_and_the_seed(model):
    images, texts = pairs()
    first, again, other = (Random(model, tokenizer, seed=seed)(images, texts) for seed in (0, 0, 1))
    assert torch.equal(first.image, again.image) and torch.equal(first.text, again.text)
    assert not torch.equal(first.image, other.image) and not torch.equal(first.text, other.text)
    assert len({tuple(each.flatten().tolist()) for each in first.image}) == len(images)


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_s_maps_do_not_depend_on_the_others(model, monkeypatch, method):
    monkeypatch.setattr("fastprob.attribution.method.TOKENS", 50)
    images, texts = pairs(16)
    method = method(model, tokenizer, masks=40) if method is RISE else method(model, tokenizer)
    together = method(images, texts)
    for i in (0, 2, 7, 15):
        alone = method(images[i : i + 1], texts[i : i + 1])
        torch.testing.assert_close(together.image[i], alone.image[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.text[i], alone.text[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_towers(tmp_path, method, dtype):
    method = method(build(tmp_path, text_tower="class token", dtype=dtype), tokenizer)
    if isinstance(method, RISE):
        method.masks = 40
    with torch.inference_mode():
        result = method(*pairs(2, dtype))
    for maps in (result.image, result.text):
        assert maps.dtype == torch.float32 and maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    assert result.image.max() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("method", [M2IB, *METHODS])
def test_maps_on_a_gpu(tmp_path, method):
    images, texts = pairs()
    model = build(tmp_path, text_tower="padding masked", dtype=torch.float64)
    options = {"masks": 40} if method is RISE else {}
    expected = method(model, tokenizer, **options)(images, texts)
    actual = method(model.cuda(), tokenizer, **options)(images.cuda(), texts)
    torch.testing.assert_close(actual.image.cpu(), expected.image, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.text.cpu(), expected.text, rtol=0, atol=1e-5)


def test_errors(tmp_path, model):
    for name, value in (("masks", 0), ("cells", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"RISE: {name} must be at least [01], got {value}"):
            RISE(model, tokenizer, **{name: value})
    for keep in (0, 1):
        with pytest.raises(ValueError, match=f"RISE: keep must be between 0 and 1, got {keep}"):
            RISE(model, tokenizer, keep=keep)
    with pytest.raises(ValueError, match="Random: seed must be at least 0, got -3"):
        Random(model, tokenizer, seed=-3)
    for towers, which in ((("custom blocks", "clip"), "image"), (("class token", "custom blocks"), "text")):
        for method in (RawAttention, AttentionRollout):
            expected = f"{method.__name__}: model must have open_clip's plain blocks, got custom ones in the {which}"
            with pytest.raises(ValueError, match=expected):
                method(build(tmp_path, *towers), tokenizer)


def test_other_towers_are_refused(tmp_path):
    config = {"embed_dim": 24, "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2}}
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    (tmp_path / "resnet.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "resnet.json")
    with pytest.raises(ValueError, match=r"model.visual must be open_clip's VisionTransformer, got ModifiedResNet"):
        GradCAM(open_clip.create_model("resnet"), tokenizer)
    with pytest.raises(ValueError, match="model must read one token of a text, got a text tower that reads all"):
        GradCAM(build(tmp_path, text={"pool_type": "none"}), tokenizer)(*pairs())
