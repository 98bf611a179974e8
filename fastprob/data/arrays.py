"""Embeddings that people have already, as a store: arrays become what `embed` would have written.

Files are mapped, read twice (checked and digested, then written) and never held whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastprob.data.formats import parquet
from fastprob.data.formats.tables import CAPTION_KEYS, IMAGE_KEYS, pick_column
from fastprob.data.rows import open_text
from fastprob.data.store import Block, EmbeddingStore, sample_line, write_store
from fastprob.data.store_format import CAPTIONS, IMAGE, TEXT

UNIT = 1e-3
"""How far from 1 a norm may be that rounding to half precision has moved: 5e-4, and as much to spare."""

_ROWS = 8192
"""Rows that are held at a time, 32 MB in float64 at D = 512, and images of a shard."""


def embed_arrays(
    image: Any,
    text: Any,
    path: str | os.PathLike,
    *,
    pairs: Any = None,
    captions: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    encoder_name: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbeddingStore:
    """Put embeddings of N images and M texts into a store at `path`; return the opened store.

    A store holds float32 rows of unit norm, as encoders here give them: float16 is converted without loss, float64
    rounded to 24 bits; an array whose rows all have norm 1, but for the rounding to half precision, is stored as it is,
    any other has every row divided by its norm (the metadata's source says so, "normalised"). A complete store of the
    same arrays, by digests of their bytes, is returned as it is, an interrupted one resumed.

    Args:
        image: [N, D] floats, an array or an .npy file.
        text: [M, D], the same.
        pairs: [M] integers, the image of each text, an array or an .npy file; every image has a text. None: text i is
            image i's. The store's texts are in the order of their images, `numpy.argsort(pairs, kind="stable")`.
        captions: M texts; None calls text i "text i".
        ids: N names of images.
        encoder_name: what made the arrays. Stores and adapters of different names are kept apart; where a name is
            missing nothing is known but the width D.

    Raises:
        ValueError: naming the array, and the row that is NaN, infinite or zero; and as `embed`.
    """
    content = _Arrays(image, text, pairs, captions, ids, encoder_name)
    return write_store(path, content, overwrite=overwrite, progress=progress)


class _Arrays:
    """The `Content` that arrays are."""

    skipped, ambiguity = (), None

    def __init__(
        self,
        image: Any,
        text: Any,
        pairs: Any,
        captions: Sequence[str] | None,
        ids: Sequence[str] | None,
        encoder_name: str | None,
    ):
        self.image, self.text = _embeddings("image", image), _embeddings("text", text)
        (images, dim), (texts, width) = self.image.shape, self.text.shape
        if dim != width:
            raise ValueError(f"embed_arrays: image and text must have one width, got {dim} and {width}")
        owner = _owner(pairs, images, texts)
        self.captions, self.ids = _strings("captions", captions, texts), _strings("ids", ids, images)
        self.order = np.argsort(owner, kind="stable")  # [M], the texts of image 0, then of image 1, ...
        self.start = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=images))])  # [N + 1]
        (image_digest, image_unit), (text_digest, text_unit) = _check("image", self.image), _check("text", self.text)
        self.divide = {IMAGE: not image_unit, TEXT: not text_unit}
        self.source = {
            "dataset": "arrays",
            "images": images,
            "model": encoder_name,
            "pretrained": None,
            "fingerprint": None,
            "dim": dim,
            "normalised": [name for name, divide in (("image", not image_unit), ("text", not text_unit)) if divide],
            "image": image_digest,
            "text": text_digest,
            "pairs": hashlib.sha256(owner.tobytes()).hexdigest(),
            "captions": hashlib.sha256(json.dumps([self.captions, self.ids]).encode()).hexdigest(),
        }

    def describe(self) -> dict[str, Any]:
        return {}

    def shards(self, done: int) -> Iterator[Iterable[Block]]:
        images = self.source["images"]
        for start in range(done, images, _ROWS):
            yield self._shard(start, min(start + _ROWS, images))

    def _shard(self, start: int, stop: int) -> Iterator[Block]:
        """Images `start` to `stop`, then their texts."""
        lines = [self._line(image) for image in range(start, stop)]
        rows = self._bytes(IMAGE, self.image[start:stop])
        yield {IMAGE: (stop - start, rows), CAPTIONS: (stop - start, b"".join(lines))}
        order = self.order[self.start[start] : self.start[stop]]
        for first in range(0, len(order), _ROWS):
            rows = order[first : first + _ROWS]
            yield {IMAGE: (0, b""), TEXT: (len(rows), self._bytes(TEXT, self.text[rows]))}

    def _line(self, image: int) -> bytes:
        rows = self.order[self.start[image] : self.start[image + 1]].tolist()
        captions = [f"text {row}" if self.captions is None else self.captions[row] for row in rows]
        return sample_line(captions, None, None if self.ids is None else self.ids[image])

    def _bytes(self, name: str, rows: np.ndarray) -> bytes:
        if self.divide[name]:
            rows = rows / _norms(rows)[:, None]
        return np.ascontiguousarray(rows, "<f4").tobytes()

    def bytes_left(self, done: int) -> int:
        """Supposing captions as of the next image."""
        images, texts = self.source["images"] - done, len(self.order) - int(self.start[done])
        return (images + texts) * 4 * self.source["dim"] + (images * len(self._line(done)) if images else 0)


def read_array(name: str, array: Any, who: str = "embed_arrays") -> np.ndarray:
    """An array, or that of an .npy file, mapped. Raises ValueError, as `who` of `name`, where the file holds none."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if not isinstance(array, (str, os.PathLike)):
        return np.asarray(array)
    try:
        found = np.load(array, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of many kinds, where the file is damaged
        raise ValueError(f"{who}: {name} must be an .npy file, got {array}: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{who}: {name} must be an .npy file, got {array}, an archive of several")
    return found


def read_lines(path: str | os.PathLike, what: str) -> list[str]:
    """The lines of a text file, or of a .parquet (clip-retrieval's metadata) the column of captions or of ids."""
    path = Path(path)
    if path.suffix == ".parquet":
        usual = CAPTION_KEYS if what == "captions" else (*IMAGE_KEYS, "key", "url")
        return parquet.read_column(path, pick_column(path, parquet.columns(path), None, usual, None))
    with open_text(path) as file:
        lines = [line.rstrip("\r\n") for line in file]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _embeddings(name: str, array: Any) -> np.ndarray:
    found = read_array(name, array)
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind != "f":
        where = f"{array}: " if isinstance(array, (str, os.PathLike)) else ""
        expected = "floats [rows, D] with at least one row"
        raise ValueError(f"embed_arrays: {where}{name} must be {expected}, got {found.dtype} {found.shape}")
    return found


def _owner(pairs: Any, images: int, texts: int) -> np.ndarray:
    """[M] int64: the image of each text."""
    if pairs is None:
        if images != texts:
            expected = "without pairs, image and text must have as many rows"
            raise ValueError(f"embed_arrays: {expected}, got {images} and {texts}")
        return np.arange(images)
    found = read_array("pairs", pairs)
    if found.shape != (texts,) or found.dtype.kind not in "iu":
        raise ValueError(f"embed_arrays: pairs must be integers [{texts}], got {found.dtype} {found.shape}")
    outside = np.flatnonzero((found < 0) | (found >= images))
    if len(outside):
        row = outside[0]
        raise ValueError(f"embed_arrays: pairs must be in 0..{images - 1}, got {found[row]} for text {row}")
    owner = found.astype("<i8")
    bare = np.flatnonzero(np.bincount(owner, minlength=images) == 0)
    if len(bare):
        raise ValueError(f"embed_arrays: pairs must give every image a text, image {bare[0]} has none")
    return owner


def _strings(name: str, values: Sequence[str] | None, count: int) -> list[str] | None:
    if values is None:
        return None
    if len(values) != count:
        raise ValueError(f"embed_arrays: {name} must be {count} texts, got {len(values)}")
    for row, value in enumerate(values):
        if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"embed_arrays: {name} must be texts in UTF-8, got {value!a} in row {row}")
    return list(values)


def _check(name: str, array: np.ndarray) -> tuple[str, bool]:
    """SHA-256 of the array's bytes, and whether all rows have unit norm. Raises ValueError for rows without any."""
    digest, unit = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode()), True
    for start in range(0, len(array), _ROWS):
        rows = np.ascontiguousarray(array[start : start + _ROWS])
        digest.update(rows.data)
        norms = _norms(rows)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            what = "is zero" if norms[bad[0]] == 0 else "has a NaN or infinite value"
            raise ValueError(f"embed_arrays: {name} row {start + bad[0]} {what}")
        unit = unit and bool((np.abs(norms - 1) <= UNIT).all())
    return digest.hexdigest(), unit


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows.astype(np.float64), axis=1)
