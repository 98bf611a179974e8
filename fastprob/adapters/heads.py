"""Heads that learn a Gaussian around a frozen embedding from pairs alone, after PFE and PCME++.

PFE: the mean is the embedding x, a head learns the variances s, by the mutual likelihood score of pairs:

    L = mean over pairs and dimensions of 1/2 ((x - y)^2 / (s_x + s_y) + log(s_x + s_y) + log 2 pi)

which is -log of the integral of the product of the two Gaussians. PCME++: a head moves the mean as well, and all pairs
of a batch are told apart by the expected squared distance of draws, `fastprob.csd`, with scale a and shift b learnt:

    d = |m_x - m_y|^2 + sum (s_x + s_y),    L = mean over all pairs of BCE(sigmoid(b - a d), is it a pair)

without that paper's pseudo-positives, mixed samples and KL term. The score of both is the variance, mean over D.
Sources: Shi and Jain, Probabilistic Face Embeddings, ICCV 2019, eq. 3 and 5; Chun, Improved probabilistic image-text
representations, ICLR 2024, eq. 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprob
from fastprob.adapters.error import SIDES
from fastprob.adapters.rivals import Method, Scores
from fastprob.data.pairs import Paired, Pairs, check_paired
from fastprob.training import Run, cosine, own_random_state, seed_all

START = 5.0  # scale and shift of PCME++ before training, as released


class Head(nn.Module):
    """An embedding to the mean and variance of a Gaussian: [..., D] -> two of [..., D].

    The mean starts at the embedding, and stays there unless `moves`; the variance starts near 1/D, that of a coordinate
    of random unit vectors.
    """

    def __init__(self, dim: int, hidden: int, moves: bool):
        super().__init__()
        self.log_variance = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        nn.init.constant_(self.log_variance[-1].bias, -math.log(dim))
        self.move = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) if moves else None
        if self.move is not None:
            nn.init.zeros_(self.move[-1].weight)
            nn.init.zeros_(self.move[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x if self.move is None else F.normalize(x + self.move(x), dim=-1)
        return mean, self.log_variance(x).exp()


class _Heads(nn.Module):
    """Heads of images and of texts; a subclass says the `loss` of image [B, D] and text [B, D]."""

    def __init__(self, dim: int, hidden: int, moves: bool):
        super().__init__()
        self.image, self.text = Head(dim, hidden, moves), Head(dim, hidden, moves)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        raise NotImplementedError


class PFE(_Heads):
    """Variances alone, trained by the mutual likelihood score."""

    def __init__(self, dim: int, hidden: int = 256):
        super().__init__(dim, hidden, moves=False)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Of pairs, [B, D] each: a scalar."""
        (mean, variance), (other, other_variance) = self.image(image), self.text(text)
        return F.gaussian_nll_loss(mean, other, variance + other_variance, full=True, eps=1e-12)


class PCME(_Heads):
    """Means and variances, trained to tell pairs from the other pairs of a batch."""

    def __init__(self, dim: int, hidden: int = 256):
        super().__init__(dim, hidden, moves=True)
        self.log_scale, self.shift = nn.Parameter(torch.tensor(math.log(START))), nn.Parameter(torch.tensor(START))

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Of pairs, [B, D] each: a scalar."""
        logits = self.shift - self.log_scale.exp() * fastprob.csd(*self.image(image), *self.text(text))  # [B, B]
        return F.binary_cross_entropy_with_logits(logits, torch.eye(len(image), device=image.device))


@dataclass(frozen=True)
class Heads:
    """The scorer of trained heads: "variance", the mean over D."""

    model: PFE | PCME

    @torch.no_grad()
    def __call__(self, data: Paired, captions: Sequence[str] | None = None) -> Scores:
        return {"variance": {side: getattr(self.model, side)(getattr(data, side).float())[1].mean(1) for side in SIDES}}


def heads(
    kind: type[PFE] | type[PCME], *, epochs: int = 50, batch_size: int = 256, lr: float = 1e-3, hidden: int = 256
) -> Method:
    """The method that trains `PFE` or `PCME` heads on the CPU, by Adam and a cosine to zero, as `fit` an adapter."""

    def method(train: Paired, validation: Paired, seed: int = 0, captions: Sequence[str] | None = None) -> Heads:
        check_paired("heads: train", train)
        pairs = Pairs(train, torch.device("cpu"))
        with own_random_state(pairs.device):
            seed_all(seed, pairs.device)
            run = _HeadRun(kind(pairs.dim, hidden), pairs, seed, epochs, batch_size, lr)
            run.train(resume=False, progress=False)
        return Heads(run.model.eval())

    return method


class _HeadRun(Run):
    """Training of heads, in memory."""

    def __init__(self, model: PFE | PCME, pairs: Pairs, seed: int, epochs: int, batch_size: int, lr: float):
        steps = math.ceil(pairs.images / batch_size)
        super().__init__(
            format="",
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=lr, fused=True),
            rate=lambda step: cosine(step / (epochs * steps)),
            epochs=epochs,
            steps=steps,
            directory=None,
        )
        self.pairs, self.seed, self.batch_size = pairs, seed, batch_size

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.pairs.epoch(self.seed, self.epoch, self.batch_size, self.step)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return self.model.loss(image, text)
