"""The k distributions that each of N generalised Gaussians most likely draws the same point with."""

from __future__ import annotations

from torch import Tensor

from fastprob._op import Indices, operator
from fastprob.ops import _maths, _pairs
from fastprob.ops.ggd_pairwise_match_nll import NUMBERS, check_matches, match_inputs, pair_gradient, pair_values


def _check(*, k, **arguments):
    check_matches("ggd_nearest_match", **arguments)
    _pairs.check_k("ggd_nearest_match", k, arguments["other_mu"])


@operator(
    gradient=lambda *tensors, k, **options: pair_gradient(*tensors, **options),
    check=_check,
    inputs=match_inputs,
    sizes=((0, 3, 4), (1, 3, 1), (3, 3, 5), (5, 34, 67)),
    grid=({"k": 3},),
    bench_sizes=((10, 25, 512), (1000, 1000, 512)),
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
    least, indices = _pairs.nearest(pair_values(eps), rows, columns, k, NUMBERS)
    return least.to(mu.dtype), indices
