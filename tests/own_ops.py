"""Operators of the tests' own, one for each thing that the mechanism can do and the shipped ones may not use.

`OWN` holds them; they are not among `fastprob._op.OPS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob._op import OPS, Detached, Indices, Mask, operator
from fastprob.ops._maths import wide


def unchecked(**_):
    pass


def _moments_inputs(make, *shape):
    x = make(*shape)
    return x, make(*shape, low=0.5, high=2), x > 0.3


def _moments_gradient(grad_mean, grad_square, x, weight, mask, top, *, power):
    w = torch.ones_like(x) if weight is None else weight
    if mask is not None:
        w = w * mask
    grad_w = grad_mean * x + grad_square * x**power
    if mask is not None:
        grad_w = grad_w * mask
    return w * (grad_mean + grad_square * power * x ** (power - 1)), None if weight is None else grad_w, None


@operator(gradient=_moments_gradient, check=unchecked, inputs=_moments_inputs, grid=({}, {"power": 3}))
def own_moments(
    x: Tensor, weight: Tensor | None = None, mask: Mask | None = None, *, power: int = 2
) -> tuple[Tensor, Tensor, Detached]:
    """Two results with a gradient and one without; an optional tensor, a mask."""
    w = torch.ones_like(x) if weight is None else weight
    if mask is not None:
        w = w * mask
    return w * x, w * x**power, (w * x).sign()


def noise(like: Tensor, seed: int) -> Tensor:
    """Numbers that any two seeds have different ones of, by element."""
    numbers = torch.arange(1, like.numel() + 1, dtype=like.dtype, device=like.device)
    return (numbers * (0.1 + seed % 1000003 / 1000003)).sin().view(like.shape)


def _noisy_gradient(grad, x, *, scale, seed):
    return (grad * (1 + scale * noise(x, seed) * 2 * x),)


@operator(gradient=_noisy_gradient, check=unchecked, inputs=lambda make, *shape: (make(*shape),), grid=({"seed": 7},))
def own_noisy(x: Tensor, *, scale: float = 0.5, seed: int = 1) -> Tensor:
    """x + scale noise x^2: draws by a seed."""
    return x + scale * noise(x, seed) * x.square()


def _pairs_inputs(make, rows, columns, dim):
    return make(rows, dim), make(columns, dim, low=-1)


def _distances(x, y):
    x, y = wide(x, y)
    return (x[:, None] - y).square().sum(-1)


def _pairs_gradient(grad, x, y):
    d = 2 * grad[..., None] * (x[:, None] - y)
    return d.sum(1), -d.movedim(-1, 0).sum(1).T


PAIRS = {"inputs": _pairs_inputs, "sizes": ((0, 2, 4), (3, 7, 5), (65, 40, 129)), "elementwise": False}


@operator(gradient=_pairs_gradient, check=unchecked, **PAIRS)
def own_pairs(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M] of rows [N, D] and [M, D]; like other results here not contiguous as they come."""
    return _distances(y, x).T.to(x.dtype)


def _nearest_gradient(grad, x, y, indices, *, k):
    d = 2 * grad[..., None] * (x[:, None] - y[indices])
    return d.sum(1), torch.zeros_like(y).index_add(0, indices.flatten(), -d.flatten(0, 1))


@operator(gradient=_nearest_gradient, check=unchecked, grid=({"k": 2},), **PAIRS)
def own_nearest(x: Tensor, y: Tensor, *, k: int = 1) -> tuple[Tensor, Indices]:
    """The k least squared distances of every row [N, k], and whose they are."""
    least = _distances(y, x).topk(k, dim=0, largest=False)
    return least.values.T.to(x.dtype), least.indices.T


OWN = {name: OPS.pop(name) for name in list(OPS) if name.startswith("own_")}
