"""ggd_nearest. See fastprob/ops/ggd_nearest.py."""

from fastprob.kernels._nearest import nearest
from fastprob.kernels._pair_gradients import gradients
from fastprob.kernels._pairwise import Pairs
from fastprob.kernels.ggd_nll import _ggd_nll_backward

_ggd_nearest_backward = gradients(_ggd_nll_backward, 3, 1)


def ggd_nearest(mu, inv_alpha, beta, target, *, k, **options):
    return nearest(Pairs(mu, inv_alpha, beta, target, **options).values, mu, target.shape[0], k)
