"""The table of all uncertainties in Markdown, and the figure of their risk-coverage curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastprob.evaluation.plots import COLOURS, axes_of_figure, save_figure
from fastprob.evaluation.selective import Ranked
from fastprob.evaluation.statistics import mean_std
from fastprob.evaluation.tables import markdown

from .measures import DIRECTIONS, RULES, Judge
from .rivals import FREE

if TYPE_CHECKING:
    from .uncertainty import Rival

OURS, DISTANCE, LESS = "p(wrong)", "1 - max cosine", "AURC, less that of p(wrong)"
PROBVLM = ("ProbVLM, released", "ProbVLM, paper", "ProbVLM, exact")
PREDICTED = ("total", "aleatoric", "epistemic")  # what an adapter says by itself
QUESTIONS = [f"{direction}, {rule}" for direction in DIRECTIONS for rule in RULES]
DRAWN = (OURS, DISTANCE, "ProbVLM, paper: total", "ProbVLM, exact: posterior error of the first")
_GREY = "#666666"


def text(results: dict) -> str:
    """The report in Markdown."""
    missing = f" **{len(results['missing'])} runs are missing.**" if results["missing"] else ""
    parts = [
        f"# Which uncertainty is best?\n\n{_verdict(results)}\n\nfastprob {results['fastprob']}, torch "
        f"{results['torch']}, {results['machine']}. Adapters and heads were trained for {results['epochs']} epochs. "
        f"Made by `make real-study`; all figures are in uncertainty.json.{missing}",
        _aurc_table(results),
        _difference_table(results),
        _other_table(results),
        _recall_table(results),
        _pair_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(results: dict) -> str:
    """Where ProbVLM's own variances win and where not, and who finds noisy pairs: a sentence each."""
    every = list(_answers(results))
    ahead = [which for which, of in every if _best(of, PROBVLM, 2) < 0]
    behind = [which for which, of in every if _best(of, PROBVLM, 1) > 0]
    beside = [min(one[LESS][0] for name, one in of.items() if name.endswith(f": {OURS} with it")) for _, of in every]
    closer = [which for which, of in every if _aurc(of, PROBVLM) < of[DISTANCE]["AURC"][0]]
    count = len(every)
    sentences = [
        f"On {len(behind)} of the {count} questions every variance that a ProbVLM adapter predicts tells wrong first "
        f"matches from right ones worse than p(wrong), which needs no adapter but known matches of a validation part; "
        f"on {len(ahead)} one of them does better (intervals of the difference without 0).",
        f"The best of these nine variances, chosen afterwards, has a smaller AURC than 1 - max cosine on {len(closer)} "
        f"of {count}{': ' if closer else ''}{'; '.join(closer)}.",
        f"With an adapter's variances beside the similarities, the best adapter chosen afterwards, the AURC of "
        f"p(wrong) changes by {min(beside):+.3f} to {max(beside):+.3f}.",
        *(_finder(dataset, of["noisy pairs"]["average precision"]) for dataset, of in results["data"].items()),
    ]
    return " ".join(sentences)


def _finder(dataset: str, found: Mapping[str, list[float]]) -> str:
    best, distance = max(found, key=lambda name: found[name][0]), f"{FREE}: {DISTANCE.replace('max ', '')}"
    return (
        f"Noisy pairs of {dataset} are found best by {best}, with an average precision of {found[best][0]:.2f} "
        f"against {found[distance][0]:.2f} of 1 - cosine."
    )


def _answers(results: dict) -> Iterator[tuple[str, dict[str, dict]]]:
    """Every question of every data set: its name, and what was measured of each score."""
    for dataset, of in results["data"].items():
        for question in QUESTIONS:
            found = {name: one[question] for name, one in of["scores"].items() if question in one}
            yield f"{dataset} {question}", found


def _best(found: Mapping[str, dict], methods: tuple[str, ...], end: int) -> float:
    """The least end (1 low, 2 high) of the intervals of the difference from p(wrong)."""
    return min(found[name][LESS][end] for name in _predicted(found, methods))


def _aurc(found: Mapping[str, dict], methods: tuple[str, ...]) -> float:
    return min(found[name]["AURC"][0] for name in _predicted(found, methods))


def _predicted(found: Mapping[str, dict], methods: tuple[str, ...]) -> list[str]:
    return [f"{method}: {kind}" for method in methods for kind in PREDICTED if f"{method}: {kind}" in found]


def _aurc_table(results: dict) -> str:
    return f"""## Area under the risk-coverage curve

Mean error of the queries that a score is most certain of, over all shares; smaller is better, and a random score has
the error rate. In brackets 95 % over resampled queries (captions of one text together) and seeds. `own`: rank 1 by
cosine is what the query was written for; `true`: anything that is true of it. p(wrong) is fitted on the validation part
by the same rule, which the others are not told, so that `true` needs the truth there; "with it" has the adapter's
variances beside the frozen similarities. "posterior" is over the first ten items by cosine, by the exact likelihood of
a match under the adapter; "error of the first" is its probability that rank 1 by cosine is not the match.

{_table(results, "AURC", lambda one: f"{one[0]:.3f} [{one[1]:.3f}, {one[2]:.3f}]", rate=True)}

![risk and coverage, openclipart](risk-openclipart.png)

![risk and coverage, digits](risk-digitscenes.png)"""


