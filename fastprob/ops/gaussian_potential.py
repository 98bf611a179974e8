"""Gaussian potential of C points: how close together they are, by pairs, without the C x C matrix.

    k_mn = exp(-t ||x_m - x_n||^2),   s = sum over m != n of k_mn
    mean: s / (C (C - 1)), over pairs;   sum: s, every pair twice;   logmean: the logarithm of mean

The gradient of s is dx_m = -4 t (x_m sum_n k_mn - sum_n k_mn x_n): the Gram product that gives the values and one more
that reads k, which is attention without a normaliser. Distances do not change when all points move by the same vector;
with their mean taken off, ||x_m||^2 + ||x_n||^2 - 2 x_m x_n cancels least. A distance that may be rounding alone is 0:
equal points count 1 whatever t.

No square overflows: points are divided by a power of two of their size, and t is multiplied by its square. logmean
is shifted by the nearest pair's distance, so that its k has a 1 among them however far apart all points are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprob._op import one_of, operator
from fastprob.ops._maths import wide

REDUCTIONS = ("mean", "sum", "logmean")
SHORTEST = 1e-12  # the least norm that normalize divides by, as F.normalize's


def _check(*, x, t, reduction, **_):
    one_of("gaussian_potential", "reduction", reduction, REDUCTIONS)
    if x.dim() != 2:
        raise ValueError(f"gaussian_potential: x must be [C, D], got {list(x.shape)}")
    if not 0 < t < math.inf:
        raise ValueError(f"gaussian_potential: t must be finite and above 0, got {t}")


def _inputs(make, count, dim):
    """Rows of unit length, about: closer than that all potentials are 1, farther apart 0."""
    edge = min(math.sqrt(3 / dim), 0.4)
    return (make(count, dim, low=-edge, high=edge),)


def points(x: Tensor, t: float, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Points as they are computed with: x [C, D] divided by lengths, so that no square overflows.

    Returns:
        w [C, D]; the lengths, [C, 1] of rows where they are normalised and [1, 1] otherwise; and the root [1, 1] of
        their t: the exponents are -root^2 |w_m - w_n|^2.
    """
    limits = torch.finfo(x.dtype)
    size = torch.linalg.vector_norm(x.detach(), 1, dim=1 if normalize else (0, 1), keepdim=True)
    scale = size.log2().floor().exp2()  # a power of two divides exactly
    scale = scale.clamp(1 if normalize else limits.tiny, limits.max / 2)
    w = x / scale
    if not normalize:
        return w, scale, (t**0.5 * scale).clamp(max=limits.max)
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp(min=SHORTEST)
    return w / norm, scale * norm, torch.full_like(scale[:1], t**0.5)


def width(root: Tensor) -> Tensor:
    """root^2, in the range of its type: it multiplies distances of 0 and of infinity."""
    limits = torch.finfo(root.dtype)
    return root.square().clamp(limits.tiny, limits.max)


def slope(t: float, root: Tensor) -> Tensor:
    """t times the length that all points were divided by, likewise: what the gradient is multiplied by."""
    return (t**0.5 * root).clamp(max=torch.finfo(root.dtype).max)


def rounding(w: Tensor) -> float:
    """What the products of equal points may differ by, relative to them, where libraries add in another order."""
    return torch.finfo(w.dtype).eps * w.shape[1] ** 0.5


def _potentials(w: Tensor, root: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """k [C, C], 0 on the diagonal, times exp of an exponent [1, 1] that is 0 but for logmean; and this exponent."""
    gram = w @ w.T
    square = gram.diagonal()
    squares = square[:, None] + square
    distance = squares - (gram + gram.T)  # symmetric, which a library's product is not
    distance = distance.masked_fill(torch.eye(w.shape[0], dtype=torch.bool, device=w.device), math.inf)
    nearest = distance.detach().amin().clamp(min=0) if reduction == "logmean" else w.new_zeros(())
    distance = distance - nearest
    none = distance - distance.detach()  # 0 that still has a derivative
    distance = torch.where(distance <= rounding(w) * squares, none, distance)
    return (-width(root) * distance).exp(), root * (root * nearest)


def _gradient(grad, x, *, t, reduction, normalize):
    if x.shape[0] < 2:
        return (torch.zeros_like(x),)
    grad, x = wide(grad, x)
    w, length, root = points(x, t, normalize)
    centred = w - w.mean(dim=0)
    k, _ = _potentials(centred, root, reduction)
    rows = k.sum(dim=1, keepdim=True)
    pairs = x.shape[0] * (x.shape[0] - 1)
    scale = {"mean": 1 / pairs, "sum": 1.0, "logmean": 1 / rows.sum()}[reduction]
    g = centred * rows - k @ centred
    if normalize:
        g = (g - w * (g * w).sum(dim=1, keepdim=True) * (length > SHORTEST)) / length
    return (g * slope(t, root) * (-4 * scale * grad),)


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

    Value and gradient in one pass over tiles, in memory of the size of x; the reference takes [C, C]. Half types are
    computed in float32. On a GPU the products have the precision that torch is set to: float32, or TF32 after
    `torch.set_float32_matmul_precision("high")`. Results of the C++ kernel are the same bits on any number of threads;
    the products of the reference and of a GPU are a library's, which says what it promises.

    Args:
        x: [C, D] points, class embeddings of unit norm as a rule; float64, float32, bfloat16 or float16.
        t: inverse squared width of the kernel, finite and above 0.
        reduction: "mean" over pairs m < n (DAPT's code), "sum" over m != n (the paper's equation, every pair twice) or
            "logmean", the logarithm of the mean (the uniformity of Wang and Isola).
        normalize: divide every row by its Euclidean norm first, as F.normalize does.

    Returns:
        A scalar; 0 for fewer than two points, of which there is no pair. NaN where a coordinate is NaN or infinite.

    Raises:
        ValueError: for x of another shape or dtype, t that is not finite and above 0, or an unknown reduction.

    Source:
        DAPT (Cho et al., ICCV 2023), L_inter; Wang and Isola, ICML 2020, sec. 4.1.2.
    """
    if x.shape[0] < 2:
        return x.new_zeros(())
    (y,) = wide(x)
    w, _, root = points(y, t, normalize)
    k, shift = _potentials(w - w.mean(dim=0), root, reduction)
    total, pairs = k.sum(), x.shape[0] * (x.shape[0] - 1)
    result = {"mean": total / pairs, "sum": total, "logmean": (total / pairs).log() - shift.sum()}[reduction]
    return result.to(x.dtype)
