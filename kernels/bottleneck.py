"""bottleneck: values and gradients. See fastprob/ops/bottleneck.py.

A program has a block of a problem's elements, of all draws: what they are before the noise is mixed in, or the sums
over the draws, stay in registers. A Philox call serves four elements.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _launch, _maths, _random
from fastprob.ops import bottleneck as _reference

STREAM = tl.constexpr(_reference.STREAM)


def bottleneck(x, logits, *, samples, **options):
    t = torch.empty((samples, *x.shape), dtype=x.dtype, device=x.device)
    kl = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(_value, (x, logits), (t, kl), samples=samples, **options)
    return t, kl


def _bottleneck_backward(grad_t, grad_kl, x, logits, *, needs, **options):
    grads = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needs >> i & 1 else t.new_empty(0)
        for i, t in enumerate((x, logits))
    )
    _run(_gradient, (x, logits, grad_t, grad_kl), grads, needs, **options)
    return grads


def _run(kernel, inputs, outputs, *flags, seed, samples, sigma, batch_dims):
    x = inputs[0]
    if x.numel():
        size, block = x.shape[batch_dims:].numel(), _launch.block_size(x)
        blocks = triton.cdiv(size, block)
        with torch.cuda.device_of(x):
            kernel[(blocks * (x.numel() // size),)](
                *_launch.contiguous(inputs), *outputs, x.numel(), size, blocks, seed, samples, sigma, *flags, block,
                num_warps=_launch.WARPS,
            )  # fmt: skip


@triton.jit
def _block(size, blocks, BLOCK: tl.constexpr):
    """A program's first group of four elements in its problem; its elements' places among all; which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    start = program % blocks * BLOCK
    element = start + tl.arange(0, BLOCK)
    return start >> 2, program // blocks * size + element, element < size


@triton.jit
def _noise(first, seed, draw, BLOCK: tl.constexpr, dtype: tl.constexpr):
    w0, w1, w2, w3 = _random.words(first + tl.arange(0, BLOCK // 4), seed, STREAM, draw.to(tl.uint32))
    z0, z1 = _random.normals(w0, w1, dtype)
    z2, z3 = _random.normals(w2, w3, dtype)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _gate(logits, FAST: tl.constexpr):
    """lambda, 1 - lambda and -log(1 - lambda)."""
    below = logits < 0
    e = _maths.exponential(tl.where(below, logits, -logits), FAST)
    larger = _maths.reciprocal(1 + e)
    smaller = e * larger
    shut = tl.where(below, 0.0, logits) + _maths.log_normal(1 + e, FAST)
    return tl.where(below, smaller, larger), tl.where(below, larger, smaller), shut


@triton.jit(do_not_specialize=["count", "size", "blocks", "seed", "samples"])
def _value(
    x, logits, t, kl, count: tl.int64, size: tl.int64, blocks: tl.int64,
    seed: tl.int64, samples: tl.int64, sigma: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    first, at, mask = _block(size, blocks, BLOCK)
    FAST: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    of_x = _maths.load(x, at, mask)
    kept, lost, shut = _gate(_maths.load(logits, at, mask), FAST)
    sigma_ = _maths.parameter(sigma, of_x.dtype)
    mean = kept * of_x
    u = mean / sigma_
    _maths.store(kl, at, (u * u - kept * (1 + lost)) / 2 + shut, mask)
    spread = lost * sigma_
    draw = tl.program_id(0).to(tl.int64) * 0
    while draw < samples:
        _maths.store(t, draw * count + at, mean + spread * _noise(first, seed, draw, BLOCK, of_x.dtype), mask)
        draw += 1


@triton.jit(do_not_specialize=["count", "size", "blocks", "seed", "samples"])
def _gradient(
    x, logits, grad_t, grad_kl, for_x, for_logits, count: tl.int64, size: tl.int64, blocks: tl.int64,
    seed: tl.int64, samples: tl.int64, sigma: tl.float64, NEEDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, at, mask = _block(size, blocks, BLOCK)
    FAST: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    of_x, of_kl = _maths.load(x, at, mask), _maths.load(grad_kl, at, mask)
    kept, lost, _ = _gate(_maths.load(logits, at, mask), FAST)
    sigma_ = _maths.parameter(sigma, of_x.dtype)
    total, along = tl.zeros((BLOCK,), of_x.dtype), tl.zeros((BLOCK,), of_x.dtype)
    draw = tl.program_id(0).to(tl.int64) * 0
    while draw < samples:
        g = _maths.load(grad_t, draw * count + at, mask)
        total += g
        along += g * _noise(first, seed, draw, BLOCK, of_x.dtype)
        draw += 1
    mean = kept * of_x
    u = mean / sigma_
    if NEEDS & 1:
        _maths.store(for_x, at, kept * (total + of_kl * (u / sigma_)), mask)
    if NEEDS & 2:
        through_t = lost * (mean * total - kept * (sigma_ * along))
        _maths.store(for_logits, at, through_t + of_kl * (kept + lost * (u * u - kept * lost)), mask)
