"""ggd_variance and its gradient. See fastprob/ops/ggd_variance.py."""

import triton
import triton.language as tl

from fastprob.kernels import _ggd
from fastprob.kernels._elementwise import elementwise


@triton.jit
def _body(inv_alpha, beta, FAST: tl.constexpr):
    value, d_inv_alpha, d_beta = _ggd.variance(inv_alpha, beta, FAST)
    return value, (d_inv_alpha, d_beta)


ggd_variance, _ggd_variance_backward = elementwise(_body)
