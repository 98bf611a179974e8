"""What the weight of the cross-modal terms does on these scenes to text uncertainty, by calibration and ambiguity."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from fastprob._files import write_atomically
from fastprob.adapters import TrainConfig, fit
from fastprob.adapters.report import Report, evaluate_store
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.plots import axes_of_figure, save_figure
from fastprob.evaluation.tables import markdown

CROSS_WEIGHTS = (1e-4, 0.1, 1.0)  # the released default first
SEEDS = (0, 1, 2)
T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Setting:
    """Heads, loss and cross weight of the adapters trained with them, one a seed, and the report on each."""

    positive: str
    form: str
    cross_weight: float
    reports: list[Report]

    @property
    def ambiguity_spearman(self) -> float:
        """Between caption ambiguity and predicted text uncertainty, mean over the seeds."""
        return statistics.mean(report.ambiguity_spearman for report in self.reports)

    @property
    def spearmans(self) -> list[float]:
        """S of text -> image, of each seed."""
        return [report.evaluation.text_to_image.spearman for report in self.reports]

    @property
    def recall(self) -> list[float]:
        """Recall@1 of text -> image by level, most certain first, mean over the seeds."""
        by_seed = [report.evaluation.text_to_image.recall for report in self.reports]
        return [statistics.mean(of_level) for of_level in zip(*by_seed)]


def cross_weight_study(
    train: EmbeddingStore, test: EmbeddingStore, heads: Iterable[tuple[str, str]], epochs: int
) -> list[Setting]:
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
    return [Setting(*setting, reports[i * len(SEEDS) :][: len(SEEDS)]) for i, setting in enumerate(settings)]


def each_on_a_thread(function: Callable[[T], R], settings: Sequence[T], description: str) -> list[R]:
    """`function` of every setting, in processes of one thread each, as many as there are threads."""
    context = multiprocessing.get_context("spawn")  # a forked torch would hang
    with ProcessPoolExecutor(torch.get_num_threads(), context, torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.map(function, settings), description, len(settings), unit="run"))


def once(path: Path, of: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, by a file unless it is of something else."""
    of = json.loads(json.dumps(of))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["of"] == of:
            return found
    found = {"of": of, **measure()}
    write_atomically(path, json.dumps(found) + "\n")
    return found


def _report(train: Path, test: Path, config: TrainConfig) -> Report:
    model = fit(EmbeddingStore(train), config=config, progress=False).model
    return evaluate_store(model, EmbeddingStore(test), passes=0, seed=config.seed)


def table(settings: Iterable[Setting]) -> str:
    """The study as a Markdown table."""
    header = "heads", "form", "cross weight", "Spearman with ambiguity", "S (least to greatest)", "recall@1 by level"
    return markdown(header, map(_row, settings))


def _row(of: Setting) -> list[str]:
    s = f"{statistics.mean(of.spearmans):+.2f} ({min(of.spearmans):+.2f} to {max(of.spearmans):+.2f})"
    recall = " ".join(f"{share:.2f}" for share in of.recall)
    return [of.positive, of.form, f"{of.cross_weight:g}", f"{of.ambiguity_spearman:+.2f}", s, recall]


def draw(settings: Sequence[Setting], path: Path) -> None:
    """Recall@1 by level of uncertainty, a line a cross weight, for the first heads of `settings`."""
    figure, axes = axes_of_figure()
    for of in settings[: len(CROSS_WEIGHTS)]:
        label = f"cross weight {of.cross_weight:g}: S = {statistics.mean(of.spearmans):+.2f}"
        axes.plot(range(1, 1 + len(of.recall)), of.recall, "o-", label=label)
    axes.set(xlabel="level of predicted text uncertainty (1 = most certain)", ylabel="recall@1, text -> image")
    axes.set_title("Recall of the own scene, by cross weight")
    axes.legend(frameon=False)
    save_figure(figure, path)
