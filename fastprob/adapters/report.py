"""Everything that is measured of an adapter on an embedding store: recall, likelihood, calibration."""

import dataclasses
import json
import math
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprob._files import write_atomically
from fastprob.adapters.adapter import ProbVLM
from fastprob.adapters.error import SIDES, ErrorModels, variances
from fastprob.adapters.scores import (
    ABOUT_OUTSIDE,
    DIRECTIONS,
    P_WRONG,
    TOTAL,
    fitted_scores,
    outside_aurocs,
    plain_scores,
)
from fastprob.adapters.training import nll
from fastprob.data.store import EmbeddingStore, check_same_encoder
from fastprob.evaluation.calibration import EXPLANATION, Calibration, Evaluation, evaluation_of
from fastprob.evaluation.comparison import EXPLANATION as ABOUT_SCORES
from fastprob.evaluation.comparison import Comparison, compare
from fastprob.evaluation.conformal import EXPLANATION as ABOUT_SETS
from fastprob.evaluation.conformal import HEADER, Sets, sets_by_threshold, table_rows
from fastprob.evaluation.figures import recall_by_level, risk_coverage, uncertainty_by_ambiguity
from fastprob.evaluation.plots import COLOURS, axes_of_figure, save_figure
from fastprob.evaluation.retrieval import Found, find_matches
from fastprob.evaluation.selective import Estimate, same
from fastprob.evaluation.statistics import spearman
from fastprob.evaluation.tables import aligned


