"""_scale_: a loss's gradients times the gradient that reaches the loss, in place. See fastprob/_op.py.

The gradient is nearly always 1. It stays on the device: every program reads it and leaves at once where it is 1, so
the host waits for nothing and the tensors are not touched.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _launch, _maths


def _scale_(grads, scale):
    grads = tuple(g for g in grads if g.numel())
    if not grads:
        return
    if any(not g.is_contiguous() or g.dtype != grads[0].dtype for g in grads):
        raise ValueError("_scale_: grads must be contiguous and of one dtype")
    sizes = tuple(g.numel() for g in grads)
    block = 4 * _launch.block_size(grads[0])  # few programs: most leave at once
    with torch.cuda.device_of(grads[0]):
        _kernel[(triton.cdiv(max(sizes), block),)](grads, sizes, scale, len(grads), block, num_warps=_launch.WARPS)


@triton.jit
def _kernel(grads, sizes, scale, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(scale)
    if factor.dtype != tl.float64:
        factor = factor.to(tl.float32)
    if factor != 1:
        for i in tl.static_range(COUNT):
            at, lane, left = _launch.block_of(sizes[i], BLOCK)
            if left == BLOCK:  # without a mask, which would keep it from moving 16 bytes at a time
                _maths.store(grads[i], at, _maths.load(grads[i], at, None) * factor, None)
            else:
                _maths.store(grads[i], at, _maths.load(grads[i], at, lane < left) * factor, lane < left)
