"""ggd_pairwise_match_nll. See fastprob/ops/ggd_pairwise_match_nll.py."""

from fastprob.kernels._ggd_match_pairs import Pairs
from fastprob.kernels._pair_gradients import gradients
from fastprob.kernels.ggd_match_nll import _ggd_match_nll_backward

_ggd_pairwise_match_nll_backward = gradients(_ggd_match_nll_backward, 3, 3)


def ggd_pairwise_match_nll(*tensors, eps):
    return Pairs(tensors, eps).values(0, tensors[0].new_empty(tensors[0].shape[0], tensors[3].shape[0]))
