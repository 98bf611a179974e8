"""BERT towers that can attend to images: transformers' BLIP text model, with keys and values that texts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention


@dataclass(frozen=True)
class Texts:
    """R texts of up to T tokens.

    ids: [R, T] int64; mask: [R, T] int64, 1 for a token and 0 for the padding behind the last one; states: [R, T, d],
    those that a text tower keeps for when the texts see images.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Texts:
        return self.map(lambda each: each[rows])

    def map(self, of: Callable[[Tensor], Tensor]) -> Texts:
        """The same of every tensor."""
        return Texts(of(self.ids), of(self.mask), None if self.states is None else of(self.states))

    def starting_with(self, token: int) -> Texts:
        """The same texts with another first token, by themselves."""
        return Texts(torch.cat([torch.full_like(self.ids[:, :1], token), self.ids[:, 1:]], dim=1), self.mask)


class ImageKeys:
    """Images as texts attend to them: every layer's keys and values, projected once, whoever asks again.

    R texts attend to I images where I divides R: the first R / I of them to the first image, and so on.

    states: [I, N, d], of an image tower.
    """

    def __init__(self, states: Tensor):
        self.states = states
        self._made: dict[BlipTextSelfAttention, tuple[Tensor, ...]] = {}
        self._rows: Tensor | slice | None = None

    def of(self, layer: BlipTextSelfAttention) -> tuple[Tensor, ...]:
        """A layer's keys and values, [I, H, N, E] each."""
        if layer not in self._made:
            self._made[layer] = tuple(_heads(layer, each(self.states)) for each in (layer.key, layer.value))
        made = self._made[layer]
        return made if self._rows is None else tuple(each[self._rows] for each in made)

    def select(self, rows: Tensor | slice) -> ImageKeys:
        """Some of these images, [R] of their numbers, any several times, or a slice. What is projected stays shared."""
        chosen = ImageKeys(self.states)
        chosen._made, chosen._rows = self._made, rows
        return chosen


class CrossAttention(BlipTextSelfAttention):
    """Attention of texts to `ImageKeys`.

    Tokens attend to an image independently of each other, so those of all its texts are the queries of one attention:
    nothing of an image is repeated for a text or for a beam.
    """

    def forward(self, hidden_states: Tensor, *, encoder_hidden_states: ImageKeys, **_: Any) -> tuple[Tensor, None]:
        """[R, T, d] -> [R, T, d]."""
        keys, values = encoder_hidden_states.of(self)
        queries = _heads(self, self.query(hidden_states).view(len(keys), -1, self.all_head_size))
        attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=self.dropout.p * self.training)
        return attended.transpose(1, 2).reshape(hidden_states.shape), None


def _heads(layer: BlipTextSelfAttention, x: Tensor) -> Tensor:
    """[B, N, H E] -> [B, H, N, E]."""
    return x.unflatten(-1, (layer.num_attention_heads, -1)).transpose(1, 2)


def bert(config: BlipTextConfig, *, layers: int, images: bool) -> BlipTextModel:
    """A BERT of so many layers. With `images` each of them attends to images, in calls that have any."""
    config = BlipTextConfig(**config.to_dict() | {"num_hidden_layers": layers, "is_decoder": images})
    model = BlipTextModel(config, add_pooling_layer=False)
    if images:
        attend_to_images(model)
    return model


def attend_to_images(model: BlipTextModel) -> None:
    """Makes a BERT's cross-attention take `ImageKeys`. Its weights stay as they are."""
    for number, layer in enumerate(model.encoder.layer):
        attention = CrossAttention(model.config, is_cross_attention=True, layer_idx=number)
        attention.load_state_dict(layer.crossattention.self.state_dict())
        layer.crossattention.self = attention


def encode(model: BlipTextModel, texts: Texts, keys: ImageKeys | None = None, **options: Any) -> Tensor:
    """The last hidden states of texts, [R, T, d], from the states that they have, if any. Options as the model's."""
    begin = {"input_ids": texts.ids} if texts.states is None else {"encoder_embeds": texts.states}
    return model(**begin, attention_mask=texts.mask, encoder_hidden_states=keys, **options).last_hidden_state
