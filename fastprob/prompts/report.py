"""What tuned prompts reach on a data set: a table by method and shots over seeds, as text and figures."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastprob._training import write_atomically
from fastprob.data.labelled import LabelledImages
from fastprob.prompts import figures
from fastprob.prompts.config import Tuned, class_embeddings
from fastprob.prompts.evaluation import Scores, linear_probe, predict, scores, zero_shot
from fastprob.prompts.inputs import Inputs
from fastprob.prompts.training import CHECKPOINT

ZERO_SHOT, LINEAR_PROBE = "zero-shot", "linear probe"
ORDER = (ZERO_SHOT, LINEAR_PROBE, "coop", "cocoop", "vpt", "coop+vpt", "dapt")  # of rows; others behind


@dataclass(frozen=True)
class Result:
    """Scores of a method, trained on `shots` images of every class drawn by `seed`, on the images of `classes`.

    shots is 0 for zero-shot, and for all images.
    """

    method: str
    shots: int
    seed: int
    classes: str
    scores: Scores


@dataclass(frozen=True)
class Report:
    """All results on a data set, and class embeddings [C, D] by method: of the most shots and the first seed."""

    data: str
    results: list[Result]
    classnames: list[str]
    embeddings: dict[str, Tensor]

    def table(self) -> str:
        """Markdown: mean and standard deviation over the seeds, in percent."""
        tables = []
        if any(result.classes == "all" for result in self.results):
            tables.append(self._table("all"))
        if any(result.classes == "base" for result in self.results):
            tables.append(self.base_to_new())
        return "\n\n".join(tables)

    def accuracy_by_shots(self) -> str:
        """Markdown: accuracy on all classes, a row a method, a column a number of shots; zero-shot under 0."""
        settings = self.by_setting("all")
        columns = sorted({shots for _, shots in settings})
        lines = [f"| method | {' | '.join(map(str, columns))} |", "|---" * (1 + len(columns)) + "|"]
        for method in dict.fromkeys(method for method, _ in settings):
            seeds = [settings.get((method, shots), {}).values() for shots in columns]
            cells = [_mean_std(scores.accuracy for scores in each) for each in seeds]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _table(self, classes: str) -> str:
        lines = ["| method | shots | accuracy | macro-F1 | ECE |", "|---|---|---|---|---|"]
        for (method, shots), seeds in self.by_setting(classes).items():
            columns = zip(*(dataclasses.astuple(of) for of in seeds.values()))
            lines.append(f"| {method} | {shots or ''} | {' | '.join(_mean_std(column) for column in columns)} |")
        return "\n".join(lines)

    def base_to_new(self) -> str:
        """Markdown: accuracies; H, the harmonic mean of base and new, is taken seed by seed."""
        new = self.by_setting("new")
        lines = ["| method | shots | base | new | H |", "|---|---|---|---|---|"]
        for setting, seeds in self.by_setting("base").items():
            base = {seed: of.accuracy for seed, of in seeds.items()}
            other = {seed: of.accuracy for seed, of in new.get(setting, {}).items()}
            harmonic = [statistics.harmonic_mean((base[seed], other[seed])) for seed in base if seed in other]
            cells = [_mean_std(column) for column in (base.values(), other.values(), harmonic)]
            lines.append(f"| {setting[0]} | {setting[1] or ''} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def by_setting(self, classes: str) -> dict[tuple[str, int], dict[int, Scores]]:
        """(method, shots) -> seed -> scores, in the order of the tables."""
        settings: dict[tuple[str, int], dict[int, Scores]] = {}
        rank = {method: i for i, method in enumerate(ORDER)}
        for result in sorted(self.results, key=lambda r: (rank.get(r.method, len(rank)), r.method, r.shots, r.seed)):
            if result.classes == classes:
                settings.setdefault((result.method, result.shots), {})[result.seed] = result.scores
        return settings

    def save(self, directory: str | os.PathLike) -> None:
        """report.md and results.json, each replaced in one step."""
        rows = [dataclasses.asdict(result) for result in self.results]
        text = json.dumps({"data": self.data, "results": rows}, indent=1) + "\n"
        write_atomically(Path(directory) / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
        text = f"# Prompts on {self.data}\n\n{self.table()}\n"
        write_atomically(Path(directory) / "report.md", lambda path: path.write_text(text, encoding="utf-8"))

    def draw(self, directory: str | os.PathLike) -> None:
        """accuracy_by_shots, class_embeddings and class_distances, as PNG. Raises ImportError without matplotlib."""
        directory = Path(directory)
        for classes in ("all", "base", "new"):
            accuracy: dict[str, dict[int, list[float]]] = {}
            for (method, shots), seeds in self.by_setting(classes).items():
                accuracy.setdefault(method, {})[shots] = [of.accuracy for of in seeds.values()]
            if accuracy:
                suffix = "" if classes == "all" else f"_{classes}"
                figures.accuracy_by_shots(accuracy, directory / f"accuracy_by_shots{suffix}.png")
        figures.class_embeddings(self.embeddings, self.classnames, directory / "class_embeddings.png")
        figures.class_distances(self.embeddings, directory / "class_distances.png")


def evaluate_runs(
    runs: str | os.PathLike,
    splits: dict[str, LabelledImages],
    *,
    split: str = "test",
    template: str | None = None,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Report:
    """Score every run of `fit` below a directory, the zero-shot predictions and a linear probe on the same images.

    A run on all classes is scored on all, a run on the base classes on these and, apart, on the new ones, by the same
    vectors in front of their names. Raises ValueError without runs, or with runs of different encoders.
    """
    paths = sorted(Path(runs).rglob(CHECKPOINT))
    if not paths:
        raise ValueError(f"evaluate_runs: runs must be a directory with {CHECKPOINT} in it, got {str(runs)!r}")
    tuned = [Tuned.load(paths[0], device=device)]
    encoder, fingerprint = tuned[0].encoder, tuned[0].encoder.fingerprint()
    tuned += [Tuned.load(path, encoder, fingerprint=fingerprint) for path in paths[1:]]
    template = template or splits[split].template

    @cache
    def inputs(split: str, classes: str, shots: int = 0, seed: int = 0) -> Inputs:
        data = splits[split].of_classes(classes)
        return Inputs(data.few_shot(shots, seed) if shots else data, encoder, workers=workers, progress=progress)

    results = []

    def score(method: str, shots: int, seed: int, classes: str, probabilities: Tensor) -> None:
        result = scores(probabilities, inputs(split, classes).labels)
        results.append(Result(method, shots, seed, classes, result))

    for each in tuned:
        config = each.config
        for classes in _scored_on(config.classes):
            test = inputs(split, classes)
            probabilities = predict(each.for_classes(test.data.classnames), test)
            score(config.name, config.shots, config.seed, classes, probabilities)
    trained_on = sorted({each.config.classes for each in tuned})
    for classes in {scored: None for trained in trained_on for scored in _scored_on(trained)}:
        score(ZERO_SHOT, 0, 0, classes, zero_shot(inputs(split, classes), template))
    for classes, shots, seed in sorted({(each.config.classes, each.config.shots, each.config.seed) for each in tuned}):
        train = inputs("train", classes, shots, seed)
        score(LINEAR_PROBE, shots, seed, classes, linear_probe(train, inputs(split, classes)))
    classnames = splits[split].classnames
    embeddings = {ZERO_SHOT: class_embeddings(encoder, classnames, template)}
    embeddings |= _embeddings(tuned, classnames)
    return Report(splits[split].name, results, classnames, {name: e.float().cpu() for name, e in embeddings.items()})


def _scored_on(trained_on: str) -> tuple[str, ...]:
    return ("base", "new") if trained_on == "base" else (trained_on,)


@torch.no_grad()
def _embeddings(tuned: Iterable[Tuned], classnames: list[str]) -> dict[str, Tensor]:
    """Of every method that tunes class embeddings, the same for all images: its run of most shots and first seed."""
    best: dict[str, Tuned] = {}
    for each in sorted(tuned, key=lambda t: (-t.config.shots, t.config.seed)):
        if each.config.method in ("coop", "dapt"):
            best.setdefault(each.config.name, each)
    return {
        name: each.for_classes(classnames).method.text_features()
        for name, each in best.items()
        if not each.config.class_specific or each.classnames == classnames
    }


def _mean_std(values: Iterable[float]) -> str:
    percent = [100 * value for value in values]
    if not percent:
        return ""
    return f"{statistics.mean(percent):.1f}" + (f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else "")
