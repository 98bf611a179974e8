"""ALBEF or BLIP as a frozen encoder, for `fastprob embed` and all that follows from its stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from open_clip.transform import image_transform
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastprob.encoders.encoder import Encoder
from fastprob.pretraining.config import Pretrained
from fastprob.pretraining.objectives import ALBEF, BLIP
from fastprob.pretraining.released import load_released
from fastprob.pretraining.text import Texts

RUN, RELEASED = "run:", "released:"


def load(name: str, tokenizer: str | None, device: str | torch.device) -> Encoder:
    """What `load_encoder` returns for a model that is one of these.

    Args:
        name: "run:" and the directory of a run of `fastprob pretrain fit`, or "released:" and a file as
            `load_released` takes it.
        tokenizer: of a released one, transformers' name or directory of bert-base-uncased.

    Raises:
        ValueError: a released file without projections or without the text tower, as captioning ones are; or as
            `Pretrained.load` and `load_released`.
    """
    if name.startswith(RUN):
        if tokenizer is not None:
            raise ValueError(f"load_encoder: pretrained must be None for {name!r}, got {tokenizer!r}")
        made = Pretrained.load(name.removeprefix(RUN))
        return _encoder(made.model, made.preprocess, name, None, device)
    path = Path(name.removeprefix(RELEASED))
    if tokenizer is None:
        raise ValueError(f"load_encoder: pretrained must be the tokenizer of {name!r}, bert-base-uncased; got None")
    model, missing = load_released(path, AutoTokenizer.from_pretrained(tokenizer))
    lacking = [part for part in ("projections", "text") if part in missing]
    if lacking:
        raise ValueError(f"load_encoder: {path} must have projections and a text tower, it has no {lacking[0]}")
    preprocess = image_transform(model.towers.visual.image_size, is_train=False, resize_mode="squash")
    return _encoder(model, preprocess, name, tokenizer, device)


def _encoder(
    model: ALBEF | BLIP, preprocess: Callable, name: str, pretrained: str | None, device: str | torch.device
) -> Encoder:
    return Encoder(_Features(model).to(device), preprocess, _Tokenizer(model.tokenizer, model.length), name, pretrained)


class _Features(nn.Module):
    """The towers by the names that open_clip's models have."""

    def __init__(self, model: ALBEF | BLIP):
        super().__init__()
        self.towers, self.padding = model.towers, model.tokenizer.pad_token_id

    def encode_image(self, images: Tensor) -> Tensor:
        return self.towers.images(images)[0]

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.towers.texts(Texts(ids, (ids != self.padding).long()))[0]


class _Tokenizer:
    """transformers' tokenizer by the call that open_clip's have."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self.tokenizer, self.context_length = tokenizer, length

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": context_length or self.context_length}
        return self.tokenizer(list(texts), return_tensors="pt", **options)["input_ids"]
