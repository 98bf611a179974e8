"""The exact likelihoods that N and M generalised Gaussians draw the same point: the maths is `ggd_match_nll`'s."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _maths, _pairs
from fastprob.ops.ggd_match_nll import slopes, values

NUMBERS = 64  # that the quadrature holds for an element


def check_matches(op: str, *, mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta, eps) -> None:
    if mu.dim() != 2:
        raise ValueError(f"{op}: mu must be [N, D], got {list(mu.shape)}")
    if other_mu.dim() != 2 or other_mu.shape[1] != mu.shape[1]:
        raise ValueError(f"{op}: other_mu must be [M, D] with D = {mu.shape[1]}, got {list(other_mu.shape)}")
    of_other = (
        ("other_inv_alpha", other_inv_alpha, "other_mu", other_mu),
        ("other_beta", other_beta, "other_mu", other_mu),
    )
    for name, tensor, like, first in (("inv_alpha", inv_alpha, "mu", mu), ("beta", beta, "mu", mu), *of_other):
        if tensor.shape != first.shape:
            raise ValueError(f"{op}: {name} must be {list(first.shape)} as {like} is, got {list(tensor.shape)}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def match_inputs(make, rows, columns, dim):
    def distribution(count):
        return make(count, dim), make(count, dim, low=0.2, high=3), make(count, dim, low=0.5, high=3)

    return *distribution(rows), *distribution(columns)


def row_blocks(mu: Tensor, columns: int) -> Iterator[slice]:
    return _pairs.blocks(mu, NUMBERS * columns)


def _gradient(grad, *tensors, eps):
    grad, *tensors = _maths.wide(grad, *tensors)
    rows, columns = tensors[:3], tensors[3:]
    of_rows, of_columns = [], [torch.zeros_like(t) for t in columns]
    for some in row_blocks(rows[0], columns[0].shape[0]):
        g = grad[some, :, None]
        each = [g * slope for slope in slopes([*(t[some, None] for t in rows), *columns], eps)]
        of_rows.append([slope.sum(1) for slope in each[:3]])
        of_columns = [total + slope.sum(0) for total, slope in zip(of_columns, each[3:])]
    return *(torch.cat(parts) for parts in zip(*of_rows)), *of_columns


@operator(
    gradient=_gradient,
    check=lambda **arguments: check_matches("ggd_pairwise_match_nll", **arguments),
    inputs=match_inputs,
    sizes=((0, 2, 4), (2, 0, 3), (1, 1, 1), (3, 4, 5), (5, 34, 67)),
    grid=({}, {"eps": 0.0}),
    bench_sizes=((50, 100, 512), (1000, 1000, 512)),
    elementwise=False,
)
def ggd_pairwise_match_nll(
    mu: Tensor,
    inv_alpha: Tensor,
    beta: Tensor,
    other_mu: Tensor,
    other_inv_alpha: Tensor,
    other_beta: Tensor,
    *,
    eps: float = 1e-4,
) -> Tensor:
    """Exact cross-modal likelihoods of all pairs: element (i, j) is the sum over D of `ggd_match_nll` of row i of the
    first distributions and row j of the others. No [N, M, D] is held.

    Args:
        mu, inv_alpha, beta: [N, D], as `ggd_match_nll` takes them; float64, float32, bfloat16 or float16.
        other_mu, other_inv_alpha, other_beta: [M, D].
        eps: added to inv_alpha and beta.

    Returns:
        [N, M], in nats, with all constants. Domain and errors of a coordinate are those of `ggd_match_nll`.

    Raises:
        ValueError: for tensors of other shapes, dtypes or devices, or negative eps.

    Source:
        ProbVLM (Upadhyay et al., ICCV 2023), eq. 5.
    """
    rows = _maths.wide(mu, inv_alpha, beta)
    columns = _maths.wide(other_mu, other_inv_alpha, other_beta)
    blocks = row_blocks(rows[0], columns[0].shape[0])
    return torch.cat([values([*(t[some, None] for t in rows), *columns], eps).sum(-1) for some in blocks]).to(mu.dtype)
