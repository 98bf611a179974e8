"""Laplace approximation of a frozen encoder's last projection, without training (BayesVLM).

An encoder ends in g = P f, features f [W] to an embedding [D], whose direction is compared with the other side's. The
posterior of the weights P under the contrastive loss, with a prior of precision l, is approximated by a Gaussian around
them whose covariance is a Kronecker product, so that the embedding of features f is a Gaussian, too:

    A = sqrt(n) mean f f^T + sqrt(l) I     [W, W]
    B = sqrt(n) mean J^T H J + sqrt(l) I   [D, D]
    g ~ N(P f, (f^T A^-1 f) B^-1)

with J = (I - u u^T) / |g| the derivative of the direction u = g / |g|, H = a^2 sum_j p_j (y_j - m)(y_j - m)^T the
second derivative of -log softmax_j(a u^T y_j) for the other side's unit embeddings y_j, p the softmax and m = sum p_j
y_j; means are over the n training features. The precision l is the one of the greatest marginal likelihood,

    1/2 (W D log l - l |P|^2 - D log det A - W log det B)

of `PRECISIONS`. With v the diagonal of the covariance and E|g|^2 = sum mean^2 + v, the cosine of two embeddings has

    expectation   sum mean_d mean'_d / sqrt(E|g|^2 E|g'|^2)
    variance      sum (v_d (v'_d + mean'_d^2) + v'_d mean_d^2) / (E|g|^2 E|g'|^2)

Source: Baumann et al., Post-hoc Probabilistic Vision-Language Models, arXiv 2412.06014, 2024, sections 3.2 and 3.3, and
the authors' released code, whose number of pseudo-data is the n here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

PRECISIONS = tuple(10.0**i for i in range(-3, 7))
_ROWS = 1024  # of features whose softmax [rows, C] is held at a time


@dataclass(frozen=True)
class LaplaceProjection:
    """The Gaussian of a projection's weights; see the top of this module."""

    weight: Tensor  # [D, W]
    inverse_a: Tensor  # [W, W]
    inverse_b: Tensor  # [D, D]
    precision: float

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the embeddings before their normalisation, two of [N, D] float64, of features [N, W]."""
        features = features.double()
        spread = ((features @ self.inverse_a) * features).sum(1, keepdim=True)  # [N, 1]
        return features @ self.weight.T, spread * self.inverse_b.diagonal()


def fit_laplace(features: Tensor, weight: Tensor, other: Tensor, scale: float) -> LaplaceProjection:
    """The approximation for one side of a model; a bias is a column of `weight` whose feature is always 1.

    Args:
        features: training features [n, W] before the projection.
        weight: of the projection, [D, W].
        other: embeddings of the other side that these are told apart from, [C, D].
        scale: a, what the model multiplies cosines by in its loss.

    Raises:
        ValueError: shapes that don't fit.
    """
    shapes = tuple(features.shape), tuple(weight.shape), tuple(other.shape)
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"fit_laplace: features, weight and other must be [n, W], [D, W], [C, D], got {shapes}")
    if shapes[1][0] != shapes[2][1]:
        raise ValueError(f"fit_laplace: features, weight and other must be [n, W], [D, W], [C, D], got {shapes}")
    features, weight, other = features.double(), weight.double(), normalize(other.double(), dim=1)
    root = len(features) ** 0.5
    a = features.T @ features / root
    b = sum(_curvature(rows @ weight.T, other, scale) for rows in features.split(_ROWS)) / root
    precision = max(PRECISIONS, key=lambda each: _marginal(weight, a, b, each))
    return LaplaceProjection(weight, _damped(a, precision).inverse(), _damped(b, precision).inverse(), precision)


def _curvature(embedding: Tensor, other: Tensor, scale: float) -> Tensor:
    """Sum of J^T H J over embeddings [B, D] before their normalisation: [D, D], without any of their H [D, D].

    With w = (a / |g|)^2 and h = H u / a^2, it is the sum of w (H / a^2 - u h^T - h u^T + u (u h) u^T).
    """
    norm = embedding.norm(dim=1, keepdim=True)
    unit, weight = embedding / norm, (scale / norm) ** 2  # [B, D], [B, 1]
    cosine = unit @ other.T  # [B, C]
    p = (scale * cosine).softmax(1)
    mean = p @ other  # [B, D]
    along = (p * cosine) @ other - mean * (mean * unit).sum(1, keepdim=True)  # h
    whole = other.T @ ((weight * p).sum(0)[:, None] * other) - mean.T @ (weight * mean)
    cross = unit.T @ (weight * along)
    both = unit.T @ (weight * (unit * along).sum(1, keepdim=True) * unit)
    return whole - cross - cross.T + both


def _damped(factor: Tensor, precision: float) -> Tensor:
    return factor + precision**0.5 * torch.eye(len(factor), dtype=torch.float64)


def _marginal(weight: Tensor, a: Tensor, b: Tensor, precision: float) -> float:
    """Log marginal likelihood but for a constant."""
    determinants = len(b) * _damped(a, precision).logdet() + len(a) * _damped(b, precision).logdet()
    prior = weight.numel() * torch.tensor(precision).log() - precision * weight.square().sum()
    return float(prior - determinants) / 2


def cosine_moments(mean: Tensor, variance: Tensor, other: Tensor, other_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Expectation and variance of the cosine of N and M Gaussian embeddings: two of [N, M], of [N, D] and [M, D]."""
    square, other_square = mean.square(), other.square()
    norms = (square + variance).sum(1)[:, None] * (other_square + other_variance).sum(1)  # [N, M]
    spread = variance @ (other_variance + other_square).T + square @ other_variance.T
    return mean @ other.T / norms.sqrt(), spread / norms
