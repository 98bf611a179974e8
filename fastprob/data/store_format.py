"""What an embedding store looks like on disk, and how it is checked. `fastprob.data.store` uses it.

A store is a directory of four to six files:

    image.npy        [N, D] float32, one row per image
    text.npy         [M, D] float32, one row per caption, in the order of the images
    captions.jsonl   N lines {"captions": [...], "label": int or null, "id": the image's name, where it has one}
    ambiguity.npy    [M] int64, how many of the images each caption fits, where the data set knows it
    skipped.jsonl    lines {"row", "reason"} of the rows of the source that were left out, where some were
    metadata.json    format, source (data set, encoder, transform), counts;
                     for every shard and file: rows, bytes, sha256; for ambiguity.npy: bytes, sha256

metadata.json alone says what is valid. It is replaced in one step, after the data it speaks of has been
flushed to the disk, so bytes beyond the last recorded shard are the remains of an interrupted run.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastprob._files import write_atomically

FORMAT = 1
IMAGE, TEXT, CAPTIONS, METADATA = "image.npy", "text.npy", "captions.jsonl", "metadata.json"
DATA_FILES = (IMAGE, TEXT, CAPTIONS)  # written shard by shard
SKIPPED = "skipped.jsonl"
AMBIGUITY = "ambiguity.npy"  # written last; its name is its key in the metadata too
LOST = "lost"  # key of the metadata: what the tokenizer loses of the captions, where that is known
KEYS = ("format", "complete", "source", "images", "texts", "shards")


def new_metadata(source: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a store with nothing in it."""
    return dict(zip(KEYS, (FORMAT, False, source, 0, 0, []), strict=True))


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The store's metadata, None when there is none. Raises ValueError when it is not of this format."""
    file = path / METADATA
    if not file.exists():
        return None
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got: {error}") from error
    found = metadata if isinstance(metadata, dict) else {}
    if found.get("format") != FORMAT or not set(KEYS) <= found.keys():
        got = f"format {found.get('format')!r} with {', '.join(found)}"
        raise ValueError(f"{file}: expected store format {FORMAT} with {', '.join(KEYS)}, got {got}")
    return metadata


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Replace the store's metadata in one step."""
    text = json.dumps(metadata, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path / METADATA, text, durable=True)


def sync(file: Any) -> None:
    """Bring a written file to the disk; a full disk is reported here at the latest."""
    file.flush()
    os.fsync(file.fileno())


def header(metadata: dict[str, Any], name: str) -> bytes:
    """The .npy header of a data file that grows (none for the others), for the rows recorded so far.

    Its length does not depend on the rows: numpy leaves room for the first axis to grow.
    """
    if name in (CAPTIONS, AMBIGUITY):
        return b""
    shape = (metadata["images" if name == IMAGE else "texts"], metadata["source"]["dim"])
    buffer = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def write_ambiguity(path: Path, metadata: dict[str, Any], ambiguity: np.ndarray) -> None:
    """Write and record the column of ambiguity, [M]. Raises ValueError for another number of captions."""
    if ambiguity.shape != (metadata["texts"],):
        raise ValueError(f"{path}: expected the ambiguity of {metadata['texts']} captions, got {ambiguity.shape}")
    buffer = io.BytesIO()
    np.save(buffer, ambiguity.astype("<i8"))
    data = buffer.getvalue()
    write_atomically(path / AMBIGUITY, data, durable=True)
    metadata[AMBIGUITY] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_metadata(path, metadata)


def write_skipped(path: Path, skipped: Sequence[dict[str, str]]) -> None:
    """Write the rows that were left out; without any, take away those of an earlier store."""
    if skipped:
        write_atomically(path / SKIPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    else:
        (path / SKIPPED).unlink(missing_ok=True)


def read_samples(path: Path, metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of captions.jsonl. Raises ValueError naming the line that is damaged, or a wrong number of captions."""
    samples = []
    with open(path / CAPTIONS, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            try:
                sample = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path / CAPTIONS}, line {number}: expected JSON, got: {error}") from error
            if not _is_sample(sample):
                raise ValueError(f"{path / CAPTIONS}, line {number}: expected captions and label, got {line.strip()}")
            samples.append(sample)
    got = len(samples), sum(len(sample["captions"]) for sample in samples)
    if got != (metadata["images"], metadata["texts"]):
        expected = f"{metadata['images']} lines with {metadata['texts']} captions"
        raise ValueError(f"{path / CAPTIONS}: expected {expected}, got {got[0]} with {got[1]}")
    return samples


def _is_sample(value: Any) -> bool:
    if not isinstance(value, dict) or not {"captions", "label"} <= value.keys():
        return False
    captions, label, id = value["captions"], value["label"], value.get("id", "")
    texts = isinstance(captions, list) and all(isinstance(text, str) for text in [*captions, id])
    return texts and (label is None or isinstance(label, int))


def size(metadata: dict[str, Any], name: str) -> int:
    """Bytes of a data file that the recorded shards account for."""
    return len(header(metadata, name)) + sum(part["bytes"] for part in _parts(metadata, name))


def _files(metadata: dict[str, Any]) -> list[str]:
    return [*DATA_FILES, *([AMBIGUITY] if AMBIGUITY in metadata else [])]


def _parts(metadata: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Bytes and sha256 of a file's shards, or of its only part."""
    return [metadata[name]] if name == AMBIGUITY else [shard[name] for shard in metadata["shards"]]


def check_sizes(path: Path, metadata: dict[str, Any]) -> None:
    """Raises ValueError naming a file that is missing, or shorter than its shards (once complete: longer)."""
    for name in _files(metadata):
        file, expected = path / name, size(metadata, name)
        got = file.stat().st_size if file.exists() else None
        if got is None or got < expected or (metadata["complete"] and got != expected):
            found = "no file" if got is None else f"{got} bytes"
            raise ValueError(f"{file}: expected {expected} bytes, got {found}")


def verify(path: Path, metadata: dict[str, Any]) -> None:
    """Read every recorded byte; raises ValueError naming the first file and shard whose checksum differs."""
    check_sizes(path, metadata)
    for name in _files(metadata):
        with open(path / name, "rb") as file:
            file.seek(len(header(metadata, name)))
            for number, part in enumerate(_parts(metadata, name)):
                expected = part["sha256"]
                got = hashlib.sha256(file.read(part["bytes"])).hexdigest()
                if got != expected:
                    raise ValueError(f"{path / name}: shard {number}: expected sha256 {expected}, got {got}")
