"""Flickr30k's and Flickr8k's own caption files; images are beside them.

results.csv           `image| number| caption` after a header line
Flickr8k.token.txt    `image#number<tab>caption`; Flickr30k's results_20130124.token likewise
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from fastprob.data.rows import Rows, open_text

EXPECTED = "Flickr30k's results.csv or Flickr8k's .token.txt"
# The published Flickr30k file lacks the second separator in one row ("2199200615.jpg| 4   A dog runs ...").
FLICKR30K = re.compile(r"([^|]+?)\s*\|\s*(\d+)(?:\s*\|\s*|\s+)(.*)")
TOKENS = re.compile(r"([^#\t]+)#(\d+)\t(.*)")


def reader(path: Path) -> Callable | None:
    if path.suffix not in (".csv", ".txt", ".token") or not path.is_file():
        return None
    with open_text(path) as lines:
        first = lines.readline().strip()
    if TOKENS.fullmatch(first):
        return read_tokens
    return read_flickr30k if path.suffix == ".csv" and first.count("|") == 2 else None


def read_flickr30k(rows: Rows, path: Path, root: Path | None) -> str:
    _read(rows, path, root, FLICKR30K, "image| number| caption", start=2)
    return "flickr30k"


def read_tokens(rows: Rows, path: Path, root: Path | None) -> str:
    _read(rows, path, root, TOKENS, "image#number<tab>caption", start=1)
    return path.stem


def _read(rows: Rows, path: Path, root: Path | None, form: re.Pattern[str], expected: str, start: int) -> None:
    pairs = []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            row = form.fullmatch(line.strip())
            where = f"{path}, line {number}"
            if row is not None:
                pairs.append((where, row[1], row[3]))
            elif number >= start and line.strip():
                rows.reject(where, f"expected '{expected}', got {line.rstrip()!r}")
    rows.add_pairs(pairs, path, root)
