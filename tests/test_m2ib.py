"""M2IB: the cheap way equals the released one over both towers, and no pair knows of the others."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("open_clip")

from explained import CONTEXT, IMAGE_TOWERS, SIZE, TEXT_TOWERS, build, pairs, tokenizer

from fastprob import bottleneck
from fastprob.attribution import M2IB, NIB
from fastprob.training import seed_of

OPTIONS = {"layer": 1, "beta": 0.3, "steps": 4, "samples": 3, "lr": 0.7, "sigma": 1.3, "seed": 5}


def transcribed(model, image, ids, side, seen):
    """The objective as the paper has it, of one pair, both towers whole in every step: KL of all tokens, [N, d].

    seen: the tokens whose KL counts. The noise is what leaves a bottleneck through which nothing of 0 passes.
    """
    layer, beta, steps, samples, lr, sigma, seed = OPTIONS.values()
    tower = model.visual if side == "image" else model.text
    a = torch.full_like(tower.positional_embedding, 5.0).requires_grad_()
    adam = torch.optim.Adam([a], lr=lr)
    for step in range(steps):
        eps, _ = bottleneck(torch.zeros_like(a), torch.full_like(a, -1000), seed=seed_of(seed, step), samples=samples)
        kl = None

        def through(_, __, x, eps=eps):
            nonlocal kl
            passing = a.sigmoid()
            mean, variance = passing * x, (1 - passing) ** 2  # the variance over sigma^2
            kl = -0.5 * (1 + variance.log() - (mean / sigma) ** 2 - variance)
            return mean + variance.sqrt() * sigma * eps

        handle = tower.transformer.resblocks[layer].register_forward_hook(through)
        features = model.encode_image(image.expand(samples, -1, -1, -1)), model.encode_text(ids.expand(samples, -1))
        handle.remove()
        loss = beta * kl[:, seen].mean() - F.cosine_similarity(*features).mean()
        (a.grad,) = torch.autograd.grad(loss, a)
        adam.step()
    return kl[0].detach()


def scaled(x):
    return ((x - x.min()) / (x.max() - x.min())).nan_to_num()  # 0 for a single word


def assert_maps_are_transcribed(model, text_tower, tolerance):
    images, texts = pairs(dtype=next(model.parameters()).dtype)
    result = M2IB(model, tokenizer, **OPTIONS)(images, texts)
    ids = tokenizer(texts)
    for i, (image, words) in enumerate(zip(images, result.words)):
        information = transcribed(model, image, ids[i], "image", slice(None)).sum(1)
        patches = information[1:].view(1, 1, *model.visual.grid_size)
        expected = scaled(F.interpolate(patches, SIZE, mode="bilinear")[0, 0])
        torch.testing.assert_close(result.image[i], expected, rtol=0, atol=tolerance)

        end = int(ids[i].argmax())
        seen = {"not causal": range(CONTEXT), "last": range(CONTEXT)}.get(text_tower, range(end + 1))
        if text_tower == "class token":  # behind the others; open_clip's mask is a place off and shows it one more
            seen = [*range(end + 2), CONTEXT]
        information = transcribed(model, image, ids[i], "text", [*seen]).sum(1)
        of_words = scaled(torch.stack([information[word.start : word.stop].sum() for word in words]))
        expected = torch.zeros(CONTEXT, dtype=of_words.dtype)
        for word, value in zip(words, of_words):
            expected[word.start : word.stop] = value
        torch.testing.assert_close(result.text[i], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tower", IMAGE_TOWERS)
def test_image_towers_maps_are_the_paper_s(tmp_path, tower):
    assert_maps_are_transcribed(build(tmp_path, tower), "clip", 1e-7)


@pytest.mark.parametrize("tower", TEXT_TOWERS)
def test_text_towers_maps_are_the_paper_s(tmp_path, tower):
    assert_maps_are_transcribed(build(tmp_path, text_tower=tower), tower, 1e-7)


def test_maps_are_the_paper_s_to_float32_rounding(tmp_path):
    assert_maps_are_transcribed(build(tmp_path, dtype=torch.float32), "clip", 1e-4)


@pytest.mark.parametrize("text", ["clip", "not causal"])
def test_a_pair_s_maps_do_not_depend_on_the_others(tmp_path, monkeypatch, text):
    """16 pairs, 7 at once. Texts of other lengths stand beside a text."""
    monkeypatch.setattr("fastprob.attribution.method.TOKENS", 50)
    model, (images, texts) = build(tmp_path, text_tower=text), pairs(16)
    m2ib = M2IB(model, tokenizer, **OPTIONS)
    together = m2ib(images, texts)
    for i in (0, 1, 2, 6, 7, 15):
        alone = m2ib(images[i : i + 1], texts[i : i + 1])
        torch.testing.assert_close(together.image[i], alone.image[0], rtol=0, atol=1e-7)
        torch.testing.assert_close(together.text[i], alone.text[0], rtol=0, atol=1e-7)
        torch.testing.assert_close(together.scores[i], alone.scores[0])
        assert together.words[i] == alone.words[0]
    again = M2IB(model, tokenizer, **OPTIONS)(images, texts)
    assert torch.equal(again.image, together.image) and torch.equal(again.text, together.text)
    other = M2IB(model, tokenizer, **OPTIONS | {"seed": 6})(images, texts)
    assert (other.image - together.image).abs().max() > 1e-3


def test_scores_are_cosines(tmp_path):
    model, (images, texts) = build(tmp_path), pairs()
    expected = F.cosine_similarity(model.encode_image(images), model.encode_text(tokenizer(texts)))
    torch.testing.assert_close(M2IB(model, tokenizer, steps=1)(images, texts).scores, expected)


def test_long_runs_stay_finite(tmp_path):
    """With a at +-hundreds, where 1 - lambda is 0 and its logarithm is not."""
    images, texts = pairs(2, torch.float32)
    model = build(tmp_path, dtype=torch.float32, vision={"layers": 2}, text={"layers": 2})
    result = M2IB(model, tokenizer, steps=1000, samples=1)(images, texts)
    for maps in (result.image, result.text):
        assert maps.isfinite().all() and maps.min() == 0 and maps.max() == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.05), (torch.bfloat16, 0.2)])
def test_half_towers_maps_are_nearly_those_of_float32(tmp_path, dtype, tolerance):
    images, texts = pairs(dtype=dtype)
    model = build(tmp_path, dtype=dtype)
    half = M2IB(model, tokenizer)(images, texts)
    full = M2IB(model.float(), tokenizer)(images.float(), texts)
    assert half.image.dtype == half.text.dtype == half.scores.dtype == torch.float32
    torch.testing.assert_close(half.image, full.image, rtol=0, atol=tolerance)
    torch.testing.assert_close(half.text, full.text, rtol=0, atol=tolerance)


def test_towers_that_overflow_are_an_error(tmp_path):
    model, (images, texts) = build(tmp_path, dtype=torch.float16), pairs(dtype=torch.float16)
    with pytest.raises(ValueError, match="M2IB: features must be finite, got NaN or inf from the float16 model"):
        M2IB(model, tokenizer)(images * 60000, texts)


LONG = " ".join(f"axolotl{i}" for i in range(20))


def test_edges(tmp_path):
    """An even image; a text of one token, of none, and longer than the context."""
    images, texts = torch.zeros(4, 3, *SIZE, dtype=torch.float64), ["cat", "", "two dogs", LONG]
    result = M2IB(build(tmp_path), tokenizer, **OPTIONS)(images, texts)
    assert result.image.shape == (4, *SIZE) and result.text.shape == (4, CONTEXT)
    assert result.image.isfinite().all() and (result.image.flatten(1).amax(1) == 1).all()
    assert [len(words) for words in result.words[:3]] == [1, 0, 2]
    assert not result.text[:2].any() and result.text[2, 1:3].sort().values.tolist() == [0, 1]
    assert result.words[3][0].start == 1 and result.words[3][-1].stop == CONTEXT - 1
    assert result.text[3, 0] == result.text[3, -1] == 0 and result.text[3].max() == 1


@pytest.mark.parametrize(("depth", "layer"), [(2, 0), (3, 1), (4, 2), (6, 4), (12, 9), (24, 19)])
def test_the_layer_is_the_paper_s_or_its_share_of_another_depth(tmp_path, depth, layer):
    model = build(tmp_path, vision={"layers": depth, "width": 16}, text={"layers": depth})
    images, texts = pairs()
    scaled_to, said = (M2IB(model, tokenizer, layer=each, steps=3)(images, texts) for each in (None, layer))
    assert torch.equal(scaled_to.image, said.image) and torch.equal(scaled_to.text, said.text)


class Counts:
    """How many rows of tokens went into the linear layers of a tower's blocks."""

    def __init__(self, tower):
        self.of = [0] * len(tower.transformer.resblocks)
        for i, block in enumerate(tower.transformer.resblocks):
            block.mlp.register_forward_hook(lambda _, inputs, __, i=i: self.add(i, inputs[0]))

    def add(self, i, x):
        self.of[i] += x[..., 0].numel()


