"""Tables in text, with a header: a row for each pair of an image and a caption; images are beside the file.

captions.csv    columns image and caption (or open_clip's filepath and title, or Hugging Face's file_name and text)
captions.tsv    the same; which of , ; and tab separates them is seen in the header
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from fastprob.data.rows import Rows, open_text

EXPECTED = "a .csv, .tsv or .txt with columns image and caption"
IMAGE_KEYS = ("image", "filepath", "file_name", "image_path")
CAPTION_KEYS = ("caption", "title", "text")
SEPARATORS = (",", "\t", ";")


def reader(path: Path) -> Callable | None:
    return read if path.suffix in (".csv", ".tsv", ".txt") and path.is_file() else None


def read(
    rows: Rows,
    path: Path,
    root: Path | None,
    *,
    image_key: str | None = None,
    caption_key: str | None = None,
    separator: str | None = None,
) -> str:
    """image_key, caption_key: the columns' names; separator: a character."""
    separator = None if separator is None else separator.replace("\\t", "\t")
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise ValueError(f"open_dataset: the separator of a table must be a character, got {separator!r}")
    with open_text(path) as file:
        first = file.readline()
        separator = separator or max(SEPARATORS, key=first.count)
        header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        image = pick_column(path, header, image_key, IMAGE_KEYS, "image_key")
        caption = pick_column(path, header, caption_key, CAPTION_KEYS, "caption_key")
        pairs = []
        for where, row in _rows(rows, path, csv.reader(file, delimiter=separator, strict=True)):
            if len(row) == len(header):
                pairs.append((where, row[header.index(image)], row[header.index(caption)]))
            elif any(field.strip() for field in row):
                expected = f"expected {len(header)} fields as in the header, got {len(row)}: {row}"
                quotes = "; a caption with the separator in it needs quotes" if len(row) > len(header) else ""
                rows.reject(where, expected + quotes)
    rows.add_pairs(pairs, path, root)
    return path.stem


def _rows(rows: Rows, path: Path, lines: Iterator[list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Where each row is, and its fields; those that the csv module can't read are rejected."""
    while True:
        first = lines.line_num + 2  # of the file: the header is the first one
        try:
            row = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            last = lines.line_num + 1
            rows.reject(f"{path}, line {first}" + (f" to {last}" if last > first else ""), f"{error}; a lone quote?")
            continue
        yield f"{path}, line {first}", row


def pick_column(path: Path, header: list[str], named: str | None, usual: tuple[str, ...], option: str | None) -> str:
    """The column of that name, or the first of the usual ones. Raises ValueError without it, or with two of it."""
    column = named or next((name for name in usual if name in header), None)
    if column is None or header.count(column) != 1:
        expected = f"one column {column!r}" if column else f"a column {' or '.join(map(repr, usual))}"
        hint = "" if named or option is None else f" (or name it: {option})"
        raise ValueError(f"open_dataset: {path}: expected {expected} in the header{hint}, got {header}")
    return column
