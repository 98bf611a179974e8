"""Pretraining of ALBEF and BLIP on captioned images, resumable bit for bit.

AdamW; the learning rate rises over the first epoch and falls to zero along a cosine. An epoch visits every image once,
with random ones of its captions. A run directory holds

    last.pt             what a run resumes from: weights, the teacher with its queue, optimiser, random states
    model.safetensors   after the last epoch, with transformers' tokenizer.json beside it, for `Pretrained.load`
    history.json        the loss of every step and epoch, and the mean of each of the losses in every epoch

each replaced in one step. Source: ALBEF (Li et al., NeurIPS 2021); BLIP (Li et al., ICML 2022).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import RandAugment
from transformers import PreTrainedTokenizerBase

from fastprob.data.captions import captions_of
from fastprob.data.pairs import Owned
from fastprob.data.pixels import ImagesOf, Pixels
from fastprob.encoders.encoder import digest_of
from fastprob.encoders.towers import augmented
from fastprob.pretraining.config import MODEL, PRECISIONS, PretrainConfig, Pretrained, build
from fastprob.pretraining.text import Texts
from fastprob.pretraining.tokens import words_of
from fastprob.pretraining.towers import Teacher
from fastprob.training import Run, average, cosine, own_random_state, seed_all, seed_of, share

_RAMP = 2
"""Epochs over which alpha rises, as in BLIP."""


def fit(
    data: Any,
    *,
    config: PretrainConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    start: Pretrained | None = None,
    directory: str | os.PathLike | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    workers: int = 0,
    progress: bool = True,
) -> tuple[Pretrained, dict]:
    """Train ALBEF or BLIP on captioned images.

    Args:
        data: of `fastprob.data.open_dataset`; every image has a caption.
        config: defaults to `PretrainConfig()`.
        tokenizer: of transformers; by default one of the captions' words, see `words_of`.
        start: of the same objective and size, whose weights and tokenizer the run begins with.
        directory: where checkpoints and history go, replacing an earlier run's; None writes nothing.
        resume: go on from `directory`/last.pt. The result equals an uninterrupted run's bit for bit.
        device: defaults to CUDA where there is one.
        workers: processes that read images; progress: show a progress bar.

    Returns:
        The model, in evaluation mode, and the content of history.json.

    Ctrl-C stops after the current step, leaving a last.pt to resume from; a second one stops at once. The caller's
    random state is left as it was.

    Raises:
        ValueError: unusable data, or a checkpoint of another config or other data; the field is named.
        FileNotFoundError: `resume` without a last.pt.
        FloatingPointError: the loss became NaN or infinite.
    """
    config = config or PretrainConfig()
    if resume and directory is None:
        raise ValueError("fit: resume needs the directory of the run, got None")
    captions = captions_of(data)
    if not captions:
        raise ValueError("fit: data must have at least one image, got none")
    bare = next((image for image, own in enumerate(captions) if not own), None)
    if bare is not None:
        raise ValueError(f"fit: data must have a caption of every image, image {bare} has none")
    if start is not None:
        tokenizer = _tokenizer_of(start, config, tokenizer)
    tokenizer = tokenizer or words_of(caption for own in captions for caption in own)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with own_random_state(device):
        run = _Run(config, data, captions, tokenizer, start, directory, device, workers)
        run.train(resume=resume, progress=progress)
    run.made.model.eval()
    if run.writes and not (run.directory / MODEL).exists():
        run.made.save(run.directory)
    return run.made, run.history


def _tokenizer_of(
    start: Pretrained, config: PretrainConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    if tokenizer is not None:
        raise ValueError("fit: tokenizer must be None with start, which has its own")
    for name in ("objective", "size", "model"):
        ours, theirs = getattr(config, name), getattr(start.config, name)
        if ours != theirs:
            raise ValueError(f"fit: start must have {name} {ours!r}, got {theirs!r}")
    return start.model.tokenizer


class _Sums(nn.Module):
    """Of this epoch's losses, each by itself."""

    total: Tensor

    def __init__(self, losses: int):
        super().__init__()
        self.register_buffer("total", torch.zeros(losses))


