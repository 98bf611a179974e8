"""The generalised Gaussian in torch code: what the references of its operators share.

With a = inv_alpha + eps, b = beta + eps and r = |mu - z|, the negative log-likelihood without its constant log 2 is

    nll = clamp(t, clamp_min, clamp_max) - log a + lgamma(1 + 1/b)
    t   = (r a)^b        form "paper":    the density of ProbVLM (Upadhyay et al., ICCV 2023), eq. 3
    t   = r a b          form "released": what the authors' code computes

lgamma(1/b) - log b = lgamma(1 + 1/b) leaves one special function and no pole. Where t is clamped its gradient is
zero; so it is at an exact tie r = 0, where the power's own derivative is infinite for b < 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob._op import one_of
from fastprob.ops._maths import power_of_product, sign

FORMS = ("paper", "released")
EDGES = {"eps": 0.0, "clamp_min": 0.0, "clamp_max": 2.0}  # options to test


def check_eps(op: str, eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def check_ggd(op: str, *, form: str, eps: float, clamp_min: float, clamp_max: float, **_) -> None:
    one_of(op, "form", form, FORMS)
    check_eps(op, eps)
    if not 0 <= clamp_min <= clamp_max:
        raise ValueError(f"{op}: clamp_min and clamp_max must satisfy 0 <= min <= max, got {clamp_min}, {clamp_max}")


def shifted(inv_alpha: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """a and b; NaN outside the domain a >= 0, b > 0."""
    a, b = inv_alpha + eps, beta + eps
    return torch.where(a >= 0, a, torch.nan), torch.where(b > 0, b, torch.nan)


def distribution(make, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """mu, inv_alpha and beta of a problem to test with."""
    inv_alpha = make(*shape, low=0.2, high=3, extreme=(1e-6, 1e6))
    return make(*shape), inv_alpha, make(*shape, low=0.5, high=3, extreme=(1e-4, 1e4))


def log_normaliser(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(1 + 1 / b) - a.log()


def residual(d: Tensor, a: Tensor, b: Tensor, form: str) -> Tensor:
    """t for the differences d = mu - z, not yet clamped."""
    return power_of_product(d.abs(), a, b)[0] if form == "paper" else d.abs() * a * b


def log_normaliser_gradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives for a and b."""
    return -1 / a, -torch.digamma(1 + 1 / b) / b.square()


def residual_gradient(
    d: Tensor, a: Tensor, b: Tensor, form: str, clamp_min: float, clamp_max: float
) -> tuple[Tensor, ...]:
    """Derivatives of the clamped residual for d, a and b."""
    if form == "paper":
        tie = ((d == 0) | (a == 0)) & (d * a == 0)  # not where the other is NaN or infinite
        d, a = torch.where(tie, 1, d), torch.where(tie, 1, a)
        t, log_u = power_of_product(d.abs(), a, b)
        partials = b * t / d, b * t / a, t * log_u
        clamped = tie | (t == 0) | (t < clamp_min) | (t > clamp_max)  # 0: an infinite b, times which 0 is NaN
    else:
        r = d.abs()
        t, partials = r * a * b, (a * b * sign(d), r * b, r * a)
        clamped = (t < clamp_min) | (t > clamp_max)
    return tuple(torch.where(clamped, 0, p) for p in partials)
