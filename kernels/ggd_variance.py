"""ggd_variance and its gradient. See fastprob/ops/ggd_variance.py."""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _ggd, _launch


def ggd_variance(inv_alpha, beta):
    inputs = _launch.contiguous((inv_alpha, beta))
    out = _launch.empty_like(inputs[0])
    _run(inputs, None, (out, out), 0)
    return out


def _ggd_variance_backward(grad, inv_alpha, beta, *, needs):
    inputs = _launch.contiguous((inv_alpha, beta))
    grads = _launch.gradients_like(inputs, needs)
    _run(inputs, grad.contiguous(), grads, needs)
    return grads


def _run(inputs, grad, outs, needs):
    n = inputs[0].numel()
    if n == 0 or (grad is not None and not needs):
        return
    with torch.cuda.device_of(inputs[0]):
        _kernel[(_launch.programs(inputs[0]),)](
            inputs, grad, outs, n, needs, _launch.block_size(inputs[0]), num_warps=_launch.WARPS
        )


@triton.jit
def _kernel(inputs, grad, outs, n, NEEDS: tl.constexpr, BLOCK: tl.constexpr):
    """outs: the values, or (if NEEDS has bits) the gradients for inv_alpha and beta times grad's element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    FAST: tl.constexpr = inputs[0].dtype.element_ty.primitive_bitwidth == 16
    value, d_inv_alpha, d_beta = _ggd.variance(_ggd.load(inputs[0], at, mask), _ggd.load(inputs[1], at, mask), FAST)
    if NEEDS:
        g = _ggd.load(grad, at, mask)
        if NEEDS & 1:
            _ggd.store(outs[0], at, g * d_inv_alpha, mask)
        if NEEDS & 2:
            _ggd.store(outs[1], at, g * d_beta, mask)
    else:
        _ggd.store(outs[0], at, value, mask)
