"""Openclipart: 4,118 pictures with titles and keywords, so that how many pictures a caption is true of is known.

Every picture has a title and keywords, from the metadata of its drawing, and these captions:

    kind 0  title and keywords     "television, television, screen, tv"
    kind 1  title                  "television"
    kind 2  one keyword            "screen"

A caption is a set of words; it is true of a picture that has all of them among its title and keywords.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

KINDS = ("title and keywords", "title", "keyword")
SKIPPED = ("computer", "shapes")  # folders of icons and geometry that captions say little about
MAX_PIXELS = 1_500_000
KEYWORDS = 5  # captions of one keyword that a picture has, at most
SHARES = {"heads": 0.45, "train": 0.35, "val": 0.05, "test": 0.15}
SPLIT_SEED = 0

_ROOT = Path("usr/share/openclipart")


@dataclass(frozen=True)
class Picture:
    """A picture's file, title and keywords, in lower case."""

    path: Path
    title: str
    keywords: tuple[str, ...]

    @property
    def words(self) -> frozenset[str]:
        """What captions are made of."""
        return frozenset((self.title, *self.keywords))


@dataclass(frozen=True)
class Caption:
    """A text of one of `KINDS`, and the words that it claims."""

    text: str
    kind: int
    words: frozenset[str]


def read_metadata(drawing: Path) -> tuple[str, tuple[str, ...]] | None:
    """Title and keywords in an SVG file's metadata, each once and in lower case; None unless it has both."""
    try:
        work = ElementTree.parse(drawing).find(".//{*}Work")
    except ElementTree.ParseError:
        return None
    if work is None:
        return None
    title = _clean(work.findtext("{*}title"))
    keywords = tuple(filter(None, dict.fromkeys(_clean(item.text) for item in work.findall("{*}subject//{*}li"))))
    return (title, keywords) if title and keywords else None


def _clean(text: str | None) -> str:
    """In lower case, words apart by one space: "AIGA_Symbol  Signs" is "aiga symbol signs"."""
    return re.sub(r"[\s_]+", " ", text or "").strip().lower()


def find_pictures(drawings: Path, pictures: Path) -> list[Picture]:
    """The pictures of the two unpacked packages that have title and keywords, in the order of their names."""
    found = []
    drawn = sorted((drawings / _ROOT / "svg").rglob("*.svg"))
    for drawing in tqdm(drawn, "titles and keywords", unit="drawing"):
        name = drawing.relative_to(drawings / _ROOT / "svg").with_suffix(".png")
        path = pictures / _ROOT / "png" / name
        if name.parts[0] in SKIPPED or not path.exists() or _pixels(path) > MAX_PIXELS:
            continue
        if metadata := read_metadata(drawing):
            found.append(Picture(path, *metadata))
    return found


def _pixels(path: Path) -> int:
    Image.MAX_IMAGE_PIXELS = None  # the largest are left out by their size
    with Image.open(path) as image:
        return image.width * image.height


def captions_of(picture: Picture) -> list[Caption]:
    """The picture's captions, no text twice."""
    title, keywords = picture.title, picture.keywords
    captions = [Caption(", ".join((title, *keywords)), 0, picture.words), Caption(title, 1, frozenset((title,)))]
    captions += [Caption(keyword, 2, frozenset((keyword,))) for keyword in keywords[:KEYWORDS]]
    return list({caption.text: caption for caption in reversed(captions)}.values())[::-1]


def truth(captions: Sequence[Caption], pictures: Sequence[Picture]) -> Tensor:
    """Whether each caption is true of each picture: [M, N] bool."""
    having: dict[str, set[int]] = {}
    for row, picture in enumerate(pictures):
        for word in picture.words:
            having.setdefault(word, set()).add(row)
    result = torch.zeros(len(captions), len(pictures), dtype=torch.bool)
    for row, caption in enumerate(captions):
        result[row, list(set.intersection(*(having.get(word, set()) for word in caption.words)))] = True
    return result


def split(count: int) -> dict[str, list[int]]:
    """Rows of every part of `SHARES`, drawn once for all: no picture is in two parts."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    parts, start, share = {}, 0, 0.0
    for name, size in SHARES.items():
        share += size
        stop = round(share * count)
        parts[name] = order[start:stop]
        start = stop
    return parts
