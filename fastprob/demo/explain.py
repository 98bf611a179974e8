"""M2IB and its rivals on the built-in scenes, where it is known what a caption names: a report, tables and figures.

The tiny CLIP has a patch for each of a scene's four cells: a map of an image says which cells matter, and no more.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastprob._files import write_atomically
from fastprob.attribution import M2IB, Attribution, metrics
from fastprob.attribution.roar import roar_loss
from fastprob.demo.explain_maps import (
    FULL,
    ONE,
    TRIVIAL,
    TRUTH,
    Chosen,
    Scenes,
    Setting,
    Size,
    maps,
    methods,
    scenes_of,
)
from fastprob.demo.explain_report import draw_grid, write_report
from fastprob.demo.study import each_on_a_thread, once

SEEDS = (0, 1, 2)
LAYERS, BETAS = (0, 1), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MARGIN = 2
"""Pixels around a box that are a hit in the pointing game: about the source's 15 of 224."""


def run(out: Path, *, size: Size | None = None, seeds: Sequence[int] = SEEDS, betas: Sequence[float] = BETAS) -> None:
    """Choose M2IB's settings, judge all methods by all metrics, and draw; writes `out`/report.md, results.json and
    figures. Interrupted, the same call goes on with what is missing: `out`/runs holds what was measured."""
    size, runs = size or Size(), out / "runs"
    settings = [(seed, Setting(layer, beta)) for layer in LAYERS for beta in betas for seed in seeds]
    tried = each_on_a_thread(partial(_try, runs, size), settings, "settings of M2IB")
    chosen = {side: _best(tried, side) for side in ("image", "text")}
    named = [(seed, name) for name in (*methods(size, chosen, 0), TRIVIAL, TRUTH) for seed in seeds]
    judged = each_on_a_thread(partial(_judge, runs, size, chosen), named, "methods")
    results = {"size": asdict(size), "seeds": list(seeds), "chosen": chosen, "settings": tried, "methods": judged}
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    draw_grid(out / "grid.png", size, chosen)
    text = write_report(out, size, chosen, tried, judged)
    print(f"\n{text}\nWritten to {out / 'report.md'}")


def _try(runs: Path, size: Size, unit: tuple[int, Setting]) -> dict[str, Any]:
    """M2IB by a setting, on validation scenes."""
    seed, setting = unit

    def measure() -> dict[str, Any]:
        scenes = scenes_of("val", size.chosen_on, seed)
        method = M2IB(scenes.encoder.model, scenes.encoder.tokenizer, seed=seed, **setting._asdict())
        one, full = (method(scenes.images, scenes.texts(level)) for level in (ONE, FULL))
        return {"image": _of_image(scenes, one), "text": _of_side(scenes, FULL, full, "text")}

    of = {"seed": seed, **setting._asdict(), "size": asdict(size)}
    return once(runs / f"layer{setting.layer}-beta{setting.beta}-seed{seed}.json", of, measure)


def _best(tried: Sequence[dict[str, Any]], side: str) -> Setting:
    """Of the most insertion less deletion, mean over the seeds: that needs no boxes."""
    gains: dict[Setting, list[float]] = {}
    for each in tried:
        of, found = Setting(each["of"]["layer"], each["of"]["beta"]), each[side]
        gains.setdefault(of, []).append(found["insertion"] - found["deletion"])
    return max(gains, key=lambda setting: statistics.mean(gains[setting]))


def _whole(runs: Path, size: Size, seed: int) -> float:
    """The loss that ROAR+ is held against."""

    def measure() -> dict[str, Any]:
        return {"loss": _roar_loss(size, seed, None, "both")}

    return once(runs / f"whole-seed{seed}.json", {"seed": seed, "size": asdict(size)}, measure)["loss"]


def _judge(runs: Path, size: Size, chosen: Chosen, unit: tuple[int, str]) -> dict[str, Any]:
    """A method on test scenes, by all metrics."""
    seed, name = unit

    def measure() -> dict[str, Any]:
        scenes = scenes_of("test", size.scenes, seed)
        one, full = (maps(size, chosen, seed, name, scenes, level) for level in (ONE, FULL))
        found = {"image": _of_image(scenes, one), "text": _of_side(scenes, FULL, full, "text")}
        found["both"] = _of_side(scenes, FULL, full, "both")
        of_tuned = maps(size, chosen, seed, name, scenes_of("train", size.tuned_on, seed), FULL)
        for side in ("image", "text"):
            found[side]["roar"] = _roar_loss(size, seed, of_tuned, side) - _whole(runs, size, seed)
        return found | {"sanity": _sanity(size, chosen, seed, name)}

    of = {"seed": seed, "name": name, "chosen": chosen, "size": asdict(size)}
    return once(runs / f"{name.replace(' ', '-')}-seed{seed}.json", of, measure)


def _of_image(scenes: Scenes, found: Attribution) -> dict[str, float]:
    boxes = [[box[1:] for box in of_scene] for of_scene in scenes.named(ONE)]
    pointing, mass = metrics.pointing_game(found.image, boxes, margin=MARGIN), metrics.mass_in_box(found.image, boxes)
    return {"pointing": _mean(pointing), "mass": _mean(mass), **_of_side(scenes, ONE, found, "image")}


def _of_side(scenes: Scenes, level: int, found: Attribution, side: str) -> dict[str, float]:
    pairs = scenes.pairs(level)
    values = metrics.confidence(pairs, found, side)._asdict()
    values |= {"insertion": metrics.insertion(pairs, found, side), "deletion": metrics.deletion(pairs, found, side)}
    return {name: _mean(value) for name, value in values.items()}


def _roar_loss(size: Size, seed: int, found: Attribution | None, side: str) -> float:
    train, test = scenes_of("train", size.tuned_on, seed), scenes_of("test", size.scenes, seed)
    options = {"side": side, "steps": size.steps, "batch_size": size.batch, "seed": seed}
    return roar_loss(train.encoder.model, train.pairs(FULL), test.pairs(FULL), found, **options)


def _sanity(size: Size, chosen: Chosen, seed: int, name: str) -> list[tuple[str, float, float]]:
    """Of a method; of what asks no model there is none."""
    method = methods(size, chosen, seed).get(name)
    if method is None:
        return []
    scenes = scenes_of("test", size.scenes, seed)
    images, texts = scenes.images[: size.checked], scenes.texts(FULL)[: size.checked]
    return [tuple(each) for each in metrics.sanity_check(method, scenes.encoder.model, images, texts, seed=seed)]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
