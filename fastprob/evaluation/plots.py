"""Empty figures in one style, and how they are written, without pyplot's global state."""

import os
from pathlib import Path

from fastprob._files import replaced

COLOURS = ("#1f6fb4", "#d1602f", "#3a8a4d", "#7b5aa6")
GREY = "#666666"


def new_figure(size: tuple[float, float]):
    """Make an empty figure of so many inches. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'fastprob[plot]'") from error
    return Figure(figsize=size, dpi=150, layout="constrained")


def axes_of_figure(panels: int | None = None):
    """Make an empty figure and its axes: one, or a list of `panels`. Raises ImportError without matplotlib."""
    figure = new_figure((6.4, 4.0) if panels is None else (3.0 * panels, 3.2))
    every = [figure.subplots()] if panels is None else list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, every[0] if panels is None else every


def save_figure(figure, path: str | os.PathLike) -> Path:
    """Write the figure as a PNG file, in one step; return its path."""
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)
