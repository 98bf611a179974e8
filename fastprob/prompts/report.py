"""What tuned prompts reach on a data set: a table by method and shots over seeds, as text and figures."""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprob._files import write_atomically
from fastprob.data.labelled import LabelledImages
from fastprob.encoders import Encoder
from fastprob.evaluation.tables import markdown, percent
from fastprob.prompts import figures
from fastprob.prompts.config import Tuned, check_template, class_embeddings
from fastprob.prompts.evaluation import Scores, linear_probe, predict, require_scikit_learn, scores, zero_shot
from fastprob.prompts.inputs import Inputs
from fastprob.prompts.training import CHECKPOINT
from fastprob.training import LAST

ZERO_SHOT, LINEAR_PROBE = "zero-shot", "linear probe"
ORDER = (ZERO_SHOT, LINEAR_PROBE, "coop", "cocoop", "vpt", "coop+vpt", "dapt")  # of rows; others behind
TABLES = {  # classes trained on, classes scored -> heading; zero-shot predictions stand in all of them
    ("all", "all"): "All classes",
    ("base", "base"): "Base classes",
    ("base", "new"): "New classes, by prompts of the base classes",
    ("new", "new"): "New classes, by prompts of their own",
    ("other", "all"): "All classes, by prompts of other ones",
}


@dataclass(frozen=True)
class Result:
    """Scores of a method on the images of some classes.

    shots, seed: the images of every class it was trained on, 0 for all, and what drew them; None for zero-shot.
    trained_on: all, base or new classes of the data set, or other ones; scored_on: all, base or new.
    """

    method: str
    shots: int | None
    seed: int | None
    trained_on: str | None
    scored_on: str
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
        parts = []
        for (trained_on, scored_on), heading in TABLES.items():
            settings = self.by_setting(trained_on, scored_on)
            if not any(shots is not None for _, shots in settings):
                continue
            rows = []
            for (method, shots), scores_by_seed in settings.items():
                measures = zip(*(astuple(scores) for scores in scores_by_seed.values()))
                seeds = "" if shots is None else len(scores_by_seed)
                rows.append((method, _shots_in_words(shots), seeds, *map(percent, measures)))
            parts += [f"## {heading}", markdown(("method", "shots", "seeds", "accuracy", "macro-F1", "ECE"), rows)]
        if any(result.trained_on == "base" for result in self.results):
            parts += ["## From base to new", self.base_to_new()]
        return "\n\n".join(parts)

    def accuracy_by_shots(self) -> str:
        """Markdown: accuracy on all classes, a row a method, a column a number of shots."""
        accuracy = self._accuracy("all", "all")
        columns = sorted({shots for _, shots in accuracy}, key=_rank_of_shots)
        rows = [
            (method, *(percent(accuracy.get((method, shots), {}).values()) for shots in columns))
            for method in dict.fromkeys(method for method, _ in accuracy)
        ]
        return markdown(("method", *map(_shots_in_words, columns)), rows)

    def base_to_new(self) -> str:
        """Markdown: accuracies; H, the harmonic mean of base and new, is taken seed by seed."""
        on_new = self._accuracy("base", "new")
        rows = []
        for (method, shots), base in self._accuracy("base", "base").items():
            new = on_new.get((method, shots), {})
            harmonic = [statistics.harmonic_mean((base[seed], new[seed])) for seed in base if seed in new]
            shares = base.values(), new.values(), harmonic
            rows.append((method, _shots_in_words(shots), *map(percent, shares)))
        return markdown(("method", "shots", "base", "new", "H"), rows)

    def by_setting(self, trained_on: str, scored_on: str) -> dict[tuple[str, int | None], dict[int | None, Scores]]:
        """(method, shots) -> seed -> scores, in the order of the tables."""

        def row(result: Result) -> tuple:
            return rank.get(result.method, len(rank)), result.method, _rank_of_shots(result.shots)

        rank = {method: i for i, method in enumerate(ORDER)}
        settings: dict[tuple[str, int | None], dict[int | None, Scores]] = {}
        for result in sorted(self.results, key=row):
            if result.trained_on in (trained_on, None) and result.scored_on == scored_on:
                settings.setdefault((result.method, result.shots), {})[result.seed] = result.scores
        return settings

    def _accuracy(self, trained_on: str, scored_on: str) -> dict[tuple[str, int | None], dict[int | None, float]]:
        """(method, shots) -> seed -> accuracy."""
        settings = self.by_setting(trained_on, scored_on)
        return {
            setting: {seed: scores.accuracy for seed, scores in scores_by_seed.items()}
            for setting, scores_by_seed in settings.items()
        }

    def save(self, directory: str | os.PathLike) -> None:
        """report.md and results.json, each replaced in one step."""
        text = json.dumps({"data": self.data, "results": [asdict(result) for result in self.results]}, indent=1) + "\n"
        write_atomically(Path(directory) / "results.json", text)
        text = f"# Prompts on {self.data}\n\n{self.table()}\n"
        write_atomically(Path(directory) / "report.md", text)

    def draw(self, directory: str | os.PathLike) -> None:
        """PNG files of accuracy by shots and, of two or more classes, of their embeddings and distances.

        Raises ImportError without matplotlib.
        """
        directory = Path(directory)
        for trained_on, scored_on in TABLES:
            by_method: dict[str, dict[int | None, list[float]]] = {}
            for (method, shots), accuracy_by_seed in self._accuracy(trained_on, scored_on).items():
                by_method.setdefault(method, {})[shots] = list(accuracy_by_seed.values())
            if set(by_method) - {ZERO_SHOT}:
                suffix = "" if trained_on == "all" else f"_{trained_on}_{scored_on}"
                figures.accuracy_by_shots(by_method, directory / f"accuracy_by_shots{suffix}.png")
        if len(self.classnames) > 1:
            figures.class_embeddings(self.embeddings, self.classnames, directory / "class_embeddings.png")
            figures.class_distances(self.embeddings, directory / "class_distances.png")


