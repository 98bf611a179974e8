"""ggd_nll: values, their sum, gradients. See fastprob/ops/ggd_nll.py."""

import triton
import triton.language as tl

from fastprob.kernels import _ggd, _maths
from fastprob.kernels._elementwise import loss


@triton.jit
def _body(mu, inv_alpha, beta, target, eps, lo, hi, PAPER: tl.constexpr, FAST: tl.constexpr):
    a, b, inv_a, stirling, p, norm_b = _ggd.shape_of(inv_alpha, beta, eps, FAST)
    t, t_d, t_a, t_b = _ggd.residual(mu - target, a, b, inv_a, lo, hi, PAPER, FAST)
    one = tl.full(a.shape, 1.0, a.dtype)
    nll = stirling - _maths.log_product(a, one, p, one, FAST) + t
    return nll, (t_d, t_a - inv_a, t_b + norm_b, -t_d)


def _arguments(form, eps, clamp_min, clamp_max):
    return (eps, clamp_min, clamp_max), (form == "paper",)


ggd_nll, _ggd_nll_backward, _ggd_nll_value_and_grad = loss(_body, _arguments)
