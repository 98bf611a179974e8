"""The study's runs as tables, figures and results.json: `python -m bench.real.report [--out DIRECTORY]`."""

from __future__ import annotations

import argparse
import json
from math import isnan
from pathlib import Path

from fastprob._files import write_atomically
from fastprob.adapters.report import _without_nan
from fastprob.evaluation.statistics import mean_std
from fastprob.evaluation.tables import markdown

from .fetch import cache_directory
from .figures import draw_causes, draw_gain, draw_loss
from .measures import DIRECTIONS, RULES
from .openclipart import KINDS
from .parts import SETS
from .results import measure, settings_of
from .study import EPOCHS

OUT = Path("bench/results/real")
WAYS = {
    "plain": "as it is",
    "balanced": "balanced: every distinct caption equally often",
    "specific": "pictures moved to their most specific caption",
    "general": "pictures moved to their most general caption",
    "both": "balanced, pictures moved to their most specific caption",
}
QUERIES = [f"{direction}, {rule}" for direction in DIRECTIONS for rule in RULES]


def text(results: dict) -> str:
    """The report in Markdown."""
    parts = [
        f"# The cross weight on two data sets\n\nfastprob {results['fastprob']}, torch {results['torch']}, "
        f"{results['machine']}. Made by `make real-study`; all figures are in results.json."
        + (f" **{len(results['missing'])} runs are missing.**" if results["missing"] else ""),
        _data_table(results),
        _calibration_table(results),
        _condition_table(results),
        _cause_table(results),
        _kind_table(results),
        _epoch_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def _data_table(results: dict) -> str:
    data = results["data"]
    rows = [[name, *(_number(data[of][name]) for of in data)] for name in next(iter(data.values()))]
    return f"""## The test parts

A caption is right by "own" if rank 1 is the picture it was written for, by "true" if it is one that the caption is true
of; pictures likewise. Distance is 1 - cosine of a caption and its pictures; frequency is how often it stands in the
training part.

{markdown(["", *data], rows)}"""


def _calibration_table(results: dict) -> str:
    rows = []
    for dataset, scores in results["baselines"].items():
        plain = sorted(
            settings_of(results, dataset, "plain", EPOCHS[dataset]), key=lambda one: (one["form"], one["cross_weight"])
        )
        for one in plain:
            label = f"{one['form']}, {one['cross_weight']:g}"
            rows.append([dataset, label, one["seeds"], *_cells(one["calibration"])])
        rows += [[dataset, name, "", *_cells(calibrated)] for name, calibrated in scores.items()]
    return f"""## Does uncertainty tell right from wrong?

Gain is 1 for the best order of the queries, 0 for a random one, negative where it is inverted; in brackets the interval
of 95 % over resampled queries and seeds. S (least to greatest seed) is right at -1. The last rows of each data set need
no adapter.

{markdown(["data", "loss, cross weight", "seeds", *QUERIES], rows)}

![gain by cross weight](gain.png)"""


def _cells(calibrated: dict[str, dict]) -> list[str]:
    return [_cell(calibrated[query]) if query in calibrated else "" for query in QUERIES]


def _cell(one: dict) -> str:
    s = one["S"]
    spread = f"{mean_std(s)[0]:+.2f}" + (f" ({min(s):+.2f} to {max(s):+.2f})" if len(s) > 1 else "")
    return f"{one['gain']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]; S {spread}"


def _condition_table(results: dict) -> str:
    rows = [
        [dataset, f"{one['cross_weight']:g}", *(f"{one['conditioned'][query][how]:+.2f}" for query in QUERIES for how in
         ("plain", "ambiguity held fixed"))]
        for dataset in SETS
        for one in settings_of(results, dataset, "plain", EPOCHS[dataset], "paper")
    ]  # fmt: skip
    header = [f"{query}{how}" for query in QUERIES for how in ("", ", ambiguity fixed")]
    return f"""## How much of it is ambiguity?

Spearman correlation of a query's uncertainty with its being right (negative is what one wants), plain and with the
number of items that are true of it held fixed. The paper's loss, mean of the seeds.

{markdown(["data", "cross weight", *header], rows)}"""


def _cause_table(results: dict) -> str:
    rows = [
        [
            dataset,
            WAYS[one["way"]],
            f"{one['cross_weight']:g}",
            one["seeds"],
            *(f"{v:+.2f}" for v in one["causes"].values()),
        ]
        for dataset in SETS
        for way in WAYS
        for one in settings_of(results, dataset, way, EPOCHS[dataset], "paper")
    ]
    header = ["data", "trained on", "cross weight", "seeds", *results["settings"][0]["causes"]]
    return f"""## What decides the sign

Spearman correlations of the captions' uncertainty with what stands above: over the queries, or over distinct captions.
The paper's loss, mean of the seeds. Two changes of the training data alone take the causes apart. Balanced, a general
caption is seen as seldom as any other. Moved half way to its most specific or most general caption, a picture teaches
another distance; how that goes with ambiguity in the training part is in the last column.

{markdown(header, rows)}

![uncertainty by ambiguity](causes.png)"""


def _kind_table(results: dict) -> str:
    rows = []
    for dataset in SETS:
        for one in settings_of(results, dataset, "plain", EPOCHS[dataset], "paper"):
            for kind in one["kinds"]:
                name = KINDS[int(kind["kind"])] if dataset == "openclipart" else f"level {kind['kind']:.0f}"
                values = [_number(value) for key, value in kind.items() if key != "kind"]
                rows.append([dataset, f"{one['cross_weight']:g}", name, *values])
    header = ["data", "cross weight", "captions", *list(results["settings"][0]["kinds"][0])[1:]]
    return f"""## By kind of caption

Spearman correlations, within the captions of a kind, of uncertainty with being right.

{markdown(header, rows)}"""


def _epoch_table(results: dict) -> str:
    every = sorted(
        (one for one in results["settings"] if one["way"] == "plain" and one["form"] == "paper"),
        key=lambda one: (one["dataset"], one["cross_weight"], one["epochs"]),
    )
    rows = [
        [one["dataset"], f"{one['cross_weight']:g}", one["epochs"],
         f"{mean_std(loss[-1] for loss in one['loss'])[0]:.3f}",
         f"{one['causes']['ambiguity']:+.2f}", *(f"{one['calibration'][query]['gain']:+.2f}" for query in QUERIES)]
        for one in every
    ]  # fmt: skip
    header = ["data", "cross weight", "epochs", "training loss at the end", "Spearman with ambiguity", *QUERIES]
    return f"""## Epochs

Gain, by length of training. Every longer run ends at a lower loss, so it is flat at none of these lengths.

{markdown(header, rows)}

![training loss](loss.png)"""


def _number(value: float) -> str:
    """A count, or a share or correlation with two digits; nothing of NaN."""
    return f"{value:,}" if isinstance(value, int) else "" if isnan(value) else f"{value:.2f}"


def write(out: Path, cache: Path) -> None:
    """Measure all runs that are there; write results.json, report.md and the figures into `out`."""
    results, runs = measure(cache)
    draw_gain(results, out / "gain.png")
    draw_causes(runs, out / "causes.png")
    draw_loss(results, out / "loss.png")
    write_atomically(out / "report.md", text(results))
    for one in results["settings"]:  # the curves are in the figure, and in the runs
        one["loss"] = [loss[-1] for loss in one["loss"]]
    write_atomically(out / "results.json", json.dumps(_without_nan(results), indent=1, allow_nan=False) + "\n")
    print(f"{out / 'report.md'}: {len(results['missing'])} runs are missing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="where what was fetched and the runs are kept")
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory of the report (default: {OUT})")
    args = parser.parse_args()
    write(args.out, cache_directory(args.cache))


if __name__ == "__main__":
    main()
