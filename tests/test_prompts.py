"""Prompt tuning: the cheap paths equal open_clip's own over all tokens; the methods tune what they say they do."""

import inspect
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("open_clip")

import open_clip

from fastprob.prompts import DAPT, VPT, CoCoOp, CoOp, PromptTextEncoder, prototypes
from fastprob.prompts.tokens import prompt_tokens

NAMES = ["golden_retriever", "fire engine red", "cat", "dog", "red dog"]
LENGTHS = [2, 3, 1, 1, 2]  # tokens of each: sorting them is no involution
L = 4
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
TOWERS = {  # what differs from CLIP's text tower
    "clip": {},
    "quick_gelu, layer scale": {"ls_init_value": 0.5},
    "eos": {"pool_type": "eos", "eos_id": 49407},
    "custom blocks": {"qk_norm": True},
    "not causal": {"no_causal_mask": True},
    "class token": {"embed_cls": True, "pad_id": 0},
}


def build(tmp_path, changes, name="prompts", **more):
    vision = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 48, "head_width": 16}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT | changes, **more}
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval().requires_grad_(False)
    for parameter in model.parameters():  # its initial weights are so small that a wrong token would hardly show
        parameter.copy_(parameter * 2 + 0.02 * torch.randn_like(parameter))
    return model.double()


@pytest.fixture
def model(tmp_path):
    return build(tmp_path, {})


@pytest.fixture
def tokenizer(tmp_path):
    return lambda texts: open_clip.get_tokenizer("ViT-B-32")(texts, context_length=TEXT["context_length"])


CONTEXTS = {"shared": (L, 32), "of each class": (5, L, 32), "of each image": (3, 1, L, 32)}


def run(encoder, context):
    context = context.clone().requires_grad_()
    value = encoder(context)
    weight = torch.linspace(-1, 1, value.numel()).to(value).view(value.shape)
    return value.detach(), torch.autograd.grad((value * weight).sum(), context)[0]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("tower", list(TOWERS)[:4])
