"""Few-shot training of prompts: CoOp, CoCoOp, VPT and DAPT, with the released schedule, resumable bit for bit.

SGD with momentum 0.9 and weight decay 5e-4; the first epoch at a learning rate of 1e-5, then along a cosine by epochs.
Unlike the released code, an epoch keeps its last, smaller batch, and DAPT's prototypes are of the images as they are,
not of random crops.

What nothing trained can change is computed once: features of the images where the image side is not tuned and nothing
is augmented, preprocessed images, DAPT's prototypes. A run directory holds

    last.pt              what a run resumes from
    prompt.safetensors   what was tuned, after the last epoch, for `Tuned.load`
    history.json         the loss of every step and epoch

each replaced in one step. Source: the code released with CoOp (IJCV 2022), CoCoOp (CVPR 2022) and DAPT (ICCV 2023).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprob.data.labelled import LabelledImages
from fastprob.encoders import Encoder
from fastprob.prompts.config import PromptConfig, Tuned, autocast, build
from fastprob.prompts.inputs import Inputs
from fastprob.prompts.methods import prototypes
from fastprob.training import Run, cosine, own_random_state, seed_all, seed_of, share

CHECKPOINT = "prompt.safetensors"
_WARM_UP_LR = 1e-5
_SCALE = 2.0**10
"""Of the loss in float16, to begin with: torch's own, 2^16, skips the first steps, and a run of one shot has fifty."""


def fit(
    data: LabelledImages,
    encoder: Encoder,
    *,
    config: PromptConfig | None = None,
    directory: str | os.PathLike | None = None,
    resume: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> Tuned:
    """Tune the prompts of `config.method` on `config.shots` images of every class of `data`.

    Args:
        data: labelled images, one or more of every class.
        encoder: frozen; the run takes place on its device.
        config: defaults to `PromptConfig()`.
        directory: where checkpoints and history go, replacing an earlier run's; None writes nothing.
        resume: go on from `directory`/last.pt. The result equals an uninterrupted run's bit for bit.
        workers: processes that read images; progress: show a progress bar.

    Ctrl-C stops after the current step, leaving a last.pt to resume from; a second one stops at once. The caller's
    random state is left as it was.

    Raises:
        ValueError: unusable data or options, or a checkpoint of another run; the field is named.
        FileNotFoundError: `resume` without a last.pt.
        FloatingPointError: the loss became NaN or infinite.
    """
    config = config or PromptConfig()
    if resume and directory is None:
        raise ValueError("fit: resume needs the directory of the run, got None")
    config = replace(config, template=config.template or data.template)
    data = data.of_classes(config.classes)
    counts = torch.bincount(data.labels, minlength=len(data.classnames))
    if not counts.all():
        missing = data.classnames[int((counts == 0).nonzero()[0])]
        raise ValueError(f"fit: data must have an image of every class, got none of {missing!r}")
    data = data.few_shot(config.shots, config.seed)
    inputs = Inputs(data, encoder, workers=workers, augment=config.augment, progress=progress)
    with own_random_state(encoder.device):
        run = _Run(config, inputs, None if directory is None else Path(directory))
        run.train(resume=resume, progress=progress)
    tuned = run.tuned()
    if run.writes and not (run.directory / CHECKPOINT).exists():
        tuned.save(run.directory / CHECKPOINT)
    return tuned


class _Run(Run):
    def __init__(self, config: PromptConfig, inputs: Inputs, directory: Path | None):
        seed_all(config.seed, inputs.encoder.device)
        self.config, self.inputs = config, inputs
        self.fingerprints = {"images": inputs.data.fingerprint(), "encoder": inputs.encoder.fingerprint()}
        model = build(config, inputs.encoder, inputs.data.classnames)
        shots = int(torch.bincount(inputs.data.labels).max())
        epochs = released_epochs(shots) if config.epochs is None else config.epochs
        steps = math.ceil(len(inputs) / config.batch_size)
        self.prototypes = None
        if config.method == "dapt":
            self.prototypes = prototypes(inputs.features, inputs.labels, len(inputs.data.classnames))
        super().__init__(
            format="fastprob.prompts.training/2",
            model=model,
            # not fused: a first step that the scaler skips leaves fused SGD's momentum uninitialised
            optimizer=torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=5e-4),
            rate=lambda step: _rate(step // steps, epochs, config.lr),
            epochs=epochs,
            steps=steps,
            directory=directory,
            scaler=torch.amp.GradScaler(inputs.encoder.device.type, _SCALE, enabled=config.precision == "amp"),
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = seed_of(self.config.seed, self.epoch)
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(seed))
        batches = [share(rows) for rows in order.split(self.config.batch_size)[self.step :]]
        if self.config.tunes_images or self.config.augment:
            return zip(self.inputs.images(batches, seed), (self.inputs.labels[rows] for rows in batches))
        return ((self.inputs.features[rows], self.inputs.labels[rows]) for rows in batches)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """images [B, 3, H, W] or features [B, D]; labels [B]."""
        with autocast(self.config, self.device):
            if self.prototypes is not None:
                return self.model.loss(images, labels, self.prototypes)
            return F.cross_entropy(self.model(images), labels)

    def start(self) -> None:
        if self.directory is not None:
            (self.directory / CHECKPOINT).unlink(missing_ok=True)  # an earlier run's
        super().start()

    def tuned(self) -> Tuned:
        inputs = self.inputs
        return Tuned(self.model.eval(), self.config, inputs.encoder, list(inputs.data.classnames), self.history)

    def identity(self) -> dict:
        return {**asdict(self.config), "classnames": self.inputs.data.classnames, **self.fingerprints}


def released_epochs(shots: int) -> int:
    """Passes over the images, by how many there are of a class."""
    return next(epochs for most, epochs in ((1, 50), (4, 100), (math.inf, 200)) if shots <= most)


def _rate(epoch: int, epochs: int, lr: float) -> float:
    """Share of the learning rate in an epoch: one of warm-up, then the cosine from its start, as released."""
    return _WARM_UP_LR / lr if epoch == 0 else cosine((epoch - 1) / epochs)
