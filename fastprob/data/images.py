"""Image files as RGB, and how the transform that follows is told from others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import numpy as np
from PIL import Image


def open_rgb(path: str | os.PathLike) -> Image.Image:
    """The image of a file, in RGB; 16-bit greys are scaled to 8 bits, where Pillow would cut them off at 255.

    Raises ValueError naming the file where it is none, torn, or of 32-bit numbers without a range; OSError as `open`.
    """
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"expected 8 or 16 bits a channel, got mode {image.mode!r}")
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"open_rgb: {os.fspath(path)}: {error}") from error


def described(transform: Callable) -> str:
    """The transform's own description, without the addresses that functions print: equal for equal transforms."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))
