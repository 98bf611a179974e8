"""Gaussian potential of C points: how close together they are, by pairs, without the C x C matrix.

    k_mn = exp(-t ||x_m - x_n||^2),   s = sum over m != n of k_mn
    mean: s / (C (C - 1)), over pairs;   sum: s, every pair twice;   logmean: the logarithm of mean

The gradient of s is dx_m = -4 t (x_m sum_n k_mn - sum_n k_mn x_n): the Gram product that gives the values and one more
that reads k, which is attention without a normaliser. Distances do not change when all points move by the same vector;
with their mean taken off, ||x_m||^2 + ||x_n||^2 - 2 x_m x_n cancels least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprob._op import one_of, operator
from fastprob.ops._ggd import wide

REDUCTIONS = ("mean", "sum", "logmean")


def _check(*, x, t, reduction, **_):
    one_of("gaussian_potential", "reduction", reduction, REDUCTIONS)
    if x.dim() != 2:
        raise ValueError(f"gaussian_potential: x must be [C, D], got {list(x.shape)}")
    if not t > 0:
        raise ValueError(f"gaussian_potential: t must be above 0, got {t}")


def _inputs(make, count, dim):
    """Rows of unit length, about: closer than that all potentials are 1, farther apart 0."""
    edge = min(math.sqrt(3 / dim), 0.4)
    return (make(count, dim, low=-edge, high=edge),)


def _potentials(x: Tensor, t: float) -> Tensor:
    """k [C, C] with zeros on the diagonal."""
    x = x - x.mean(dim=0)
    norm = x.square().sum(dim=1)
    distance = (norm[:, None] + norm - 2 * x @ x.T).clamp(min=0)
    return (-t * distance).exp() * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def _gradient(grad, x, *, t, reduction, normalize):
    grad, x = wide(grad, x)
    w = F.normalize(x, dim=1) if normalize else x
    k = _potentials(w, t)
    rows = k.sum(dim=1, keepdim=True)
    count = len(x) * (len(x) - 1)
    scale = {"mean": 1 / max(count, 1), "sum": 1.0, "logmean": 1 / rows.sum() if count else 0.0}[reduction]
    g = -4 * t * scale * grad * (w * rows - k @ w)
    if normalize:
        g = (g - w * (g * w).sum(dim=1, keepdim=True)) / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (g,)


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    sizes=((0, 4), (1, 1), (2, 3), (3, 5), (65, 129)),
    grid=[
        {"t": 1.5, "reduction": reduction, "normalize": normalize}
        for reduction in REDUCTIONS
        for normalize in (False, True)
    ],
    bench_sizes=((1000, 512), (21000, 512)),  # ImageNet's classes, ImageNet-21k's
    is_scalar=lambda **_: True,
    elementwise=False,
)
def gaussian_potential(x: Tensor, *, t: float = 2.0, reduction: str = "mean", normalize: bool = False) -> Tensor:
    """Mean Gaussian potential of pairs of points, exp(-t ||x_m - x_n||^2): DAPT's inter-class dispersion.

    Value and gradient in one pass over tiles, in memory of the size of x. Half types are computed in float32. On a GPU
    the products have the precision that torch is set to: float32, or TF32 after
    `torch.set_float32_matmul_precision("high")`.

    Args:
        x: [C, D] points, class embeddings of unit norm as a rule; float64, float32, bfloat16 or float16.
        t: inverse squared width of the kernel, above 0.
        reduction: "mean" over pairs m < n (DAPT's code), "sum" over m != n (the paper's equation, every pair twice) or
            "logmean", the logarithm of the mean (the uniformity of Wang and Isola).
        normalize: divide every row by its Euclidean norm first, as F.normalize does.

    Returns:
        A scalar; 0 for fewer than two points, of which there is no pair.

    Raises:
        ValueError: for x of another shape or dtype, t <= 0, or an unknown reduction.

    Source:
        DAPT (Cho et al., ICCV 2023), L_inter; Wang and Isola, ICML 2020, sec. 4.1.2.
    """
    dtype, count = x.dtype, len(x) * (len(x) - 1)
    if not count:
        return (x.sum() * 0).to(dtype)
    (x,) = wide(x)
    total = _potentials(F.normalize(x, dim=1) if normalize else x, t).sum()
    result = {"mean": total / count, "sum": total, "logmean": (total / count).log()}[reduction]
    return result.to(dtype)
