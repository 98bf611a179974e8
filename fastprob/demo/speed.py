"""What the demo measures of speed: the loss alone, and a whole epoch, each against eager code in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastprob
from fastprob.adapters import ProbVLM
from fastprob.demo import eager

SHAPE = (1024, 512)  # of the loss: a batch of ViT-B-32 embeddings


def loss_times(rounds: int = 15) -> dict[str, float]:
    """Milliseconds of probvlm_loss forward and backward at `SHAPE`, float32: the median of interleaved rounds."""
    torch.manual_seed(0)
    image, text = ([_leaf(0, 1), _leaf(0.3, 2), _leaf(0.3, 2)] for _ in range(2))
    targets = [torch.randn(SHAPE) * SHAPE[1] ** -0.5 for _ in range(2)]
    compiled = torch.compile(eager.best_loss)
    losses: dict[str, Callable[[], Tensor]] = {
        "fastprob": lambda: fastprob.probvlm_loss(*image, *text, *targets),
        "eager as released": lambda: eager.released_loss(image, text, *targets),
        "eager, the paper's form": lambda: eager.released_loss(image, text, *targets, power=True),
        "eager, best formulation": lambda: eager.best_loss(image, text, *targets),
        "torch.compile": lambda: compiled(image, text, *targets),
    }
    times: dict[str, list[float]] = {name: [] for name in losses}
    for warm_up in (True, True, *[False] * rounds):
        for name, loss in losses.items():
            for leaf in (*image, *text):
                leaf.grad = None
            start = time.perf_counter()
            loss().backward()
            if not warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def epoch_times(encoder, dataset, store, batch_size: int = 256) -> dict[str, float]:
    """Seconds of an epoch over `dataset`: cached embeddings with the fused loss, and the released script's way.

    The released way runs the frozen encoder on every batch and computes the loss in eager code with its NaN checks.
    Both train the same adapter with the same optimiser on one caption an image.
    """
    images = torch.stack([encoder.preprocess(dataset[i][0]) for i in range(len(dataset))])  # [N, 3, H, W]
    tokens = encoder.tokenizer(dataset.captions[:: len(dataset.captions) // len(dataset)])  # [N, L]

    def cached(rows):
        return store.image[rows], store.text[rows * 5]

    def encoded(rows):
        return encoder.encode_image(images[rows]), encoder.encode_text(tokens[rows])

    def fused(image, text, z_image, z_text):
        return fastprob.probvlm_loss(*image, *text, z_image, z_text)

    def released(image, text, z_image, z_text):
        return eager.released_loss(image, text, z_image, z_text)

    return {
        "cached embeddings, fused loss": _epoch(cached, fused, len(dataset), encoder.dim, batch_size),
        "encoder in the loop, eager loss": _epoch(encoded, released, len(dataset), encoder.dim, batch_size),
    }


def _epoch(embeddings: Callable, loss: Callable, count: int, dim: int, batch_size: int) -> float:
    torch.manual_seed(0)
    model = ProbVLM(dim)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    start = time.perf_counter()
    for rows in torch.randperm(count).split(batch_size):
        z_image, z_text = embeddings(rows)
        value = loss(*model(z_image, z_text), z_image, z_text)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return time.perf_counter() - start


def _leaf(low: float, high: float) -> Tensor:
    return torch.empty(SHAPE).uniform_(low, high).requires_grad_()
