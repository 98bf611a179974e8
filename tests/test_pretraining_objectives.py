"""ALBEF and BLIP against their papers' steps, plainly: images repeated for every text, all words scored everywhere."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from open_clip.transformer import VisionTransformer
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from bench.blip import plain, released, states_of
from fastprob.data import DigitScenes
from fastprob.pretraining.masking import hide_tokens
from fastprob.pretraining.objectives import ALBEF, BLIP
from fastprob.pretraining.retrieval import recalls, retrieve
from fastprob.pretraining.text import ImageKeys
from fastprob.pretraining.tokens import words_of
from fastprob.pretraining.towers import Teacher

SCENES = DigitScenes("train", num_scenes=40)
CAPTIONS = [
    "a three at the top left",
    "two digits",
    "a seven below a one",
    "handwriting",
    "a four",
    "an eight and a nine",
]
ALPHA, SEED, MOMENTUM = 0.3, 3, 0.9


def made(kind, seed=0, **config):
    torch.manual_seed(seed)
    visual = VisionTransformer(16, 8, 24, 2, 3, 4.0)
    visual.proj = None
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BlipTextConfig(**sizes | {"max_position_embeddings": 16} | config)
    return kind(visual, words_of(SCENES.captions), config, dim=20).double()


def batch(model, images=3, each=2):
    """Images, texts, and ids of which the first and the last image have the same one."""
    pixels = torch.randn(images, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(images) % max(images - 1, 1)
    return pixels, model.tokenize(CAPTIONS[: images * each]), ids


def teacher_of(model, seed=2):
    """One that is not the model, with a queue that has pairs of some ids."""
    teacher = Teacher(model.towers, 11, momentum=MOMENTUM, seed=seed).double()
    torch.manual_seed(seed)
    for parameter in teacher.twin.parameters():
        parameter.add_(torch.randn_like(parameter) / 50)
    features = (F.normalize(torch.randn(5, 20, dtype=torch.float64), dim=1) for _ in range(2))
    teacher.queue.add(*features, torch.tensor([0, 9, 1, 8, 7]))
    return teacher


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("kind", [ALBEF, BLIP])
def test_losses_and_gradients_are_the_papers(kind, each):
    model = made(kind)
    pixels, texts, ids = batch(model, each=each)
    with torch.no_grad():
        first, second = teacher_of(model), teacher_of(model)
    losses = model.losses(pixels, texts, ids, first, alpha=ALPHA, seed=SEED)
    expected = released(model, pixels, texts, ids, second, alpha=ALPHA, seed=SEED)
    assert list(losses) == ["itc", "itm", "mlm" if kind is ALBEF else "lm"]
    torch.testing.assert_close(torch.stack(list(losses.values())), torch.stack(expected))
    wanted = list(model.parameters())
    ours = torch.autograd.grad(sum(losses.values()), wanted)
    theirs = torch.autograd.grad(sum(expected), wanted)
    for (name, _), mine, other in zip(model.named_parameters(), ours, theirs):
        assert mine.abs().max() > 0 or "key.bias" in name, name
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_the_queue_takes_the_batch_after_the_loss():
    model = made(BLIP)
    pixels, texts, ids = batch(model)
    with torch.no_grad():
        teacher = teacher_of(model)
        before = teacher.queue.text.clone()
        model.losses(pixels, texts, ids, teacher, alpha=ALPHA, seed=SEED)
        expected = teacher.twin.texts(texts)[0]
    assert teacher.queue.ids.tolist() == [0, 9, 1, 8, 7, 0, 0, 1, 1, 0, 0][:5] + [0, 0, 1, 1, 0, 0]
    torch.testing.assert_close(teacher.queue.text[5:], expected)
    assert teacher.queue.text[:5].equal(before[:5])
    assert not teacher.train().twin.training


@pytest.mark.parametrize("kind", [ALBEF, BLIP])
def test_a_batch_of_one_image_has_no_negatives(kind):
    model = made(kind)
    pixels, texts, ids = batch(model, images=1, each=2)
    losses = model.losses(pixels, texts, ids, Teacher(model.towers, 4).double(), alpha=0.0, seed=SEED)
    pairs = model.match(model.towers.texts(texts)[1], ImageKeys(model.towers.images(pixels)[1]))
    torch.testing.assert_close(losses["itm"], F.cross_entropy(pairs, torch.ones(2, dtype=torch.int64)))
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [ALBEF, BLIP])
def test_in_bfloat16(kind):
    model = made(kind).float()
    pixels, texts, ids = batch(model)
    exact = model.losses(pixels.float(), texts, ids, Teacher(model.towers, 4), alpha=0.4, seed=SEED)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(pixels.float(), texts, ids, Teacher(model.towers, 4), alpha=0.4, seed=SEED)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), exact[name], rtol=0.03, atol=0.03)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_albefs_upper_layers_alone_see_images():
    towers = made(ALBEF, num_hidden_layers=5).towers
    assert len(towers.text.encoder.layer) == 2 and len(towers.fusion.encoder.layer) == 3
    assert not hasattr(towers.text.encoder.layer[1], "crossattention")


@pytest.mark.parametrize("kind", [ALBEF, BLIP])
def test_keys_of_images_are_projected_once_for_all(kind):
    """For true pairs, negatives of both sides and words; and for all words and beams of a caption."""
    model = made(kind)
    pixels, texts, ids = batch(model)
    teacher = Teacher(model.towers, 4).double()  # before the hooks, which it would copy
    layers = (model.towers.text if kind is BLIP else model.towers.fusion).encoder.layer
    rows = []
    for layer in layers:
        layer.crossattention.self.key.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model.losses(pixels, texts, ids, teacher, alpha=ALPHA, seed=SEED)
    assert rows == [3] * len(layers)
    if kind is BLIP:
        rows.clear()
        model.eval().caption(pixels, num_beams=3, min_new_tokens=4, max_new_tokens=4)
        assert rows == [3] * len(layers)


@torch.no_grad()
def test_attention_to_images_drops_in_training_alone():
    model = made(BLIP, attention_probs_dropout_prob=0.5)
    pixels, texts, _ = batch(model)
    keys = ImageKeys(model.towers.images(pixels)[1])
    model.towers.text.eval()
    attention = model.towers.text.encoder.layer[0].crossattention.self
    once, again = (model.match(texts, keys) for _ in range(2))
    assert once.equal(again)
    attention.train()
    assert not model.match(texts, keys).equal(once)


def test_texts_that_do_not_belong_to_images_are_refused():
    model = made(BLIP)
    pixels, texts, ids = batch(model)
    with pytest.raises(ValueError, match="losses: texts must be a multiple of the 3 images, got 5"):
        model.losses(pixels, texts[:5], ids, Teacher(model.towers, 4).double(), alpha=0.0, seed=0)


def test_tokens_are_hidden_by_berts_shares():
    ids = torch.randint(0, 50, (2000, 10), generator=torch.Generator().manual_seed(0))
    shown, hidden = hide_tokens(ids, mask=4, vocabulary=50, keep=(0, 2, 3), seed=5)
    kept = (ids == 0) | (ids == 2) | (ids == 3)
    assert not (hidden & kept).any() and shown[~hidden].equal(ids[~hidden])
    assert float(hidden[~kept].double().mean()) == pytest.approx(0.15, abs=0.01)
    others = hidden & (ids != 4)
    masked, same = (float((each & others).sum() / others.sum()) for each in (shown == 4, shown == ids))
    assert masked == pytest.approx(0.8 + 0.1 / 50, abs=0.02) and same == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    instead = shown[others & (shown != 4) & (shown != ids)]
    assert set(instead.tolist()) == set(range(50)) - {4}
    again, other = (hide_tokens(ids, mask=4, vocabulary=50, keep=(0, 2, 3), seed=seed)[1] for seed in (5, 6))
    assert again.equal(hidden) and not other.equal(hidden)
    half = hide_tokens(ids, mask=4, vocabulary=50, keep=(), seed=5, share=0.5)[1]
    assert float(half.double().mean()) == pytest.approx(0.5, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- captions


def by_hand(model, image, count):
    """Greedy words, every one of them from all before it anew."""
    states = states_of(model.towers, image)
    ids = torch.tensor([[model.tokenizer.bos_token_id]])
    for _ in range(count):
        hidden = plain(model.decoder.bert, ids, encoder_hidden_states=states, is_decoder=True)
        ids = torch.cat([ids, model.decoder.cls(hidden)[:, -1:].argmax(-1)], dim=1)
    return ids[0, 1:]


def untrained_but_decided(model):
    """Weights so large that a word depends on the image and on the words before it."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "visual" not in name:
            parameter.data *= 6
    return model.eval()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"top_k": 5}])
