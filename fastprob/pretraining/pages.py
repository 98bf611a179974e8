"""A page of pictures over their captions, as one HTML file, and a figure of how a run's losses went."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprob.evaluation.page import Item, Section, thumbnail, write_page
from fastprob.evaluation.plots import COLOURS, axes_of_figure, save_figure

SHOWN = 100
"""Pictures of a page, at most."""


def write_captioned(
    path: str | os.PathLike,
    title: str,
    dataset: Any,
    lines: Sequence[Sequence[str]],
    facts: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the first pictures of a data set, each over its lines of text, as one HTML file; return its path.

    Args:
        path: of the file.
        dataset: as `fastprob.data.open_dataset` returns it.
        lines: of every picture.
        facts: what is said first: what each is called, and what it is.
    """
    shown = range(min(SHOWN, len(dataset)))
    names = getattr(dataset, "ids", None) or [f"picture {row}" for row in shown]
    items = [Item(names[row], lines[row], picture=thumbnail(dataset[row][0], names[row])) for row in shown]
    about = [("Data", f"{dataset.name}, {len(dataset):,} pictures, of which the first {len(items)} are shown"), *facts]
    return write_page(path, title, [Section("What was done", facts=about), Section("Pictures", grid=items)])


def draw_losses(losses: Mapping[str, Sequence[float]], path: str | os.PathLike) -> Path:
    """Draw the mean of every loss in every epoch as a PNG file; return its path.

    losses: name -> nats by epoch, of history.json. Raises ImportError without matplotlib.
    """
    figure, panels = axes_of_figure(len(losses))
    for axes, colour, (name, values) in zip(panels, COLOURS, losses.items()):
        axes.plot(range(1, len(values) + 1), values, "o-", color=colour, markersize=3)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("epoch")
    panels[0].set_ylabel("nats")
    return save_figure(figure, path)
