"""The k targets that each of N generalised Gaussians finds likeliest, without the N x M matrix of their values."""

from __future__ import annotations

from torch import Tensor

from fastprob._op import Indices, operator
from fastprob.ops import _ggd, _maths, _pairs
from fastprob.ops.ggd_pairwise_nll import check_pairs, pair_gradient, pair_inputs, pair_values


def _check(*, k, **arguments):
    check_pairs("ggd_nearest", **arguments)
    _pairs.check_k("ggd_nearest", k, arguments["target"])


@operator(
    gradient=lambda *tensors, k, **options: pair_gradient(*tensors, **options),
    check=_check,
    inputs=pair_inputs,
    sizes=((0, 3, 4), (1, 3, 1), (3, 3, 5), (70, 67, 3)),
    grid=[{"k": 3}, {"k": 3, "form": "released", **_ggd.EDGES}],
    bench_sizes=((200, 1000, 512), (1000, 1000, 512), (5000, 5000, 512)),
    elementwise=False,
)
def ggd_nearest(
    mu: Tensor,
    inv_alpha: Tensor,
    beta: Tensor,
    target: Tensor,
    *,
    k: int = 1,
    form: str = "paper",
    eps: float = 1e-4,
    clamp_min: float = 1e-4,
    clamp_max: float = 1e3,
) -> tuple[Tensor, Indices]:
    """The k likeliest targets under every generalised Gaussian: those of the least `ggd_pairwise_nll`.

    The N x M matrix is never held: the C++ kernel takes memory of N k numbers, the others that of a block of rows.
    Equal values come in the order of their indices, NaN last; it is the values as computed that are compared, before
    they are rounded to a half type.

    Args:
        mu, inv_alpha, beta: [N, D] distributions, as `ggd_nll` takes them; float64, float32, bfloat16 or float16.
        target: [M, D].
        k: how many, 1..M.
        form, eps, clamp_min, clamp_max: as `ggd_pairwise_nll` takes them.

    Returns:
        The values [N, k] in nats, ascending, without the constant D log 2; and which targets they are of, [N, k] int64.
        Gradients take the indices for constants.

    Raises:
        ValueError: for k out of range, and as `ggd_pairwise_nll` does.

    Source:
        ProbVLM (Upadhyay et al., ICCV 2023), eq. 3.
    """
    dtype = mu.dtype
    mu, inv_alpha, beta, target = _maths.wide(mu, inv_alpha, beta, target)
    a, b = _ggd.shifted(inv_alpha, beta, eps)
    values, indices = _pairs.nearest(pair_values(form, clamp_min, clamp_max), (mu, a, b), (target,), k)
    return values.to(dtype), indices
