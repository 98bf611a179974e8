"""Encoders: everything goes through open_clip, the tiny CLIP's quality is what is promised."""

import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastprob.data import tokens
from fastprob.data.digitscenes import PLACES, RELATIONS, Caption, DigitScenes
from fastprob.data.tokens import Lost, lost
from fastprob.encoders import load_encoder, tiny


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the tiny config with random weights."""
    tiny.register()
    torch.manual_seed(0)
    model, _, _ = open_clip.create_model_and_transforms(tiny.NAME)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def encoder(weights):
    return load_encoder("tiny", pretrained=weights)


def batch(encoder, size=5, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    return torch.stack([encoder.preprocess(Image.fromarray(image)) for image in pixels])  # [size, 3, 32, 32]


def test_embeddings_are_open_clips_and_of_unit_norm(encoder, weights):
    model, _, preprocess = open_clip.create_model_and_transforms(tiny.NAME, pretrained=str(weights))
    model.eval()
    images, tokens = batch(encoder), encoder.tokenizer(["a three", "two digits"])
    with torch.no_grad():
        theirs = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    for ours, expected in zip((encoder.encode_image(images), encoder.encode_text(tokens)), theirs):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(len(ours)))
        assert ours.shape[1] == encoder.dim
    assert repr(preprocess.transforms[-1]) == repr(encoder.preprocess.transforms[-1])


def test_frozen_and_in_eval_mode(encoder):
    assert not encoder.model.training
    assert not any(weight.requires_grad for weight in encoder.model.parameters())
    assert not encoder.encode_image(batch(encoder)).requires_grad


def test_fingerprint_is_of_weights_and_transform(encoder, weights):
    first = encoder.fingerprint()
    assert load_encoder("tiny", pretrained=str(weights)).fingerprint() == first
    transform, encoder.preprocess = encoder.preprocess, encoder.preprocess.transforms[-1]
    assert encoder.fingerprint() != first
    encoder.preprocess = transform
    encoder.model.state_dict()["visual.proj"][3, 1] += 1e-6
    assert encoder.fingerprint() != first


def test_any_open_clip_model_from_a_local_checkpoint(tmp_path):
    """Another architecture by open_clip's own name, its weights in a .pt file, as a user has them."""
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"] |= {"layers": 1, "width": 64, "head_width": 32}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    path = tmp_path / "fastprob-test-B-32.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    model = open_clip.create_model(path.stem)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    encoder = load_encoder(path.stem, pretrained=tmp_path / "weights.pt")
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat"])
    assert torch.equal(encoder.tokenizer(["a photo of a cat"]), tokens)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_text(tokens), model.eval().encode_text(tokens, normalize=True))
    assert encoder.encode_image(encoder.preprocess(Image.new("L", (300, 200)))[None]).shape == (1, 512)
    with pytest.raises(ValueError, match="pretrained must be weights of 'tiny', got"):
        load_encoder("tiny", pretrained=tmp_path / "weights.pt")


def test_a_damaged_checkpoint(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"pretrained must be weights of 'tiny', got .*weights\.safetensors"):
        load_encoder("tiny", pretrained=tmp_path / "weights.safetensors")


def test_unknown_model_names_close_ones():
    with pytest.raises(ValueError, match=r"got 'vit-b32'; close matches: .*ViT-B-32"):
        load_encoder("vit-b32", pretrained="openai")


@pytest.mark.parametrize("pretrained", [None, "no/such.pt", "laion9b"])
def test_missing_weights(pretrained):
    with pytest.raises(ValueError, match=f"one of .*laion2b_s34b_b79k.* or a checkpoint file .*got {pretrained!r}"):
        load_encoder("ViT-B/32", pretrained=pretrained)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32)])
def test_image_batch_of_another_shape(encoder, shape):
    with pytest.raises(ValueError, match=r"batch must be \[B, 3, H, W\], got"):
        encoder.encode_image(torch.zeros(shape))


# --------------------------------------------------------------------------------------- the tiny CLIP


