"""ggd_nearest_match. See fastprob/ops/ggd_nearest_match.py."""

from fastprob.kernels._ggd_match_pairs import Pairs
from fastprob.kernels._nearest import nearest
from fastprob.kernels._pair_gradients import gradients
from fastprob.kernels.ggd_match_nll import _ggd_match_nll_backward

_ggd_nearest_match_backward = gradients(_ggd_match_nll_backward, 3, 3)


def ggd_nearest_match(*tensors, k, eps):
    return nearest(Pairs(tensors, eps).values, tensors[0], tensors[3].shape[0], k)
