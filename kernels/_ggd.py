"""The generalised Gaussian per element: the maths stands in fastprob/ops/_ggd.py.

Every selection is written so that a NaN fails its comparison and stays; tl.minimum and tl.maximum would drop it.
"""

import triton
import triton.language as tl

from fastprob.kernels import _maths


@triton.jit
def shape_of(inv_alpha, beta, eps, FAST: tl.constexpr):
    """A distribution's part that no target enters: a, b, 1/a, stirling, p and the gradient of lgamma(1 + 1/b) for b.

    The normaliser is stirling - log p - log a. Outside the domain a and b are NaN.
    """
    a, b = inv_alpha + eps, beta + eps
    a, b = tl.where(a >= 0, a, _maths.NAN), tl.where(b > 0, b, _maths.NAN)
    y = _maths.reciprocal(b)
    stirling, p, digamma = _maths.gamma1p(y, FAST)
    return a, b, _maths.reciprocal(a), stirling, p, -digamma * y * y


@triton.jit
def residual(d, a, b, inv_a, clamp_min, clamp_max, PAPER: tl.constexpr, FAST: tl.constexpr):
    """The clamped residual t of a difference d = mu - z, and its derivatives for d, a and b."""
    r = tl.abs(d)
    if PAPER:
        t, log_u = _maths.power(r, _maths.factor(a, FAST), b, FAST)
        tie = (log_u == -_maths.INF) | (t == 0)  # or an infinite b, times which 0 is NaN
        fixed = (t < clamp_min) | (t > clamp_max) | tie
        bt = b * t
        grad_d, grad_a, grad_b = bt / d, bt * inv_a, t * log_u
    else:
        u = r * a
        t = u * b
        fixed = (t < clamp_min) | (t > clamp_max)
        ab = a * b
        grad_d, grad_a, grad_b = tl.where(d < 0, -ab, tl.where(d > 0, ab, d * ab)), r * b, u
    grad_d, grad_a = tl.where(fixed, 0.0, grad_d), tl.where(fixed, 0.0, grad_a)
    t = tl.where(t < clamp_min, clamp_min, tl.where(t > clamp_max, clamp_max, t))
    return t, grad_d, grad_a, tl.where(fixed, 0.0, grad_b)


@triton.jit
def variance(inv_alpha, beta, FAST: tl.constexpr):
    """alpha^2 Gamma(3/beta) / Gamma(1/beta) and its derivatives for inv_alpha and beta."""
    a, b = tl.where(inv_alpha >= 0, inv_alpha + 0.0, _maths.NAN), tl.where(beta > 0, beta, _maths.NAN)  # -0 + 0 is 0
    y = _maths.reciprocal(b)
    stirling1, p1, digamma1 = _maths.gamma1p(y, FAST)
    stirling3, p3, digamma3 = _maths.gamma1p(3 * y, FAST)
    one = tl.full(a.shape, 1.0, a.dtype)
    # lgamma(1 + 3y) - lgamma(1 + y) - log 3 - 2 log a, with one logarithm of p1 / (3 p3)
    logs = _maths.log_normal(p1 * _maths.reciprocal(3 * p3), FAST) - 2 * _maths.log_product(a, one, one, one, FAST)
    value = _maths.exponential((stirling3 - stirling1) + logs, FAST)
    return value, -2 * value * _maths.reciprocal(a), value * y * y * (digamma1 - 3 * digamma3)
