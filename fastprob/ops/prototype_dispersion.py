"""Dispersion of B points about their classes' prototypes: the mean squared difference, without the gathered prototypes.

    d_b = x_b - p_{y_b},   value: sum_bd d_bd^2 / (B D)

The gradients are g_b = 2 d_b / (B D) for x_b and, for p_c, minus the sum of g_b over the points of class c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob._op import Indices, operator
from fastprob.ops._maths import add_rows, readable, wide


def _check(*, x, prototypes, labels):
    if x.dim() != 2:
        raise ValueError(f"prototype_dispersion: x must be [B, D], got {list(x.shape)}")
    if prototypes.dim() != 2 or prototypes.shape[1] != x.shape[1]:
        raise ValueError(
            f"prototype_dispersion: prototypes must be [C, D] with D = {x.shape[1]}, got {list(prototypes.shape)}"
        )
    if labels.dim() != 1 or labels.shape[0] != x.shape[0]:
        raise ValueError(f"prototype_dispersion: labels must be [B] with B = {x.shape[0]}, got {list(labels.shape)}")
    if readable(labels) and labels.numel():
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= prototypes.shape[0]:
            raise ValueError(
                f"prototype_dispersion: labels must be in 0..{prototypes.shape[0] - 1}, got {low if low < 0 else high}"
            )


def _inputs(make, count, dim, classes):
    x = make(count, dim)
    labels = torch.arange(count, device=x.device) ** 2 + 1  # some classes get several points, some none
    return x, make(classes, dim), labels % classes


def _differences(x: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """d [B, D]. Unlike prototypes[labels], index_select takes no negative labels."""
    return x - prototypes.index_select(0, labels)


def _gradient(grad, x, prototypes, labels):
    grad, x, prototypes = wide(grad, x, prototypes)
    g = 2 * grad / max(x.numel(), 1) * _differences(x, prototypes, labels)
    return g, add_rows(torch.zeros_like(prototypes), labels, -g), None


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    sizes=((0, 4, 2), (1, 1, 1), (3, 5, 3), (4, 1100, 9), (65, 129, 7)),
    bench_sizes=((1024, 512, 100),),
    frozen=("prototypes",),
    is_scalar=lambda **_: True,
    elementwise=False,
)
def prototype_dispersion(x: Tensor, prototypes: Tensor, labels: Indices) -> Tensor:
    """Mean squared difference of points and their classes' prototypes: DAPT's intra-class dispersion.

    As F.mse_loss(x, prototypes[labels]), value and gradient of x in one pass and without the [B, D] copy.

    Args:
        x: [B, D] points, image features of unit norm as a rule; float64, float32, bfloat16 or float16.
        prototypes: [C, D], a point for every class; fixed as a rule.
        labels: [B] int64 in 0..C-1, each point's class.

    Returns:
        A scalar, over points and dimensions; 0 where there are none.

    Raises:
        ValueError: for tensors of other shapes or dtypes, and for a label out of range where all labels can be read
            without waiting for a device: eagerly on the CPU. Compiled for the CPU it is a RuntimeError, or the
            IndexError of the reference. On a GPU the value and the point's gradient are NaN.

    Source:
        DAPT (Cho et al., ICCV 2023), L_intra.
    """
    dtype = x.dtype
    x, prototypes = wide(x, prototypes)
    return (_differences(x, prototypes, labels).square().sum() / max(x.numel(), 1)).to(dtype)
