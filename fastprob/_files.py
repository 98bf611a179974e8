"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(
    path: str | os.PathLike, content: str | bytes | Callable[[Path], object], *, durable: bool = False
) -> None:
    """Replace the file at `path` in one step: who reads it sees the old content or the new, also if the process dies.

    content: the text (UTF-8) or bytes, or a function that fills the file whose path it gets.
    durable: flush to the disk first, so that a power cut too leaves one of the two; a full disk is then an OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
