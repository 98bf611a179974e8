"""Negative log-likelihoods of all pairs of N generalised Gaussians and M targets: the maths stands in `_ggd.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _ggd, _maths, _pairs


def check_pairs(op: str, *, mu, inv_alpha, beta, target, **options) -> None:
    if mu.dim() != 2:
        raise ValueError(f"{op}: mu must be [N, D], got {list(mu.shape)}")
    for name, tensor in (("inv_alpha", inv_alpha), ("beta", beta)):
        if tensor.shape != mu.shape:
            raise ValueError(f"{op}: {name} must be [N, D] = {list(mu.shape)} as mu is, got {list(tensor.shape)}")
    if target.dim() != 2 or target.shape[1] != mu.shape[1]:
        raise ValueError(f"{op}: target must be [M, D] with D = {mu.shape[1]}, got {list(target.shape)}")
    _ggd.check_ggd(op, **options)


def pair_inputs(make, rows, columns, dim):
    """Residuals of one size, about: a sum of many has the rounding of its largest, which a few are not to decide."""
    inv_alpha = make(rows, dim, low=0.2, high=1, extreme=(1e-6, 1e6))
    return make(rows, dim), inv_alpha, make(rows, dim, low=0.5, high=2, extreme=(1e-4, 1e4)), make(columns, dim)


def pairwise_nll(mu, a, b, target, form, clamp_min, clamp_max) -> Tensor:
    """The sums over D of the elements' values: of [..., D] distributions and targets, which broadcast."""
    t = _ggd.residual(mu - target, a, b, form).clamp(clamp_min, clamp_max)
    return t.sum(-1) + _ggd.log_normaliser(a, b).sum(-1)


def _gradient(grad, mu, inv_alpha, beta, target, *, form, eps, clamp_min, clamp_max):
    grad, mu, inv_alpha, beta, target = _maths.wide(grad, mu, inv_alpha, beta, target)
    a, b = _ggd.shifted(inv_alpha, beta, eps)
    of_rows, of_target = [], torch.zeros_like(target)
    for rows in _pairs.blocks(mu, target.shape[0]):
        d, g = mu[rows, None] - target, grad[rows, :, None]
        slopes = _ggd.residual_gradient(d, a[rows, None], b[rows, None], form, clamp_min, clamp_max)
        of_rows.append([(g * slope).sum(1) for slope in slopes])
        of_target = of_target - (g * slopes[0]).sum(0)
    grad_mu, grad_a, grad_b = (torch.cat(parts) for parts in zip(*of_rows))
    norm_a, norm_b = _ggd.log_normaliser_gradient(a, b)
    total = grad.sum(1, keepdim=True)
    return grad_mu, grad_a + total * norm_a, grad_b + total * norm_b, of_target


@operator(
    gradient=_gradient,
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
    blocks = _pairs.blocks(mu, target.shape[0])
    parts = [
        pairwise_nll(mu[rows, None], a[rows, None], b[rows, None], target, form, clamp_min, clamp_max)
        for rows in blocks
    ]
    return torch.cat(parts).to(dtype)
