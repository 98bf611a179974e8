"""Maps to look at: heat over a picture, words shaded, both as tiles of a PNG file.

Files need matplotlib: `pip install fastprob[plot]`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastprob.attribution.metrics import Box
from fastprob.evaluation.page import HEAT, THUMBNAIL
from fastprob.evaluation.plots import COLOURS, new_figure, save_figure

_OPAQUE = 0.75
"""How much of the picture the greatest heat hides."""

_LETTERS = 13
"""Of words below a tile that an inch has room for."""


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in greys under a map of it, [H, W] from 0 to 1: the more orange, the greater.

    Small pictures are magnified by a whole number. A map of another size is stretched over the picture.
    """
    times = max(THUMBNAIL // max(picture.size), 1)
    picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    stretched = Image.fromarray(heat.cpu().float().numpy()).resize(picture.size, Image.Resampling.BILINEAR)
    alpha = _OPAQUE * np.asarray(stretched)[..., None].clip(0, 1)
    return Image.fromarray(((1 - alpha) * grey + alpha * np.array(HEAT, np.float32)).round().astype(np.uint8))


@dataclass(frozen=True)
class Tile:
    """A picture with a title, words with values from 0 to 1 below it, and boxes in pixels of the picture."""

    picture: Image.Image
    title: str = ""
    words: Sequence[tuple[str, float]] = ()
    boxes: Sequence[Box] = ()


def draw_tiles(rows: Sequence[Sequence[Tile]], path: str | os.PathLike, *, width: float = 1.8) -> Path:
    """Draw rows of as many tiles each, `width` inches wide, as a PNG file; return its path.

    Raises ImportError without matplotlib.
    """
    columns = len(rows[0])
    letters = round(_LETTERS * width)
    lines = [max(len(_lines(tile.words, letters)) for tile in row) for row in rows]
    titles = [any(tile.title for tile in row) for row in rows]
    heights = [width + 0.16 * count + 0.3 * title for count, title in zip(lines, titles)]
    figure = new_figure((width * columns, sum(heights)))
    every = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, tile in zip(every.flat, (tile for row in rows for tile in row)):
        _draw(axes, tile, letters)
    return save_figure(figure, path)


def _draw(axes, tile: Tile, letters: int) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(tile.picture)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(tile.title, fontsize=8, parse_math=False)
    for x0, y0, x1, y1 in tile.boxes:
        axes.add_patch(
            Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=COLOURS[0], linewidth=1.5)
        )
    if tile.words:
        axes.add_artist(_shaded(_lines(tile.words, letters)))


def _shaded(lines: Sequence[Sequence[tuple[str, float]]]):
    """Lines of words below their axes, each word on the colour of its value."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker

    def box(word: str, value: float) -> TextArea:
        colour = (*(channel / 255 for channel in HEAT), _OPAQUE * value)
        back = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        return TextArea(word, textprops={"fontsize": 7, "bbox": back, "parse_math": False})

    packed = [HPacker(children=[box(*word) for word in line], pad=0, sep=5) for line in lines]
    packed = VPacker(children=packed, align="center", pad=0, sep=4)
    return AnnotationBbox(packed, (0.5, -0.03), xycoords="axes fraction", box_alignment=(0.5, 1), frameon=False)


def _lines(words: Sequence[tuple[str, float]], letters: int) -> list[list[tuple[str, float]]]:
    lines: list[list[tuple[str, float]]] = []
    room = 0
    for word, value in words:
        if len(word) > room:
            lines.append([])
            room = letters
        lines[-1].append((word, value))
        room -= len(word) + 1
    return lines
