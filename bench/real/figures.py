"""The study's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastprob.evaluation.plots import COLOURS, axes_of_figure, save_figure

from .measures import DIRECTIONS, RULES
from .parts import SETS
from .results import Runs, settings_of
from .study import CROSS_WEIGHTS, ENDS, EPOCHS, FORMS


def draw_gain(results: dict, path: Path) -> None:
    """Gain by cross weight: a panel for a data set and direction, a line for a rule and loss, beside 1 - max cosine."""
    panels = [(dataset, direction) for dataset in SETS for direction in DIRECTIONS]
    figure, every = axes_of_figure(len(panels))
    for axes, (dataset, direction) in zip(every, panels):
        for rule, colour in zip(RULES, COLOURS):
            query = f"{direction}, {rule}"
            for form, style in zip(FORMS, ("o-", "s:")):
                chosen = settings_of(results, dataset, "plain", EPOCHS[dataset], form)
                points = [one["calibration"][query] for one in chosen]
                weights, gains = [one["cross_weight"] for one in chosen], [point["gain"] for point in points]
                ends = [[g - point["low"] for g, point in zip(gains, points)],
                        [point["high"] - g for g, point in zip(gains, points)]]  # fmt: skip
                axes.errorbar(weights, gains, ends, fmt=style, color=colour, capsize=2, label=f"{rule}, {form} loss")
            baseline = results["baselines"][dataset]["1 - max cosine"][query]["gain"]
            axes.axhline(baseline, color=colour, linestyle="--", linewidth=1, label=f"{rule}, 1 - max cosine")
        axes.axhline(0, color="#666666", linewidth=1)
        axes.set(xscale="log", xlabel="cross weight", title=f"{dataset}\n{direction}")
    every[0].set_ylabel("gain (1 best, 0 random, < 0 inverted)")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    save_figure(figure, path)


def draw_causes(runs: dict[tuple, Runs], path: Path) -> None:
    """Mean uncertainty of distinct captions, and their distance from their pictures, by how many pictures they fit."""
    figure, every = axes_of_figure(len(SETS))
    for axes, dataset in zip(every, SETS):
        judge = runs[dataset, "paper", 1.0, "plain", EPOCHS[dataset]].judge
        ambiguity = judge.ambiguity["text -> image"][judge.test.distinct]
        lines: dict[str, Sequence[Tensor]] = {"distance from its pictures": [judge.distance]}
        for way, label in (("plain", "uncertainty"), ("balanced", "balanced")):
            for weight in ENDS:
                key = dataset, "paper", weight, way, EPOCHS[dataset]
                if key in runs:
                    lines[f"{label}, cross weight {weight:g}"] = runs[key].distinct
        edges = torch.logspace(0, float(ambiguity.max().log10()) + 1e-9, 8, dtype=torch.float64)
        bins = torch.bucketize(ambiguity, edges[1:-1], right=True)
        groups = [bins == number for number in bins.unique()]
        centre = [float(ambiguity[group].log().mean().exp()) for group in groups]
        looks = (("#666666", "o-"), *((colour, style) for style in ("o-", "s:") for colour in COLOURS[:2]))
        for (label, scores), (colour, style) in zip(lines.items(), looks):
            relative = torch.stack([score / score.mean() for score in scores]).mean(0)
            axes.plot(centre, [float(relative[group].mean()) for group in groups], style, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel="pictures that the caption is true of", title=dataset)
    every[0].set_ylabel("relative to the mean of all captions")
    figure.set_size_inches(10, 4.2)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_loss(results: dict, path: Path) -> None:
    """Training loss by step's share of the longest run, for each length of training and both ends of the weight."""
    figure, every = axes_of_figure(len(SETS))
    for axes, dataset in zip(every, SETS):
        chosen = (one for one in results["settings"] if one["dataset"] == dataset and one["form"] == "paper")
        for one in sorted(chosen, key=lambda one: one["epochs"]):
            if one["way"] == "plain" and one["cross_weight"] in (CROSS_WEIGHTS[0], CROSS_WEIGHTS[-1]):
                colour = COLOURS[0] if one["cross_weight"] < 1 else COLOURS[1]
                label = f"cross weight {one['cross_weight']:g}" if one["epochs"] == EPOCHS[dataset] else None
                axes.plot(range(1, 1 + len(one["loss"][0])), one["loss"][0], color=colour, linewidth=1, label=label)
        axes.set(xlabel="epoch", title=dataset)
        axes.legend(frameon=False)
    every[0].set_ylabel("nats per dimension")
    figure.set_size_inches(10, 3.8)
    save_figure(figure, path)
