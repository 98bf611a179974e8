"""Retrieval in two steps: the first ones by contrast, and these in order by matching.

A pair that both directions ask for is matched once. All texts of an image are matched together: its keys and values are
projected once, and no more than one image's are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fastprob.data.pixels import Pixels
from fastprob.evaluation.retrieval import nearest
from fastprob.pretraining.objectives import ALBEF, BLIP
from fastprob.pretraining.text import ImageKeys, Texts

_TEXTS = 256
"""Texts that are read at once, or matched with an image."""


@dataclass(frozen=True)
class Found:
    """What Q queries find first, [Q, k] numbers of gallery items, the best one first: by contrast, and by matching."""

    by_contrast: Tensor
    by_matching: Tensor


@torch.no_grad()
def retrieve(
    model: ALBEF | BLIP, pixels: Pixels, captions: list[str], *, first: int = 128, progress: bool = True
) -> tuple[Found, Found]:
    """What N images find among M captions, and what the captions find among the images.

    Of each query the first ones by the features' cosine are put in order by the logit of a match, to which BLIP adds
    the cosine.

    Args:
        model: in evaluation mode.
        pixels: the images, which are encoded twice, a batch at a time.
        first: how many of each query; all where there are fewer. 128 for ALBEF on Flickr30k, 256 on COCO.

    Raises:
        ValueError: for `first` below 1, or no captions.

    Source:
        ALBEF (Li et al., NeurIPS 2021), sec. 4; BLIP (Li et al., ICML 2022), sec. 5.1.
    """
    if first < 1 or not captions:
        raise ValueError(f"retrieve: first and captions must be at least 1, got {first} and {len(captions)} captions")
    text, texts_read = read(model, captions)
    image = torch.cat([model.towers.images(batch)[0] for batch in batches_of(model, pixels, "encode", progress)])
    image, text, count = image.cpu(), text.cpu(), len(captions)
    texts = nearest(image, text, min(first, count))[1]  # [N, k]
    images = nearest(text, image, min(first, len(image)))[1]  # [M, k]
    asked = torch.arange(len(image))[:, None] * count + texts, images * count + torch.arange(count)[:, None]
    pairs = torch.cat([each.flatten() for each in asked]).unique()  # [P], image M + text, sorted
    scores = match(model, pixels, texts_read, pairs // count, pairs % count, progress)[:, 1]
    if isinstance(model, BLIP):
        scores += (image[pairs // count] * text[pairs % count]).sum(1)
    of_query = (scores[torch.searchsorted(pairs, each)] for each in asked)
    return tuple(
        Found(items, items.gather(1, each.argsort(dim=1, descending=True, stable=True)))
        for items, each in zip((texts, images), of_query)
    )


def read(model: ALBEF | BLIP, captions: list[str]) -> tuple[Tensor, Texts]:
    """Unit features [M, D], and the texts as `fuse` takes them."""
    texts = model.tokenize(captions)
    parts = [model.towers.texts(texts[start : start + _TEXTS]) for start in range(0, len(texts), _TEXTS)]
    states = None if parts[0][1].states is None else torch.cat([read.states for _, read in parts])
    return torch.cat([features for features, _ in parts]), Texts(texts.ids, texts.mask, states)


def batches_of(model: ALBEF | BLIP, pixels: Pixels, name: str, progress: bool) -> Iterator[Tensor]:
    """All images, on the model's device, under a progress bar of this name."""
    rows = torch.arange(len(pixels)).split(pixels.batch_size)
    for images in tqdm(pixels.read(rows), name, len(rows), leave=False, disable=not progress):
        yield images.to(model.matching.weight.device)


def match(model: ALBEF | BLIP, pixels: Pixels, read: Texts, images: Tensor, texts: Tensor, progress: bool) -> Tensor:
    """Logits [P, 2] of no match and a match, on the CPU, of pairs of images and texts [P], sorted by image."""
    scores, done = [], 0
    own = texts.split(torch.bincount(images, minlength=len(pixels)).tolist())
    for batch in batches_of(model, pixels, "match", progress):
        keys = ImageKeys(model.towers.images(batch)[1])
        for number, rows in enumerate(own[done : done + len(batch)]):
            key = keys.select(slice(number, number + 1))
            scores += [model.match(read[part], key).cpu() for part in rows.to(batch.device).split(_TEXTS) if len(part)]
        done += len(batch)
    return torch.cat(scores)


def recalls(order: Tensor, own: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """Share of queries with one of their own among the first items.

    order: [Q, k], of `Found`; own: [Q, G] bool; at: how many are looked at, those up to k.
    """
    hits = own.gather(1, order).cumsum(1) > 0
    return {n: float(hits[:, n - 1].double().mean()) for n in at if n <= order.shape[1]}