@dataclasses.dataclass(frozen=True)
class Report:
    """What `evaluate_store` found."""

    source: dict[str, Any]
    """Of the store: data set, encoder, transform."""
    match: str
    """What makes a caption the right one: "image" (written for it) or "class" (of the same label)."""
    passes: int
    seed: int
    nll: float
    """Mean negative log-likelihood in nats per dimension, own and cross terms with weight 1; see `adapters.nll`."""
    evaluation: Evaluation
    comparisons: dict[str, Comparison]
    """Direction and rule, as "text -> image, own" -> scores side by side: the adapter's, those of the frozen
    similarities, the probability of error where one was fitted, and a random one. Rules are "own" or "class", as
    `match`, and "true", where the truth was given."""
    image_uncertainty: Tensor
    """[N] total uncertainty of each image, mean over D."""
    text_uncertainty: Tensor
    """[M] total uncertainty of each caption, mean over D."""
    ambiguity: Tensor | None
    """[M] how many images each caption fits, where the store knows."""
    conformal: dict[float, dict[str, Sets]] = dataclasses.field(default_factory=dict)
    """Promised coverage -> "text" and "image" -> what the conformal sets of these queries hold, where thresholds were
    fitted. The promise is of texts, and of the image that each was written for, by whatever rule of a match."""
    outside: dict[str, dict[str, Estimate]] = dataclasses.field(default_factory=dict)
    """Direction -> score -> AUROC with which it tells queries that have no match here, where such were given."""
    outside_source: dict[str, Any] | None = None
    """Of the store that these are from, as `source`."""

    @property
    def outside_rows(self) -> list[tuple[str, ...]]:
        """Of a table: each score with its AUROC in every direction."""
        names = next(iter(self.outside.values()), {})
        return [(name, *(str(of[name]) for of in self.outside.values())) for name in names]

    @property
    def ambiguity_spearman(self) -> float | None:
        """Spearman correlation of the captions' uncertainty with their ambiguity."""
        return None if self.ambiguity is None else spearman(self.ambiguity, self.text_uncertainty)

    @property
    def rule(self) -> str:
        """What a match is, in words."""
        return {"image": "the image that a caption was written for", "class": "an image of the caption's class"}[
            self.match
        ]

    @property
    def summary(self) -> list[str]:
        """What is of no direction, a line each."""
        lines = [f"NLL {self.nll:.4f} nats per dimension"]
        if self.ambiguity is not None:
            lines.append(f"Spearman of text uncertainty with caption ambiguity {self.ambiguity_spearman:.3f}")
        return lines

    def table(self) -> str:
        """The report as text, with what its figures mean, and a warning where they are inverted."""
        lines = []
        for question, comparison in self.comparisons.items():
            lines += [f"{question}: first match wrong {comparison.error:.3f}", comparison.table(), ""]
        lines += [ABOUT_SCORES, ""]
        if self.conformal:
            lines += ["Conformal sets", aligned(HEADER, table_rows(self.conformal)), "", ABOUT_SETS, ""]
        if self.outside:
            lines += [f"From outside, {self.outside_source['dataset']}: AUROC [95 %]"]
            lines += [aligned(("score", *self.outside), self.outside_rows), "", ABOUT_OUTSIDE, ""]
        lines += [self.evaluation.table(), "", *self.summary, ""]
        lines += [EXPLANATION, f"A match is {self.rule} here."]
        for name, calibration in self.evaluation.directions.items():
            if calibration.inverted:
                found = f"the more uncertain a query, the more often it is right (S {calibration.spearman:+.2f})"
                lines.append(f"WARNING: {name} is inverted: {found}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types; what is undefined (NaN) is None."""
        names = ("source", "match", "passes", "seed", "nll", "conformal", "outside", "outside_source")
        values = {name: getattr(self, name) for name in names}
        values["image_to_text"] = _calibration(self.evaluation.image_to_text)
        values["text_to_image"] = _calibration(self.evaluation.text_to_image)
        values["ambiguity_spearman"] = self.ambiguity_spearman
        values["comparisons"] = self.comparisons
        return _without_nan(values)

    def save(self, directory: str | os.PathLike) -> None:
        """Write report.json into `directory`."""
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(Path(directory) / "report.json", text)

    def draw(self, directory: str | os.PathLike) -> list[tuple[str, Path]]:
        """Draw risk_coverage.png, recall_by_level.png and uncertainty_by_ambiguity.png; return title and file of each.

        Raises ImportError without matplotlib.
        """
        directory = Path(directory)
        path = risk_coverage(self.comparisons, directory / "risk_coverage.png")
        figures = [("Wrong answers by the share of queries answered", path)]
        path = recall_by_level(self.evaluation.directions, directory / "recall_by_level.png")
        figures.append(("Recall@1 by level of uncertainty", path))
        if self.ambiguity is not None:
            path = directory / "uncertainty_by_ambiguity.png"
            uncertainty_by_ambiguity(self.ambiguity, self.text_uncertainty, path)
            figures.append(("Uncertainty of texts by the images that they fit", path))
        return figures


def evaluate_store(
    model: ProbVLM,
    store: EmbeddingStore,
    *,
    truth: Tensor | None = None,
    error: ErrorModels | None = None,
    outside: EmbeddingStore | None = None,
    passes: int = 20,
    levels: int = 10,
    seed: int = 0,
) -> Report:
    """Evaluate an adapter on the embeddings it was made for, on the model's device.

    Args:
        model: the adapter.
        store: embeddings of the model's width. With labels, a caption is right for every image of its class;
            without, for the image that it was written for.
        truth: which texts are true of which images, bool [M, N]: a second rule, beside the first.
        error: the probability of error that was fitted for this adapter; its signals are judged beside it, and the
            conformal sets of its thresholds.
        outside: embeddings by the same encoder, whose images and texts have no match in `store`: how well each score
            tells them. Their queries and the store's ask together, so that they are among each other's signals.
        passes, seed: dropout passes, see `predict`.
        levels: of uncertainty, see `evaluate`.

    Raises:
        ValueError: a width other than the model's, another encoder outside, or as `nll`, `predict` and `evaluate`.
    """
    for each in (store,) if outside is None else (store, outside):
        if model.config["dim"] != each.dim:
            raise ValueError(
                f"evaluate_store: the model takes dimension {model.config['dim']}, {each.path} has {each.dim}"
            )
        check_same_encoder(store.encoder, str(store.path), each)
    known = variances(model, store, passes, seed)
    labels = store.labels
    rule, match = "image", (torch.arange(len(store.image)), store.caption_image)
    if labels is not None:
        rule, match = "class", (labels, labels[store.caption_image])
    found = find_matches(store.image, store.text, match)
    scores = {side: plain_scores(known[side], place.first) for side, place in zip(SIDES, found)}
    total = [scores[side][TOTAL] for side in SIDES]
    evaluation = evaluation_of(found, *total, levels=levels)  # checks levels and scores
    if error is not None:
        for side, signals in error.signals(store, captions=store.captions, adapter=model, seed=seed).items():
            scores[side] |= fitted_scores(error, side, signals.values)
    strangers: dict[str, dict[str, Estimate]] = {}
    if outside is not None:
        options = {"known": known, "found": found, "error": error, "passes": passes, "seed": seed}
        strangers = outside_aurocs(model, store, outside, **options)
    rules = {"own" if rule == "image" else rule: found}
    if truth is not None:
        rules["true"] = find_matches(store.image, store.text, truth.T)
    comparisons: dict[str, Comparison] = {}
    for name, by_rule in rules.items():
        left_out = () if error is not None and error.rule == name else (P_WRONG,)  # it was fitted to another question
        comparisons |= _compare(scores, store, by_rule, name, left_out)
    return Report(
        source=store.metadata["source"],
        match=rule,
        passes=passes,
        seed=seed,
        nll=nll(model, store),
        evaluation=evaluation,
        comparisons=comparisons,
        image_uncertainty=total[0],
        text_uncertainty=total[1],
        ambiguity=store.ambiguity,
        conformal={} if error is None else _conformal(store, error.conformal),
        outside=strangers,
        outside_source=None if outside is None else outside.metadata["source"],
    )


def _compare(
    scores: Mapping[str, Mapping[str, Tensor]],
    store: EmbeddingStore,
    found: tuple[Found, Found],
    rule: str,
    left_out: Container[str],
) -> dict[str, Comparison]:
    group, result = {"image": torch.arange(len(store.image)), "text": same(store.captions)}, {}
    for side, of in zip(SIDES, found):
        judged = {name: score for name, score in scores[side].items() if name not in left_out}
        question = f"{DIRECTIONS[side]}, {rule}"
        result[question] = compare(judged, of.rank > 0, group[side], probabilities=(P_WRONG,))
    return result


def _conformal(store: EmbeddingStore, least: Mapping[float, float]) -> dict[float, dict[str, Sets]]:
    return dict(zip(least, sets_by_threshold(store, list(least.values())))) if least else {}


def training_curves(history: Mapping, path: str | os.PathLike) -> Path:
    """Draw the loss of every step and of every epoch, and the validation NLL, from `fit`'s history.

    Args:
        history: `FitResult.history` or the content of history.json, of at least one epoch.
        path: of the PNG file.

    Returns:
        `path`. Raises ValueError without an epoch, ImportError without matplotlib.
    """
    epochs = len(history["train_loss"])
    if not epochs:
        raise ValueError("training_curves: history must hold at least one epoch, got none")
    steps = len(history["step_loss"])
    figure, axes = axes_of_figure()
    step = torch.arange(1, steps + 1) * (epochs / steps)
    epoch = torch.arange(1, epochs + 1)
    axes.plot(step, history["step_loss"], color=COLOURS[0], alpha=0.25, linewidth=0.8, label="loss of a step")
    axes.plot(epoch, history["train_loss"], color=COLOURS[0], label="loss of an epoch")
    if history["val_nll"]:
        axes.plot(epoch, history["val_nll"], color=COLOURS[1], label="validation NLL")
    axes.set(xlabel="epoch", ylabel="nats per dimension")
    axes.set_title("Adapter training")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def _calibration(result: Calibration) -> dict[str, Any]:
    return dataclasses.asdict(result) | {"score": result.score}


def _without_nan(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _without_nan(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