def test_captions_are_those_of_transformers_with_images_repeated(options):
    """Beam search, several captions of an image, sampling, and a prompt that is left out."""
    model = untrained_but_decided(made(BLIP))
    pixels, tokenizer = batch(model)[0], model.tokenizer
    options |= {"max_new_tokens": 8, "repetition_penalty": 1.5, "do_sample": "top_k" in options}
    torch.manual_seed(0)
    captions = model.caption(pixels, prompt="a three", **options)
    theirs = BlipTextLMHeadModel(model.decoder.config).double().eval()
    theirs.load_state_dict(model.decoder.state_dict())
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("a three", add_special_tokens=False)["input_ids"]]] * 3)
    torch.manual_seed(0)
    told = theirs.generate(ids, encoder_hidden_states=states_of(model.towers, pixels), **options)
    assert captions == tokenizer.batch_decode(told[:, 3:], skip_special_tokens=True)
    assert len(captions) == 3 * options.get("num_return_sequences", 1) and len(set(captions)) > 2


def test_captions_longer_than_the_positions_are_refused():
    model = made(BLIP)
    with pytest.raises(ValueError, match=r"max_new_tokens must be in 1\.\.13 after this prompt, got 14"):
        model.caption(batch(model)[0], prompt="a three", max_new_tokens=14)
    assert len(model.tokenizer(model.caption(batch(model)[0], prompt="a three", min_new_tokens=13)[0])["input_ids"]) > 9


