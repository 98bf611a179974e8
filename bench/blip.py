"""ALBEF and BLIP as their repositories compute them: what the tests hold ours against, and what benches time.

An image is repeated for each of its texts, all words are scored everywhere, the matrix of similarities is held, the
twin moves a weight at a time, and every word and beam of a caption projects the image's keys and values anew.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel, BlipTextSelfAttention

from fastprob.pretraining.masking import hide_tokens
from fastprob.pretraining.negatives import hard_negatives
from fastprob.pretraining.objectives import BLIP
from fastprob.pretraining.text import Texts
from fastprob.pretraining.towers import Teacher
from fastprob.training import seed_of


def plain(ours: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Last states by transformers' own text model of the same weights, whose images are states, a row for each text."""
    return functional_call(_bare(ours), dict(ours.named_parameters()), args, kwargs).last_hidden_state


@cache
def _bare(ours: nn.Module) -> BlipTextModel:
    return BlipTextModel(ours.config, add_pooling_layer=False).train(ours.training)


def states_of(towers: nn.Module, pixels: Tensor) -> Tensor:
    visual = towers.visual
    return visual.ln_post(visual.transformer(visual._embeds(pixels)))


def released(
    model: nn.Module, pixels: Tensor, texts: Texts, ids: Tensor, teacher: Teacher, *, alpha: float, seed: int
) -> list[Tensor]:
    """The three losses of ALBEF and BLIP. The queue stays as it is."""
    each = len(texts) // len(pixels)
    pixels, ids, mask = pixels.repeat_interleave(each, dim=0), ids.repeat_interleave(each), texts.mask
    towers, twin, queue = model.towers, teacher.twin, teacher.queue
    for mine, theirs in zip(twin.parameters(), towers.parameters()):
        mine.data = mine.data * teacher.momentum + theirs.data * (1 - teacher.momentum)
    image, text = states_of(towers, pixels), plain(towers.text, texts.ids, attention_mask=mask)
    with torch.no_grad():
        twin_image, twin_text = states_of(twin, pixels), plain(twin.text, texts.ids, attention_mask=mask)
    v, t = _features(towers.image_projection, image), _features(towers.text_projection, text)
    with torch.no_grad():
        vm, tm = _features(twin.image_projection, twin_image), _features(twin.text_projection, twin_text)
    tau, key_ids = model.contrast.temperature, torch.cat([ids, queue.ids])
    to_text = _contrast(v, torch.cat([tm, queue.text]), vm, ids, key_ids, tau, alpha)
    to_image = _contrast(t, torch.cat([vm, queue.image]), tm, ids, key_ids, tau, alpha)

    negative_text = hard_negatives(v @ tm.T / tau, ids, ids, seed=seed_of(seed, 0))[0]
    negative_image = hard_negatives(t @ vm.T / tau, ids, ids, seed=seed_of(seed, 1))[0]
    every = torch.arange(len(ids), device=ids.device)
    rows, images = torch.cat([every, negative_text, every]), torch.cat([image, image, image[negative_image]])
    if isinstance(model, BLIP):
        begun = texts.starting_with(towers.enc).ids[rows]
        fused = plain(towers.text, begun, attention_mask=mask[rows], encoder_hidden_states=images)
    else:
        begun = text[rows]
        fused = plain(towers.fusion, encoder_embeds=begun, attention_mask=mask[rows], encoder_hidden_states=images)
    labels = (torch.arange(len(rows), device=ids.device) < len(ids)).long()
    itm = F.cross_entropy(model.matching(fused[:, 0]), labels)
    if isinstance(model, BLIP):
        third = _causal(model, texts, image)
    else:
        third = _masked(model, twin, texts, image, twin_image, alpha, seed_of(seed, 2))
    return [(to_text + to_image) / 2, itm, third]


def _features(projection: nn.Module, states: Tensor) -> Tensor:
    return F.normalize(projection(states[:, 0]), dim=1)


def _contrast(
    a: Tensor, keys: Tensor, teacher: Tensor, ids: Tensor, key_ids: Tensor, tau: Tensor, alpha: float
) -> Tensor:
    equal = (ids[:, None] == key_ids).to(a.dtype)
    soft = (teacher @ keys.T / tau).softmax(1).detach()
    targets = alpha * soft + (1 - alpha) * equal / equal.sum(1, keepdim=True)
    return -((a @ keys.T / tau).log_softmax(1) * targets).sum(1).mean()


def _causal(model: nn.Module, texts: Texts, image: Tensor) -> Tensor:
    begun = texts.starting_with(model.tokenizer.bos_token_id)
    seen = {"attention_mask": texts.mask, "encoder_hidden_states": image, "is_decoder": True}
    scores = model.decoder.cls(plain(model.decoder.bert, begun.ids, **seen))[:, :-1]
    labels = texts.ids.masked_fill(texts.mask == 0, -100)[:, 1:]
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def _masked(
    model: nn.Module, twin: nn.Module, texts: Texts, image: Tensor, twin_image: Tensor, alpha: float, seed: int
) -> Tensor:
    tokens, scores = model.tokenizer, []
    keep = tokens.pad_token_id, tokens.cls_token_id
    shown, hidden = hide_tokens(texts.ids, mask=tokens.mask_token_id, vocabulary=len(tokens), keep=keep, seed=seed)
    for towers, states in ((model.towers, image), (twin, twin_image)):
        text = plain(towers.text, shown, attention_mask=texts.mask)
        seen = {"attention_mask": texts.mask, "encoder_hidden_states": states}
        scores.append(towers.words(plain(towers.fusion, encoder_embeds=text, **seen)))
    labels = texts.ids.masked_fill(~hidden, -100)
    hard = F.cross_entropy(scores[0].flatten(0, 1), labels.flatten())
    soft = -(scores[0].log_softmax(2) * scores[1].softmax(2).detach()).sum(2)[hidden].mean()
    return (1 - alpha) * hard + alpha * soft


class _Anew(BlipTextSelfAttention):
    """Projects an image's keys and values in every call, as BLIP's repository does."""

    def forward(self, *args: Any, cache: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().forward(*args, cache=None, **kwargs)


def captioner(model: BLIP) -> BlipTextLMHeadModel:
    """transformers' decoder with BLIP's weights, that keeps nothing of images."""
    decoder = BlipTextLMHeadModel(model.decoder.config)
    for number, layer in enumerate(decoder.bert.encoder.layer):
        layer.crossattention.self = _Anew(decoder.config, is_cross_attention=True, layer_idx=number)
    decoder.load_state_dict(model.decoder.state_dict())
    return decoder.eval()
