"""probvlm_loss: value, gradients or both, in one pass over the eight tensors. See fastprob/ops/probvlm_loss.py."""

import triton
import triton.language as tl

from fastprob.kernels import _ggd, _maths
from fastprob.kernels._elementwise import loss


@triton.jit
def _adapter(
    mu, inv_alpha, beta, own, cross, own_nll, cross_nll, own_l1, cross_l1, eps, lo, hi,
    PAPER: tl.constexpr, L1: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A distribution's terms for its own and the other target: a, p and the loss but for the logarithm that they enter;
    the derivatives for mu, inv_alpha and beta, and mu's parts: minus the targets'.
    """
    norm, d_own, d_cross = own_nll + cross_nll, mu - own, mu - cross
    a, b, inv_a, stirling, p, norm_b = _ggd.shape_of(inv_alpha, beta, eps, FAST)
    t_own, own_d, own_a, own_b = _ggd.residual(d_own, a, b, inv_a, lo, hi, PAPER, FAST)
    t_cross, cross_d, cross_a, cross_b = _ggd.residual(d_cross, a, b, inv_a, lo, hi, PAPER, FAST)
    value = norm * stirling + own_nll * t_own + cross_nll * t_cross
    if L1:
        value += own_l1 * tl.abs(d_own) + cross_l1 * tl.abs(d_cross)

    own_d, cross_d = own_nll * own_d, cross_nll * cross_d
    if L1:
        own_d += own_l1 * _maths.sign(d_own)
        cross_d += cross_l1 * _maths.sign(d_cross)
    grad_a = own_nll * own_a + cross_nll * cross_a - norm * inv_a
    grad_b = own_nll * own_b + cross_nll * cross_b + norm * norm_b
    return a, p, value, own_d + cross_d, grad_a, grad_b, own_d, cross_d


@triton.jit
def _body(
    mu_i, inv_alpha_i, beta_i, mu_t, inv_alpha_t, beta_t, image, text, own_nll, cross_nll, own_l1, cross_l1,
    eps, lo, hi, PAPER: tl.constexpr, L1: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    a_i, p_i, value_i, d_mu_i, d_a_i, d_b_i, own_i, cross_i = _adapter(
        mu_i, inv_alpha_i, beta_i, image, text, own_nll, cross_nll, own_l1, cross_l1, eps, lo, hi, PAPER, L1, FAST
    )
    a_t, p_t, value_t, d_mu_t, d_a_t, d_b_t, own_t, cross_t = _adapter(
        mu_t, inv_alpha_t, beta_t, text, image, own_nll, cross_nll, own_l1, cross_l1, eps, lo, hi, PAPER, L1, FAST
    )
    logs = (own_nll + cross_nll) * _maths.log_product(a_i, a_t, p_i, p_t, FAST)
    grads = d_mu_i, d_a_i, d_b_i, d_mu_t, d_a_t, d_b_t, -(own_i + cross_t), -(own_t + cross_i)
    return value_i + value_t - logs, grads


def _arguments(cross_weight, l1_weight, nll_weight, form, eps, clamp_min, clamp_max):
    weights = nll_weight, cross_weight * nll_weight, l1_weight, cross_weight * l1_weight
    return (*weights, eps, clamp_min, clamp_max), (form == "paper", l1_weight != 0)


probvlm_loss, _probvlm_loss_backward, _probvlm_loss_value_and_grad = loss(_body, _arguments)
