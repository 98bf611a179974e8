"""Pages of what an adapter says of a store: figures, and the texts and images of which it is most and least certain."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastprob.adapters.report import Report
from fastprob.adapters.scores import ABOUT_OUTSIDE
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.calibration import EXPLANATION, Calibration
from fastprob.evaluation.comparison import EXPLANATION as ABOUT_SCORES
from fastprob.evaluation.comparison import HEADER
from fastprob.evaluation.conformal import EXPLANATION as ABOUT_SETS
from fastprob.evaluation.conformal import HEADER as SETS_HEADER
from fastprob.evaluation.conformal import table_rows
from fastprob.evaluation.examples import Pictures, examples
from fastprob.evaluation.page import Section, Table, write_page

SHOWN = 8
"""Texts, and images, of the most certain ones on a page, and as many of the least certain."""

_PREDICTED = """\
An uncertainty is a variance, the mean over the dimensions of the embedding. Level 1 has the most certain, every level \
as many. Whether uncertain ones are harder to retrieve with, fastprob eval measures: it may be the other way round."""

_PROBABLE = """\
An uncertainty is here the probability that the first match is wrong, as fastprob calibrate fitted it. Level 1 has the \
most certain, every level as many."""

_STRICTER = """\
A caption of several images is right here for each of them. Recall@1 is stricter: each of the equal captions is of one \
image, and that of another image, which ties with it, is wrong."""


def write_report_page(
    report: Report,
    store: EmbeddingStore,
    path: str | os.PathLike,
    *,
    figures: Sequence[tuple[str, str | os.PathLike]] = (),
    shown: int = SHOWN,
    pictures: Pictures | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> Path:
    """Write what `evaluate_store` found of a store as one HTML file; return its path.

    figures: title and PNG file of each, as `Report.draw` returns them.
    shown: how many of the most and of the least certain texts and images, each with the three that it retrieves.
    pictures: of the store's images, see `pictures_of`; without them the page has names and captions alone.
    checkpoint: the adapter's file, to be named.

    Raises ValueError unless `shown` is at least 1.
    """
    check_shown("write_report_page", shown)
    facts = [*_facts(store, report.passes, report.seed, checkpoint), ("Match", report.rule)]
    directions = report.evaluation.directions.items()
    uncertainty = {"image": report.image_uncertainty, "text": report.text_uncertainty}
    options = {"levels": len(report.evaluation.text_to_image.recall), "shown": shown, "pictures": pictures}
    if report.match == "class":
        options |= {"key": store.labels}
    else:
        options |= {"key": torch.arange(len(store.image)), "said": [_STRICTER]}
    sections = [
        Section("What was evaluated", facts=facts),
        _what_it_says(report),
        *([Section("Figures", figures=figures)] if figures else []),
        Section("Which score tells wrong from right?", [ABOUT_SCORES], tables=_comparisons(report)),
        *_conformal(report),
        *_outside(report),
        Section("Levels of uncertainty", tables=[_table(*direction) for direction in directions]),
        *examples(store, uncertainty, **options),
    ]
    return write_page(path, f"Uncertainty on {store.metadata['source']['dataset']}", sections)


def write_predictions_page(
    store: EmbeddingStore,
    uncertainty: Mapping[str, Tensor],
    path: str | os.PathLike,
    *,
    passes: int,
    levels: int,
    seed: int,
    shown: int = SHOWN,
    pictures: Pictures | None = None,
    checkpoint: str | os.PathLike | None = None,
    is_probability: bool = False,
) -> Path:
    """Write the uncertainties of a store's images and texts as one HTML file; return its path.

    uncertainty: total, mean over D, of each "image" [N] and of each "text" [M]; or the probabilities that their first
        matches are wrong, where `is_probability`.
    passes, seed, levels: as `write_predictions` had them; the others as in `write_report_page`.
    """
    sections = [
        Section(
            "What was predicted",
            [_PROBABLE if is_probability else _PREDICTED],
            facts=_facts(store, passes, seed, checkpoint),
        ),
        *examples(store, uncertainty, levels=levels, shown=shown, pictures=pictures),
    ]
    return write_page(path, f"Uncertainty of {store.metadata['source']['dataset']}", sections)


def check_shown(who: str, shown: int) -> None:
    """Raises ValueError, as `who`, unless a page can show so many."""
    if shown < 1:
        raise ValueError(f"{who}: shown must be at least 1, got {shown}")


def _facts(
    store: EmbeddingStore, passes: int, seed: int, checkpoint: str | os.PathLike | None
) -> list[tuple[str, str]]:
    encoder = [store.encoder["model"] or "not named", store.encoder["pretrained"], f"dimension {store.dim}"]
    drawn = f"aleatoric and epistemic, {passes} dropout passes, seed {seed}" if passes else "aleatoric alone, no passes"
    return [
        ("Data", f"{store.metadata['source']['dataset']}, {len(store.image):,} images, {len(store.text):,} texts"),
        ("Store", str(store.path)),
        ("Encoder", ", ".join(str(part) for part in encoder if part is not None)),
        *([] if checkpoint is None else [("Adapter", str(checkpoint))]),
        ("Uncertainty", drawn),
    ]


def _what_it_says(report: Report) -> Section:
    directions = report.evaluation.directions
    said = {name: _verdict(name, found) for name, found in directions.items()}
    inverted = [said.pop(name) for name, found in directions.items() if found.inverted]
    return Section("What it says", [*said.values(), f"{'; '.join(report.summary)}.", EXPLANATION], warnings=inverted)


def _verdict(name: str, found: Calibration) -> str:
    if math.isnan(found.spearman):
        return f"{_arrow(name)} has the same recall@1 in every level, {found.recall_at[1]:.3f}."
    if found.inverted:
        order = "is inverted: the more uncertain a query, the more often it is right"
    elif found.ordered:
        order = "is as it should be: the more uncertain a query, the less often it is right"
    else:
        order = "has no clear order"
    levels = f"{found.recall[0]:.3f} in the most certain level, {found.recall[-1]:.3f} in the least certain"
    return f"{_arrow(name)} {order} (S {found.spearman:+.2f}). Recall@1 is {found.recall_at[1]:.3f}; {levels}."


def _table(name: str, found: Calibration) -> Table:
    rows = [
        (str(level), f"{uncertainty:#.3g}", f"{recall:.3f}", f"{count:,}")
        for level, (uncertainty, recall, count) in enumerate(zip(found.uncertainty, found.recall, found.count), 1)
    ]
    values = {f"recall@{k}": value for k, value in found.recall_at.items()}
    values |= {"S": found.spearman, "R2": found.r2, "-S*R2": found.score}
    facts = [(name, f"{value:.3f}") for name, value in values.items()]
    return Table(_arrow(name), ("level", "uncertainty", "recall@1", "queries"), rows, facts)


def _comparisons(report: Report) -> list[Table]:
    tables = []
    for question, comparison in report.comparisons.items():
        facts = [("first match wrong", f"{comparison.error:.3f}")]
        tables.append(Table(_arrow(question), HEADER, comparison.rows(), facts))
    return tables


def _conformal(report: Report) -> list[Section]:
    if not report.conformal:
        return []
    table = Table("Texts' images, images' texts", SETS_HEADER, table_rows(report.conformal))
    return [Section("Sets that hold the match as often as promised", [ABOUT_SETS], tables=[table])]


def _outside(report: Report) -> list[Section]:
    if report.outside_source is None:
        return []
    source = report.outside_source
    facts = [("Outside", f"{source['dataset']}, {source['images']:,} images")]
    table = Table("AUROC [95 %]", ("score", *map(_arrow, report.outside)), report.outside_rows)
    return [Section("Which score tells what has no match here?", [ABOUT_OUTSIDE], facts, tables=[table])]


def _arrow(name: str) -> str:
    return name.replace("->", "→")
