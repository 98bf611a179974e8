"""Few-shot adaptation of the tiny CLIP to shifted digits: every method by shots and seed, and from base to new."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import fastprob
from fastprob._files import write_atomically
from fastprob.data.labelled import open_splits
from fastprob.demo.study import each_on_a_thread
from fastprob.encoders import load_encoder
from fastprob.evaluation.tables import markdown, percent
from fastprob.prompts import PromptConfig, fit
from fastprob.prompts.report import Report, evaluate_runs
from fastprob.training import LAST

SHIFTS = ("thickened", "rotated", "inverted")
SHOTS, SEEDS = (1, 2, 4, 8, 16), (1, 2, 3)
# The released settings, but for fewer vectors and epochs: the tiny CLIP has prompts of 14 tokens, images of 4 patches.
# DAPT with the released default weights of its two terms, and with those released for EuroSAT.
METHODS: dict[str, dict[str, Any]] = {
    "coop": {"method": "coop", "init": "a lone"},
    "cocoop": {"method": "cocoop", "init": "a lone"},
    "vpt": {"method": "vpt", "visual_length": 4},
    "coop+vpt": {"method": "dapt", "init": "a lone", "visual_length": 4, "beta_t": 0.0, "beta_v": 0.0},
    "dapt": {"method": "dapt", "init": "a lone", "visual_length": 4},
    "dapt-t10-v100": {"method": "dapt", "init": "a lone", "visual_length": 4, "beta_t": 10.0, "beta_v": 100.0},
}


def run(
    out: Path,
    *,
    shifts: Sequence[str] = SHIFTS,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    epochs: int = 50,
) -> None:
    """Tune all methods on all shifts, score them beside zero-shot and linear probe; writes `out`/report.md.

    Base to new is at the most shots. Interrupted, the same call goes on with what is missing.
    """
    settings = [
        (shift, PromptConfig(**METHODS[name], epochs=epochs, shots=k, seed=seed, classes=classes))
        for shift in shifts
        for name in METHODS
        for classes, of_shots in (("all", shots), ("base", [max(shots)]))
        for k in of_shots
        for seed in seeds
    ]
    each_on_a_thread(partial(_fit, out), settings, "few-shot runs")
    reports = {shift: evaluate_runs(out / shift, open_splits(f"digits:{shift}"), progress=False) for shift in shifts}
    for shift, report in reports.items():
        report.save(out / shift)
        report.draw(out / shift)
    text = _report(reports, epochs, len(seeds))
    write_atomically(out / "report.md", text)
    print(f"\n{text}\nWritten to {out / 'report.md'}")


@cache
def _tools(shift: str):
    return open_splits(f"digits:{shift}")["train"], load_encoder("tiny")


def _fit(out: Path, setting: tuple[str, PromptConfig]) -> None:
    shift, config = setting
    train, encoder = _tools(shift)
    directory = out / shift / config.classes / config.directory
    resume = (directory / LAST).exists()
    fit(train, encoder, config=config, directory=directory, resume=resume, progress=False)


def gains(report: Report, method: str) -> dict[int, list[float]]:
    """Shots -> the accuracy of a DAPT less that of CoOp + VPT with the same seed: what its two terms add."""
    settings = report.by_setting("all", "all")
    return {
        shots: [scores.accuracy - settings["coop+vpt", shots][seed].accuracy for seed, scores in seeds.items()]
        for (name, shots), seeds in settings.items()
        if name == method
    }


def _report(reports: dict[str, Report], epochs: int, seeds: int) -> str:
    parts = [
        "# Few-shot adaptation to shifted digits",
        f"fastprob {fastprob.__version__}, torch {torch.__version__}, {platform.machine()} CPU.",
        f"The tiny CLIP, {epochs} epochs, {seeds} seeds; accuracy in percent, mean ± standard deviation. Prompts "
        'start from "a lone <digit>", that of the zero-shot predictions.',
    ]
    for shift, report in reports.items():
        test = len(open_splits(f"digits:{shift}")["test"])
        parts += [
            f"## {shift.capitalize()} ({test} test images)",
            f"By images of a class ([macro-F1 and calibration too]({shift}/report.md)):",
            report.accuracy_by_shots(),
            "From base to new classes:",
            report.base_to_new(),
        ]
        figures = "accuracy_by_shots", "class_embeddings", "class_distances"
        parts += [f"![{name}]({shift}/{name}.png)" for name in figures]
    rows, totals = [], []
    for method in (name for name in METHODS if name.startswith("dapt")):
        by_shots = {(shift, k): of for shift, each in reports.items() for k, of in gains(each, method).items()}
        rows += [(method, shift, shots, percent(values, "+")) for (shift, shots), values in by_shots.items()]
        totals.append(f"{method}: {percent([value for values in by_shots.values() for value in values], '+')}")
    parts.append(
        "## What DAPT's two dispersion terms add to CoOp + VPT\n\n"
        "Percentage points, paired by seed, mean ± standard deviation. Over all shifts and shots, " + ", ".join(totals)
    )
    return "\n\n".join([*parts, markdown(("method", "shift", "shots", "gain"), rows)]) + "\n"
