"""Monte-Carlo dropout of a small network's last layers: mean and variance over passes, without a pass's outputs.

With h the hidden layer before the dropout, F the linear map from there to the units of a ReLU and W the last layer:

    u_m = relu(F d_m(h) + c),  y_m = W u_m,    d_m(h) = h where pass m keeps a unit, over 1 - p, else 0
    mean = sum_m y_m / M,    variance = sum_m (y_m - mean)^2 / M

A pass is one thinned network: its mask over H is the same for every row. With u the mean of all u_m, mean is W u, and
y_m - mean is W (u_m - u), in which nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from fastprob._op import one_of, operator
from fastprob.ops._maths import wide
from fastprob.ops._random import kept

PRODUCTS = ("float32", "bfloat16")


def _check(*, hidden, constant, fold, last, passes, p, products, **_):
    if hidden.dim() != 2:
        raise ValueError(f"mc_dropout: hidden must be [N, H], got {list(hidden.shape)}")
    (rows, width), units = hidden.shape, constant.shape[-1] if constant.dim() else 0
    if constant.dim() != 2 or constant.shape[0] != rows:
        raise ValueError(f"mc_dropout: constant must be [N, C] with N = {rows}, got {list(constant.shape)}")
    if fold.dim() != 2 or fold.shape[0] != units or fold.shape[1] != width:
        raise ValueError(f"mc_dropout: fold must be [C, H] = [{units}, {width}], got {list(fold.shape)}")
    if last.dim() != 2 or last.shape[1] != units:
        raise ValueError(f"mc_dropout: last must be [D, C] with C = {units}, got {list(last.shape)}")
    if passes < 1:
        raise ValueError(f"mc_dropout: passes must be at least 1, got {passes}")
    if not 0 <= p < 1:
        raise ValueError(f"mc_dropout: p must be in [0, 1), got {p}")
    one_of("mc_dropout", "products", products, PRODUCTS)


def _inputs(make, rows, width, units, dim):
    extreme = (1e-3, 1e3)
    span, of_weights = {"low": -1, "high": 1, "extreme": extreme}, {"low": -0.5, "high": 0.5, "extreme": extreme}
    rows_of = make(rows, width, **span), make(rows, units, **span)
    return *rows_of, make(units, width, **of_weights), make(dim, units, **of_weights)


def _passes(hidden: Tensor, constant: Tensor, fold: Tensor, keep: Tensor, p: float) -> Iterator[tuple[Tensor, ...]]:
    """Of every pass: its mask [H], d(h) [N, H] and the units u [N, C]."""
    for mask in keep:
        dropped = torch.where(mask, hidden, 0) / (1 - p)
        yield mask, dropped, torch.relu(dropped @ fold.T + constant)


def product(x: Tensor, weight: Tensor, products: str) -> Tensor:
    """x weight^T, of float32 by bfloat16 products where these are asked for."""
    if products == "bfloat16" and x.dtype == torch.float32:
        return (x.bfloat16() @ weight.bfloat16().T).float()
    return x @ weight.T


def _gradient(grad_mean, grad_variance, hidden, constant, fold, last, *, passes, p, seed, products):
    grad_mean, grad_variance, hidden, constant, fold, last = wide(
        grad_mean, grad_variance, hidden, constant, fold, last
    )
    hidden = torch.where(hidden.isfinite().all(dim=1, keepdim=True), hidden, torch.nan)
    keep = kept(passes, hidden.shape[1], p=p, seed=seed, device=hidden.device)
    mean = reduce(torch.add, (u for _, _, u in _passes(hidden, constant, fold, keep, p))) / passes
    grads = [*(torch.zeros_like(t) for t in (hidden, constant, fold)), grad_mean.T @ mean]
    for mask, dropped, u in _passes(hidden, constant, fold, keep, p):
        deviation = u - mean
        grad = (
            grad_mean + 2 * grad_variance * (deviation @ last.T)
        ) / passes  # of y_m; over passes the sum of grad_mean
        below = (grad @ last) * (u > 0)
        of_pass = torch.where(mask, below @ fold, 0) / (1 - p), below, below.T @ dropped, grad.T @ deviation
        grads = [total + g for total, g in zip(grads, of_pass)]
    return tuple(grads)


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    sizes=((0, 3, 2, 4), (1, 1, 1, 1), (3, 5, 7, 4), (21, 70, 37, 19)),
    grid=(
        {"passes": 3, "p": 1287638482 / 2**32, "seed": 48},  # the number of element 0, which is kept
        {"passes": 1, "p": 0.0},
        {"passes": 9, "p": 3217716533 / 2**32, "seed": -60, "products": "bfloat16"},  # one more: element 0 is dropped
    ),
    bench_sizes=((1000, 256, 512, 512), (8192, 256, 512, 512)),
    elementwise=False,
)
def mc_dropout(
    hidden: Tensor,
    constant: Tensor,
    fold: Tensor,
    last: Tensor,
    *,
    passes: int = 20,
    p: float = 0.1,
    seed: int = 0,
    products: str = "float32",
) -> tuple[Tensor, Tensor]:
    """Mean and population variance of last relu(fold d(hidden) + constant) over passes with dropout d.

    Memory does not grow with the number of passes, and there is no [M, N, D]. On a CPU only what a pass drops is
    computed anew before the ReLU.

    Args:
        hidden: [N, H], the layer before the dropout; float64, float32, bfloat16 or float16.
        constant: [N, C], what is added before the ReLU, biases included.
        fold: [C, H], the linear map from the dropout to the ReLU.
        last: [D, C], the layer after the ReLU, without its bias.
        passes: M, at least 1.
        p: the probability to drop a unit, in [0, 1); what is kept is divided by 1 - p.
        seed: of the masks, the same bits on every device: pass m drops unit k where Philox4x32-10's number of element
            m H + k is below floor(p 2^32); see `fastprob/ops/_random.py`.
        products: of float32 tensors with `last`: "float32", on a GPU in the precision that torch is set to for it, or
            "bfloat16", several times as fast where a processor has them: y - mean is then good to some 2^-9 of it.
            Gradients are the float32 ones.

    Returns:
        (mean, variance), each [N, D]. A row of which `hidden` is not finite is NaN.

    Raises:
        ValueError: for tensors of other shapes, passes or p out of range, or unknown products.

    Source:
        Gal and Ghahramani, Dropout as a Bayesian approximation, ICML 2016; the adapter of ProbVLM (Upadhyay et al.,
        ICCV 2023).
    """
    dtype = hidden.dtype
    hidden, constant, fold, last = wide(hidden, constant, fold, last)
    hidden = torch.where(hidden.isfinite().all(dim=1, keepdim=True), hidden, torch.nan)
    keep = kept(passes, hidden.shape[1], p=p, seed=seed, device=hidden.device)
    mean = reduce(torch.add, (u for _, _, u in _passes(hidden, constant, fold, keep, p))) / passes
    deviations = (product(u - mean, last, products) for _, _, u in _passes(hidden, constant, fold, keep, p))
    variance = reduce(torch.add, (d.square() for d in deviations)) / passes
    return (mean @ last.T).to(dtype), variance.to(dtype)
