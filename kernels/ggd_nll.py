"""ggd_nll: values, their sum, gradients. See fastprob/ops/ggd_nll.py."""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _ggd, _launch


def ggd_nll(mu, inv_alpha, beta, target, *, reduction, **options):
    inputs = _launch.contiguous((mu, inv_alpha, beta, target))
    if reduction != "none":
        return _reduced(inputs, reduction, 0, options)[0]
    out = _launch.empty_like(inputs[0])
    _run(inputs, None, out, inputs, 0, 1, options)
    return out


def _ggd_nll_backward(grad, mu, inv_alpha, beta, target, *, reduction, needs, **options):
    inputs = _launch.contiguous((mu, inv_alpha, beta, target))
    grads = _launch.gradients_like(inputs, needs)
    if needs:
        count = inputs[0].numel() if reduction == "mean" else 1
        _run(inputs, grad.contiguous(), None, grads, needs, count, options, per_element=reduction == "none")
    return grads


def _ggd_nll_value_and_grad(mu, inv_alpha, beta, target, *, reduction, needs, **options):
    return _reduced(_launch.contiguous((mu, inv_alpha, beta, target)), reduction, needs, options)


def _reduced(inputs, reduction, needs, options):
    """The mean or sum, and the gradients that `needs` asks for."""
    grads, n = _launch.gradients_like(inputs, needs), inputs[0].numel()
    if n == 0:
        return inputs[0].new_full((), float("nan") if reduction == "mean" else 0.0), *grads
    count = n if reduction == "mean" else 1
    with torch.cuda.device_of(inputs[0]):
        partials = _launch.partials_of(inputs[0])
        _run(inputs, None, partials, grads, needs, count, options, has_sum=True)
        return _launch.total(partials, inputs[0], count), *grads


def _run(inputs, grad, out, grads, needs, count, options, *, has_sum=False, per_element=False):
    n = inputs[0].numel()
    if n == 0:
        return
    with torch.cuda.device_of(inputs[0]):
        _kernel[(_launch.programs(inputs[0]),)](
            inputs, grad, out, grads, n, count, options["eps"], options["clamp_min"], options["clamp_max"],
            options["form"] == "paper", has_sum, per_element, needs, _launch.block_size(inputs[0]),
            num_warps=_launch.WARPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _kernel(
    inputs, grad, out, grads, n, count, eps: tl.float64, clamp_min: tl.float64, clamp_max: tl.float64,
    PAPER: tl.constexpr, SUM: tl.constexpr, PER_ELEMENT: tl.constexpr, NEEDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes to `out`, unless it is None, the elements' nll or (SUM) the program's sum of them; and to `grads` the
    gradients for mu, inv_alpha, beta, target over `count`, times grad's scalar or (PER_ELEMENT) its element.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    FAST: tl.constexpr = inputs[0].dtype.element_ty.primitive_bitwidth == 16
    mu, inv_alpha = _ggd.load(inputs[0], at, mask), _ggd.load(inputs[1], at, mask)
    beta, target = _ggd.load(inputs[2], at, mask), _ggd.load(inputs[3], at, mask)
    lo, hi = _ggd.parameter(clamp_min, mu.dtype), _ggd.parameter(clamp_max, mu.dtype)
    a, b, inv_a, stirling, p, norm_b = _ggd.shape_of(inv_alpha, beta, _ggd.parameter(eps, mu.dtype), FAST)
    t, t_d, t_a, t_b = _ggd.residual(mu - target, a, b, inv_a, lo, hi, PAPER, FAST)

    if out is not None:
        one = tl.full(a.shape, 1.0, a.dtype)
        nll = stirling - _ggd.log_product(a, one, p, one, FAST) + t
        if SUM:
            tl.store(out + tl.program_id(0), tl.sum(tl.where(mask, nll, 0.0)).to(tl.float64))
        else:
            _ggd.store(out, at, nll, mask)

    if NEEDS:
        g = _ggd.load(grad, at, mask) if PER_ELEMENT else _launch.gradient_scale(grad, count, mu.dtype)
        if NEEDS & 1:
            _ggd.store(grads[0], at, g * t_d, mask)
        if NEEDS & 2:
            _ggd.store(grads[1], at, g * (t_a - inv_a), mask)
        if NEEDS & 4:
            _ggd.store(grads[2], at, g * (t_b + norm_b), mask)
        if NEEDS & 8:
            _ggd.store(grads[3], at, -g * t_d, mask)
