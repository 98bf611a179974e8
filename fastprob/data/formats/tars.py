"""webdataset's tars as img2dataset writes them: NNNNN.tar with key.jpg and key.txt, or the caption in key.json.

Images are read where they are in the tar, in any order, so nothing is unpacked.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from fastprob.data.formats.folders import SUFFIXES
from fastprob.data.images import FileSlice
from fastprob.data.rows import Rows

EXPECTED = "webdataset's .tar, or a directory of them"


def reader(path: Path) -> Callable | None:
    if path.suffix == ".tar" and path.is_file():
        return read
    return read if path.is_dir() and any(path.glob("*.tar")) else None


def read(rows: Rows, path: Path, root: Path | None) -> str:
    for tar in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        try:
            with tarfile.open(tar, "r:") as opened:
                _read(rows, tar, opened)
        except tarfile.TarError as error:
            raise ValueError(f"open_dataset: {tar}: expected an uncompressed tar that is whole, got {error}") from error
    return path.resolve().stem


def _read(rows: Rows, tar: Path, opened: tarfile.TarFile) -> None:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in opened:
        if not member.isfile() or member.issparse():
            continue
        folder, (stem, _, suffix) = PurePosixPath(member.name).parent, PurePosixPath(member.name).name.partition(".")
        key = str(folder / stem)
        if suffix.lower() in samples.setdefault(key, {}):
            rows.reject(f"{tar}, sample {key}", f"expected a {suffix} of its own, found two")
        else:
            samples[key][suffix.lower()] = member
    for key, parts in samples.items():
        image = next((member for suffix, member in parts.items() if f".{suffix}" in SUFFIXES), None)
        where = f"{tar}, sample {key}"
        if image is None:
            if parts.keys() & {"txt", "json"}:
                rows.reject(where, f"expected an image, got {sorted(parts)}")
            continue
        place = FileSlice(image.name, tar, image.offset_data, image.size)
        rows.add(where, key, place, [rows.caption(where, text) for text in _captions(opened, parts)])


def _captions(opened: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> list[Any]:
    """Those of key.txt, else those of key.json."""
    if "txt" in parts:
        return [opened.extractfile(parts["txt"]).read().decode("utf-8-sig", "surrogateescape")]
    if "json" not in parts:
        return []
    try:
        about = json.loads(opened.extractfile(parts["json"]).read().decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return [None]
    found = about.get("captions", about.get("caption")) if isinstance(about, dict) else None
    return found if isinstance(found, list) else [found]
