"""Images as RGB from where their bytes are, why some can't be read, and how a transform is told from others."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError


class ImageSource(Protocol):
    """Where the bytes of an image are: a `Path`, a `FileSlice`, or anything else that opens; its str() names it."""

    name: str

    def open(self, mode: str) -> BinaryIO: ...


@dataclass(frozen=True)
class FileSlice:
    """Bytes within a file, such as a member of a tar: `size` bytes from `offset` on."""

    name: str
    file: Path
    offset: int
    size: int

    def open(self, mode: str = "rb") -> BinaryIO:
        with open(self.file, mode) as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def stamp(self) -> tuple[Any, ...]:
        """What differs where the image does, short of reading it."""
        return (self.name, self.offset, self.size, self.file.stat().st_mtime_ns)

    def __str__(self) -> str:
        return f"{self.file}/{self.name}"


def stamp(image: Any) -> tuple[Any, ...]:
    """What differs where the image does: of a file its name, size and time of change."""
    if isinstance(image, os.PathLike):
        found = os.stat(image)
        return (Path(image).name, found.st_size, found.st_mtime_ns)
    return image.stamp()


def open_rgb(image: str | os.PathLike | ImageSource) -> Image.Image:
    """The image, in RGB; 16-bit greys are scaled to 8 bits, where Pillow would cut them off at 255.

    Raises ValueError naming the file where it is none, torn, or of 32-bit numbers without a range; OSError as `open`.
    """
    with _opened(image) as file:
        try:
            return _rgb(_header(file))
        except Exception as error:  # of many kinds, where the file is damaged
            raise ValueError(f"open_rgb: {image}: {_reason(error)}") from error


def unreadable(image: str | os.PathLike | ImageSource, *, decode: bool = False) -> str | None:
    """Why the image can't be used, None where it can: by its header, or `decode` all of it, which finds torn files."""
    try:
        with _opened(image) as file:
            header = _header(file)
            if decode:
                _rgb(header)
    except Exception as error:  # of many kinds, where the file is damaged
        return _reason(error)
    return None


def _opened(image: Any) -> BinaryIO:
    return open(image, "rb") if isinstance(image, (str, os.PathLike)) else image.open("rb")


def _header(file: BinaryIO) -> Image.Image:
    image = Image.open(file)
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got mode {image.mode!r}")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def described(transform: Callable) -> str:
    """The transform's own description, without the addresses that functions print: equal for equal transforms."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))
