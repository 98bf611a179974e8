"""Negative log-likelihood of a generalised Gaussian: the maths stands in `_ggd.py`."""

from __future__ import annotations

from torch import Tensor

from fastprob._op import one_of, operator
from fastprob.ops import _ggd, _maths

REDUCTIONS = ("mean", "sum", "none")


def _check(*, reduction, mu, inv_alpha, beta, target, **options):
    one_of("ggd_nll", "reduction", reduction, REDUCTIONS)
    _ggd.check_ggd("ggd_nll", **options)


def _inputs(make, *shape):
    return *_ggd.distribution(make, *shape), make(*shape)


def _gradient(grad, mu, inv_alpha, beta, target, *, form, eps, clamp_min, clamp_max, reduction):
    grad, mu, inv_alpha, beta, target = _maths.wide(grad, mu, inv_alpha, beta, target)
    a, b = _ggd.shifted(inv_alpha, beta, eps)
    grad_d, grad_a, grad_b = _ggd.residual_gradient(mu - target, a, b, form, clamp_min, clamp_max)
    norm_a, norm_b = _ggd.log_normaliser_gradient(a, b)
    if reduction == "mean":
        grad = grad / max(mu.numel(), 1)
    return grad * grad_d, grad * (grad_a + norm_a), grad * (grad_b + norm_b), -grad * grad_d


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    grid=[
        *({"form": form, "reduction": reduction} for form in _ggd.FORMS for reduction in REDUCTIONS),
        {"reduction": "none", **_ggd.EDGES},
    ],
    frozen=("target",),
    is_scalar=lambda *, reduction, **_: reduction != "none",
)
def ggd_nll(
    mu: Tensor,
    inv_alpha: Tensor,
    beta: Tensor,
    target: Tensor,
    *,
    form: str = "paper",
    eps: float = 1e-4,
    clamp_min: float = 1e-4,
    clamp_max: float = 1e3,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of `target` under generalised Gaussians, without the constant log 2.

    With a = inv_alpha + eps, b = beta + eps and r = |mu - target|:

        nll = clamp(t, clamp_min, clamp_max) - log a + lgamma(1 + 1/b),    t = (r a)^b ("paper") or r a b ("released")

    Args:
        mu, inv_alpha, beta, target: tensors of any one shape, or that broadcast to one; float64, float32, bfloat16
            or float16. inv_alpha is 1/scale, in 1/units of mu; beta is the shape (2 normal, 1 Laplace), no unit.
            Where a < 0 or b <= 0 the result is NaN.
        form: "paper", the density; "released", the product that the authors' code has in the power's place.
        eps: added to inv_alpha and beta.
        clamp_min, clamp_max: bounds of the residual t; its gradient is zero outside of them and at mu = target.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the elements' values for "none"; in nats.

    Raises:
        ValueError: for an unknown form or reduction, negative eps, bounds out of order, or tensors that differ in
            dtype or device or do not broadcast.

    Source:
        ProbVLM (Upadhyay et al., ICCV 2023), eq. 3; `GenGaussLoss` of the released code for "released".
    """
    dtype = mu.dtype
    mu, inv_alpha, beta, target = _maths.wide(mu, inv_alpha, beta, target)
    a, b = _ggd.shifted(inv_alpha, beta, eps)
    nll = _ggd.residual(mu - target, a, b, form).clamp(clamp_min, clamp_max) + _ggd.log_normaliser(a, b)
    if reduction != "none":
        nll = nll.mean() if reduction == "mean" else nll.sum()
    return nll.to(dtype)