@pytest.mark.filterwarnings("ignore:PromptTextEncoder")
def test_every_path_equals_all_tokens(tmp_path, tokenizer, tower, custom_text, position, context):
    model = build(tmp_path, TOWERS[tower], custom_text=custom_text)
    context = torch.randn(CONTEXTS[context], dtype=torch.float64)
    options = {"context_length": L, "class_position": position}
    plain = run(PromptTextEncoder(model, tokenizer, NAMES, path="plain", **options), context)
    torch.testing.assert_close(plain[0].norm(dim=-1), torch.ones(plain[0].shape[:-1], dtype=torch.float64))
    for more in ({}, {"path": "truncated"}, {"chunk": 2}, {"chunk": 7, "recompute": True}):
        encoder = PromptTextEncoder(model, tokenizer, NAMES, **options, **more)
        torch.testing.assert_close(run(encoder, context), plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_prompts_are_what_the_sentence_would_be(model, tokenizer, position):
    """With the words' own embeddings as context the class embeddings are those of the whole sentence."""
    phrase = "a photo of the"
    sentence = {"end": "a photo of the {}.", "middle": "a photo {} of the.", "front": "{} a photo of the."}[position]
    method = CoOp(model, tokenizer, NAMES, init=phrase, class_position=position)
    texts = tokenizer([sentence.format(name.replace("_", " ")) for name in NAMES])
    torch.testing.assert_close(method.text_features(), model.encode_text(texts, normalize=True))


@pytest.mark.parametrize(
    ("tower", "position", "path"),
    [
        ("clip", "end", "shared"),
        ("quick_gelu, layer scale", "end", "shared"),
        ("clip", "middle", "truncated"),
        ("custom blocks", "end", "truncated"),
    ],
)
def test_takes_the_cheapest_path(tmp_path, tokenizer, tower, position, path):
    model = build(tmp_path, TOWERS[tower])
    encoder = PromptTextEncoder(model, tokenizer, NAMES, context_length=L, class_position=position)
    assert encoder.path == path and f"path={path!r}" in repr(encoder)


@pytest.mark.parametrize(("tower", "reason"), [("not causal", "not causal"), ("class token", "class token")])
def test_says_why_a_tower_needs_all_tokens(tmp_path, tokenizer, tower, reason):
    model = build(tmp_path, TOWERS[tower], custom_text=True)
    with pytest.warns(UserWarning, match=f"all 20 tokens.*{reason}"):
        encoder = PromptTextEncoder(model, tokenizer, NAMES, context_length=L)
    assert encoder.path == "plain"
    for path in ("shared", "truncated"):
        with pytest.raises(ValueError, match=f"path must be .* got {path!r}: .*{reason}"):
            PromptTextEncoder(model, tokenizer, NAMES, context_length=L, path=path)


ALL_TOKENS = {  # tower -> its config, and what is set on it once it is built
    "clip": ({}, {}),
    "CLIP's own class": ({"custom_text": False}, {}),
    "CLIP's own class, biased projection": ({"custom_text": False, "proj_bias": True}, {}),
    "eos": ({"pool_type": "eos", "eos_id": 49407}, {}),
    "last, biased projection": ({"pool_type": "last", "proj_bias": True, "no_causal_mask": True}, {}),
    "custom blocks, no projection": ({"qk_norm": True, "proj_type": "none"}, {}),
    "padding masked": ({"no_causal_mask": True}, {"use_pad_mask": True}),
    "class token": ({"embed_cls": True}, {}),
    "class token, masked rightly": ({"embed_cls": True}, {"correct_cls_mask": True}),
    "class token, not causal": ({"embed_cls": True, "no_causal_mask": True}, {"use_pad_mask": True}),
}


@pytest.mark.parametrize("tower", ALL_TOKENS)
@pytest.mark.filterwarnings("ignore:PromptTextEncoder")
def test_all_tokens_are_what_open_clip_encodes(tmp_path, tokenizer, tower):
    """Against `encode_text` with the context put in by a hook."""
    changes, attributes = ALL_TOKENS[tower]
    changes = {"custom_text": True, **changes}
    custom_text = changes.pop("custom_text")
    model = build(tmp_path, changes, custom_text=custom_text)
    for name, value in attributes.items():
        assert hasattr(model.text, name)
        setattr(model.text, name, value)
    encoder = PromptTextEncoder(model, tokenizer, NAMES, context_length=L, path="plain")
    context = torch.randn(L, 32, dtype=torch.float64)
    actual = encoder(context)
    embedding = (model.text if custom_text else model).token_embedding
    assert not embedding._forward_hooks
    embedding.register_forward_hook(
        lambda _, __, output: torch.cat([output[:, :1], context.expand(5, -1, -1), output[:, 1 + L :]], dim=1)
    )
    texts = tokenizer([f"x x x x {name.replace('_', ' ')}." for name in NAMES])
    torch.testing.assert_close(actual, model.encode_text(texts, normalize=True))


def test_threads_that_share_a_model_do_not_meet(model, tokenizer):
    encoder = PromptTextEncoder(model, tokenizer, NAMES, context_length=L, path="plain")
    contexts = torch.randn(2, L, 32, dtype=torch.float64)
    expected = [encoder(context) for context in contexts]
    start = threading.Barrier(2)

    def encode(i):
        start.wait()
        return max((encoder(contexts[i]) - expected[i]).abs().max().item() for _ in range(30))

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(encode, range(2))) < 1e-12


