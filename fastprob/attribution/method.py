"""What every method of attribution is called with and returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprob.attribution.words import Word, membership, words_of
from fastprob.encoders.towers import Entered, ImageTower, TextTower

TOKENS = 800
"""Of images at once: 16 of ViT-B-32's, 3 of ViT-L-14's. More take more memory and are no faster."""


@dataclass(frozen=True)
class Attribution:
    """What the matches of P images and texts rest on.

    image: [P, H, W], from 0 to 1 in every image, at the images' size.
    text: [P, T], at every token the value of its word, from 0 to 1 among the words of a text; 0 at tokens of no word.
    words: of every text its words, and where they stand among its T tokens.
    scores: [P], the cosines of the pairs.

    A map without differences is 0 everywhere, as that of a single word.
    """

    image: Tensor
    text: Tensor
    words: list[list[Word]]
    scores: Tensor

    def of_words(self, pair: int) -> list[tuple[str, float]]:
        """The words of a text with their values."""
        values = self.text[pair].tolist()
        return [(word.text, values[word.start]) for word in self.words[pair]]


@dataclass(frozen=True)
class Side:
    """The images or the texts of P pairs in their tower, and what they are matched with.

    inputs: images [P, 3, H, W] or token ids [P, T]; states: in front of block `first`; other: [P, D], features of the
    other side, of unit norm; content: [P, N], which of the states' tokens are patches or parts of words.
    """

    tower: ImageTower | TextTower
    inputs: Tensor
    states: Entered
    first: int
    other: Tensor
    content: Tensor

    def cosine(self, states: Tensor) -> Tensor:
        """[S, P], of states in the place of the pairs' own, [S, P, N, d]."""
        features = self.tower.features(self.states.with_states(states), self.first)
        return (unit(features).unflatten(0, states.shape[:2]) * self.other).sum(-1)

    def gradient(self, states: Tensor) -> Tensor:
        """[P, N, d], of the cosines for states in the place of the pairs' own, [P, N, d]."""
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            return torch.autograd.grad(self.cosine(states[None]).sum(), states)[0]


def unit(features: Tensor) -> Tensor:
    """Features of unit norm."""
    return F.normalize(widened(features), dim=-1)


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def min_max(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """[P, K] from 0 to 1 in every row, among the numbers that count, [P, K] bool; 0 where a row has no differences."""
    counts = torch.ones_like(x, dtype=torch.bool) if counts is None else counts
    low = x.masked_fill(~counts, torch.inf).amin(1, keepdim=True)
    span = x.masked_fill(~counts, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(counts & (span > 0), (x - low) / span, 0)


class Method:
    """A method of attribution: called with P images and their texts, it returns an `Attribution`.

    Args:
        model: an open_clip model with a vision transformer and a text transformer, frozen and in eval mode.
        tokenizer: its tokenizer (`open_clip.get_tokenizer`).

    Raises:
        ValueError: for another model; when called, for images that are not [P, 3, H, W] of its size, texts that are not
            P, or features that are not finite.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Tensor]):
        self.image_tower, self.text_tower, self.tokenizer = ImageTower(model), TextTower(model), tokenizer

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Attribution:
        """images: [P, 3, H, W], preprocessed; texts: P. What a pair's maps are does not depend on the other pairs."""
        self._check(images, texts)
        ids, words = words_of(self.tokenizer, texts)
        images, ids = images.to(self.text_tower.device), ids.to(self.text_tower.device)
        pairs = max(TOKENS // (1 + math.prod(self.image_tower.grid)), 1)
        some = [slice(at, at + pairs) for at in range(0, len(ids), pairs)]
        image, text, scores = map(torch.cat, zip(*(self._maps(images[i], ids[i], words[i]) for i in some)))
        return Attribution(image, text, words, scores)

    def _check(self, images: Tensor, texts: Sequence[str]) -> None:
        who, size = type(self).__name__, (3, *self.image_tower.image_size)
        if images.dim() != 4 or images.shape[1:] != size or not len(images):
            expected = f"[P, {', '.join(map(str, size))}] with P at least 1"
            raise ValueError(f"{who}: images must be {expected}, got {list(images.shape)}")
        if isinstance(texts, str) or len(texts) != len(images):
            got = repr(texts) if isinstance(texts, str) else len(texts)
            raise ValueError(f"{who}: texts must be a list of {len(images)}, one for each image, got {got}")

    def _maps(self, images: Tensor, ids: Tensor, words: list[list[Word]]) -> tuple[Tensor, Tensor, Tensor]:
        """The image maps, text maps and scores of some pairs."""
        member = membership(words, ids.shape[1]).to(ids.device)
        image, text = self._sides(images, ids, member.any(1))
        scores = (image.other * text.other).sum(-1)
        if not scores.isfinite().all():
            dtype = str(self.text_tower.dtype).removeprefix("torch.")
            raise ValueError(f"{type(self).__name__}: features must be finite, got NaN or inf from the {dtype} model")
        patches = F.interpolate(widened(self._image(image))[:, None], images.shape[2:], mode="bilinear")
        tokens = widened(self._text(text))
        tokens = F.pad(tokens, (0, ids.shape[1] - tokens.shape[1]))  # or cut: a class token stands behind the last
        of_words = min_max((member * tokens[:, None]).sum(-1), member.any(-1))  # [P, W]
        return min_max(patches.flatten(1)).view_as(patches)[:, 0], (member * of_words[..., None]).sum(1), scores

    def _sides(self, images: Tensor, ids: Tensor, of_words: Tensor) -> tuple[Side, Side]:
        """Both sides of some pairs. of_words: [P, T] bool, the tokens of words."""
        image = self._states(self.image_tower, self.image_tower.enter(images))
        text = self._states(self.text_tower, self.text_tower.enter(self.text_tower.embed(ids), ids))
        patches = torch.ones(image[0].x.shape[:2], dtype=torch.bool, device=ids.device)
        patches[:, 0] = False
        of_words = F.pad(of_words, (0, text[0].x.shape[1] - ids.shape[1]))
        return (
            Side(self.image_tower, images, *image[:2], other=text[2], content=patches),
            Side(self.text_tower, ids, *text[:2], other=image[2], content=of_words),
        )

    def _states(self, tower: ImageTower | TextTower, batch: Entered) -> tuple[Entered, int, Tensor]:
        """The hidden states that the method looks at, the block behind them, and the features that come of them."""
        first = self._first(tower)
        states = tower.run(batch, tower.blocks[:first])
        return states, first, unit(tower.features(states, first))

    # What a method says: `_tokens` for both sides alike, or `_image` and `_text`.

    def _first(self, tower: ImageTower | TextTower) -> int:
        """The block in front of which the method looks at the hidden states."""
        return 0

    def _tokens(self, side: Side) -> Tensor:
        """[P, N], a value for every token."""
        raise NotImplementedError

    def _image(self, side: Side) -> Tensor:
        """[P, h, w], a value for every patch, or on any other grid."""
        return self._tokens(side)[:, 1:].unflatten(1, self.image_tower.grid)

    def _text(self, side: Side) -> Tensor:
        """[P, N], a value for every token; a word's is their sum."""
        return self._tokens(side)