def _difference_table(results: dict) -> str:
    def cell(one: list[float]) -> str:
        bold = "**" * (one[1] > 0 or one[2] < 0)
        return f"{bold}{one[0]:+.3f}{bold} [{one[1]:+.3f}, {one[2]:+.3f}]"

    return f"""## Against p(wrong), query by query

AURC less that of p(wrong) of frozen similarities, over the same draws of queries and seeds: positive is worse than
p(wrong); bold where the interval of 95 % is on one side of 0.

{_table(results, LESS, cell)}"""


def _table(results: dict, measure: str, cell, rate: bool = False) -> str:
    rows = []
    for dataset, of in results["data"].items():
        if rate:
            rows.append([dataset, "(error rate)", "", *(f"{of['wrong'][question]:.3f}" for question in QUESTIONS)])
        for name, one in of["scores"].items():
            cells = [cell(one[question][measure]) if question in one else "" for question in QUESTIONS]
            rows.append([dataset, name, one["seeds"], *cells])
    return markdown(["data", "score", "seeds", *QUESTIONS], rows)


def _other_table(results: dict) -> str:
    def cell(one: dict) -> str:
        ece = f"; ECE {one['ECE']:.3f}" if "ECE" in one else ""
        return f"{one['AUROC']:.2f}; S {mean_std(one['S'])[0]:+.2f}{ece}"

    rows = []
    for dataset, of in results["data"].items():
        for name, one in of["scores"].items():
            told = [
                f"{mean_std(one[f'{direction}, own']['Spearman with ambiguity'])[0]:+.2f}"
                if f"{direction}, own" in one
                else ""
                for direction in DIRECTIONS
            ]
            cells = [cell(one[question]) if question in one else "" for question in QUESTIONS]
            rows.append([dataset, name, *told, *cells])
    header = ["data", "score", *(f"ambiguity, {direction}" for direction in DIRECTIONS), *QUESTIONS]
    return f"""## AUROC, S, ECE and ambiguity

Means of the seeds. Ambiguity: Spearman correlation with the number of items that are true of the query. AUROC as a
detector of wrong first matches, 1/2 of a random score; S over ten levels, -1 is right; of probabilities the expected
calibration error, 15 bins.

{markdown(header, rows)}"""


def _recall_table(results: dict) -> str:
    rows = [
        [dataset, name, *(_percent(one[question]) for question in QUESTIONS)]
        for dataset, of in results["data"].items()
        for name, one in of["recall@1"].items()
    ]
    return f"""## Recall@1 by ranking

Percent, mean and deviation of the seeds. "match likelihood" orders the first ten by cosine anew, by the exact
likelihood of two distributions; "likelihood" has the query's distribution at the frozen embeddings of the others, "csd"
PCME++'s distance. Equal captions are one item here; above, a picture that finds its caption as another picture's of the
same words is wrong by `own`.

{markdown(["data", "ranking", *QUESTIONS], rows)}"""


def _percent(shares: list[float]) -> str:
    mean, std = mean_std(shares)
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std else "")


def _pair_table(results: dict) -> str:
    rows = [
        [dataset, f"{of['noisy pairs']['share']:.3f}", name, f"{one[0]:.3f} [{one[1]:.3f}, {one[2]:.3f}]"]
        for dataset, of in results["data"].items()
        for name, one in of["noisy pairs"]["average precision"].items()
    ]
    return f"""## Noisy pairs

A fifth of the test captions is given to a random picture that they are not true of; average precision of finding these.
A random score has the share.

{markdown(["data", "share", "score", "average precision"], rows)}"""


def draw_risk(found: Mapping[str, Rival], judge: Judge, path: Path) -> None:
    """Risk by coverage of some scores, mean of their seeds: a panel a question."""
    figure, every = axes_of_figure(len(QUESTIONS))
    grid = np.linspace(0.02, 1, 99)
    for axes, ((direction, rule), wrong) in zip(every, judge.wrong.items()):
        for name, colour in zip(DRAWN, COLOURS):
            if name in found:
                curves = [Ranked(score, wrong).curve() for score in found[name].of(direction, rule)]
                mean = np.mean([np.interp(grid, *(of.numpy() for of in curve)) for curve in curves], axis=0)
                axes.plot(grid, mean, color=colour, label=name)
        axes.axhline(float(wrong.mean()), color=_GREY, linestyle=":", linewidth=1, label="random")
        axes.set(xlabel="share of the queries answered", title=f"{direction}, {rule}")
    every[0].set_ylabel("share of these that are wrong")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.set_size_inches(12, 3.8)
    save_figure(figure, path)