PUNCTUATED = ["crane (bird)", "St.", "rock 'n' roll!", "plain name"]


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("position", ["middle", "front"])
def test_names_stand_where_coop_puts_them(tokenizer, position, length):
    """CoOp takes as many of the tokens behind the context for the name as the name has by itself: a full stop that is
    in one token with its end goes with it. An odd context has its smaller half in front."""
    texts = tokenizer([f"{'x ' * length}{name}." for name in PUNCTUATED])
    start, slot = texts[0, :1], texts[0, 1]
    ahead = length // 2 if position == "middle" else 0
    tokens = prompt_tokens(tokenizer, PUNCTUATED, length, position)
    for row, name in enumerate(PUNCTUATED):
        count = len(open_clip.get_tokenizer("ViT-B-32").encode(name))
        behind = texts[row, 1 + length :]
        parts = [start, slot.repeat(ahead), behind[:count], slot.repeat(length - ahead), behind[count:]]
        assert torch.equal(tokens.ids[row], torch.cat(parts))
        slots = [*range(1, 1 + ahead), *range(1 + ahead + count, 1 + length + count)]
        assert tokens.slots[row].tolist() == slots
        assert tokens.ids[row, tokens.ends[row]] == 49407


def test_fewer_tokens_go_through_the_shared_path(model, tokenizer):
    counts = {}
    for path in ("shared", "truncated", "plain"):
        encoder, seen = PromptTextEncoder(model, tokenizer, NAMES, context_length=L, path=path), []
        block = model.transformer.resblocks[0].mlp
        handle = block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][..., 0].numel()))
        encoder(torch.randn(L, 32, dtype=torch.float64))
        handle.remove()
        counts[path] = sum(seen)
    assert counts == {"shared": 1 + L + sum(LENGTHS) + 2 * 5, "truncated": 5 * (1 + L + 3 + 2), "plain": 5 * 20}


