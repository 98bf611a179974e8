"""Figures of tuned prompts, as PNG files. They need matplotlib: `pip install fastprob[plot]`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastprob.evaluation.plots import axes_of_figure, save_figure
from fastprob.evaluation.statistics import mean_std

_MOST_NAMES = 30
"""Classes whose names still fit into a figure."""


def accuracy_by_shots(accuracy: Mapping[str, Mapping[int | None, Sequence[float]]], path: str | os.PathLike) -> Path:
    """Accuracy against the number of images a class, a line a method, with the standard deviation over seeds.

    accuracy: method -> shots -> accuracy of each seed; shots None, of zero-shot predictions, is a level line, 0 stands
    for all images. Returns `path`.
    """
    figure, axes = axes_of_figure()
    shots = {k for by_shots in accuracy.values() for k in by_shots if k}
    places = {k: k for k in shots} | {0: 2 * max(shots, default=1)}  # all images: one step further right
    for method, by_shots in accuracy.items():
        if set(by_shots) == {None}:
            axes.axhline(100 * by_shots[None][0], color="#666666", linestyle="--", linewidth=1, label=method)
            continue
        at = sorted((places[k], seeds) for k, seeds in by_shots.items())
        mean, std = zip(*(mean_std([100 * share for share in seeds]) for _, seeds in at))
        axes.errorbar([place for place, _ in at], mean, yerr=std, fmt="o-", capsize=2, label=method)
    ticks = {place: str(k or "all") for k, place in places.items() if any(k in by for by in accuracy.values())}
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="images of a class", ylabel="accuracy (%)", title="Accuracy by shots")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def class_embeddings(embeddings: Mapping[str, Tensor], classnames: Sequence[str], path: str | os.PathLike) -> Path:
    """Class embeddings before and after tuning, a panel a method, all about their mean and on the same two axes: the
    principal ones of all methods' together.

    embeddings: method -> [C, D], C >= 2. Returns `path`.
    """
    centred = {method: of.double() - of.double().mean(dim=0) for method, of in embeddings.items()}
    plane = torch.linalg.svd(torch.cat(list(centred.values())), full_matrices=False).Vh[:2]  # [2, D]
    figure, panels = axes_of_figure(len(embeddings))
    reach = 1.15 * max(float((of @ plane.T).abs().max()) for of in centred.values())
    for axes, (method, of) in zip(panels, centred.items()):
        at = of @ plane.T  # [C, 2]
        axes.scatter(at[:, 0], at[:, 1], s=18, c=range(len(at)), cmap="tab10" if len(at) <= 10 else "viridis")
        for name, (x, y) in zip(classnames if len(at) <= _MOST_NAMES else (), at.tolist()):
            axes.annotate(name, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
        axes.set(title=method, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    return save_figure(figure, path)


def class_distances(embeddings: Mapping[str, Tensor], path: str | os.PathLike) -> Path:
    """Histogram of the distances between class embeddings, by method: what a dispersion term widens.

    embeddings: method -> [C, D] of unit norm, C >= 2. Returns `path`.
    """
    figure, axes = axes_of_figure()
    distances = {method: torch.pdist(of.double()) for method, of in embeddings.items()}
    span = (0.0, max(float(of.max()) for of in distances.values()))
    for method, of in distances.items():
        label = f"{method}: mean {of.mean():.2f}"
        axes.hist(of.numpy(), bins=24, range=span, histtype="step", linewidth=1.5, label=label)
    axes.set(xlabel="distance between two class embeddings", ylabel="pairs", title="How far classes are apart")
    axes.legend(frameon=False, loc="upper left")
    return save_figure(figure, path)