def test_what_cannot_change_is_computed_once(tmp_path):
    """Per pair: blocks up to the bottleneck once; behind it once and in each of 4 - 1 steps 3 times, the last for one
    token. Weights get no gradient."""
    model, (images, texts) = build(tmp_path).requires_grad_(True), pairs(1)
    counts = Counts(model.visual), Counts(model.text)
    M2IB(model, tokenizer, **OPTIONS)(images, texts)
    tokens = 1 + 6, int(tokenizer(texts).argmax()) + 1
    assert tokens[1] < CONTEXT
    passes = 1 + 3 * 3
    assert counts[0].of == [tokens[0], tokens[0], passes * tokens[0], passes]
    assert counts[1].of == [tokens[1], tokens[1], passes]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_may_be_called_without_gradients(tmp_path):
    m2ib, (images, texts) = M2IB(build(tmp_path), tokenizer, **OPTIONS), pairs()
    expected = m2ib(images, texts)
    with torch.inference_mode():
        assert torch.equal(m2ib(images, texts).image, expected.image)


@pytest.mark.parametrize("options", [{"seed": -1}, {"steps": 0}, {"samples": 0}, {"lr": -1.0}, {"beta": float("nan")}])
def test_options_out_of_range(tmp_path, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"M2IB: {name} must be at least [01] and finite, got {value}"):
        M2IB(build(tmp_path), tokenizer, **options)


