"""Parquet tables of captions, with the images beside them as files.

    00000.parquet       img2dataset's "files": columns key, caption and status; images in 00000/<key>.jpg
    metadata.parquet    columns image_path and caption (clip-retrieval's), or those of a .csv

Needs pyarrow: pip install 'fastprob[parquet]'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprob.data.formats.folders import SUFFIXES
from fastprob.data.formats.tables import CAPTION_KEYS, IMAGE_KEYS, pick_column
from fastprob.data.rows import Rows

EXPECTED = "a .parquet with columns image_path (or key) and caption, or a directory of them"


def reader(path: Path) -> Callable | None:
    if path.suffix == ".parquet" and path.is_file():
        return read
    return read if path.is_dir() and any(path.glob("*.parquet")) else None


def read(
    rows: Rows, path: Path, root: Path | None, *, image_key: str | None = None, caption_key: str | None = None
) -> str:
    """image_key, caption_key: the columns' names. What img2dataset could not download is no row."""
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        header = columns(file)
        captions = read_column(file, pick_column(file, header, caption_key, CAPTION_KEYS, "caption_key"))
        downloaded = image_key is None and "key" in header and not set(IMAGE_KEYS) & set(header)
        if downloaded:
            images = _downloaded(file, header, root or file.parent)
        else:
            column = pick_column(file, header, image_key, IMAGE_KEYS, "image_key")
            kind = _parquet(file).schema_arrow.field(column).type
            if not str(kind).startswith(("string", "large_string", "dictionary")):
                expected = f"paths in {column!r}, images in the table itself are for hf:"
                raise ValueError(f"open_dataset: {file}: expected {expected}, got {kind}")
            images = read_column(file, column)
        pairs = [
            (f"{file}, row {row}", image, text)
            for row, (image, texts) in enumerate(zip(images, captions))
            if not downloaded or image is not None
            for text in (texts if isinstance(texts, list) and texts else [texts])
        ]
        rows.add_pairs(pairs, file, root or (file.parent if downloaded else None))
    return path.resolve().stem


def _downloaded(file: Path, header: list[str], root: Path) -> list[str | None]:
    """img2dataset's image of each row, 00000/<key>.jpg; None where it had none to write."""
    keys = read_column(file, "key")
    status = read_column(file, "status") if "status" in header else ["success"] * len(keys)
    suffixes = {each.stem: each.suffix for each in (root / file.stem).glob("*") if each.suffix.lower() in SUFFIXES}
    return [
        f"{file.stem}/{key}{suffixes.get(str(key), '.jpg')}" if state == "success" else None
        for key, state in zip(keys, status)
    ]


def columns(file: Path) -> list[str]:
    """The names of a table's columns. Raises ValueError for another file, ImportError without pyarrow."""
    return _parquet(file).schema_arrow.names


def read_column(file: Path, name: str) -> list[Any]:
    """A column's values, None where there is none. Errors as `columns`."""
    return _parquet(file).read(columns=[name]).column(0).to_pylist()


def _parquet(file: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{file}: parquet needs pyarrow: pip install 'fastprob[parquet]'") from error
    try:
        return ParquetFile(file)
    except ArrowException as error:
        raise ValueError(f"open_dataset: {file}: expected a parquet table, got: {error}") from error
