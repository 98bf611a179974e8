"""Closed-form sampled distance of N and M Gaussian embeddings: the expected squared distance of draws from each two.

    d_ij = |mean_i - other_mean_j|^2 + sum_d (variance_id + other_variance_jd)

The first term is |x|^2 + |y|^2 - 2 x y with x and y the means less the mean of them all, which changes no difference
and makes the terms that cancel as small as they get. With g the gradient, that of mean_i is 2 sum_j g_ij (x_i - y_j):
one product more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _pairs
from fastprob.ops._maths import wide


def _check(**tensors):
    _pairs.check_sides("csd", tensors, ("mean", "variance"), ("other_mean", "other_variance"))


def _inputs(make, rows, columns, dim):
    variances = {"low": 0, "high": 1}
    return make(rows, dim), make(rows, dim, **variances), make(columns, dim), make(columns, dim, **variances)


def _centred(mean: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The points less the mean of them all, where that is finite."""
    centre = (mean.sum(dim=0) + other.sum(dim=0)) / max(mean.shape[0] + other.shape[0], 1)
    centre = torch.where(centre.isfinite(), centre, 0)
    return mean - centre, other - centre


def _squared_norm(x: Tensor) -> Tensor:
    squares = torch.linalg.vecdot(x, x)
    return torch.where(squares.isfinite(), squares, torch.nan)


def _gradient(grad, mean, variance, other_mean, other_variance):
    grad, mean, variance, other_mean, other_variance = wide(grad, mean, variance, other_mean, other_variance)
    x, y = _centred(mean, other_mean)
    rows, columns = grad.sum(dim=1, keepdim=True), grad.sum(dim=0)[:, None]
    grad_x, grad_y = 2 * (x * rows - grad @ y), 2 * (y * columns - grad.T @ x)
    return grad_x, rows.expand_as(variance), grad_y, columns.expand_as(other_variance)


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    sizes=((0, 2, 4), (2, 0, 3), (1, 1, 1), (3, 7, 5), (65, 40, 129)),
    bench_sizes=((1024, 1024, 512),),
    elementwise=False,
)
def csd(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Closed-form sampled distance, pairwise: |mean_i - other_mean_j|^2 + sum_d (variance_i + other_variance_j).

    It is the expectation of |X_i - Y_j|^2 for independent X_i and Y_j of any distributions with these means and
    variances. By a matrix product: memory is of the size of the inputs and the result, and the error some epsilon of
    the dtype times the squared distance of the two from the mean of all.

    Args:
        mean, variance: [N, D]; float64, float32, bfloat16 or float16. Variances are not checked for their sign.
        other_mean, other_variance: [M, D].

    Returns:
        [N, M], in squared units of the means, whose squares have to be in the dtype's range. NaN where a mean is NaN or
        infinite.

    Raises:
        ValueError: for tensors of other shapes, or that differ in dtype or device.

    Source:
        Chun, Improved probabilistic image-text representations (PCME++), ICLR 2024, eq. 1.
    """
    dtype = mean.dtype
    mean, variance, other_mean, other_variance = wide(mean, variance, other_mean, other_variance)
    x, y = _centred(mean, other_mean)
    squares = _squared_norm(x)[:, None] + _squared_norm(y)
    distance = torch.addmm(squares, x, y.T, alpha=-2).clamp_min_(0)
    return distance.add_(variance.sum(dim=1, keepdim=True)).add_(other_variance.sum(dim=1)).to(dtype)
