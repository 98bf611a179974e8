"""Speed as the demo measures it: the loss by kernel and by reference, an epoch without and with the frozen encoder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

import fastprob
from fastprob.adapters import ProbVLM
from fastprob.data.digitscenes import LEVELS, DigitScenes
from fastprob.data.store import EmbeddingStore
from fastprob.encoders import Encoder

SHAPE = (1024, 512)  # of the loss: a batch of ViT-B-32 embeddings
BATCH = 256  # of an epoch
BACKENDS = {"fastprob": nullcontext, "its PyTorch reference": partial(fastprob.backend, "reference")}


def loss_times(rounds: int = 15) -> dict[str, float]:
    """Milliseconds of probvlm_loss forward and backward at `SHAPE`, float32: the median of interleaved rounds."""
    torch.manual_seed(0)
    ranges = (0, 1), (0.3, 2), (0.3, 2)  # of mu, 1/alpha, beta
    parameters = [torch.empty(SHAPE).uniform_(low, high).requires_grad_() for low, high in ranges * 2]
    targets = [torch.randn(SHAPE) * SHAPE[1] ** -0.5 for _ in range(2)]
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for warm_up in (True, True, *[False] * rounds):
        for name, backend in BACKENDS.items():
            with backend():
                start = time.perf_counter()
                torch.autograd.grad(fastprob.probvlm_loss(*parameters, *targets), parameters)
                seconds = time.perf_counter() - start
            if not warm_up:
                times[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def epoch_times(encoder: Encoder, scenes: DigitScenes, store: EmbeddingStore) -> dict[str, float]:
    """Seconds of an epoch over the scenes with a caption each: on cached embeddings, and with the encoder run anew."""
    images = torch.stack([encoder.preprocess(image) for image, _ in scenes])  # [N, 3, H, W]
    tokens = encoder.tokenizer(scenes.captions[::LEVELS])  # [N, L]

    def cached(rows: Tensor) -> tuple[Tensor, Tensor]:
        return store.image[rows], store.text[rows * LEVELS]

    def encoded(rows: Tensor) -> tuple[Tensor, Tensor]:
        return encoder.encode_image(images[rows]), encoder.encode_text(tokens[rows])

    ways = {"cached embeddings": cached, "encoder in the loop": encoded}
    return {name: _epoch(embeddings, len(scenes), encoder.dim) for name, embeddings in ways.items()}


def _epoch(embeddings: Callable[[Tensor], tuple[Tensor, Tensor]], count: int, dim: int) -> float:
    torch.manual_seed(0)
    model = ProbVLM(dim)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    start = time.perf_counter()
    for rows in torch.randperm(count).split(BATCH):
        image, text = embeddings(rows)
        of_image, of_text = model(image, text)
        optimizer.zero_grad()
        fastprob.probvlm_loss(*of_image, *of_text, image, text).backward()
        optimizer.step()
    return time.perf_counter() - start
