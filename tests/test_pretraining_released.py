"""Weights in the formats of transformers and of the two repositories, drawn at random, against transformers' models."""

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from fastprob.encoders import load_encoder
from fastprob.pretraining.config import SIZES, PretrainConfig, Size, build
from fastprob.pretraining.objectives import DEC, ENC
from fastprob.pretraining.released import load_released
from fastprob.pretraining.text import ImageKeys
from fastprob.pretraining.tokens import words_of

CAPTIONS = ["a three at the top left", "two digits", "a seven below a one"]


def tokenizer_of(blip=True):
    made = words_of(CAPTIONS)
    if blip:
        made.add_special_tokens({"bos_token": DEC, "additional_special_tokens": [ENC]})
    return made


def theirs(kind):
    tokens = tokenizer_of()
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": tokens.bos_token_id, "eos_token_id": 3, "sep_token_id": 3}
    text = sizes | ids | {"vocab_size": len(tokens), "max_position_embeddings": 20, "encoder_hidden_size": 128}
    vision = sizes | {"intermediate_size": 512, "image_size": 32, "patch_size": 16, "initializer_range": 0.02}
    torch.manual_seed(0)
    model = kind(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=24))
    for parameter in model.parameters():  # biases and norms too
        parameter.data += torch.randn_like(parameter) / 20
    return model.eval()


def texts_of(model, first):
    texts = model.tokenize(CAPTIONS)
    return texts.starting_with(model.tokenizer.convert_tokens_to_ids(first)) if first else texts


PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))

TO_REPOSITORY = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.post_layernorm", "visual_encoder.norm"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("layer_norm", "norm"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
)


def as_repository(state):
    """BLIP's own names, and what its checkpoints hold beside the model."""
    named = {}
    for name, weight in state.items():
        for ours, its in TO_REPOSITORY if name.startswith("vision_model") else ():
            name = name.replace(ours, its)
        named[name] = weight
    extra = {"temp": torch.tensor(0.03), "image_queue": torch.zeros(24, 8), "queue_ptr": torch.zeros(1)}
    twins = {f"{name.split('.')[0]}_m.{name.partition('.')[2]}": weight + 1 for name, weight in named.items()}
    return {**named, **twins, **extra, "text_encoder.embeddings.position_ids": torch.arange(20)[None]}


@torch.no_grad()
@pytest.mark.parametrize("repository", [False, True])
def test_retrieval_is_theirs(repository, tmp_path):
    expected = theirs(BlipForImageTextRetrieval)
    state = {name: weight.contiguous() for name, weight in expected.state_dict().items()}
    path = tmp_path / ("model.pth" if repository else "model.safetensors")
    if repository:
        torch.save({"model": as_repository(state), "epoch": 3}, path)
    else:
        save_file(state, path)
    model, missing = load_released(path, tokenizer_of(blip=False))
    assert missing == (["decoder"] if repository else ["decoder", "temperature"]) and not model.training
    assert float(model.contrast.temperature) == pytest.approx(0.03 if repository else 0.07)
    tolerance = {"rtol": 1e-3, "atol": 1e-3 if repository else 1e-5}  # norms of the repository add another epsilon
    images, states = model.towers.images(PIXELS)
    features, read = model.towers.texts(model.tokenize(CAPTIONS))
    plain, grounded = texts_of(model, None), texts_of(model, ENC)
    wanted = expected(plain.ids, PIXELS, attention_mask=plain.mask, use_itm_head=False).itm_score
    torch.testing.assert_close(images @ features.T, wanted, **tolerance)
    matched = expected(grounded.ids, PIXELS, attention_mask=grounded.mask).itm_score
    torch.testing.assert_close(model.match(read, ImageKeys(states)), matched, **tolerance)
    assert not F.cosine_similarity(matched[:1], matched[1:]).gt(1 - 1e-6).all()


