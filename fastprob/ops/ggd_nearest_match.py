"""The k distributions that each of N generalised Gaussians most likely draws the same point with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob._op import Indices, operator
from fastprob.ops import _maths
from fastprob.ops.ggd_match_nll import slopes, values
from fastprob.ops.ggd_pairwise_match_nll import check_matches, match_inputs, row_blocks


def _check(*, k, **arguments):
    check_matches("ggd_nearest_match", **arguments)
    if not 1 <= k <= arguments["other_mu"].shape[0]:
        raise ValueError(f"ggd_nearest_match: k must be in 1..M with M = {arguments['other_mu'].shape[0]}, got {k}")


def _gradient(grad, *tensors, k, eps):
    *tensors, indices = tensors
    grad, *tensors = _maths.wide(grad, *tensors)
    rows, columns = tensors[:3], tensors[3:]
    of_rows, of_columns = [], [torch.zeros_like(t) for t in columns]
    for some in row_blocks(rows[0], k):
        chosen = indices[some].flatten()
        others = (t.index_select(0, chosen).unflatten(0, (-1, k)) for t in columns)
        each = [grad[some, :, None] * slope for slope in slopes([*(t[some, None] for t in rows), *others], eps)]
        of_rows.append([slope.sum(1) for slope in each[:3]])
        of_columns = [total.index_add(0, chosen, g.flatten(0, 1)) for total, g in zip(of_columns, each[3:])]
    return *(torch.cat(parts) for parts in zip(*of_rows)), *of_columns


@operator(
    gradient=_gradient,
    check=_check,
    inputs=match_inputs,
    sizes=((0, 3, 4), (1, 3, 1), (3, 3, 5), (5, 34, 67)),
    grid=({"k": 3},),
    bench_sizes=((50, 100, 512), (1000, 1000, 512)),
    elementwise=False,
)
def ggd_nearest_match(
    mu: Tensor,
    inv_alpha: Tensor,
    beta: Tensor,
    other_mu: Tensor,
    other_inv_alpha: Tensor,
    other_beta: Tensor,
    *,
    k: int = 1,
    eps: float = 1e-4,
) -> tuple[Tensor, Indices]:
    """The k others of the least `ggd_pairwise_match_nll` for every row, without the N x M matrix.

    Equal values come in the order of their indices, NaN last.

    Args:
        mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta, eps: as `ggd_pairwise_match_nll` takes them.
        k: how many, 1..M.

    Returns:
        The values [N, k] in nats, ascending; and which others they are of, [N, k] int64. Gradients take the indices for
        constants.

    Raises:
        ValueError: for k out of range, and as `ggd_pairwise_match_nll` does.

    Source:
        ProbVLM (Upadhyay et al., ICCV 2023), eq. 5.
    """
    rows = _maths.wide(mu, inv_alpha, beta)
    columns = _maths.wide(other_mu, other_inv_alpha, other_beta)
    least, indices = [], []
    for some in row_blocks(rows[0], columns[0].shape[0]):
        nll = values([*(t[some, None] for t in rows), *columns], eps).sum(-1)
        ordered = nll.sort(dim=1, stable=True)
        least.append(ordered.values[:, :k])
        indices.append(ordered.indices[:, :k])
    return torch.cat(least).to(mu.dtype), torch.cat(indices)
