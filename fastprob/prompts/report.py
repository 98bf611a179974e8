"""What tuned prompts reach on a data set: a table by method and shots over seeds, as text and figures."""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastprob._files import write_atomically
from fastprob.data.labelled import LabelledImages
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
            lines = ["| method | shots | seeds | accuracy | macro-F1 | ECE |", "|---|---|---|---|---|---|"]
            for (method, shots), seeds in settings.items():
                columns = " | ".join(_mean_std(column) for column in zip(*(astuple(of) for of in seeds.values())))
                lines.append(f"| {method} | {_named(shots)} | {'' if shots is None else len(seeds)} | {columns} |")
            parts += [f"## {heading}", "\n".join(lines)]
        if any(result.trained_on == "base" for result in self.results):
            parts += ["## From base to new", self.base_to_new()]
        return "\n\n".join(parts)

    def accuracy_by_shots(self) -> str:
        """Markdown: accuracy on all classes, a row a method, a column a number of shots."""
        settings = self.by_setting("all", "all")
        columns = sorted({shots for _, shots in settings}, key=_rank)
        lines = [f"| method | {' | '.join(_named(k) for k in columns)} |", "|---" * (1 + len(columns)) + "|"]
        for method in dict.fromkeys(method for method, _ in settings):
            seeds = [settings.get((method, shots), {}).values() for shots in columns]
            lines.append(f"| {method} | {' | '.join(_mean_std(of.accuracy for of in each) for each in seeds)} |")
        return "\n".join(lines)

    def base_to_new(self) -> str:
        """Markdown: accuracies; H, the harmonic mean of base and new, is taken seed by seed."""
        new = self.by_setting("base", "new")
        lines = ["| method | shots | base | new | H |", "|---|---|---|---|---|"]
        for setting, seeds in self.by_setting("base", "base").items():
            base = {seed: of.accuracy for seed, of in seeds.items()}
            other = {seed: of.accuracy for seed, of in new.get(setting, {}).items()}
            harmonic = [statistics.harmonic_mean((base[seed], other[seed])) for seed in base if seed in other]
            cells = [_mean_std(column) for column in (base.values(), other.values(), harmonic)]
            lines.append(f"| {setting[0]} | {_named(setting[1])} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def by_setting(self, trained_on: str, scored_on: str) -> dict[tuple[str, int | None], dict[int | None, Scores]]:
        """(method, shots) -> seed -> scores, in the order of the tables."""
        settings: dict[tuple[str, int | None], dict[int | None, Scores]] = {}
        rank = {method: i for i, method in enumerate(ORDER)}
        for result in sorted(self.results, key=lambda r: (rank.get(r.method, len(rank)), r.method, _rank(r.shots))):
            if result.trained_on in (trained_on, None) and result.scored_on == scored_on:
                settings.setdefault((result.method, result.shots), {})[result.seed] = result.scores
        return settings

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
            accuracy: dict[str, dict[int | None, list[float]]] = {}
            for (method, shots), seeds in self.by_setting(trained_on, scored_on).items():
                accuracy.setdefault(method, {})[shots] = [of.accuracy for of in seeds.values()]
            if set(accuracy) - {ZERO_SHOT}:
                suffix = "" if trained_on == "all" else f"_{trained_on}_{scored_on}"
                figures.accuracy_by_shots(accuracy, directory / f"accuracy_by_shots{suffix}.png")
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
    paths = _finished(Path(runs))
    first = Tuned.load(paths[0], device=device)
    encoder, fingerprint = first.encoder, first.encoder.fingerprint()
    tuned = {path: Tuned.load(path, encoder, fingerprint=fingerprint) for path in paths}
    _check_distinct(tuned)

    @cache
    def test(classes: str) -> Inputs:
        return Inputs(splits[split].of_classes(classes), encoder, workers=workers, progress=progress)

    results: list[Result] = []

    def score(method: str, shots: int | None, seed: int | None, trained_on: str | None, on: str, of: Tensor) -> None:
        results.append(Result(method, shots, seed, trained_on, on, scores(of, test(on).labels)))

    settings = set()  # of which a linear probe is fitted
    for each in tuned.values():
        config = each.config
        ours = each.classnames == splits["train"].of_classes(config.classes).classnames
        trained_on = config.classes if ours else "other"
        if ours:
            settings.add((config.classes, config.shots, config.seed))
        for on in [on for trained, on in TABLES if trained == trained_on]:
            names = test(on).data.classnames
            if names == each.classnames or not config.class_specific:
                of = predict(each.for_classes(names), test(on))
                score(config.name, config.shots, config.seed, trained_on, on, of)
    for on in dict.fromkeys(result.scored_on for result in results):
        score(ZERO_SHOT, None, None, None, on, zero_shot(test(on), template))
    for classes, shots, seed in sorted(settings):
        data = splits["train"].of_classes(classes)
        if probe and len(data.classnames) > 1:
            drawn = data.few_shot(shots, seed)
            train = Inputs(drawn, encoder, workers=workers, progress=progress)
            score(LINEAR_PROBE, shots, seed, classes, classes, linear_probe(train, test(classes)))
    classnames = splits[split].classnames
    embeddings = {ZERO_SHOT: class_embeddings(encoder, classnames, template), **_embeddings(tuned.values(), classnames)}
    return Report(splits[split].name, results, classnames, {name: e.float().cpu() for name, e in embeddings.items()})


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
    seen: dict[tuple, Path] = {}
    for path, each in tuned.items():
        key = each.config.name, tuple(each.classnames), each.config.shots, each.config.seed
        if key in seen:
            ours, theirs = asdict(each.config), asdict(tuned[seen[key]].config)
            differs = [f"{name} {theirs[name]!r} and {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
            raise ValueError(
                f"evaluate_runs: runs must differ in method, classes, shots or seed, got {seen[key]} and {path} "
                f"({', '.join(differs) or 'equal'})"
            )
        seen[key] = path


@torch.no_grad()
def _embeddings(tuned: Iterable[Tuned], classnames: list[str]) -> dict[str, Tensor]:
    """Of every method that tunes class embeddings, the same for all images: its run of most shots and first seed."""
    best: dict[str, Tuned] = {}
    for each in sorted(tuned, key=lambda t: (-_rank(t.config.shots), t.config.seed)):
        fits = not each.config.class_specific or each.classnames == classnames
        if each.config.method in ("coop", "dapt") and fits:
            best.setdefault(each.config.name, each)
    return {name: each.for_classes(classnames).method.text_features() for name, each in best.items()}


def _rank(shots: int | None) -> float:
    """Zero-shot first, all images last."""
    return -1 if shots is None else shots or math.inf


def _named(shots: int | None) -> str:
    return "" if shots is None else str(shots or "all")


def _mean_std(values: Iterable[float]) -> str:
    percent = [100 * value for value in values]
    if not percent:
        return ""
    return f"{statistics.mean(percent):.1f}" + (f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else "")
