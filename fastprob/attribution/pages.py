"""A page of pictures and their texts, with what the match of each pair rests on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from tqdm import tqdm

from fastprob.attribution.figures import overlay
from fastprob.attribution.method import Attribution, Method
from fastprob.encoders.towers import resizing
from fastprob.evaluation.page import Item, Section, thumbnail, write_page

CAPTIONS = 5
"""Most texts of a picture that a page shows."""

_SAID = """\
The more orange a place of a picture or a word is, the more the match of the two rests on it, by this method. Values \
are within a picture and within a text: in each the least important has 0, the most important 1. They say nothing of \
how well the two match; that is the cosine."""


def explained(
    method: Method, preprocess: Callable[[Image.Image], Tensor], picture: Image.Image, texts: Sequence[str]
) -> tuple[Image.Image, Attribution]:
    """What a model sees of a picture, and what its match with each text rests on."""
    images = preprocess(picture)[None].expand(len(texts), -1, -1, -1)
    return Compose(resizing(preprocess))(picture.convert("RGB")), method(images, texts)


def shaded(found: Attribution, pair: int, text: str) -> list[tuple[str, float]]:
    """All words of a text with their values; those that the model's context has no room for have none, 0."""
    of_words = found.of_words(pair)
    return [*of_words, *((word, 0.0) for word in text.split()[len(of_words) :])]


def write_explained(
    method: Method,
    preprocess: Callable[[Image.Image], Tensor],
    dataset: Any,
    path: str | os.PathLike,
    *,
    facts: Sequence[tuple[str, str]] = (),
    progress: bool = True,
) -> Path:
    """Write a data set's pictures, each with maps by its texts, five at most, as one HTML file; return its path.

    Args:
        method: what makes the maps.
        preprocess: the model's own transform.
        dataset: as `fastprob.data.open_dataset` returns it.
        path: of the file.
        facts: what is said of the page first: what each is called, and what it is.
        progress: show a progress bar.
    """
    rows = tqdm(range(len(dataset)), "pictures", unit="picture", disable=not progress)
    items = [item for row in rows for item in _items(method, preprocess, dataset, row)]
    sections = [
        Section("What was explained", [_SAID], [("Data", f"{dataset.name}, {len(dataset):,} pictures"), *facts]),
        Section("Pictures and texts", grid=items),
    ]
    return write_page(path, f"What matches rest on: {dataset.name}", sections)


def _items(method: Method, preprocess: Callable, dataset: Any, row: int) -> Iterator[Item]:
    picture, texts = dataset[row]
    ids = getattr(dataset, "ids", None)
    name, texts = ids[row] if ids else f"picture {row}", texts[:CAPTIONS]
    seen, found = explained(method, preprocess, picture, texts)
    yield Item(name, picture=thumbnail(seen, name))
    for pair, (text, score) in enumerate(zip(texts, found.scores.tolist())):
        shown = thumbnail(overlay(seen, found.image[pair]), f"What matters in {name} for: {text}")
        yield Item(text, numbers=[("cosine", f"{score:.3f}")], picture=shown, words=shaded(found, pair, text))
