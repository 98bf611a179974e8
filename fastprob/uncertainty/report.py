"""Everything that is measured of an adapter on an embedding store: recall, likelihood, calibration."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprob.adapters import GGDAdapter, ProbVLM, nll, predict
from fastprob.data.store import EmbeddingStore
from fastprob.uncertainty.calibration import Calibration, Evaluation, evaluate, spearman

PREDICT_ROWS = 16384
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
    text_uncertainty: Tensor
    """[M] total uncertainty of each caption, mean over D."""
    ambiguity: Tensor | None
    """[M] how many images each caption fits, where that is known (DigitScenes)."""

    @property
    def ambiguity_spearman(self) -> float | None:
        """Spearman correlation of the captions' uncertainty with their ambiguity."""
        return None if self.ambiguity is None else spearman(self.ambiguity, self.text_uncertainty)

    def table(self) -> str:
        """The report as text."""
        lines = [self.evaluation.table(), "", f"NLL {self.nll:.4f} nats per dimension"]
        if self.ambiguity is not None:
            lines.append(f"Spearman of text uncertainty with caption ambiguity {self.ambiguity_spearman:.3f}")
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
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (directory / "report.json").write_text(text + "\n", encoding="utf-8")

    def draw(self, directory: str | os.PathLike) -> None:
        """Draw recall_by_level.png and uncertainty_by_ambiguity.png. Raises ImportError without matplotlib."""
        from fastprob.uncertainty.figures import recall_by_level, uncertainty_by_ambiguity

        directory, found = Path(directory), self.evaluation
        directions = {"image -> text": found.image_to_text, "text -> image": found.text_to_image}
        recall_by_level(directions, directory / "recall_by_level.png")
        if self.ambiguity is not None:
            path = directory / "uncertainty_by_ambiguity.png"
            uncertainty_by_ambiguity(self.ambiguity, self.text_uncertainty, path)


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
        text_uncertainty=text,
        ambiguity=_ambiguity(store),
    )


def _total_uncertainty(adapter: GGDAdapter, rows: Tensor, passes: int, seed: int) -> Tensor:
    """[R, D] -> [R] mean over D of the total uncertainty. A row's result does not depend on its block."""
    blocks = rows.split(PREDICT_ROWS)
    return torch.cat([predict(adapter, block, passes=passes, seed=seed).total.mean(1) for block in blocks])


def _ambiguity(store: EmbeddingStore) -> Tensor | None:
    """[M] how many of the store's scenes each caption fits, when it is of DigitScenes."""
    name = re.fullmatch(r"digitscenes:(\w+)(?::seed=(\d+))?", store.metadata["source"]["dataset"])
    if name is None:
        return None
    from fastprob.data.digitscenes import DigitScenes

    dataset = DigitScenes(name[1], seed=int(name[2] or 0), num_scenes=len(store.image))
    return dataset.ambiguity() if dataset.captions == store.captions else None


def _calibration(result: Calibration) -> dict[str, Any]:
    return dataclasses.asdict(result) | {"score": result.score}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