class _Run(Run):
    def __init__(
        self,
        config: PretrainConfig,
        data: Any,
        captions: list[list[str]],
        tokenizer: PreTrainedTokenizerBase,
        start: Pretrained | None,
        directory: str | os.PathLike | None,
        device: torch.device,
        workers: int,
    ):
        seed_all(config.seed, device)
        self.config, self.data = config, data
        self.made = build(config, tokenizer)
        model = self.made.model.to(device)
        if start is not None:
            model.load_state_dict(start.model.state_dict())
        self.start_from = None if start is None else digest_of(start.model).hexdigest()
        self.teacher = Teacher(model.towers, config.queue, momentum=config.momentum, seed=config.seed).to(device)
        names = model.names
        self.chosen = names if config.losses == "all" else config.losses.split(",")
        self.sums = _Sums(len(names)).to(device)
        self.pixels = Pixels(ImagesOf(data), self.made.preprocess, workers=workers)
        self.texts = [caption for own in captions for caption in own]
        counts = torch.tensor([len(own) for own in captions])
        self.of = Owned(torch.arange(len(captions)).repeat_interleave(counts), len(captions))
        steps = math.ceil(len(captions) / config.batch_size)
        super().__init__(
            format="fastprob.pretraining.training/2",
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True),
            rate=lambda step: _rate(step, steps, config.epochs * steps),
            epochs=config.epochs,
            steps=steps,
            directory=directory,
            extras={"teacher": self.teacher, "sums": self.sums},
        )
        self.history["losses"] = {name: [] for name in names}
        model.train()

    def start(self) -> None:
        if self.directory is not None:
            (self.directory / MODEL).unlink(missing_ok=True)  # an earlier run's
        super().start()

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """Images [I, 3, H, W], their texts, and the images' numbers [I]."""
        image, caption = self.of.epoch(seed_of(self.config.seed, self.epoch), self.config.captions)
        whole = list(zip(image.split(self.config.batch_size), caption.split(self.config.batch_size)))[self.step :]
        shares = [share(rows) for rows, _ in whole]
        for (_, captions), rows, pixels in zip(whole, shares, self._read(shares)):
            texts = self.model.tokenize([self.texts[i] for i in captions.flatten().tolist()])  # as long on every rank
            yield pixels.to(self.device), texts.map(partial(share, run=self.config.captions)), rows.to(self.device)

    def _read(self, batches: list[Tensor]) -> Iterator[Tensor]:
        if not self.config.augment:
            return self.pixels.read(batches)
        then = [RandAugment(num_ops=2, magnitude=5)]
        transform = augmented(self.made.preprocess, self.pixels.size, least=0.5, then=then)
        return self.pixels.load(batches, transform, seed_of(self.config.seed, self.epoch))

    def loss(self, pixels: Tensor, texts: Texts, rows: Tensor) -> Tensor:
        step = self.epoch * self.steps + self.step
        alpha = self.config.alpha * min(1.0, step / (_RAMP * self.steps))
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            seed = seed_of(self.config.seed, step)
            losses = self.model.losses(pixels, texts, rows, self.teacher, alpha=alpha, seed=seed)
        self.sums.total += torch.stack([loss.detach().float() for loss in losses.values()])
        return torch.stack([losses[name].float() for name in self.chosen]).sum()  # others' weights have no gradient

    def epoch_ended(self, train_loss: float) -> None:
        total = self.sums.total / self.steps
        average([total])
        for name, loss in zip(self.made.model.names, total.tolist()):
            self.history["losses"][name].append(loss)
        self.sums.total.zero_()

    def identity(self) -> dict[str, Any]:
        words = hashlib.sha256(json.dumps(sorted(self.model.tokenizer.get_vocab().items())).encode()).hexdigest()
        texts = hashlib.sha256(json.dumps([self.texts, self.of.count.tolist()]).encode()).hexdigest()
        files = self.data.digests() if hasattr(self.data, "digests") else {}
        own = {"tokens": words, "start": self.start_from}
        return {**asdict(self.config), **own, "data": {"name": self.data.name, "captions": texts, **files}}


def _rate(step: int, steps: int, all_steps: int) -> float:
    """Share of the learning rate: an epoch's straight way up, then the cosine."""
    return min((step + 1) / steps, 1.0) * cosine(step / all_steps)
