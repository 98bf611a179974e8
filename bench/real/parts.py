"""The embeddings that everything is trained and measured on, as arrays on disk, with what each caption is true of.

    python -m bench.real.parts [--cache DIRECTORY]    makes openclipart's, and says where they are

A part is a directory:

    image.npy [N, D], text [M, D] float32    pairs.npy [M] int64, the picture of each caption    captions.txt, M lines
    truth.npy [M, N] bool, whether a caption is true of a picture    kind.npy [M] int64, how specific the caption is

The parts of openclipart are heads, train, val and test, and outside: scenes of digits as the same towers and heads see
them, which match nothing there. Those of DigitScenes are train, val and test.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastprob.adapters import PairedEmbeddings
from fastprob.data.digitscenes import DigitScenes
from fastprob.data.store import embed
from fastprob.encoders import load_encoder

from .fetch import DRAWINGS, PICTURES, cache_directory, fetch, work_directory
from .openclipart import Caption, Picture, captions_of, find_pictures, split, truth
from .towers import Head, Rows, encode_images, encode_texts, features, train_heads

SCENES = 300  # of digits, outside openclipart


@dataclass(frozen=True)
class Part:
    """Embeddings of pictures and captions with their truth."""

    data: PairedEmbeddings
    captions: list[str]
    truth: Tensor  # [M, N]
    kind: Tensor  # [M]

    @cached_property
    def ambiguity(self) -> Tensor:
        """[M] how many of the pictures each caption is true of."""
        return self.truth.sum(1)

    @cached_property
    def which(self) -> Tensor:
        """[M] which of the different captions, in the order of their first occurrence, each caption is."""
        row = {caption: i for i, caption in enumerate(dict.fromkeys(self.captions))}
        return torch.tensor([row[caption] for caption in self.captions])

    @cached_property
    def distinct(self) -> Tensor:
        """[U] the first caption with each of the different texts."""
        first = {caption: i for i, caption in reversed(list(enumerate(self.captions)))}
        return torch.tensor([first[caption] for caption in dict.fromkeys(self.captions)])

    def save(self, directory: Path) -> None:
        """Write the part; the directory appears when it is whole."""
        scratch = directory.with_name(f".{directory.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        arrays = {"image": self.data.image, "text": self.data.text, "pairs": self.data.caption_image}
        for name, array in (arrays | {"truth": self.truth, "kind": self.kind}).items():
            np.save(scratch / f"{name}.npy", array.numpy())
        (scratch / "captions.txt").write_text("".join(f"{caption}\n" for caption in self.captions), encoding="utf-8")
        scratch.rename(directory)

    @classmethod
    def load(cls, directory: Path) -> Part:
        """Read what `save` wrote. Embeddings come in here alone: a store of them would be opened here."""
        names = ("image", "text", "pairs", "truth", "kind")
        image, text, pairs, true, kind = (torch.from_numpy(np.load(directory / f"{name}.npy")) for name in names)
        captions = (directory / "captions.txt").read_text(encoding="utf-8").splitlines()
        return cls(PairedEmbeddings(image, text, pairs), captions, true, kind)


def openclipart_directory(cache: Path) -> Path:
    """Where its parts are kept."""
    return work_directory(cache) / "openclipart"


def openclipart(cache: Path) -> dict[str, Part]:
    """Part by name, made on the first call and kept in `cache`."""
    root = openclipart_directory(cache)
    if not (root / "test").exists():
        _make_openclipart(cache, root)
    return {name: Part.load(root / name) for name in ("train", "val", "test")}


def digitscenes(cache: Path) -> dict[str, Part]:
    """Part by name, embedded on the first call and kept in `cache`."""
    root = work_directory(cache) / "digitscenes"
    for name in ("train", "val", "test"):
        if not (root / name).exists():
            _embed_scenes(name, cache).save(root / name)
    return {name: Part.load(root / name) for name in ("train", "val", "test")}


SETS = {"openclipart": openclipart, "digitscenes": digitscenes}


def _embed_scenes(name: str, cache: Path) -> Part:
    scenes = DigitScenes(name)
    store = embed(scenes, load_encoder("tiny"), work_directory(cache) / "stores" / name)
    data = PairedEmbeddings(store.image.clone(), store.text.clone(), store.caption_image)
    return Part(data, store.captions, scenes.matches(), scenes.caption_level)


@dataclass(frozen=True)
class Gathered:
    """Openclipart's pictures, the captions of each, and all texts among these, once."""

    pictures: list[Picture]
    captions: list[list[Caption]]
    texts: list[str]


