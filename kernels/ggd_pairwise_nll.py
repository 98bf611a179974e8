"""ggd_pairwise_nll. See fastprob/ops/ggd_pairwise_nll.py."""

from fastprob.kernels._pair_gradients import gradients
from fastprob.kernels._pairwise import Pairs
from fastprob.kernels.ggd_nll import _ggd_nll_backward

_ggd_pairwise_nll_backward = gradients(_ggd_nll_backward, 3, 1)


def ggd_pairwise_nll(mu, inv_alpha, beta, target, **options):
    out = mu.new_empty(mu.shape[0], target.shape[0])
    return Pairs(mu, inv_alpha, beta, target, **options).values(0, out)
