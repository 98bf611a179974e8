"""What is measured of the study's runs: calibration by both rules, what uncertainty goes with, and the baselines."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

import fastprob
from fastprob.evaluation.statistics import spearman

from .measures import RULES, Judge, distance, gain_interval, level_spearman, partial_spearman
from .parts import SETS
from .study import Setting, runs_directory, settings, training_part


@dataclass(frozen=True)
class Runs:
    """The adapters of one setting, a seed each."""

    setting: Setting
    runs: list[dict]
    judge: Judge

    @cached_property
    def distinct(self) -> list[Tensor]:
        """[U] uncertainty of each distinct caption of the test part, seed by seed."""
        return [torch.tensor(run["text"]["test"], dtype=torch.float64) for run in self.runs]

    @cached_property
    def scores(self) -> dict[str, list[Tensor]]:
        """Direction -> [Q] uncertainty of each query, seed by seed."""
        image = [torch.tensor(run["image"]["test"], dtype=torch.float64) for run in self.runs]
        return {"text -> image": [score[self.judge.test.which] for score in self.distinct], "image -> text": image}


def load_runs(cache: Path, judges: dict[str, Judge]) -> dict[tuple, Runs]:
    """(data set, form, cross weight, way, epochs) -> its runs; of settings without a run, none."""
    found: dict[tuple, Runs] = {}
    for setting in settings():
        file = runs_directory(cache) / f"{setting.name}.json"
        if file.exists():
            key = setting.dataset, setting.form, setting.cross_weight, setting.way, setting.epochs
            runs = found.setdefault(key, Runs(setting, [], judges[setting.dataset]))
            runs.runs.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def calibration(scores: dict[str, list[Tensor]], judge: Judge) -> dict[str, dict]:
    """Direction and rule -> the gain with its interval, and S of every seed."""
    result = {}
    for (direction, rule), wrong in judge.wrong.items():
        if direction in scores:
            mean, low, high = gain_interval(scores[direction], wrong, judge.draws[direction])
            levels = [level_spearman(score, wrong) for score in scores[direction]]
            result[f"{direction}, {rule}"] = {"gain": mean, "low": low, "high": high, "S": levels}
    return result


def causes(runs: Runs) -> dict[str, float]:
    """What the uncertainty goes with: rank correlations, mean of the seeds; of captions with repeats, or distinct."""
    judge, scores = runs.judge, runs.scores
    ambiguity = judge.ambiguity["text -> image"]
    of_distinct = ambiguity[judge.test.distinct]
    seen, far = judge.frequency, judge.distance
    kept = seen > 0
    train = training_part(judge.train, runs.setting.way)
    told = train.ambiguity, distance(train)[train.which]
    return {
        "ambiguity": fmean(spearman(u, ambiguity) for u in scores["text -> image"]),
        "ambiguity, distinct": fmean(spearman(u, of_distinct) for u in runs.distinct),
        "ambiguity, distinct and seen in training": fmean(spearman(u[kept], of_distinct[kept]) for u in runs.distinct),
        "frequency given distance, distinct": fmean(partial_spearman(u, seen, far) for u in runs.distinct),
        "distance given frequency, distinct": fmean(partial_spearman(u, far, seen) for u in runs.distinct),
        "pictures: true captions": fmean(
            spearman(u, judge.ambiguity["image -> text"]) for u in scores["image -> text"]
        ),
        "(told in training: distance and ambiguity)": spearman(*told),
    }


def conditioned(runs: Runs) -> dict[str, dict[str, float]]:
    """Direction and rule -> Spearman of uncertainty with being right: plain, and with the ambiguity held fixed."""
    result = {}
    for (direction, rule), wrong in runs.judge.wrong.items():
        right, given = 1 - wrong, runs.judge.ambiguity[direction]
        plain = fmean(spearman(score, right) for score in runs.scores[direction])
        fixed = fmean(partial_spearman(score, right, given) for score in runs.scores[direction])
        result[f"{direction}, {rule}"] = {"plain": plain, "ambiguity held fixed": fixed}
    return result


def by_kind(runs: Runs) -> list[dict[str, float]]:
    """Of captions of each kind: how many are right, and Spearman of their uncertainty with being right."""
    test, rows = runs.judge.test, []
    for kind in test.kind.unique().tolist():
        members = test.kind == kind
        row: dict[str, float] = {"kind": kind, "median ambiguity": int(test.ambiguity[members].median())}
        for rule in RULES:
            right = 1 - runs.judge.wrong["text -> image", rule][members]
            row[f"right, {rule}"] = float(right.mean())
            scores = [score[members] for score in runs.scores["text -> image"]]
            row[f"Spearman, {rule}"] = fmean(spearman(score, right) for score in scores)
        rows.append(row)
    return rows


def about_data(judge: Judge) -> dict[str, float]:
    """Sizes, recall, and what ambiguity goes with in the frozen embeddings."""
    test, distinct = judge.test, judge.test.distinct
    ambiguity = judge.ambiguity["text -> image"]
    own = judge.distance[test.which]
    recall = {f"recall@1, {way}, {rule}": float(1 - wrong.mean()) for (way, rule), wrong in judge.wrong.items()}
    return {
        "pictures": len(test.data.image),
        "captions": len(test.captions),
        "distinct captions": len(distinct),
        "of these seen in training": float((judge.frequency > 0).double().mean()),
        **recall,
        **{
            f"Spearman of ambiguity and being right, {way}, {rule}": spearman(judge.ambiguity[way], 1 - wrong)
            for (way, rule), wrong in judge.wrong.items()
        },
        "Spearman of ambiguity and distance": spearman(ambiguity, own),
        "Spearman of ambiguity and distance, distinct captions": spearman(ambiguity[distinct], judge.distance),
        "Spearman of ambiguity and frequency, distinct captions": spearman(ambiguity[distinct], judge.frequency),
    }


def measure(cache: Path) -> tuple[dict, dict[tuple, Runs]]:
    """All results, as JSON types, and the runs."""
    judges = {}
    for name, make in SETS.items():
        parts = make(cache)
        judges[name] = Judge(parts["test"], parts["train"])
    runs = load_runs(cache, judges)
    found = [
        {
            "dataset": key[0], "form": key[1], "cross_weight": key[2], "way": key[3], "epochs": key[4],
            "seeds": len(each.runs), "calibration": calibration(each.scores, each.judge), "causes": causes(each),
            "conditioned": conditioned(each), "kinds": by_kind(each),
            "loss": [run["train_loss"] for run in each.runs],
        }
        for key, each in tqdm(runs.items(), "measuring", unit="setting")
    ]  # fmt: skip
    baselines = {
        name: {score: calibration(by_way, judge) for score, by_way in judge.baselines().items()}
        for name, judge in judges.items()
    }
    machine = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    results = {
        "fastprob": fastprob.__version__, "torch": torch.__version__, "machine": machine,
        "missing": [each.name for each in settings() if not (runs_directory(cache) / f"{each.name}.json").exists()],
        "data": {name: about_data(judge) for name, judge in judges.items()},
        "baselines": baselines,
        "settings": found,
    }  # fmt: skip
    return results, runs


def settings_of(results: dict, dataset: str, way: str, epochs: int, form: str | None = None) -> list[dict]:
    """What was measured of a data set, way and number of epochs, by cross weight."""
    chosen = [
        one
        for one in results["settings"]
        if (one["dataset"], one["way"], one["epochs"]) == (dataset, way, epochs) and form in (None, one["form"])
    ]
    return sorted(chosen, key=lambda one: one["cross_weight"])