def gather(cache: Path) -> Gathered:
    """All of openclipart that is used."""
    pictures = find_pictures(fetch(DRAWINGS, cache), fetch(PICTURES, cache))
    captions = [captions_of(picture) for picture in pictures]
    return Gathered(pictures, captions, sorted({caption.text for each in captions for caption in each}))


def encoded(cache: Path) -> tuple[list[Picture], Tensor, Tensor, list[Tensor]]:
    """All pictures, their features, those of all texts, and the rows of these that are each picture's."""
    found = gather(cache)
    image, text = features(found.pictures, found.texts, cache)
    row = {text: i for i, text in enumerate(found.texts)}
    return found.pictures, image, text, [torch.tensor([row[each.text] for each in some]) for some in found.captions]


@dataclass(frozen=True)
class Encoded:
    """Openclipart through its towers: features of all pictures and texts, whose these are, and the heads on them."""

    pictures: list[Picture]
    image: Tensor  # [N, 1280]
    text: Tensor  # [U, 384]
    own: list[Tensor]  # of each picture, the rows of its captions' texts
    heads: tuple[Head, Head]  # of images and of texts

    def rows(self, part: str) -> Rows:
        """Features of a part's pictures and captions."""
        return rows_of(self.image, self.text, self.own, split(len(self.pictures))[part])

    def members(self, part: str) -> list[Picture]:
        """The pictures of a part."""
        return [self.pictures[i] for i in split(len(self.pictures))[part]]


@functools.cache
def encode_openclipart(cache: Path) -> Encoded:
    """The features are kept in `cache`; the heads are trained anew, always alike."""
    pictures, image, text, own = encoded(cache)
    return Encoded(pictures, image, text, own, train_heads(rows_of(image, text, own, split(len(own))["heads"])))


@torch.no_grad()
def _make_openclipart(cache: Path, root: Path) -> None:
    every = encode_openclipart(cache)
    image_head, text_head = every.heads
    for name in ("train", "val", "test"):
        rows = every.rows(name)
        unit = Rows(image_head(rows.image), text_head(rows.text), rows.caption_image)
        _part(unit, every.members(name)).save(root / name)


@torch.no_grad()
def outside(cache: Path) -> Part:
    """Digit scenes through openclipart's towers and heads, made on the first call and kept in `cache`."""
    directory = openclipart_directory(cache) / "outside"
    if not directory.exists():
        scenes, (image_head, text_head) = DigitScenes("test", num_scenes=SCENES), encode_openclipart(cache).heads
        image = image_head(encode_images([picture for picture, _ in scenes], cache))
        data = PairedEmbeddings(image, text_head(encode_texts(scenes.captions, cache)), scenes.caption_image)
        Part(data, scenes.captions, scenes.matches(), scenes.caption_level).save(directory)
    return Part.load(directory)


def rows_of(image: Tensor, text: Tensor, own: list[Tensor], members: list[int]) -> Rows:
    """The rows of these pictures and of their captions; own: rows of `text` of each picture's captions."""
    counts = torch.tensor([len(own[i]) for i in members])
    caption_image = torch.arange(len(members)).repeat_interleave(counts)
    return Rows(image[members], text[torch.cat([own[i] for i in members])], caption_image)


def _part(rows: Rows, members: list[Picture]) -> Part:
    captions = [caption for picture in members for caption in captions_of(picture)]
    data = PairedEmbeddings(rows.image, rows.text, rows.caption_image)
    kind = torch.tensor([caption.kind for caption in captions])
    return Part(data, [caption.text for caption in captions], truth(captions, members), kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where what was fetched and made of it is kept")
    cache = cache_directory(parser.parse_args().cache)
    openclipart(cache)
    outside(cache)
    print(openclipart_directory(cache))


if __name__ == "__main__":
    main()
