"""Figures of calibration, as PNG files. They need matplotlib: `pip install fastprob[plot]`."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastprob.evaluation.calibration import Calibration, mean_uncertainty
from fastprob.evaluation.comparison import RANDOM, Comparison
from fastprob.evaluation.plots import COLOURS, GREY, axes_of_figure, save_figure
from fastprob.evaluation.statistics import spearman


def recall_by_level(results: Mapping[str, Calibration], path: str | os.PathLike) -> Path:
    """Draw recall@1 against the level of uncertainty, a line a result, with its straight-line fit.

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
        colour = COLOURS[position % len(COLOURS)]
        level = torch.arange(1, len(result.recall) + 1, dtype=torch.float64)
        slope, offset = _line(level, torch.tensor(result.recall, dtype=torch.float64))
        axes.plot(level, result.recall, "o-", color=colour, label=f"{name}:  -S·R² = {result.score:.2f}")
        axes.plot(level, slope * level + offset, "--", color=colour, linewidth=1, alpha=0.6)
    axes.set(xlabel="uncertainty level (1 = most certain)", ylabel="recall@1", ylim=(-0.03, 1.03))
    axes.set_title("Recall@1 by predicted uncertainty")
    axes.set_xticks(range(1, 1 + max(len(result.recall) for result in results.values())))
    axes.legend(frameon=False)
    return save_figure(figure, path)


def risk_coverage(comparisons: Mapping[str, Comparison], path: str | os.PathLike) -> Path:
    """Draw the share of wrong answers against the share of queries that are answered, a panel a comparison.

    Args:
        comparisons: title of the panel -> scores of the same names each.
        path: of the PNG file.

    Returns:
        `path`. Raises ValueError without comparisons, ImportError without matplotlib.
    """
    if not comparisons:
        raise ValueError("risk_coverage: comparisons must hold at least one, got none")
    figure, panels = axes_of_figure(len(comparisons))
    for axes, (title, comparison) in zip(panels, comparisons.items(), strict=True):
        for position, (name, judged) in enumerate(comparison.scores.items()):
            colour = GREY if name == RANDOM else COLOURS[position % len(COLOURS)]
            style = "--" if position >= len(COLOURS) else "-"
            axes.plot(range(1, 101), judged.risk, style, color=colour, linewidth=1.2, label=name)
        axes.set(xlabel="answered, the most certain first (%)", ylim=(0, None))
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("wrong among the answered")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4, fontsize=8)
    return save_figure(figure, path)


def uncertainty_by_ambiguity(ambiguity: Tensor, uncertainty: Tensor, path: str | os.PathLike) -> Path:
    """Draw the uncertainty of captions against how many images each of them fits, with the medians.

    Args:
        ambiguity: number of images that each caption fits, [M], at least 1.
        uncertainty: total uncertainty of each caption, [M] or [M, D] (then its mean over D is shown).
        path: of the PNG file.

    Returns:
        `path`. Raises ValueError for other shapes, ImportError without matplotlib.
    """
    scores, ambiguity = mean_uncertainty(uncertainty), ambiguity.cpu().double()
    if ambiguity.dim() != 1 or ambiguity.shape != scores.shape or len(scores) < 2 or ambiguity.min() < 1:
        raise ValueError(
            "uncertainty_by_ambiguity: ambiguity must be [M >= 2] and at least 1, uncertainty [M] or [M, D], "
            f"got {tuple(ambiguity.shape)} and {tuple(uncertainty.shape)}"
        )
    figure, axes = axes_of_figure()
    axes.scatter(ambiguity, scores, s=8, color=COLOURS[0], alpha=0.25, linewidths=0, label="a caption")
    edges = torch.logspace(0, float(ambiguity.max().log10()) + 1e-9, 9, dtype=torch.float64)
    bins = torch.bucketize(ambiguity, edges[1:-1], right=True)
    groups = [bins == number for number in bins.unique()]
    centre = [float(ambiguity[group].log().mean().exp()) for group in groups]
    median = [float(scores[group].median()) for group in groups]
    axes.plot(centre, median, "o-", color=COLOURS[1], label="median")
    axes.set(xscale="log", xlabel="images that the caption fits", ylabel="total uncertainty (mean over D)")
    axes.set_title(f"Uncertainty against ambiguity: Spearman {spearman(ambiguity, scores):.2f}")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and offset of the least-squares line."""
    centred = x - x.mean()
    slope = float(centred @ y) / float(centred @ centred)
    return slope, float(y.mean()) - slope * float(x.mean())