BAD = {
    "path": ({"path": "fast"}, "path must be one of 'auto', 'shared', 'truncated', 'plain', got 'fast'"),
    "chunk": ({"chunk": 0}, "chunk must be at least 1 or None, got 0"),
    "position": ({"class_position": "back"}, "class_position must be one of 'end', 'middle', 'front', got 'back'"),
    "context": ({"context_length": 0}, "context_length must be at least 1, got 0"),
    "room": ({"context_length": 15}, "leave room for 15 context vectors among 20 tokens, got 'fire engine red'"),
    "no room": ({"context_length": 40}, "leave room for 40 context vectors among 20 tokens, got 'golden_retriever'"),
    "shared": ({"path": "shared", "class_position": "front"}, "got 'shared': the class name stands in the front"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_are_named(model, tokenizer, what):
    options, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        PromptTextEncoder(model, tokenizer, NAMES, **{"context_length": L} | options)


def test_bad_names_and_contexts_are_named(model, tokenizer):
    for names in ([], "cat"):
        with pytest.raises(ValueError, match="classnames must be a list of names, got"):
            PromptTextEncoder(model, tokenizer, names, context_length=L)
    with pytest.raises(ValueError, match="text tower of open_clip's own, got Linear"):
        PromptTextEncoder(torch.nn.Linear(2, 2), tokenizer, NAMES, context_length=L)
    encoder = PromptTextEncoder(model, tokenizer, NAMES, context_length=L)
    for shape in ((3, 32), (4, L, 32), (2, 5, L, 32), (L, 31)):
        with pytest.raises(ValueError, match=r"context must be .* C = 5, L = 4, d = 32, got \["):
            encoder(torch.zeros(shape, dtype=torch.float64))
    encoder = PromptTextEncoder(model, tokenizer, NAMES, context_length=L, path="shared")
    with pytest.raises(ValueError, match=r"context must be .* for path='shared', got \[C, L, d\]"):
        encoder(torch.zeros(5, L, 32, dtype=torch.float64))


# ---- methods --------------------------------------------------------------------------------------------------------


def methods(model, tokenizer):
    text = torch.randn(5, 24, dtype=torch.float64)
    return {
        "CoOp": (CoOp(model, tokenizer, NAMES, context_length=L), {"ctx": (L, 32)}),
        "CoOp, class-specific": (
            CoOp(model, tokenizer, NAMES, context_length=L, class_specific=True), {"ctx": (5, L, 32)},
        ),
        "CoCoOp": (
            CoCoOp(model, tokenizer, NAMES),
            {"ctx": (4, 32), "meta_net.linear1.weight": (1, 24), "meta_net.linear1.bias": (1,),
             "meta_net.linear2.weight": (32, 1), "meta_net.linear2.bias": (32,)},
        ),
        "VPT": (VPT(model, text, length=3), {"vis_ctx": (1, 3, 48)}),
        "VPT, deep": (VPT(model, text, length=3, deep=True), {"vis_ctx": (2, 3, 48)}),
        "DAPT": (
            DAPT(model, tokenizer, NAMES, context_length=L, visual_length=3),
            {"vis_ctx": (1, 3, 48), "txt_ctx": (L, 32)},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["CoOp", "CoOp, class-specific", "CoCoOp", "VPT", "VPT, deep", "DAPT"])
def test_tunes_its_context_alone_and_learns(model, tokenizer, name):
    method, shapes = methods(model, tokenizer)[name]
    method = method.double()
    assert {k: tuple(v.shape) for k, v in method.state_dict().items()} == shapes
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, labels = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.arange(10) % 5
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(method(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert method(images).shape == (10, 5)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_released_checkpoints_load(model, tokenizer, tmp_path):
    source, target = (CoOp(model, tokenizer, NAMES, context_length=L) for _ in range(2))
    prefix = {"token_prefix": torch.zeros(5, 1, 32), "token_suffix": torch.zeros(5, 15, 32)}
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    source.ctx.sum().backward()
    optimizer.step()
    # Dassl's warm-up keeps the schedule that follows it as an object, and its state with it
    scheduler = {"last_epoch": 50, "successor": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)}
    state = {"state_dict": {**source.state_dict(), **prefix}, "epoch": 50, "optimizer": optimizer.state_dict()}
    torch.save({**state, "scheduler": scheduler, "val_result": None}, tmp_path / "model.pth.tar-50")
    target.load_released(tmp_path / "model.pth.tar-50")
    assert torch.equal(source.ctx, target.ctx)
    other = CoOp(model, tokenizer, NAMES, context_length=L + 1)
    with pytest.raises(ValueError, match=r"(?s)CoOp: .*tar-50 must hold what it tunes: .*size mismatch"):
        other.load_released(tmp_path / "model.pth.tar-50")
    for content in ([1], {"state_dict": {"ctx": 1}}, {"epoch": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"CoOp: .*other\.pth must be a checkpoint with a state dict"):
            other.load_released(tmp_path / "other.pth")


def test_image_prompts_without_effect_leave_the_features_alone(model):
    """No vectors: open_clip's own features."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    method = VPT(model, torch.randn(5, 24, dtype=torch.float64), length=0).double()
    torch.testing.assert_close(method.image_features(images), model.encode_image(images, normalize=True))


def test_dropout_of_image_prompts_is_of_each_image(model):
    torch.manual_seed(0)
    method = VPT(model, torch.randn(5, 24, dtype=torch.float64), length=3, dropout=0.5).double()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64).expand(4, -1, -1, -1)
    assert len(method.image_features(images).unique(dim=0)) == 4
    assert torch.pdist(method.eval().image_features(images)).max() < 1e-9


def test_dapt_loss_is_its_three_terms(model, tokenizer):
    method = DAPT(model, tokenizer, NAMES, context_length=L, beta_t=0.3, beta_v=0.7).double().eval()
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.arange(6) % 5
    features = torch.randn(10, 24, dtype=torch.float64)
    center = prototypes(features, torch.arange(10) % 5, 5)
    torch.testing.assert_close(center[1], F.normalize(features[[1, 6]], dim=1).mean(0))
    image, text = method.image_features(images), method.text_features()
    inter = torch.pdist(text).square().mul(-2).exp().mean()
    intra = sum((image[i] - center[labels[i]]).square().mean() for i in range(6)) / 6
    expected = F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels) + 0.3 * inter + 0.7 * intra
    torch.testing.assert_close(method.loss(images, labels, center), expected)
    with pytest.raises(ValueError, match=r"each of the 6 classes, got counts \[2, 2, 2, 2, 2, 0\]"):
        prototypes(features, torch.arange(10) % 5, 6)


def test_dapt_with_prototypes_of_another_dtype(model, tokenizer):
    """A model in bfloat16 with prototypes in float32, as `prototypes` of stored features makes them."""
    method = DAPT(model.bfloat16(), tokenizer, NAMES, context_length=L, beta_v=10.0).eval()
    images, labels, center = torch.randn(6, 3, 16, 16).bfloat16(), torch.arange(6) % 5, torch.randn(5, 24)
    half = method.loss(images, labels, center)
    half.backward()
    model.float()
    torch.testing.assert_close(half, method.loss(images.float(), labels, center), rtol=0.02, atol=0)
    assert method.vis_ctx.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 24), (3, 16, 16), (2, 1, 16, 16)])
def test_what_is_no_image_is_named(model, tokenizer, shape):
    got = f"got {list(shape)}".replace("[", r"\[")
    for method in (VPT(model, torch.randn(5, 24)), DAPT(model, tokenizer, NAMES, context_length=L)):
        with pytest.raises(ValueError, match=rf"{type(method).__name__}: images must be \[B, 3, H, W\], .*{got}"):
            method(torch.zeros(shape, dtype=torch.float64))
    if len(shape) != 2:  # which are features
        with pytest.raises(ValueError, match=rf"CoOp: images must be \[B, 3, H, W\], or features \[B, D\], {got}"):
            CoOp(model, tokenizer, NAMES, context_length=L)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("deep", [False, True])
def test_initial_image_prompts_fill_the_released_range(model, deep):
    """Uniform up to sqrt(6 / (3 p^2 + d)): of 4,000 vectors the largest number is within a thousandth of the bound."""
    vectors = VPT(model, torch.randn(5, 24), length=4000, deep=deep).vis_ctx
    bound = math.sqrt(6 / (3 * 8**2 + 48))
    assert 0.999 * bound < vectors.max() <= bound and -bound <= vectors.min() < -0.999 * bound
    assert vectors.mean().abs() < 0.01 * bound


def test_initial_contexts_have_the_released_spread(model, tokenizer):
    context = CoOp(model, tokenizer, NAMES, class_specific=True, context_length=14).ctx  # 5 x 14 x 32 numbers
    assert 0.018 < context.std() < 0.022 and context.mean().abs() < 0.002


DEFAULTS = {
    CoOp: {"context_length": 16, "class_specific": False, "init": None},
    CoCoOp: {"context_length": 4, "init": "a photo of a"},
    VPT: {"length": 16, "deep": False, "dropout": 0.0},
    DAPT: {
        "context_length": 16, "init": None, "visual_length": 16, "deep": False, "dropout": 0.0, "beta_t": 0.1,
        "beta_v": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("method", DEFAULTS, ids=lambda method: method.__name__)
def test_defaults_are_the_released_ones(method):
    parameters = inspect.signature(method).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == DEFAULTS[method]


@pytest.mark.gpu
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_path_on_a_gpu(model, tokenizer, context):
    x = 0.1 * torch.randn(CONTEXTS[context], dtype=torch.float64)
    expected = run(PromptTextEncoder(model, tokenizer, NAMES, context_length=L, path="plain"), x)
    model.cuda()
    for path in ("plain", "truncated", *["shared"] * (context != "of each class")):
        actual = run(PromptTextEncoder(model, tokenizer, NAMES, context_length=L, path=path), x.cuda())
        torch.testing.assert_close([t.cpu() for t in actual], list(expected))
