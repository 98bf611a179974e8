"""Negative log-likelihoods of all pairs of N generalised Gaussians and M targets: the maths stands in `_ggd.py`."""

from __future__ import annotations

from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _ggd, _maths, _pairs


def check_pairs(op: str, **arguments) -> None:
    _pairs.check_sides(op, arguments, ("mu", "inv_alpha", "beta"), ("target",))
    _ggd.check_ggd(op, **arguments)


def pair_inputs(make, rows, columns, dim):
    """Residuals of one size, about: a sum of many has the rounding of its largest, which a few are not to decide."""
    inv_alpha = make(rows, dim, low=0.2, high=1, extreme=(1e-6, 1e6))
    return make(rows, dim), inv_alpha, make(rows, dim, low=0.5, high=2, extreme=(1e-4, 1e4)), make(columns, dim)


def pair_values(form, clamp_min, clamp_max):
    """Values [R, M] of mu, a and b [R, 1, D] and targets [M, D]."""

    def values(rows, columns):
        (mu, a, b), (target,) = rows, columns
        t = _ggd.residual(mu - target, a, b, form).clamp(clamp_min, clamp_max)
        return t.sum(-1) + _ggd.log_normaliser(a, b).sum(-1)

    return values


def pair_gradient(grad, mu, inv_alpha, beta, target, indices=None, *, form, eps, clamp_min, clamp_max):
    """Of all pairs, or of those of the columns that `indices` [N, k] chooses."""
    grad, mu, inv_alpha, beta, target = _maths.wide(grad, mu, inv_alpha, beta, target)
    a, b = _ggd.shifted(inv_alpha, beta, eps)

    def slopes(rows, columns):
        (mu, a, b), (target,) = rows, columns
        by_mu, by_a, by_b = _ggd.residual_gradient(mu - target, a, b, form, clamp_min, clamp_max)
        return by_mu, by_a, by_b, -by_mu

    grad_mu, grad_a, grad_b, grad_target = _pairs.gradients(slopes, (mu, a, b), (target,), grad, indices)
    norm_a, norm_b = _ggd.log_normaliser_gradient(a, b)
    total = grad.sum(1, keepdim=True)
    return grad_mu, grad_a + total * norm_a, grad_b + total * norm_b, grad_target


@operator(
    gradient=pair_gradient,
    check=lambda **arguments: check_pairs("ggd_pairwise_nll", **arguments),
    inputs=pair_inputs,
    sizes=((0, 2, 4), (2, 0, 3), (1, 1, 1), (3, 4, 5), (70, 67, 3)),
    grid=[{"form": form} for form in _ggd.FORMS] + [_ggd.EDGES],
    bench_sizes=((200, 1000, 512), (1000, 1000, 512), (5000, 5000, 512)),
    elementwise=False,
)
def ggd_pairwise_nll(
    mu: Tensor,
    inv_alpha: Tensor,
    beta: Tensor,
    target: Tensor,
    *,
    form: str = "paper",
    eps: float = 1e-4,
    clamp_min: float = 1e-4,
    clamp_max: float = 1e3,
) -> Tensor:
    """Negative log-likelihood of every target under every generalised Gaussian, without the constant D log 2.

    Element (i, j) is the sum over D of `ggd_nll(mu[i], inv_alpha[i], beta[i], target[j], reduction="none")`: how
    unlikely target j is under distribution i, whose D coordinates are independent. No [N, M, D] is held: kernels take
    memory of the size of inputs and result at most, the reference the pairs of a block of rows at a time.

    Args:
        mu, inv_alpha, beta: [N, D] distributions, as `ggd_nll` takes them; float64, float32, bfloat16 or float16.
            Where inv_alpha + eps < 0 or beta + eps <= 0 the row of the result is NaN.
        target: [M, D].
        form: "paper", the density; "released", the product that the authors' code has in the power's place.
        eps: added to inv_alpha and beta.
        clamp_min, clamp_max: bounds of each coordinate's residual; its gradient is zero outside of them and at a tie.

    Returns:
        [N, M], in nats.

    Raises:
        ValueError: for tensors of other shapes, dtypes or devices, an unknown form, negative eps or bounds out of
            order.

    Source:
        ProbVLM (Upadhyay et al., ICCV 2023), eq. 3.
    """
    dtype = mu.dtype
    mu, inv_alpha, beta, target = _maths.wide(mu, inv_alpha, beta, target)
    a, b = _ggd.shifted(inv_alpha, beta, eps)
    return _pairs.pairwise(pair_values(form, clamp_min, clamp_max), (mu, a, b), (target,)).to(dtype)
