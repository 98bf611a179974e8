"""Data sets of Hugging Face's `datasets`, from the hub or a directory of `save_to_disk`.

    hf:NAME:SPLIT    with a column of images and one of captions, a text or a list of texts for each image

Needs datasets: pip install 'fastprob[hf]'.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastprob.data.formats.tables import CAPTION_KEYS, pick_column
from fastprob.data.rows import Rows

EXPECTED = "hf:NAME:SPLIT"
PREFIX = "hf:"


@dataclass(frozen=True)
class _Cell:
    """An image in a row of a data set."""

    name: str
    images: Any  # a data set of undecoded images alone
    row: int
    version: str

    def open(self, mode: str = "rb") -> BinaryIO:
        (image,) = self.images[self.row].values()
        if image is None:
            raise ValueError("expected an image, got None")
        return open(image["path"], mode) if image["bytes"] is None else io.BytesIO(image["bytes"])

    def stamp(self) -> tuple[Any, ...]:
        return (self.row, self.version)

    def __str__(self) -> str:
        return self.name


def read(rows: Rows, spec: str, *, image_key: str | None = None, caption_key: str | None = None) -> str:
    """image_key, caption_key: the columns' names; else the first of images, and the one that is named for captions."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{spec} needs datasets: pip install 'fastprob[hf]'") from error
    data = _load(datasets, spec)
    columns = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    image = pick_column(spec, columns, image_key, tuple(columns), "image_key")
    caption = pick_column(spec, data.column_names, caption_key, (*CAPTION_KEYS, "captions"), "caption_key")
    images = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    for row, texts in enumerate(data[caption]):
        where = f"{spec}, row {row}"
        captions = [rows.caption(where, text) for text in (texts if isinstance(texts, list) else [texts])]
        rows.add(where, str(row), _Cell(where, images, row, data._fingerprint), captions)
    return spec


def _load(datasets: Any, spec: str) -> Any:
    name, _, split = spec.removeprefix(PREFIX).partition(":")
    folder = Path(name).expanduser()
    try:
        data = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(name)
    except Exception as error:  # of many kinds: an unknown name, no network, a damaged directory
        raise ValueError(f"open_dataset: {spec}: {error}") from error
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(f"open_dataset: {spec}: expected one of its splits {[*data]} after it, got {split!r}")
        return data[split]
    return data
