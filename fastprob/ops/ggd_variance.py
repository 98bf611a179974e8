"""Variance of a generalised Gaussian, in the log domain: alpha^2 Gamma(3y) / Gamma(y) with y = 1/beta.

log variance = lgamma(1 + 3y) - lgamma(1 + y) - log 3 - 2 log inv_alpha: the poles of Gamma(3y) and Gamma(y) at y = 0
cancel (beta -> infinity is the uniform distribution, alpha^2 / 3), and the ratio of two overflowing Gammas is never
formed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _ggd, _maths


def _inputs(make, *shape):
    return _ggd.distribution(make, *shape)[1:]


def _gradient(grad, inv_alpha, beta):
    grad, inv_alpha, beta = _maths.wide(grad, inv_alpha, beta)
    a, b = _ggd.shifted(inv_alpha, beta, 0.0)
    variance = _variance(a, b)
    slope = (torch.digamma(1 + 1 / b) - 3 * torch.digamma(1 + 3 / b)) / b.square()
    return -2 * grad * variance / a, grad * variance * slope


def _variance(a: Tensor, b: Tensor) -> Tensor:
    return (torch.lgamma(1 + 3 / b) - torch.lgamma(1 + 1 / b) - math.log(3) - 2 * a.log()).exp()


@operator(gradient=_gradient, check=lambda **_: None, inputs=_inputs)
def ggd_variance(inv_alpha: Tensor, beta: Tensor) -> Tensor:
    """Variance of a generalised Gaussian: alpha^2 Gamma(3/beta) / Gamma(1/beta), elementwise.

    Finite wherever the true value is: neither Gamma is formed.

    Args:
        inv_alpha: 1/alpha >= 0; beta: the shape > 0. Of one shape, or that broadcast to one; float64, float32,
            bfloat16 or float16. Outside the domain the result is NaN; for inv_alpha = 0 it is infinite.

    Returns:
        The variances, in squared units of alpha.

    Raises:
        ValueError: for tensors that differ in dtype or device or do not broadcast.

    Source:
        Nadarajah, A generalized normal distribution, J. Appl. Stat. 32 (2005), eq. 11; ProbVLM (ICCV 2023), eq. 7.
    """
    dtype = inv_alpha.dtype
    inv_alpha, beta = _maths.wide(inv_alpha, beta)
    return _variance(*_ggd.shifted(inv_alpha, beta, 0.0)).to(dtype)
