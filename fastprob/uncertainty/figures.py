"""Figures of calibration and training, as PNG files. They need matplotlib: `pip install fastprob[plot]`."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastprob.uncertainty.calibration import Calibration, spearman

_COLOURS = ("#1f6fb4", "#d1602f", "#3a8a4d", "#7b5aa6")
_GREY = "#666666"


def recall_by_level(results: Mapping[str, Calibration], path: str | os.PathLike) -> Path:
    """Recall@1 against the level of uncertainty, a line a result, with its straight-line fit.

    Args:
        results: name shown in the legend -> calibration.
        path: of the PNG file.

    Returns:
        `path`. Raises ValueError without results, ImportError without matplotlib.
    """
    if not results:
        raise ValueError("recall_by_level: results must hold at least one calibration, got none")
    figure, axes = axes_of_figure()
    for position, (name, result) in enumerate(results.items()):
        colour = _COLOURS[position % len(_COLOURS)]
        level = torch.arange(1, len(result.recall) + 1, dtype=torch.float64)
        slope, offset = _line(level, torch.tensor(result.recall, dtype=torch.float64))
        axes.plot(level, result.recall, "o-", color=colour, label=f"{name}:  -S·R² = {result.score:.2f}")
        axes.plot(level, slope * level + offset, "--", color=colour, linewidth=1, alpha=0.6)
    axes.set(xlabel="uncertainty level (1 = most certain)", ylabel="recall@1", ylim=(-0.03, 1.03))
    axes.set_title("Recall@1 by predicted uncertainty")
    axes.set_xticks(range(1, 1 + max(len(result.recall) for result in results.values())))
    axes.legend(frameon=False)
    return save_figure(figure, path)


def uncertainty_by_ambiguity(ambiguity: Tensor, uncertainty: Tensor, path: str | os.PathLike) -> Path:
    """Uncertainty of captions against how many images each of them fits, with the medians.

    Args:
        ambiguity: number of images that each caption fits, [M], at least 1.
        uncertainty: total uncertainty of each caption, [M] or [M, D] (then its mean over D is shown).
        path: of the PNG file.

    Returns:
        `path`. Raises ValueError for other shapes, ImportError without matplotlib.
    """
    scores = uncertainty.cpu().double()
    scores = scores.mean(1) if scores.dim() == 2 else scores
    ambiguity = ambiguity.cpu().double()
    if ambiguity.dim() != 1 or ambiguity.shape != scores.shape or len(scores) < 2 or ambiguity.min() < 1:
        raise ValueError(
            "uncertainty_by_ambiguity: ambiguity must be [M >= 2] and at least 1, uncertainty [M] or [M, D], "
            f"got {tuple(ambiguity.shape)} and {tuple(uncertainty.shape)}"
        )
    figure, axes = axes_of_figure()
    axes.scatter(ambiguity, scores, s=8, color=_COLOURS[0], alpha=0.25, linewidths=0, label="a caption")
    edges = torch.logspace(0, float(ambiguity.max().log10()) + 1e-9, 9, dtype=torch.float64)
    bins = torch.bucketize(ambiguity, edges[1:-1], right=True)
    groups = [bins == number for number in bins.unique()]
    centre = [float(ambiguity[group].log().mean().exp()) for group in groups]
    median = [float(scores[group].median()) for group in groups]
    axes.plot(centre, median, "o-", color=_COLOURS[1], label="median")
    axes.set(xscale="log", xlabel="images that the caption fits", ylabel="total uncertainty (mean over D)")
    axes.set_title(f"Uncertainty against ambiguity: Spearman {spearman(ambiguity, scores):.2f}")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def training_curves(history: Mapping, path: str | os.PathLike) -> Path:
    """Loss of every step and of every epoch, and the validation NLL, from `fit`'s history.

    Args:
        history: `FitResult.history` or the content of history.json, of at least one epoch.
        path: of the PNG file.

    Returns:
        `path`. Raises ValueError without an epoch, ImportError without matplotlib.
    """
    epochs = len(history["train_loss"])
    if not epochs:
        raise ValueError("training_curves: history must hold at least one epoch, got none")
    steps = len(history["step_loss"])
    figure, axes = axes_of_figure()
    step = torch.arange(1, steps + 1) * (epochs / steps)
    epoch = torch.arange(1, epochs + 1)
    axes.plot(step, history["step_loss"], color=_COLOURS[0], alpha=0.25, linewidth=0.8, label="loss of a step")
    axes.plot(epoch, history["train_loss"], color=_COLOURS[0], label="loss of an epoch")
    if history["val_nll"]:
        axes.plot(epoch, history["val_nll"], color=_COLOURS[1], label="validation NLL")
    axes.set(xlabel="epoch", ylabel="nats per dimension")
    axes.set_title("Adapter training")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def axes_of_figure(panels: int | None = None):
    """An empty figure, free of pyplot's global state, and its axes: one, or a list of `panels` side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'fastprob[plot]'") from error
    size = (6.4, 4.0) if panels is None else (3.0 * panels, 3.2)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    every = [figure.subplots()] if panels is None else list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_GREY)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, every[0] if panels is None else every


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and offset of the least-squares line."""
    centred = x - x.mean()
    slope = float(centred @ y) / float(centred @ centred)
    return slope, float(y.mean()) - slope * float(x.mean())


def save_figure(figure, path: str | os.PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
