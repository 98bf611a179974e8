"""The runs of `bench.real.selection` as selection.json, selection.md and figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

import fastprob
from fastprob._files import write_atomically
from fastprob.adapters.selection import MEASURES, WAYS
from fastprob.evaluation.plots import COLOURS, axes_of_figure, save_figure
from fastprob.evaluation.statistics import mean_std, spearman
from fastprob.evaluation.tables import markdown

from .selection import COUNTS, LABELS, MODELS, PLAIN, SWAPPED

OUT = Path("bench/results/real")
RULES = ("own", "true")
RANKED = (*MEASURES, PLAIN, LABELS)


def write(results: dict, directory: Path) -> None:
    """Write everything into the directory, beside what else is there."""
    machine = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    about = {"fastprob": fastprob.__version__, "torch": torch.__version__, "machine": machine}
    write_atomically(directory / "selection.json", json.dumps(about | results, indent=1) + "\n")
    write_atomically(directory / "selection.md", text(about, results))
    draw_active(results["active"], directory / "active.png")
    for dataset, runs in results["models"].items():
        draw_models(runs, directory / f"models-{dataset}.png")


def text(about: dict, results: dict) -> str:
    """The report in Markdown."""
    seeds = len(next(iter(results["noisy"].values())))
    head = f"""# Does uncertainty choose?

fastprob {about["fastprob"]}, torch {about["torch"]}, {about["machine"]}; {seeds} seeds, mean ± standard deviation. Made
by `python -m bench.real.selection`; all figures are in selection.json. In short:

{_in_short(results)}"""
    return "\n\n".join([head, _noisy(results["noisy"]), _active(results["active"]), _models(results["models"])]) + "\n"


def _in_short(results: dict) -> str:
    lines = []
    for score in ("doubt", "likelihood, adapter of itself", "match, adapter of itself"):
        verdicts = _each(results["noisy"], lambda run: run["precision"][score] - run["precision"]["cosine"])
        lines.append(f"- Wrong captions, {score} against the cosine: {verdicts}.")
    for way in WAYS[:-1]:
        for rule in RULES:
            verdicts = _each(results["active"], lambda run: lead(run, way, rule))
            lines.append(
                f"- What to label next, {way} against random (recall@1 by {rule}, mean of all counts): {verdicts}."
            )
    for by in RANKED:
        found = (
            f"{name} {mean_std(agreement(run, by, 'own') for run in runs)[0]:+.2f}"
            for name, runs in results["models"].items()
        )
        what = "with labels, of the labelled kind" if by == LABELS else "without labels"
        lines.append(f"- Which model, {by} ({what}), Spearman with recall@1 by own: {', '.join(found)}.")
    return "\n".join(lines)


def _each(by_dataset: dict, difference: Callable[[dict], float]) -> str:
    return "; ".join(f"{name} {verdict([difference(run) for run in runs])}" for name, runs in by_dataset.items())


def verdict(differences: Sequence[float]) -> str:
    """Their mean, and whether all seeds agree on the sign."""
    mean, _ = mean_std(differences)
    if all(each > 0 for each in differences):
        return f"**better** in every seed ({mean:+.3f})"
    if all(each < 0 for each in differences):
        return f"**worse** in every seed ({mean:+.3f})"
    return f"no difference that all seeds show ({mean:+.3f})"


def lead(run: dict, way: str, rule: str) -> float:
    """Recall above that of random choice, the mean of all counts."""
    return mean_std(a[rule] - b[rule] for a, b in zip(run[way], run["random"]))[0]


def agreement(run: dict, by: str, rule: str) -> float:
    """Spearman of certainty and recall over the candidates: 1 is right."""
    certainty = torch.tensor([-one["uncertainty"][by] for one in run.values()], dtype=torch.float64)
    return spearman(certainty, torch.tensor([one["recall"][rule] for one in run.values()]))


def shortfall(run: dict, by: str, rule: str) -> float:
    """By how much the recall of the least uncertain candidate is below the best one's."""
    first = min(run.values(), key=lambda one: one["uncertainty"][by])
    return max(one["recall"][rule] for one in run.values()) - first["recall"][rule]


def _cell(values: Iterable[float]) -> str:
    mean, deviation = mean_std(values)
    return f"{mean:.3f} ± {deviation:.3f}"


