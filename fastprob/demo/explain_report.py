"""The report of the methods of attribution: tables, what they say in words, and figures."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastprob
from fastprob._files import write_atomically
from fastprob.attribution.figures import Tile, draw_tiles, overlay
from fastprob.attribution.pages import shaded
from fastprob.demo.explain_maps import CHOSEN, FULL, ONE, PAPER, TRIVIAL, TRUTH, Chosen, Size, methods, scenes_of
from fastprob.evaluation.plots import COLOURS, GREY, axes_of_figure, save_figure
from fastprob.evaluation.statistics import mean_std
from fastprob.evaluation.tables import markdown

Found = Sequence[dict[str, Any]]
"""What was measured, of every setting or method and seed."""


class Column(NamedTuple):
    """A metric: its name here and in tables, whether more is better, what it is multiplied by, and digits shown."""

    name: str
    title: str
    more: bool
    scale: float = 1
    digits: int = 2


FAITHFUL = (
    Column("drop", "drop ↓", False, digits=1),
    Column("increase", "increase ↑ %", True, digits=0),
    Column("insertion", "insertion ↑", True, digits=3),
    Column("deletion", "deletion ↓", False, digits=3),
)
ROAR = Column("roar", "ROAR+ ↑", True)
COLUMNS = {
    "image": (
        Column("pointing", "pointing ↑ %", True, 100, 0),
        Column("mass", "mass in box ↑ %", True, 100, 0),
        *FAITHFUL,
        ROAR,
    ),
    "text": (*FAITHFUL, ROAR),
    "both": FAITHFUL,
}
IN_GRID = (PAPER, CHOSEN, "NIB", "Grad-CAM", "gradient x input", "attention rollout", "RISE")
SHOWN = 4
"""Scenes of the grid."""


def write_report(out: Path, size: Size, chosen: Chosen, tried: Found, judged: Found) -> str:
    """Draw and write `out`/report.md; return its text."""
    _draw_settings(tried, out / "settings.png")
    _draw_sanity(judged, out / "sanity.png")
    images, texts = chosen["image"], chosen["text"]
    text = f"""# What matches on DigitScenes rest on

fastprob {fastprob.__version__}, torch {torch.__version__}, {platform.machine()} CPU. The tiny CLIP, \
{len(_by_seed(judged, PAPER))} seeds of scenes and noise, {size.scenes} test scenes each with two digits or more that \
differ; mean ± standard deviation over the seeds. One model: what another would give is not in the deviations.

![scenes and what matters in them, by method](grid.png)

{_ROWS}

## Images: which digit is "a three"?

{_IMAGES}

{_table(judged, "image")}

{_verdict(judged, "image")}

## Texts: which words of "a three above a seven, with a two" matter?

{_TEXTS}

{_table(judged, "text")}

{_verdict(judged, "text")}

## Both at once

{_table(judged, "both")}

{_verdict(judged, "both")}

## M2IB's settings

On {size.chosen_on} validation scenes. Chosen by insertion less deletion, which needs no boxes: for images layer \
{images.layer} and beta {images.beta:g}, for texts layer {texts.layer} and beta {texts.beta:g}. The paper's beta is \
0.1, its layer here 1. The rivals have their defaults, RISE {size.masks} masks: M2IB alone was given this choice.

![metrics by beta and layer](settings.png)

## Random weights

Rank correlation of the maps of {size.checked} pairs with those of the same model after the weights of its last \
blocks, and at last all of them, were shuffled. Maps that stay are not of the model. Random numbers are drawn by the \
input alone, so that they do not change.

{_sanity_table(judged)}

![correlation by shuffled blocks](sanity.png)
"""
    write_atomically(out / "report.md", text)
    return text


_ROWS = f"""\
"{PAPER}" has the paper's settings, "{CHOSEN}" those of the validation scenes, below. "{TRIVIAL}" asks no model: how \
far a pixel is from the mean colour, how many letters a word has. "{TRUTH}" are the cells of the digits that are \
named, and the words that name them: what a map of this grid could say at best, which is not always the best by a \
metric."""

_IMAGES = """\
Pointing: whether the greatest value is in the box of a named digit, or at most 2 pixels off; mass: the share of the \
map in boxes. Drop and increase: of 100 times the cosine, and the share of scenes, if the image is multiplied by its \
map. Insertion and deletion: area under the cosine as pixels are put in or taken out, the most important first. \
ROAR+: how much more CLIP's loss on whole pairs is, in nats, after tuning on full captions and scenes without their \
most important half, than after tuning on whole ones."""

_TEXTS = "The same of full captions' words; ROAR+ after tuning without the most important half of them."


def _by_seed(judged: Found, name: str) -> list[dict[str, Any]]:
    return [each for each in judged if each["of"]["name"] == name]


def _values(judged: Found, name: str, side: str, column: Column) -> list[float]:
    return [column.scale * each[side][column.name] for each in _by_seed(judged, name)]


def _names(judged: Found) -> list[str]:
    return list(dict.fromkeys(each["of"]["name"] for each in judged))