def evaluate_runs(
    runs: str | os.PathLike,
    splits: dict[str, LabelledImages],
    *,
    split: str = "test",
    template: str | None = None,
    probe: bool = True,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Report:
    """Score every finished run of `fit` below a directory, zero-shot predictions and linear probes on the same images.

    A run on all classes is scored on all, a run on the base classes on these and, apart, on the new ones, by the same
    vectors in front of their names; a run on classes that are not this data set's on all of its. Contexts of each class
    are scored on their classes alone. `probe` fits a linear probe to the images of every run.

    Raises ValueError without runs, with runs of different encoders, and for two runs of the same method, classes, shots
    and seed; ImportError for a probe without scikit-learn.
    """
    if probe:
        require_scikit_learn()
    template = check_template("evaluate_runs", template or splits[split].template)
    checkpoints = _finished(Path(runs))
    first = Tuned.load(checkpoints[0], device=device)
    encoder, fingerprint = first.encoder, first.encoder.fingerprint()
    tuned = {path: Tuned.load(path, encoder, fingerprint=fingerprint) for path in checkpoints}
    _check_distinct(tuned)
    evaluation = _Evaluation(splits, split, encoder, {"workers": workers, "progress": progress})
    for run in tuned.values():
        evaluation.score_run(run)
    evaluation.score_zero_shot(template)
    if probe:
        evaluation.score_linear_probes(tuned.values())
    classnames = splits[split].classnames
    embeddings = {ZERO_SHOT: class_embeddings(encoder, classnames, template), **_embeddings(tuned.values(), classnames)}
    embeddings = {method: vectors.float().cpu() for method, vectors in embeddings.items()}
    return Report(splits[split].name, evaluation.results, classnames, embeddings)


class _Evaluation:
    """Results on the images of one split, as they come in."""

    def __init__(self, splits: dict[str, LabelledImages], split: str, encoder: Encoder, reading: dict[str, Any]):
        self.splits, self.split, self.encoder, self.reading = splits, split, encoder, reading
        self.results: list[Result] = []
        self._tests: dict[str, Inputs] = {}

    def test(self, classes: str) -> Inputs:
        """The images to score on: of all, base or new classes."""
        if classes not in self._tests:
            self._tests[classes] = Inputs(self.splits[self.split].of_classes(classes), self.encoder, **self.reading)
        return self._tests[classes]

    def score_run(self, run: Tuned) -> None:
        """A method, on all classes that the tables have for those that it was trained on."""
        config, trained_on = run.config, self._trained_on(run)
        for scored_on in [scored for trained, scored in TABLES if trained == trained_on]:
            test = self.test(scored_on)
            if test.data.classnames == run.classnames or not config.class_specific:
                probabilities = predict(run.for_classes(test.data.classnames), test)
                self._add(config.name, config.shots, config.seed, trained_on, scored_on, probabilities)

    def score_zero_shot(self, template: str) -> None:
        """On all classes that a method was scored on."""
        for scored_on in dict.fromkeys(result.scored_on for result in self.results):
            self._add(ZERO_SHOT, None, None, None, scored_on, zero_shot(self.test(scored_on), template))

    def score_linear_probes(self, runs: Iterable[Tuned]) -> None:
        """Fitted to the images of every run on this data set's classes, if there are two or more."""
        ours = [run.config for run in runs if self._trained_on(run) != "other"]
        for classes, shots, seed in sorted({(config.classes, config.shots, config.seed) for config in ours}):
            images = self.splits["train"].of_classes(classes)
            if len(images.classnames) > 1:
                train = Inputs(images.few_shot(shots, seed), self.encoder, **self.reading)
                probabilities = linear_probe(train, self.test(classes))
                self._add(LINEAR_PROBE, shots, seed, classes, classes, probabilities)

    def _trained_on(self, run: Tuned) -> str:
        ours = self.splits["train"].of_classes(run.config.classes).classnames
        return run.config.classes if run.classnames == ours else "other"

    def _add(
        self,
        method: str,
        shots: int | None,
        seed: int | None,
        trained_on: str | None,
        scored_on: str,
        probabilities: Tensor,
    ) -> None:
        result = scores(probabilities, self.test(scored_on).labels)
        self.results.append(Result(method, shots, seed, trained_on, scored_on, result))


def _finished(runs: Path) -> list[Path]:
    """The checkpoints of finished runs; a warning names those that are not."""
    paths = sorted(runs.rglob(CHECKPOINT))
    begun = sorted(path.parent for path in runs.rglob(LAST) if not (path.parent / CHECKPOINT).exists())
    if begun:
        warnings.warn(f"evaluate_runs: {len(begun)} unfinished runs are left out, first {begun[0]}", stacklevel=3)
    if not paths:
        raise ValueError(f"evaluate_runs: runs must be a directory with {CHECKPOINT} in it, got {str(runs)!r}")
    return paths


def _check_distinct(tuned: dict[Path, Tuned]) -> None:
    path_of: dict[tuple, Path] = {}
    for path, run in tuned.items():
        setting = run.config.name, tuple(run.classnames), run.config.shots, run.config.seed
        earlier = path_of.setdefault(setting, path)
        if earlier != path:
            options, others = asdict(run.config), asdict(tuned[earlier].config)
            differing = [f"{k} {others[k]!r} and {options[k]!r}" for k in options if options[k] != others[k]]
            raise ValueError(
                f"evaluate_runs: runs must differ in method, classes, shots or seed, got {earlier} and {path} "
                f"({', '.join(differing) or 'equal'})"
            )


@torch.no_grad()
def _embeddings(runs: Iterable[Tuned], classnames: list[str]) -> dict[str, Tensor]:
    """Of every method that tunes class embeddings, the same for all images: its run of most shots and first seed."""
    chosen: dict[str, Tuned] = {}
    for run in sorted(runs, key=lambda run: (-_rank_of_shots(run.config.shots), run.config.seed)):
        fits = not run.config.class_specific or run.classnames == classnames
        if run.config.method in ("coop", "dapt") and fits:
            chosen.setdefault(run.config.name, run)
    return {name: run.for_classes(classnames).method.text_features() for name, run in chosen.items()}


def _rank_of_shots(shots: int | None) -> float:
    """Zero-shot first, all images last."""
    return -1 if shots is None else shots or math.inf


def _shots_in_words(shots: int | None) -> str:
    return "" if shots is None else str(shots or "all")
