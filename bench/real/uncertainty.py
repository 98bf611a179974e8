"""Which uncertainty is best? All methods of `rivals` on both data sets, one table.

    python -m bench.real.uncertainty [--cache DIRECTORY] [--out DIRECTORY] [--minutes M]

makes the runs that are missing and writes uncertainty.json, uncertainty.md and figures. Every score is judged by every
question: each direction of retrieval, and each rule of what is right (`measures`).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from tqdm import tqdm

import fastprob
from fastprob._files import write_atomically
from fastprob.adapters.report import _without_nan
from fastprob.evaluation.calibration import expected_calibration_error
from fastprob.evaluation.selective import Ranked
from fastprob.evaluation.statistics import spearman

from .fetch import cache_directory
from .measures import Judge, level_spearman, seeds_interval
from .parts import SETS
from .rivals import EPOCHS, FREE, METHODS, SEEDS, Found, Trial, load, make, noisy, trials
from .uncertainty_report import LESS, OURS, draw_risk, text

OUT = Path("bench/results/real")
SIDE = {"text -> image": "text", "image -> text": "image"}
PROBABILITIES = ("p(wrong)", "p(wrong) with it", "posterior error of the first")  # that the first match is wrong
PAIR_DRAWS = 100  # of the bootstrap of an average precision


@dataclass(frozen=True)
class Rival:
    """A score of a method, of a data set: its runs by seed."""

    method: str
    score: str
    runs: list[Found]

    @property
    def name(self) -> str:
        return self.score if self.method == FREE else f"{self.method}: {self.score}"

    def of(self, direction: str, rule: str) -> list[Tensor]:
        """The score of every query [Q], seed by seed: that of the rule where there is one, as of p(wrong)."""
        side = SIDE[direction]
        names = [f"score|{self.score}, {rule}|{side}", f"score|{self.score}|{side}"]
        return [next(run[name] for name in names if name in run) for run in self.runs]

    def answers(self, direction: str) -> bool:
        """Whether the score is one of this direction's queries."""
        return any(name.endswith(f"|{SIDE[direction]}") and f"|{self.score}" in name for name in self.runs[0])


def rivals(dataset: str, cache: Path) -> list[Rival]:
    """All scores of the runs that are there."""
    found = []
    for method in METHODS:
        every = [load(Trial(dataset, method, seed), cache) for seed in SEEDS]
        runs = [run for run in every if run is not None]
        found += [Rival(method, score, runs) for score in _names(runs, "score")]
    return found


def _names(runs: list[Found], kind: str) -> list[str]:
    """Of the scores, rankings or pairs of runs, without the rule and in the order of their names."""
    named = [name.split("|")[1] for name in (runs[0] if runs else ()) if name.startswith(f"{kind}|")]
    return sorted({name.removesuffix(", own").removesuffix(", true") for name in named})


# ----------------------------------------------------------------------------------- what a score is judged by


Areas = tuple[Tensor, Tensor]
"""AURC of every seed [seeds], and of every seed and draw of the bootstrap [seeds, DRAWS]."""


def areas(rival: Rival, judge: Judge) -> dict[str, Areas]:
    """Question -> AURC of the score, for the questions whose queries it is of."""
    found = {}
    for (direction, rule), wrong in judge.wrong.items():
        if rival.answers(direction):
            ranked = [Ranked(score, wrong) for score in rival.of(direction, rule)]
            drawn = torch.stack([each.aurc(judge.draws[direction]) for each in ranked])
            found[f"{direction}, {rule}"] = torch.cat([each.aurc() for each in ranked]), drawn
    return found


def judged(rival: Rival, ours: dict[str, Areas], judge: Judge) -> dict[str, dict]:
    """Question -> measures of the score; the difference of its AURC from ours is over the same draws and seeds."""
    own, result = areas(rival, judge), {}
    for (direction, rule), wrong in judge.wrong.items():
        question = f"{direction}, {rule}"
        if question not in own:
            continue
        scores = rival.of(direction, rule)
        ranked = [Ranked(score, wrong) for score in scores]
        less = [one - other[: len(scores)] for one, other in zip(own[question], ours[question])]
        result[question] = {
            "AURC": _interval(*own[question]),
            LESS: _interval(*less),
            "gain": fmean(float(each.gain()) for each in ranked),
            "AUROC": fmean(float(each.auroc()) for each in ranked),
            "S": [level_spearman(score, wrong) for score in scores],
            "Spearman with ambiguity": [spearman(score, judge.ambiguity[direction]) for score in scores],
        }
        if rival.score in PROBABILITIES:
            ece = [expected_calibration_error(score, wrong) for score in scores]
            result[question]["ECE"] = fmean(ece)
    return result