def _table(judged: Found, side: str) -> str:
    best = {column: _ranked(judged, side, column)[0] for column in COLUMNS[side]}

    def cell(name: str, column: Column) -> str:
        mean, std = mean_std(_values(judged, name, side, column))
        text = f"{mean:.{column.digits}f} ± {std:.{column.digits}f}"
        return f"**{text}**" if name == best[column] else text

    rows = [(name, *(cell(name, column) for column in COLUMNS[side])) for name in _names(judged)]
    return markdown(("", *(column.title for column in COLUMNS[side])), rows)


def _ranked(judged: Found, side: str, column: Column) -> list[str]:
    """All but the truth, the best first."""
    names = [name for name in _names(judged) if name != TRUTH]
    return sorted(names, key=lambda name: mean_std(_values(judged, name, side, column))[0], reverse=column.more)


def _verdict(judged: Found, side: str) -> str:
    """Who is best by what, and where M2IB stands."""
    ranked = {column.name: _ranked(judged, side, column) for column in COLUMNS[side]}
    best: dict[str, list[str]] = {}
    for metric, names in ranked.items():
        best.setdefault(names[0], []).append(metric)
    leaders = "; ".join(f"{name} by {', '.join(metrics)}" for name, metrics in best.items())
    places = [
        f"{name}: place " + ", ".join(f"{names.index(name) + 1} by {metric}" for metric, names in ranked.items())
        for name in (PAPER, CHOSEN)
    ]
    return f"Best of {len(_names(judged)) - 1}, the truth apart: {leaders}. {'. '.join(places)}."


def _sanity(judged: Found) -> dict[str, dict[str, tuple[float, float]]]:
    """Method -> shuffled weights -> correlation of images and of texts, mean over the seeds."""
    result: dict[str, dict[str, tuple[float, float]]] = {}
    for name in _names(judged):
        for stages in zip(*(each["sanity"] for each in _by_seed(judged, name))):
            weights, images, texts = zip(*stages)
            result.setdefault(name, {})[weights[0]] = mean_std(images)[0], mean_std(texts)[0]
    return result


def _sanity_table(judged: Found) -> str:
    found = _sanity(judged)
    stages = list(found[PAPER])
    header = ["", *(f"{side}, {stage}" for side in ("image", "text") for stage in stages)]
    rows = [[name, *(f"{of[stage][side]:+.2f}" for side in (0, 1) for stage in stages)] for name, of in found.items()]
    return markdown(header, rows)


# ---- figures --------------------------------------------------------------------------------------------------------


def draw_grid(path: Path, size: Size, chosen: Chosen) -> None:
    """Scenes of the first seed and what matters in them: of captions that name one digit, then of full ones."""
    scenes, rows = scenes_of("test", size.scenes, 0), []
    by_method = {name: make(scenes.encoder.model) for name, make in methods(size, chosen, 0).items() if name in IN_GRID}
    for place, level in enumerate([ONE] * (SHOWN // 2) + [FULL] * (SHOWN // 2)):
        text, boxes = scenes.texts(level)[place], [box[1:] for box in scenes.named(level)[place]]
        picture = scenes.all[scenes.rows[place]][0]
        row = [Tile(picture, "" if place else "scene, named", [(word, 0.0) for word in text.split()], boxes)]
        for name, method in by_method.items():
            found = method(scenes.images[place : place + 1], [text])
            row.append(Tile(overlay(picture, found.image[0]), "" if place else name, shaded(found, 0, text)))
        rows.append(row)
    draw_tiles(rows, path, width=1.3)


def _draw_settings(tried: Found, path: Path) -> None:
    """Metrics by beta, a line a layer, a panel a metric."""
    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "images: pointing game": lambda found: found["image"]["pointing"],
        "images: insertion - deletion": lambda found: found["image"]["insertion"] - found["image"]["deletion"],
        "texts: insertion - deletion": lambda found: found["text"]["insertion"] - found["text"]["deletion"],
    }
    figure, every = axes_of_figure(len(panels))
    layers, betas = (sorted({found["of"][name] for found in tried}) for name in ("layer", "beta"))
    for axes, (title, value) in zip(every, panels.items()):
        for colour, layer in zip(COLOURS, layers):
            of = [[value(f) for f in tried if f["of"]["layer"] == layer and f["of"]["beta"] == beta] for beta in betas]
            means, stds = zip(*map(mean_std, of))
            axes.errorbar(betas, means, stds, fmt="o-", color=colour, capsize=2, label=f"layer {layer}")
        axes.axvline(0.1, color=GREY, linestyle=":", label="the paper's beta")
        axes.set(xscale="log", xlabel="beta")
        axes.set_title(title, fontsize=9)
    every[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_sanity(judged: Found, path: Path) -> None:
    """Correlation by shuffled weights, a line a method."""
    found = _sanity(judged)
    figure, panels = axes_of_figure(2)
    for side, (axes, title) in enumerate(zip(panels, ("images", "texts"))):
        for position, (name, stages) in enumerate(found.items()):
            style = ("o-", "s--", "^:")[position // len(COLOURS)]
            values = [1.0, *(of[side] for of in stages.values())]
            axes.plot(["none", *stages], values, style, color=COLOURS[position % len(COLOURS)], ms=4, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("shuffled weights")
        axes.tick_params(axis="x", labelrotation=30)
    panels[0].set_ylabel("rank correlation")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)
