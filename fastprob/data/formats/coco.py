"""Captions in JSON: COCO's own, and Karpathy's splits of COCO, Flickr30k and Flickr8k.

COCO      {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; images in ../val2017
Karpathy  {"images": [{"filename", "split", "sentences": [{"raw"}], "filepath" (optional)}]}; images beside it
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprob.data.rows import Rows, open_text

EXPECTED = "captions in COCO's or Karpathy's .json"


def reader(path: Path) -> Callable | None:
    return read if path.suffix == ".json" and path.is_file() else None


def read(rows: Rows, path: Path, root: Path | None, *, split: str | None = None) -> str:
    """split: of Karpathy's, "train", "restval", "val" or "test", several joined by "+"; None takes all."""
    try:
        with open_text(path) as file:
            data = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"open_dataset: {path}: expected JSON, got {error}") from error
    images = data.get("images") if isinstance(data, dict) else None
    if isinstance(images, list) and isinstance(data.get("annotations"), list):
        if split is not None:
            raise ValueError(f"open_dataset: {path}: COCO's captions have no splits, got split {split!r}")
        return _coco(rows, path, root, images, data["annotations"])
    if isinstance(images, list) and any(isinstance(row, dict) and "sentences" in row for row in images):
        return _karpathy(rows, path, root, images, split)
    got = f"keys {sorted(data)}" if isinstance(data, dict) else type(data).__name__
    expected = "COCO captions with lists 'images' and 'annotations', or Karpathy's 'images' with 'sentences'"
    raise ValueError(f"open_dataset: {path}: expected {expected}, got {got}")


def _coco(rows: Rows, path: Path, root: Path | None, images: list[Any], annotations: list[Any]) -> str:
    captions: dict[Any, list[str]] = {}
    names: dict[Any, tuple[str, Any]] = {}
    for index, row in enumerate(images):
        where = f"{path}, images[{index}]"
        if not _has(rows, where, row, "id", "file_name"):
            continue
        if row["id"] in names:
            rows.reject(where, f"expected an id of its own, got {row['id']!r}, that of {names[row['id']][1]!r}")
            continue
        names[row["id"]], captions[row["id"]] = (where, row["file_name"]), []
    for index, row in enumerate(annotations):
        where = f"{path}, annotations[{index}]"
        if not _has(rows, where, row, "image_id", "caption"):
            continue
        caption = rows.caption(where, row["caption"])
        if row["image_id"] not in captions:
            rows.reject(where, f"expected an image_id of 'images', got {row['image_id']!r}")
        elif caption is not None:
            captions[row["image_id"]].append(caption)
    root = root or path.parent.parent / path.stem.removeprefix("captions_")
    for id, (where, name) in names.items():
        rows.add(where, name, rows.file(where, root, name), captions[id])
    return path.stem


def _karpathy(rows: Rows, path: Path, root: Path | None, images: list[Any], split: str | None) -> str:
    wanted = None if split is None else split.split("+")
    found = sorted({str(row.get("split")) for row in images if isinstance(row, dict)})
    if wanted is not None and not set(wanted) <= set(found):
        raise ValueError(f"open_dataset: {path}: expected a split among {found}, got {split!r}")
    pairs = []
    for index, row in enumerate(images):
        where = f"{path}, images[{index}]"
        if not _has(rows, where, row, "filename", "sentences"):
            continue
        if wanted is not None and row.get("split") not in wanted:
            continue
        name, sentences = row["filename"], row["sentences"]
        if isinstance(name, str) and isinstance(row.get("filepath"), str):
            name = f"{row['filepath']}/{name}"
        if not isinstance(sentences, list) or not sentences:
            rows.reject(where, f"expected 'sentences' with captions, got {sentences!r}")
            continue
        for number, sentence in enumerate(sentences):
            raw = sentence.get("raw") if isinstance(sentence, dict) else sentence
            pairs.append((f"{where}.sentences[{number}]", name, raw))
    rows.add_pairs(pairs, path, root)
    return path.stem + ("" if split is None else f":{split}")


def _has(rows: Rows, where: str, row: Any, *keys: str) -> bool:
    """Whether `row` has the keys, and an id among them can be one; else it is rejected."""
    if not isinstance(row, dict) or any(key not in row for key in keys):
        rows.reject(where, f"expected {' and '.join(keys)}, got {row!r}")
        return False
    for key in keys:
        if key in ("id", "image_id") and not isinstance(row[key], (str, int)):
            rows.reject(where, f"expected {key} to be a number or text, got {row[key]!r}")
            return False
    return True