def _noisy(by_dataset: dict) -> str:
    scores = next(iter(by_dataset.values()))[0]["precision"]
    rows = [
        [score, *(_cell(run["precision"][score] for run in runs) for runs in by_dataset.values())] for score in scores
    ]
    sizes = "; ".join(f"{name}: {runs[0]['wrong']} of {runs[0]['captions']}" for name, runs in by_dataset.items())
    return f"""## Wrong captions

{SWAPPED:.0%} of the captions of half of the training pictures were moved to other pictures; those that are not true of
their new picture are wrong (of the first seed, {sizes}). Average precision of each score (`fastprob noisy`); random has
the share of the wrong ones. An adapter of itself is trained on these captions, wrong ones and all; one of clean data on
the other half as it is. A sum is of ranks.

{markdown(["score", *by_dataset], rows)}"""


def _active(by_dataset: dict) -> str:
    tables = [
        f"{name}, by {rule}; first {_cell(run['first'][rule] for run in runs)}, tuned on the labelled alone "
        f"{_cell(run['labelled alone'][rule] for run in runs)}:\n\n"
        + markdown(
            ["pictures chosen", *COUNTS],
            [[way, *(_cell(run[way][i][rule] for run in runs) for i in range(len(COUNTS)))] for way in WAYS],
        )
        for name, runs in by_dataset.items()
        for rule in RULES
    ]
    return """## What to label next

Two linear heads over frozen features (`bench/real/targets.py`) are tuned with open_clip's contrastive loss on 300
labelled pictures and on those that each way chose of the pool (`fastprob select`); the towers stay frozen.
Openclipart's pool is like the labelled pictures, the digit scenes' is of inverted brightness. Adapter and p(wrong) know
labelled pictures only; a pool's pictures ask its captions, of which it is not known whose they are. recall@1 on the
test part, the mean of both directions.

![active learning](active.png)

""" + "\n\n".join(tables)


def _models(by_dataset: dict) -> str:
    tables = []
    for name, runs in by_dataset.items():
        rows = [
            [by, *(_cell(of(run, by, rule) for run in runs) for rule in RULES for of in (agreement, shortfall))]
            for by in RANKED
        ]
        header = [name, *(f"{what}, {rule}" for rule in RULES for what in ("Spearman", "recall lost"))]
        tables.append(f"![candidates on {name}](models-{name}.png)\n\n{markdown(header, rows)}")
    return f"""## Which model to take

{len(MODELS)} candidates, heads tuned as above on the labelled pictures and on some of the pool:
{"; ".join(MODELS)}.
They are ranked on the test part without its labels (`rank_models`). Spearman is that of certainty and true recall@1: 1
is right. Recall lost is what the first of the ranking has less than the best. The last row needs labels, of the
labelled kind: openclipart's are like the test's, the digit scenes' are not inverted.

""" + "\n\n".join(tables)


def draw_active(by_dataset: dict, path: Path) -> None:
    """Recall by the number of chosen pictures, with deviations over seeds: a panel for a data set and rule."""
    figure, every = axes_of_figure(len(by_dataset) * len(RULES))
    panels = [(name, rule) for name in by_dataset for rule in RULES]
    for axes, (name, rule) in zip(every, panels):
        for way, colour in zip(WAYS, COLOURS):
            points = [mean_std(run[way][i][rule] for run in by_dataset[name]) for i in range(len(COUNTS))]
            means, deviations = zip(*points)
            axes.errorbar(COUNTS, means, deviations, fmt="o-", color=colour, capsize=2, label=way)
        axes.set(xscale="log", xlabel="pictures chosen", title=f"{name}, by {rule}", xticks=COUNTS)
        axes.set_xticks([], minor=True)
        axes.set_xticklabels(COUNTS)
    every[0].set_ylabel("recall@1")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS), frameon=False)
    save_figure(figure, path)


def draw_models(runs: list[dict], path: Path) -> None:
    """Uncertainty of the candidates against recall by own: a panel for a measure, a colour for a seed."""
    figure, every = axes_of_figure(len(RANKED))
    for axes, by in zip(every, RANKED):
        for run, colour in zip(runs, COLOURS):
            recall = [one["recall"]["own"] for one in run.values()]
            axes.scatter([one["uncertainty"][by] for one in run.values()], recall, s=14, color=colour)
        mean, deviation = mean_std(agreement(run, by, "own") for run in runs)
        axes.set(xlabel=by, title=f"Spearman {mean:.2f} ± {deviation:.2f}")
        axes.locator_params(axis="x", nbins=4)
    every[0].set_ylabel("recall@1 by own")
    save_figure(figure, path)
