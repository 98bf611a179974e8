"""The whole way on the built-in data: embed, fit, evaluate, and what it costs, as a report with figures."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

import fastprob
from fastprob._files import write_atomically
from fastprob.adapters import FitResult, TrainConfig, fit
from fastprob.adapters.error import file_beside, fit_error
from fastprob.adapters.pages import write_report_page
from fastprob.adapters.report import Report, evaluate_store, training_curves
from fastprob.adapters.scores import COSINE, P_WRONG
from fastprob.adapters.training import CHECKPOINT
from fastprob.data.digitscenes import LEVELS, DigitScenes
from fastprob.data.store import EmbeddingStore, embed, pictures_of
from fastprob.demo import speed, study
from fastprob.encoders import load_encoder
from fastprob.evaluation.retrieval import recall_at_k

HEADS = (("softplus", "paper"), ("relu", "paper"), ("relu", "released"))  # ours, the released heads, and their loss


def run(out: Path, *, epochs: int = 50, study_epochs: int = 40) -> None:
    """Embed DigitScenes, train and evaluate an adapter, compare loss weights and speed; writes `out`/report.md
    and report.html."""
    encoder = load_encoder("tiny")
    scenes = {split: DigitScenes(split) for split in ("train", "val", "test")}
    stores = {split: embed(scenes[split], encoder, out / "embeddings" / split) for split in scenes}
    times = {"loss_ms": speed.loss_times(), "epoch_s": speed.epoch_times(encoder, scenes["train"], stores["train"])}
    config = TrainConfig(epochs=epochs)
    trained = fit(stores["train"], validation=stores["val"], config=config, directory=out / "adapter")
    error = fit_error(stores["val"], captions=stores["val"].captions, adapter=trained.model)
    error.save(file_beside(out / "adapter"))
    report = evaluate_store(trained.model, stores["test"], truth=scenes["test"].matches(), error=error)
    report.save(out)
    figures = [*report.draw(out), ("Adapter training", training_curves(trained.history, out / "training.png"))]
    about = {"pictures": pictures_of(stores["test"], scenes["test"]), "checkpoint": out / "adapter" / CHECKPOINT}
    page = write_report_page(report, stores["test"], out / "report.html", figures=figures, **about)
    settings = study.cross_weight_study(stores["train"], stores["test"], HEADS, study_epochs)
    study.draw(settings, out / "cross_weight.png")
    recall = frozen_recall(stores["test"], scenes["test"])
    text = "\n\n".join(
        [_about(), _of_encoder(recall), _of_adapter(trained, report), _of_study(settings), _of_speed(**times)]
    )
    write_atomically(out / "speed.json", json.dumps(times, indent=1) + "\n")
    write_atomically(out / "report.md", f"{text}\n")
    print(f"\n{text}\n\nWritten to {out / 'report.md'}; the most and the least certain scenes and captions in {page}")


def frozen_recall(store: EmbeddingStore, scenes: DigitScenes) -> list[float]:
    """Share of the captions that rank a scene they are true of first, by level, the most specific first."""
    truth = scenes.matches()
    levels = [scenes.caption_level == level for level in range(LEVELS)]
    return [recall_at_k(store.text[of], store.image, truth[of]) for of in levels]


def _about() -> str:
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"""# fastprob on DigitScenes

fastprob {fastprob.__version__}, torch {torch.__version__}, {platform.machine()} CPU with {threads} threads \
({capability})."""


def _of_encoder(recall: list[float]) -> str:
    return f"""## The frozen encoder

A scene that the caption is true of comes first for {", ".join(f"{share:.0%}" for share in recall)} of the captions, \
from the most specific level to the least."""


def _of_adapter(trained: FitResult, report: Report) -> str:
    by_text = report.evaluation.text_to_image
    wrong = "\n".join(
        f"- {question}: {each.scores[P_WRONG].aurc}; 1 - max cosine {each.scores[COSINE].aurc}; random {each.error:.3f}"
        for question, each in report.comparisons.items()
        if P_WRONG in each.scores
    )
    return f"""## How likely is the first match wrong?

Share of wrong answers, averaged over the share of queries that are answered (AURC, 95 %), by the fitted probability:

{wrong}

![wrong answers by the share answered](risk_coverage.png)

## The adapter

NLL on held-out scenes: {trained.nll_before:.3f} before training, {trained.nll_after:.3f} after, in nats per dimension.
Spearman correlation of the predicted text uncertainty with the number of scenes a caption fits: \
{report.ambiguity_spearman:+.2f}.
Text -> image: S = {by_text.spearman:+.2f}, R2 = {by_text.r2:.2f} over {len(by_text.recall)} levels.

![training](training.png)
![recall by level of uncertainty](recall_by_level.png)
![uncertainty against ambiguity](uncertainty_by_ambiguity.png)"""


def _of_study(settings: list[study.Setting]) -> str:
    return f"""## The cross weight

Mean over {len(study.SEEDS)} seeds. S is the Spearman correlation of the uncertainty level with recall@1 of the scene \
that a caption was written for: -1 is right, +1 is inverted. Where any scene that it is true of counts, it is the \
other way round. The released code's cross weight is 1e-4.

{study.table(settings)}

![recall by level for three cross weights](cross_weight.png)"""


def _of_speed(loss_ms: dict[str, float], epoch_s: dict[str, float]) -> str:
    (kernel, reference), (cached, encoded) = loss_ms.values(), epoch_s.values()
    return f"""## Speed

The loss with its gradients, {" x ".join(map(str, speed.SHAPE))}, float32: {kernel:.2f} ms, by its PyTorch reference \
{reference:.2f} ms: {reference / kernel:.1f} times. `make bench` compares it with the released code and torch.compile.

An epoch over the training scenes: {cached:.2f} s on cached embeddings, {encoded:.1f} s with the encoder in the loop: \
{encoded / cached:.0f} times."""