def test_vocabulary_has_one_token_a_word():
    texts = [Caption((a, b), r).text for a in range(10) for b in (a, (a + 1) % 10) for r in RELATIONS]
    texts += [Caption((a,), place, 1).text for a in range(10) for place in PLACES]
    texts += [Caption((0, 1, 2), "above").text, *(Caption(count=n).text for n in (1, 2, 3)), Caption().text]
    tiny.register()
    tokenizer, config = open_clip.get_tokenizer(tiny.NAME), open_clip.get_model_config(tiny.NAME)
    for text in texts:
        assert len(tokenizer.encode(text)) == len(text.replace(",", " ,").split()), text
    longest = max(DigitScenes("train").captions, key=lambda text: len(tokenizer.encode(text)))
    assert len(tokenizer.encode(longest)) + 2 <= config["text_cfg"]["context_length"]
    assert tokenizer.vocab_size == config["text_cfg"]["vocab_size"] <= 600
    # the shipped file is what its generator makes
    assert gzip.decompress(tiny.MERGES.read_bytes()) == gzip.decompress(tiny.merges_of(texts))


def test_training_lowers_the_loss_is_repeatable_and_keeps_the_callers_random_state(monkeypatch):
    recipe, losses = replace(tiny.RECIPE, scenes=256, steps=30, lone=30, batch=32), []
    forward = open_clip.ClipLoss.forward

    def noted(*args, **kwargs):
        losses.append(forward(*args, **kwargs))
        return losses[-1]

    monkeypatch.setattr(open_clip.ClipLoss, "forward", noted)
    before = torch.get_rng_state()
    first, second = tiny.train(recipe, progress=False), tiny.train(recipe, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert sum(losses[25:30]) < 0.9 * sum(losses[:5])
    shipped = load_file(tiny.WEIGHTS)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in shipped.items()}


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_tiny_clip_finds_a_true_scene_for_captions_of_every_level(split):
    encoder, scenes = load_encoder(), DigitScenes(split)
    images = encoder.encode_image(torch.stack([encoder.preprocess(image) for image, _ in scenes]))  # [N, D]
    texts = {text: row for row, text in enumerate(dict.fromkeys(scenes.captions))}
    text = encoder.encode_text(encoder.tokenizer(list(texts)))  # [U, D]
    best = (text @ images.T).argmax(dim=1)[[texts[caption] for caption in scenes.captions]]  # [5 N]
    hit = scenes.matches()[torch.arange(len(best)), best]
    for level in range(5):
        share = hit[scenes.caption_level == level].float().mean().item()
        assert share >= 0.85, f"level {level}: {share:.1%}"


# -------------------------------------------------------------------------------------- what tokenizers lose


@pytest.mark.parametrize(("name", "context"), [("ViT-B-32", 77), ("digitscenes-tiny", 14)])
def test_a_caption_is_cut_off_from_the_first_token_that_does_not_fit(name, context):
    tiny.register()
    tokenizer = open_clip.get_tokenizer(name)
    fits, just_too_long, too_long = ("a " * (context - 2 + more) for more in (0, 1, 40))  # two tokens are the ends
    assert lost(tokenizer, ["a", "", fits]) == Lost(0.0, 0.0)
    assert lost(tokenizer, [fits, just_too_long, too_long, "a", fits]) == Lost(0.4, 0.0)
    assert lost(tokenizer, []) == Lost(0.0, 0.0)


class Words:
    """As a tokenizer of transformers that ends in its last token, whatever it cuts off, and pads with it, too."""

    def __init__(self, unknown):
        self.tokenizer = SimpleNamespace(unk_token_id=unknown)

    def __call__(self, texts, context_length=5):
        rows = [[8 if word == "odd" else 4 for word in text.split()][: context_length - 1] for text in texts]
        return torch.tensor([row + [2] * (context_length - len(row)) for row in rows])


def test_share_of_unknown_tokens(monkeypatch):
    monkeypatch.setattr(tokens, "_AT_ONCE", 2)
    texts = ["one", "one odd", "one two odd four", "one two three four", "one two three four five"]
    assert lost(Words(8), texts) == Lost(1 / 5, 2 / 15)
    assert lost(Words(2), texts) == Lost(1 / 5, 0.0)  # CLIP's mark of an end
    assert str(lost(Words(8), texts)) == "20.0% of the captions are cut off, 13.3% of their tokens are unknown"