def test_errors(tmp_path):
    model, (images, texts) = build(tmp_path), pairs()
    for each in (M2IB, NIB):
        for layer in (2, 9, -1):
            expected = f"{each.__name__}: layer must be from 0 to 1 for the 3 blocks of the text tower, or None"
            with pytest.raises(ValueError, match=f"{expected}, got {layer}|from 0 to 2 .* 4 blocks of the image tower"):
                each(model, tokenizer, layer=layer)
    with pytest.raises(ValueError, match="M2IB: sigma must be above 0 and finite, got 0"):
        M2IB(model, tokenizer, sigma=0)
    with pytest.raises(ValueError, match="NIB: steps must be at least 1, got 0"):
        NIB(model, tokenizer, steps=0)
    m2ib = M2IB(model, tokenizer)
    for bad in (images[0], images[:, :1], images[..., :8], images[:0]):
        with pytest.raises(ValueError, match=r"M2IB: images must be \[P, 3, 24, 16\] with P at least 1, got \["):
            m2ib(bad, texts)
    for bad, got in ((texts[:3], "3"), ("a cat", "'a cat'")):
        with pytest.raises(ValueError, match=f"M2IB: texts must be a list of 4, one for each image, got {got}"):
            m2ib(images, bad)
    with pytest.raises(ValueError, match="M2IB: model must have at least 2 blocks in a tower, got 1 in the text tower"):
        M2IB(build(tmp_path, text={"layers": 1}), tokenizer)
