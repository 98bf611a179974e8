"""What carries the calibration: the weight of the cross-modal terms, by text uncertainty and caption ambiguity."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from fastprob.adapters import TrainConfig, fit
from fastprob.adapters.report import Report, evaluate_store
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.plots import axes_of_figure, save_figure

CROSS_WEIGHTS = (1e-4, 0.1, 1.0)  # the released default first
SEEDS = (0, 1, 2)
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Row:
    """One setting, its reports over the seeds."""

    positive: str
    form: str
    cross_weight: float
    reports: list[Report]

    @property
    def spearman(self) -> float:
        """Between caption ambiguity and predicted text uncertainty, mean over the seeds."""
        return statistics.mean(r.ambiguity_spearman or 0.0 for r in self.reports)

    @property
    def s(self) -> tuple[float, float, float]:
        """S of text -> image: mean, least and greatest over the seeds."""
        values = [r.evaluation.text_to_image.spearman for r in self.reports]
        return statistics.mean(values), min(values), max(values)

    @property
    def recall(self) -> list[float]:
        """Recall@1 of text -> image by level, most certain first, mean over the seeds."""
        return [statistics.mean(level) for level in zip(*(r.evaluation.text_to_image.recall for r in self.reports))]


def cross_weight_study(
    train: EmbeddingStore, test: EmbeddingStore, epochs: int = 40, heads: Iterable[tuple[str, str]] = ()
) -> list[Row]:
    """An adapter per head, weight and seed on `train`, evaluated on `test`. heads: (positive, form) pairs.

    As many at a time as there are threads, each on one: so small a model gains nothing from a second.
    """
    settings = [(positive, form, weight) for positive, form in heads for weight in CROSS_WEIGHTS]
    configs = [
        TrainConfig(epochs=epochs, positive=positive, form=form, cross_weight=weight, seed=seed)
        for positive, form, weight in settings
        for seed in SEEDS
    ]
    reports = each_on_a_thread(partial(_report, train.path, test.path), configs, "calibration by cross weight")
    return [Row(*setting, reports[i * len(SEEDS) :][: len(SEEDS)]) for i, setting in enumerate(settings)]


def each_on_a_thread(function: Callable[[T], R], settings: Sequence[T], description: str) -> list[R]:
    """`function` of every setting, in processes of one thread each, as many as there are threads."""
    context = multiprocessing.get_context("spawn")  # a forked torch would hang
    with ProcessPoolExecutor(torch.get_num_threads(), context, torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.map(function, settings), description, len(settings), unit="run"))


def _report(train: Path, test: Path, config: TrainConfig) -> Report:
    model = fit(EmbeddingStore(train), config=config, progress=False).model
    return evaluate_store(model, EmbeddingStore(test), passes=0, seed=config.seed)


def table(rows: list[Row]) -> str:
    """The study as a Markdown table."""
    lines = [
        "| heads | form | cross weight | Spearman with ambiguity | S (least to greatest) | recall@1 by level |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, least, greatest = row.s
        recall = " ".join(f"{value:.2f}" for value in row.recall)
        lines.append(
            f"| {row.positive} | {row.form} | {row.cross_weight:g} | {row.spearman:+.2f} "
            f"| {mean:+.2f} ({least:+.2f} to {greatest:+.2f}) | {recall} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Recall@1 by level of uncertainty, a line a cross weight, for the first heads of `rows`."""
    figure, axes = axes_of_figure()
    for row in rows[: len(CROSS_WEIGHTS)]:
        label = f"cross weight {row.cross_weight:g}: S = {row.s[0]:+.2f}"
        axes.plot(range(1, 1 + len(row.recall)), row.recall, "o-", label=label)
    axes.set(xlabel="level of predicted text uncertainty (1 = most certain)", ylabel="recall@1, text -> image")
    axes.set_title("The cross-modal terms carry the calibration")
    axes.legend(frameon=False)
    save_figure(figure, path)
