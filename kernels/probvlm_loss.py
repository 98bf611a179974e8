"""probvlm_loss: value, gradients or both, in one pass over the eight tensors. See fastprob/ops/probvlm_loss.py."""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _ggd, _launch


def probvlm_loss(*inputs, **options):
    return _valued(inputs, 0, options)[0]


def _probvlm_loss_backward(grad, *inputs, needs, **options):
    inputs = _launch.contiguous(inputs)
    grads = _launch.gradients_like(inputs, needs)
    if needs and inputs[0].numel():
        _run(inputs, grad, None, grads, needs, options)
    return grads


def _probvlm_loss_value_and_grad(*inputs, needs, **options):
    return _valued(inputs, needs, options)


def _valued(inputs, needs, options):
    """The loss, and the gradients that `needs` asks for."""
    inputs = _launch.contiguous(inputs)
    grads, n = _launch.gradients_like(inputs, needs), inputs[0].numel()
    if n == 0:
        return inputs[0].new_full((), float("nan")), *grads
    with torch.cuda.device_of(inputs[0]):
        partials = _launch.partials_of(inputs[0])
        _run(inputs, None, partials, grads, needs, options)
        return _launch.total(partials, inputs[0], n), *grads


def _run(inputs, grad, partials, grads, needs, options):
    cross, l1, nll = options["cross_weight"], options["l1_weight"], options["nll_weight"]
    with torch.cuda.device_of(inputs[0]):
        _kernel[(_launch.programs(inputs[0]),)](
            inputs, grad, partials, grads, inputs[0].numel(), float(nll), float(cross * nll), float(l1),
            float(cross * l1), options["eps"], options["clamp_min"], options["clamp_max"],
            options["form"] == "paper", l1 != 0, needs, _launch.block_size(inputs[0]), num_warps=_launch.WARPS,
        )  # fmt: skip


@triton.jit
def _kernel(
    inputs, grad, partials, grads, n, own_nll: tl.float64, cross_nll: tl.float64, own_l1: tl.float64,
    cross_l1: tl.float64, eps: tl.float64, clamp_min: tl.float64, clamp_max: tl.float64,
    PAPER: tl.constexpr, L1: tl.constexpr, NEEDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the program's sum of the loss to `partials`, unless it is None, and the gradients of the mean, times
    grad's scalar. Order of inputs and gradients: image mu, inv_alpha, beta; text mu, inv_alpha, beta; image, text.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    mu_i, mu_t = _ggd.load(inputs[0], at, mask), _ggd.load(inputs[3], at, mask)
    ia_i, ia_t = _ggd.load(inputs[1], at, mask), _ggd.load(inputs[4], at, mask)
    b_i, b_t = _ggd.load(inputs[2], at, mask), _ggd.load(inputs[5], at, mask)
    z_i, z_t = _ggd.load(inputs[6], at, mask), _ggd.load(inputs[7], at, mask)

    C: tl.constexpr = mu_i.dtype
    FAST: tl.constexpr = inputs[0].dtype.element_ty.primitive_bitwidth == 16
    eps, lo, hi = _ggd.parameter(eps, C), _ggd.parameter(clamp_min, C), _ggd.parameter(clamp_max, C)
    own_nll, cross_nll = _ggd.parameter(own_nll, C), _ggd.parameter(cross_nll, C)
    own_l1, cross_l1 = _ggd.parameter(own_l1, C), _ggd.parameter(cross_l1, C)
    norm = own_nll + cross_nll

    a_i, b_i, inv_a_i, stirling_i, p_i, norm_b_i = _ggd.shape_of(ia_i, b_i, eps, FAST)
    a_t, b_t, inv_a_t, stirling_t, p_t, norm_b_t = _ggd.shape_of(ia_t, b_t, eps, FAST)
    d_ii, d_it, d_tt, d_ti = mu_i - z_i, mu_i - z_t, mu_t - z_t, mu_t - z_i
    ii, ii_d, ii_a, ii_b = _ggd.residual(d_ii, a_i, b_i, inv_a_i, lo, hi, PAPER, FAST)
    it, it_d, it_a, it_b = _ggd.residual(d_it, a_i, b_i, inv_a_i, lo, hi, PAPER, FAST)
    tt, tt_d, tt_a, tt_b = _ggd.residual(d_tt, a_t, b_t, inv_a_t, lo, hi, PAPER, FAST)
    ti, ti_d, ti_a, ti_b = _ggd.residual(d_ti, a_t, b_t, inv_a_t, lo, hi, PAPER, FAST)

    if partials is not None:
        loss = norm * (stirling_i + stirling_t - _ggd.log_product(a_i, a_t, p_i, p_t, FAST))
        loss += own_nll * (ii + tt) + cross_nll * (it + ti)
        loss += own_l1 * (tl.abs(d_ii) + tl.abs(d_tt)) + cross_l1 * (tl.abs(d_it) + tl.abs(d_ti))
        tl.store(partials + tl.program_id(0), tl.sum(tl.where(mask, loss, 0.0)).to(tl.float64))

    if NEEDS:
        g = _launch.gradient_scale(grad, n, C)
        own_nll, cross_nll, norm = g * own_nll, g * cross_nll, g * norm
        s_ii, s_it = own_nll * ii_d, cross_nll * it_d
        s_tt, s_ti = own_nll * tt_d, cross_nll * ti_d
        if L1:
            own_l1, cross_l1 = g * own_l1, g * cross_l1
            s_ii, s_it = s_ii + own_l1 * _ggd.sign(d_ii), s_it + cross_l1 * _ggd.sign(d_it)
            s_tt, s_ti = s_tt + own_l1 * _ggd.sign(d_tt), s_ti + cross_l1 * _ggd.sign(d_ti)
        if NEEDS & 1:
            _ggd.store(grads[0], at, s_ii + s_it, mask)
        if NEEDS & 2:
            _ggd.store(grads[1], at, own_nll * ii_a + cross_nll * it_a - norm * inv_a_i, mask)
        if NEEDS & 4:
            _ggd.store(grads[2], at, own_nll * ii_b + cross_nll * it_b + norm * norm_b_i, mask)
        if NEEDS & 8:
            _ggd.store(grads[3], at, s_tt + s_ti, mask)
        if NEEDS & 16:
            _ggd.store(grads[4], at, own_nll * tt_a + cross_nll * ti_a - norm * inv_a_t, mask)
        if NEEDS & 32:
            _ggd.store(grads[5], at, own_nll * tt_b + cross_nll * ti_b + norm * norm_b_t, mask)
        if NEEDS & 64:
            _ggd.store(grads[6], at, -(s_ii + s_ti), mask)
        if NEEDS & 128:
            _ggd.store(grads[7], at, -(s_it + s_tt), mask)
