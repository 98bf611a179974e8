"""Everything that is measured of an adapter on an embedding store: recall, likelihood, calibration."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprob._files import write_atomically
from fastprob.adapters.adapter import GGDAdapter, ProbVLM
from fastprob.adapters.training import nll
from fastprob.adapters.uncertainty import predict
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.calibration import EXPLANATION, Calibration, Evaluation, evaluate
from fastprob.evaluation.figures import recall_by_level, uncertainty_by_ambiguity
from fastprob.evaluation.plots import COLOURS, axes_of_figure, save_figure
from fastprob.evaluation.statistics import spearman

_PREDICT_ROWS = 16384
"""Rows of [D] uncertainties held at a time, before their mean over D: 130 MB in four tensors at D = 512."""


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
    image_uncertainty: Tensor
    """[N] total uncertainty of each image, mean over D."""
    text_uncertainty: Tensor
    """[M] total uncertainty of each caption, mean over D."""
    ambiguity: Tensor | None
    """[M] how many images each caption fits, where the store knows."""

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
        lines = [self.evaluation.table(), "", *self.summary, "", EXPLANATION, f"A match is {self.rule} here."]
        for name, calibration in self.evaluation.directions.items():
            if calibration.inverted:
                found = f"the more uncertain a query, the more often it is right (S {calibration.spearman:+.2f})"
                lines.append(f"WARNING: {name} is inverted: {found}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types; what is undefined (NaN) is None."""
        values = {name: getattr(self, name) for name in ("source", "match", "passes", "seed", "nll")}
        values["image_to_text"] = _calibration(self.evaluation.image_to_text)
        values["text_to_image"] = _calibration(self.evaluation.text_to_image)
        values["ambiguity_spearman"] = self.ambiguity_spearman
        return _without_nan(values)

    def save(self, directory: str | os.PathLike) -> None:
        """Write report.json into `directory`."""
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(Path(directory) / "report.json", text)

    def draw(self, directory: str | os.PathLike) -> list[tuple[str, Path]]:
        """Draw recall_by_level.png and uncertainty_by_ambiguity.png; return title and file of each.

        Raises ImportError without matplotlib.
        """
        directory = Path(directory)
        path = recall_by_level(self.evaluation.directions, directory / "recall_by_level.png")
        figures = [("Recall@1 by level of uncertainty", path)]
        if self.ambiguity is not None:
            path = directory / "uncertainty_by_ambiguity.png"
            uncertainty_by_ambiguity(self.ambiguity, self.text_uncertainty, path)
            figures.append(("Uncertainty of texts by the images that they fit", path))
        return figures


def evaluate_store(
    model: ProbVLM, store: EmbeddingStore, *, passes: int = 20, levels: int = 10, seed: int = 0
) -> Report:
    """Evaluate an adapter on the embeddings it was made for, on the model's device.

    Args:
        model: the adapter.
        store: embeddings of the model's width. With labels, a caption is right for every image of its class;
            without, for the image that it was written for.
        passes, seed: dropout passes, see `predict`.
        levels: of uncertainty, see `evaluate`.

    Raises:
        ValueError: a width other than the model's, or as `nll`, `predict` and `evaluate`.
    """
    if model.config["dim"] != store.dim:
        raise ValueError(
            f"evaluate_store: the model takes dimension {model.config['dim']}, {store.path} has {store.dim}"
        )
    image = _total_uncertainty(model.image, store.image, passes, seed)  # [N]
    text = _total_uncertainty(model.text, store.text, passes, seed)  # [M]
    labels = store.labels
    match = None if labels is None else (labels, labels[store.caption_image])
    return Report(
        source=store.metadata["source"],
        match="image" if match is None else "class",
        passes=passes,
        seed=seed,
        nll=nll(model, store),
        evaluation=evaluate(store, image, text, match=match, levels=levels),
        image_uncertainty=image,
        text_uncertainty=text,
        ambiguity=store.ambiguity,
    )


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


def _total_uncertainty(adapter: GGDAdapter, rows: Tensor, passes: int, seed: int) -> Tensor:
    """Predict in blocks, of which no row's result depends: [R, D] -> [R] mean over D of the total uncertainty."""
    blocks = rows.split(_PREDICT_ROWS)
    return torch.cat([predict(adapter, block, passes=passes, seed=seed).total.mean(1) for block in blocks])


def _calibration(result: Calibration) -> dict[str, Any]:
    return dataclasses.asdict(result) | {"score": result.score}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
