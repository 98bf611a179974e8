"""ggd_match_nll: values, their sum, gradients. See fastprob/ops/ggd_match_nll.py."""

from fastprob.kernels._elementwise import loss
from fastprob.kernels._ggd_match import match, nodes_for

ggd_match_nll, _ggd_match_nll_backward, _ggd_match_nll_value_and_grad = loss(match, lambda eps: ((eps,), ()), nodes_for)