@torch.no_grad()
def test_a_released_model_is_an_encoder(tmp_path):
    expected = theirs(BlipForImageTextRetrieval)
    save_file({name: weight.contiguous() for name, weight in expected.state_dict().items()}, tmp_path / "a.safetensors")
    tokenizer_of().save_pretrained(tmp_path / "words")
    encoder = load_encoder(f"released:{tmp_path / 'a.safetensors'}", tmp_path / "words")
    assert encoder.dim == 24 and encoder.preprocess(Image.new("RGB", (50, 20))).shape == (3, 32, 32)
    ids = encoder.tokenizer(CAPTIONS)
    mask = (ids != 0).long()
    wanted = expected(ids, PIXELS, attention_mask=mask, use_itm_head=False).itm_score
    torch.testing.assert_close(encoder.encode_image(PIXELS) @ encoder.encode_text(ids).T, wanted)
    with pytest.raises(ValueError, match="must be the tokenizer of 'released:x', bert-base-uncased; got None"):
        load_encoder("released:x")
    captioner = theirs(BlipForConditionalGeneration).state_dict()
    save_file({name: weight.clone().contiguous() for name, weight in captioner.items()}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="must have projections and a text tower, it has no projections"):
        load_encoder(f"released:{tmp_path / 'c.safetensors'}", tmp_path / "words")


@torch.no_grad()
def test_captions_are_theirs(tmp_path):
    expected = theirs(BlipForConditionalGeneration)
    state = {name: weight.clone().contiguous() for name, weight in expected.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model, missing = load_released(tmp_path / "model.safetensors", tokenizer_of(blip=False))
    assert missing == ["matching", "projections", "temperature", "text"]
    told = expected.generate(PIXELS, num_beams=3, max_new_tokens=8, do_sample=False)
    wanted = model.tokenizer.batch_decode(told, skip_special_tokens=True)
    assert model.caption(PIXELS, num_beams=3, max_new_tokens=8) == wanted


def test_albefs_weights_find_their_places(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "small", Size(32, 16, 128, 4, 2, 20, 24))
    model = build(PretrainConfig(objective="albef"), tokenizer_of(blip=False)).model
    released, bias = {}, torch.randn(128)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight)
        for ours, its in (
            ("towers.visual.class_embedding", "visual_encoder.cls_token"),
            ("towers.visual.positional_embedding", "visual_encoder.pos_embed"),
            ("towers.visual.conv1", "visual_encoder.patch_embed.proj"),
            ("towers.visual.transformer.resblocks", "visual_encoder.blocks"),
            ("towers.visual.ln_post", "visual_encoder.norm"),
            ("ln_1", "norm1"),
            ("ln_2", "norm2"),
            ("in_proj_weight", "qkv.weight"),
            ("in_proj_bias", "qkv.bias"),
            ("out_proj", "proj"),
            ("c_fc", "fc1"),
            ("c_proj", "fc2"),
            ("towers.fusion.encoder.layer.0", "text_encoder.bert.encoder.layer.2"),
            ("towers.fusion.encoder.layer.1", "text_encoder.bert.encoder.layer.3"),
            ("towers.text.", "text_encoder.bert."),
            ("towers.words", "text_encoder.cls"),
            ("towers.image_projection", "vision_proj"),
            ("towers.text_projection", "text_proj"),
            ("matching", "itm_head"),
            ("contrast.temperature", "temp"),
        ):
            name = name.replace(ours, its)
        released[name] = weight.detach().clone()
    released = {name: weight for name, weight in released.items() if "ln_pre" not in name}
    released["visual_encoder.patch_embed.proj.bias"] = bias
    released["visual_encoder.cls_token"] = released["visual_encoder.cls_token"][None, None]
    released["visual_encoder.pos_embed"] = released["visual_encoder.pos_embed"][None]
    torch.save({"model": released}, tmp_path / "ALBEF.pth")
    loaded, missing = load_released(tmp_path / "ALBEF.pth", tokenizer_of(blip=False))
    assert missing == [] and type(loaded) is type(model)
    of = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        wanted = of[name].detach()
        if name.endswith("visual.positional_embedding"):
            wanted = torch.cat([wanted[:1], wanted[1:] + bias])
        assert weight.equal(wanted), name


def test_other_files_are_refused(tmp_path):
    state = {name: weight.contiguous() for name, weight in theirs(BlipForImageTextRetrieval).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"must have the tokenizer's \d+ tokens, got \d+"):
        load_released(tmp_path / "model.safetensors", words_of(["other words"]))
    save_file(state | {"vision_model.extra": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"must have the weights of BLIP alone, got towers\.visual\.extra \[2\]"):
        load_released(tmp_path / "odd.safetensors", tokenizer_of(blip=False))
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="must be a checkpoint of ALBEF or BLIP, it has no"):
        load_released(tmp_path / "a.safetensors", tokenizer_of())
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold weights by name, got list"):
        load_released(tmp_path / "list.pth", tokenizer_of())