def _interval(values: Tensor, drawn: Tensor) -> list[float]:
    """Mean over the seeds [seeds], and its interval, of draws [seeds, DRAWS]."""
    return [float(values.mean()), *seeds_interval(drawn)]


# ----------------------------------------------------------------------------------------- rankings and pairs


def recalls(dataset: str, judge: Judge, cache: Path) -> dict[str, dict[str, list[float]]]:
    """Ranking -> question -> recall@1 of every seed. Equal captions are one item, whichever picture they were for."""
    return {
        f"{method}: {name}": _recall(runs, name, judge)
        for method, runs in _runs(dataset, cache)
        for name in _names(runs, "top")
    }


def _runs(dataset: str, cache: Path) -> Iterator[tuple[str, list[Found]]]:
    for method in METHODS:
        every = [load(Trial(dataset, method, seed), cache) for seed in SEEDS]
        yield method, [run for run in every if run is not None]


def _recall(runs: list[Found], name: str, judge: Judge) -> dict[str, list[float]]:
    test = judge.test
    own = torch.zeros(len(test.data.image), len(test.distinct), dtype=torch.bool)  # [N, U]
    own[test.data.caption_image, test.which] = True
    true, every, images = test.truth, torch.arange(len(test.captions)), torch.arange(len(test.data.image))
    found: dict[str, list[float]] = {}
    for run in runs:
        image, caption = run[f"top|{name}|text"].long(), run[f"top|{name}|image"].long()  # [M] pictures, [N] of U
        right = {
            "text -> image, own": image == test.data.caption_image,
            "text -> image, true": true[every, image],
            "image -> text, own": own[images, caption],
            "image -> text, true": true[test.distinct[caption], images],
        }
        for question, rows in right.items():
            found.setdefault(question, []).append(float(rows.double().mean()))
    return found


def pairs(dataset: str, judge: Judge, cache: Path) -> dict[str, list[float]]:
    """Way -> average precision of finding the pairs that `noisy` made, mean of the seeds with its interval."""
    swapped = (noisy(judge.test) != judge.test.data.caption_image).numpy()
    weights = judge.draws["text -> image"][:PAIR_DRAWS].numpy()
    result = {}
    for method, runs in _runs(dataset, cache):
        for name in _names(runs, "pair"):
            scores = [run[f"pair|{name}"].numpy() for run in runs]
            values = torch.tensor([average_precision_score(swapped, score) for score in scores])
            drawn = [
                [average_precision_score(swapped, score, sample_weight=row) for row in weights] for score in scores
            ]
            result[f"{method}: {name}"] = _interval(values, torch.tensor(drawn, dtype=torch.float64))
    return result


# ------------------------------------------------------------------------------------------------- the results


def measure(cache: Path, out: Path) -> dict:
    """All results, as JSON types; the figures are drawn into `out`."""
    results: dict = {
        "fastprob": fastprob.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})",
        "epochs": EPOCHS,
        "missing": [trial.file(cache).stem for trial in trials() if not trial.file(cache).exists()],
        "data": {},
    }
    for dataset, parts in ((name, make_parts(cache)) for name, make_parts in SETS.items()):
        judge, found = Judge(parts["test"], parts["train"]), rivals(dataset, cache)
        ours = areas(next(each for each in found if each.score == OURS), judge)
        results["data"][dataset] = {
            "wrong": {f"{way}, {rule}": float(wrong.mean()) for (way, rule), wrong in judge.wrong.items()},
            "scores": {
                each.name: {"seeds": len(each.runs), **judged(each, ours, judge)}
                for each in tqdm(found, f"judging {dataset}", unit="score")
            },
            "recall@1": recalls(dataset, judge, cache),
            "noisy pairs": {
                "share": float((noisy(judge.test) != judge.test.data.caption_image).double().mean()),
                "average precision": pairs(dataset, judge, cache),
            },
        }
        draw_risk({each.name: each for each in found}, judge, out / f"risk-{dataset}.png")
    return results


def write(out: Path, cache: Path) -> None:
    """Measure all runs that are there; write uncertainty.json, uncertainty.md and the figures into `out`."""
    results = _without_nan(measure(cache, out))
    write_atomically(out / "uncertainty.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomically(out / "uncertainty.md", text(results))
    print(f"{out / 'uncertainty.md'}: {len(results['missing'])} runs are missing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where what was fetched and the runs are kept")
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory of the report (default: {OUT})")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    args = parser.parse_args()
    cache = cache_directory(args.cache)
    make(cache, minutes=args.minutes)
    write(args.out, cache)


if __name__ == "__main__":
    main()
