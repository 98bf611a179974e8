"""Files that are there whole or not at all, and weights in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor


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


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace the safetensors file at `path` in one step."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, to_safetensors(tensors, metadata))


def read_tensors(who: str, path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file. Raises ValueError, as `who`, for another file."""
    try:
        with safe_open(Path(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who}: {path} must be a safetensors file: {error}") from error