@torch.no_grad()
def test_captions_are_the_likeliest_words():
    model = untrained_but_decided(made(BLIP))
    pixels = batch(model)[0]
    captions = model.caption(pixels, num_beams=1, min_new_tokens=9, max_new_tokens=9)
    expected = [model.tokenizer.decode(by_hand(model, image[None], 9), skip_special_tokens=True) for image in pixels]
    assert captions == expected and len(set(captions)) == len(captions)


# --------------------------------------------------------------------------------------------------------- retrieval


class Rows:
    """Images that are made already, in batches of two."""

    batch_size = 2

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def read(self, batches):
        return (self.pixels[rows] for rows in batches)


@pytest.mark.parametrize("kind", [ALBEF, BLIP])
@torch.no_grad()
def test_the_first_by_contrast_are_ordered_by_matching(kind):
    model = untrained_but_decided(made(kind))
    pixels = torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    texts = model.tokenize(CAPTIONS)
    (v, states), (t, read) = model.towers.images(pixels), model.towers.texts(texts)
    cosine = v @ t.T
    matched = torch.stack(
        [model.match(read, ImageKeys(one.expand(len(texts), -1, -1)))[:, 1] for one in states]
    )  # [5, 6]
    scores = matched + cosine if kind is BLIP else matched
    found = retrieve(model, Rows(pixels), CAPTIONS, first=3, progress=False)
    for each, similar, score in zip(found, (cosine, cosine.T), (scores, scores.T)):
        items = similar.topk(3).indices
        assert each.by_contrast.equal(items)
        order = score.gather(1, items).argsort(dim=1, descending=True)
        assert each.by_matching.equal(items.gather(1, order))
    assert not found[0].by_matching.equal(found[0].by_contrast)
    everything = retrieve(model, Rows(pixels), CAPTIONS, first=100, progress=False)[1].by_matching
    assert everything.equal(scores.T.argsort(dim=1, descending=True))
    with pytest.raises(ValueError, match="first and captions must be at least 1, got 0 and 6 captions"):
        retrieve(model, Rows(pixels), CAPTIONS, first=0)


def test_recall_is_of_any_that_is_true():
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    own = torch.tensor([[True, False, False, True], [False, False, True, False]])
    assert recalls(order, own, at=(1, 2, 3, 5)) == {1: 0.0, 2: 1.0, 3: 1.0}
    own[0] = torch.tensor([False, False, True, False])
    assert recalls(order, own, at=(1,)) == {1: 0.5}
