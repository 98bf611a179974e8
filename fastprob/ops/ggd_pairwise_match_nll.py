"""The exact likelihoods that N and M generalised Gaussians draw the same point: the maths is `ggd_match_nll`'s."""

from __future__ import annotations

from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _ggd, _maths, _pairs
from fastprob.ops.ggd_match_nll import slopes, values

NUMBERS = 64  # that the quadrature holds for a coordinate of a pair


def check_matches(op: str, *, eps, **arguments) -> None:
    names = ("mu", "inv_alpha", "beta")
    _pairs.check_sides(op, arguments, names, [f"other_{name}" for name in names])
    _ggd.check_eps(op, eps)


def match_inputs(make, rows, columns, dim):
    def distribution(count):
        return make(count, dim), make(count, dim, low=0.2, high=3), make(count, dim, low=0.5, high=3)

    return *distribution(rows), *distribution(columns)


def pair_values(eps):
    """Values [R, M] of three tensors [R, 1, D] and three [M, D]."""
    return lambda rows, columns: values([*rows, *columns], eps).sum(-1)


def pair_gradient(grad, mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta, indices=None, *, eps):
    """Of all pairs, or of those of the columns that `indices` [N, k] chooses."""
    grad, *tensors = _maths.wide(grad, mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta)

    def pair_slopes(rows, columns):
        return slopes([*rows, *columns], eps)

    return tuple(_pairs.gradients(pair_slopes, tensors[:3], tensors[3:], grad, indices, NUMBERS))


@operator(
    gradient=pair_gradient,
    check=lambda **arguments: check_matches("ggd_pairwise_match_nll", **arguments),
    inputs=match_inputs,
    sizes=((0, 2, 4), (2, 0, 3), (1, 1, 1), (3, 4, 5), (5, 34, 67)),
    grid=({}, {"eps": 0.0}),
    bench_sizes=((10, 25, 512), (1000, 1000, 512)),
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
    """Exact cross-modal negative log-likelihoods of all pairs of distributions.

    Element (i, j) is the sum over D of `ggd_match_nll` of row i of the first distributions and row j of the others. No
    [N, M, D] is held.

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
    return _pairs.pairwise(pair_values(eps), rows, columns, NUMBERS).to(mu.dtype)
