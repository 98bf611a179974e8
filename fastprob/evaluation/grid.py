"""A grid of pictures, as a PNG file. It needs matplotlib: `pip install fastprob[plot]`."""

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from fastprob.evaluation.plots import new_figure, save_figure

_COLUMNS = 6
_WIDTH, _HEIGHT = 1.8, 2.25  # inches of a tile
_LETTERS = 30  # of a line below a tile


def picture_grid(tiles: Sequence[tuple[Image | str, str]], title: str, path: str | os.PathLike) -> Path:
    """Draw tiles, at least one, row by row: a picture, or a text in its place, and the lines below it.

    Returns `path`, of the PNG file. Raises ImportError without matplotlib.
    """
    columns = min(_COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    figure = new_figure((_WIDTH * max(columns, 3), _HEIGHT * rows + 0.3))
    figure.suptitle(title, fontsize=10, parse_math=False)
    for place, (shown, below) in enumerate(tiles, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("\n".join(map(_wrapped, below.splitlines())), fontsize=7, parse_math=False)
        if isinstance(shown, str):
            axes.text(0.5, 0.5, _wrapped(shown, lines=8), ha="center", va="center", fontsize=8, parse_math=False)
            axes.set_box_aspect(1)
        else:
            axes.imshow(shown)
    return save_figure(figure, path)


def _wrapped(text: str, lines: int = 2) -> str:
    return textwrap.fill(text, _LETTERS, max_lines=lines, placeholder=" …")
