"""The study's figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastprob.evaluation.plots import COLOURS, axes_of_figure, save_figure

from .measures import DIRECTIONS, RULES
from .parts import SETS
from .results import Runs, settings_of
from .study import ENDS, EPOCHS, FORMS

_GREY = "#666666"
_FULL, _DOTTED = "o-", "s:"


def draw_gain(results: dict, path: Path) -> None:
    """Gain by cross weight: a panel for a data set and direction, a line for a rule and loss, beside 1 - max cosine."""
    panels = [(dataset, direction) for dataset in SETS for direction in DIRECTIONS]
    figure, every = axes_of_figure(len(panels))
    for axes, (dataset, direction) in zip(every, panels):
        for rule, colour in zip(RULES, COLOURS):
            _draw_rule(axes, results, dataset, f"{direction}, {rule}", rule, colour)
        axes.axhline(0, color=_GREY, linewidth=1)
        axes.set(xscale="log", xlabel="cross weight", title=f"{dataset}\n{direction}")
    every[0].set_ylabel("gain (1 best, 0 random, < 0 inverted)")
    _legend_below(figure, every[0], 6)
    save_figure(figure, path)


def _draw_rule(axes, results: dict, dataset: str, query: str, rule: str, colour: str) -> None:
    for form, style in zip(FORMS, (_FULL, _DOTTED)):
        chosen = settings_of(results, dataset, "plain", EPOCHS[dataset], form)
        points = [one["calibration"][query] for one in chosen]
        gains = torch.tensor([point["gain"] for point in points])
        ends = torch.tensor([[point["low"] for point in points], [point["high"] for point in points]])
        weights = [one["cross_weight"] for one in chosen]
        errors = (ends - gains).abs()
        axes.errorbar(weights, gains, errors, fmt=style, color=colour, capsize=2, label=f"{rule}, {form} loss")
    baseline = results["baselines"][dataset]["1 - max cosine"][query]["gain"]
    axes.axhline(baseline, color=colour, linestyle="--", linewidth=1, label=f"{rule}, 1 - max cosine")


def draw_causes(runs: dict[tuple, Runs], path: Path) -> None:
    """Mean uncertainty of distinct captions, and their distance from their pictures, by how many pictures they fit."""
    figure, every = axes_of_figure(len(SETS))
    for axes, dataset in zip(every, SETS):
        judge = runs[dataset, "paper", 1.0, "plain", EPOCHS[dataset]].judge
        groups, centre = _by_ambiguity(judge.ambiguity["text -> image"][judge.test.distinct])
        axes.plot(centre, _means([judge.distance], groups), _FULL, color=_GREY, label="distance from its pictures")
        for label, scores, look in _uncertainties(runs, dataset):
            axes.plot(centre, _means(scores, groups), label=label, **look)
        axes.set(xscale="log", yscale="log", xlabel="pictures that the caption is true of", title=dataset)
    every[0].set_ylabel("relative to the mean of all captions")
    figure.set_size_inches(10, 4.2)
    _legend_below(figure, every[0], 3)
    save_figure(figure, path)


def _uncertainties(runs: dict[tuple, Runs], dataset: str) -> Iterator[tuple[str, list[Tensor], dict]]:
    """Label, uncertainty of distinct captions by seed, and look of every line."""
    ways = {"plain": ("", "o", "-"), "balanced": (", balanced", "s", ":")}
    for way, (said, marker, line) in ways.items():
        for weight, colour in zip(ENDS, COLOURS):
            key = dataset, "paper", weight, way, EPOCHS[dataset]
            if key in runs:
                look = {"marker": marker, "linestyle": line, "color": colour}
                yield f"uncertainty, weight {weight:g}{said}", runs[key].distinct, look


def _by_ambiguity(ambiguity: Tensor) -> tuple[list[Tensor], list[float]]:
    """Groups of captions by how many pictures they fit [U], and the geometric mean of that in each."""
    edges = torch.logspace(0, float(ambiguity.max().log10()) + 1e-9, 8, dtype=torch.float64)
    bins = torch.bucketize(ambiguity, edges[1:-1], right=True)
    groups = [bins == number for number in bins.unique()]
    return groups, [float(ambiguity[group].log().mean().exp()) for group in groups]


def _means(scores: list[Tensor], groups: list[Tensor]) -> list[float]:
    """Mean of each group, relative to that of all, over the seeds."""
    relative = torch.stack([score / score.mean() for score in scores]).mean(0)
    return [float(relative[group].mean()) for group in groups]


def draw_loss(results: dict, path: Path) -> None:
    """Training loss by epoch, for each length of training and both ends of the cross weight."""
    figure, every = axes_of_figure(len(SETS))
    for axes, dataset in zip(every, SETS):
        for one in results["settings"]:
            if (one["dataset"], one["form"], one["way"]) == (dataset, "paper", "plain") and one["cross_weight"] in ENDS:
                colour = COLOURS[ENDS.index(one["cross_weight"])]
                label = f"cross weight {one['cross_weight']:g}" if one["epochs"] == EPOCHS[dataset] else None
                axes.plot(range(1, 1 + len(one["loss"][0])), one["loss"][0], color=colour, linewidth=1, label=label)
        axes.set(xlabel="epoch", title=dataset)
        axes.legend(frameon=False)
    every[0].set_ylabel("nats per dimension")
    figure.set_size_inches(10, 3.8)
    save_figure(figure, path)


def _legend_below(figure, axes, columns: int) -> None:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
