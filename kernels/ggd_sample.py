"""ggd_sample: values and gradients. See fastprob/ops/ggd_sample.py.

A program draws a block of elements. In float64, whatever the type: a rounding decides on a proposal. The cosine is a
polynomial, for a library's reduction of large arguments would take a stack. The gradient draws the same numbers anew,
and torch code makes gradients of them.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _launch, _maths, _random
from fastprob.ops import ggd_sample as _reference

STREAM, ATTEMPTS = tl.constexpr(_reference.STREAM), tl.constexpr(_reference.ATTEMPTS)


def ggd_sample(mu, inv_alpha, beta, *, n, seed, eps):
    out = torch.empty((n, *mu.shape), dtype=mu.dtype, device=mu.device)
    _run((mu, inv_alpha, beta), (out,), seed, eps)
    return out


def _ggd_sample_backward(grad, mu, inv_alpha, beta, *, needs, n, seed, eps):
    inputs = mu, inv_alpha, beta
    drawn = tuple(torch.empty((n, *mu.shape), dtype=torch.float64, device=mu.device) for _ in range(2))
    _run(inputs, drawn, seed, eps)
    grads = _reference.gradient_of(grad.double(), *_reference.parameters(inv_alpha, beta, eps), *drawn)
    return tuple(
        g.to(t.dtype).contiguous() if needs >> i & 1 else t.new_empty(0) for i, (g, t) in enumerate(zip(grads, inputs))
    )


def _run(inputs, out, seed, eps):
    count = out[0].numel()
    if count:
        inputs, block = _launch.contiguous(inputs), _launch.block_size(out[0])
        with torch.cuda.device_of(out[0]):
            _draw[(triton.cdiv(count, block),)](
                inputs, out, count, inputs[0].numel(), seed, eps, block, num_warps=_launch.WARPS
            )


@triton.jit
def _uniform(word):
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def _cosine(turn):
    """cos(2 pi turn) for 0 < turn < 1, to some 1e-15: the sine of a quarter turn's distance from 1/4 and 3/4."""
    y = 4 * tl.abs(turn - 0.5) - 1  # -1..1; the result is sin(pi y / 2)
    q = y * y
    s = -6.688035109811464e-10 + q * (6.066935731106192e-12 + q * -4.377065467313739e-14)
    s = 0.00016044118478735975 + q * (-3.598843235212084e-06 + q * (5.692172921967924e-08 + q * s))
    s = 1.5707963267948966 + q * (-0.6459640975062462 + q * (0.07969262624616703 + q * (-0.004681754135318687 + q * s)))
    return y * s


@triton.jit(do_not_specialize=["count", "size", "seed"])
def _draw(inputs, out, count: tl.int64, size: tl.int64, seed: tl.int64, eps: tl.float64, BLOCK: tl.constexpr):
    """Writes the draws to `out`, or where these are two tensors U and log G."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    mask = element < count
    mu, inv_alpha, beta = [_maths.load(pointer, element % size, mask).to(tl.float64) for pointer in inputs]
    a, b = inv_alpha + eps, beta + eps
    a, b = tl.where(a >= 0, a, _maths.NAN), tl.where(b > 0, b, _maths.NAN)
    d = 2 / 3 + 1 / b
    slope = 1 / (3 * tl.sqrt(d))
    u, log_v = d * 0, d * 0
    pending = mask
    attempt = tl.program_id(0) * 0
    while (attempt < ATTEMPTS) & (tl.max(pending.to(tl.int32)) > 0):
        w0, w1, w2, w3 = _random.words(element, seed, STREAM, attempt)
        u = tl.where(attempt == 0, 2 * _uniform(w3) - 1, u)
        x = tl.sqrt(-2 * tl.log(_uniform(w0))) * _cosine(_uniform(w1))
        root = 1 + x * slope
        v = root * root * root
        log = tl.log(tl.where(v > 0, v, 1.0))
        log_v = tl.where(pending, log, log_v)
        taken = (v > 0) & (tl.log(_uniform(w2)) < x * x / 2 + d * (1 - v + log))
        pending = pending & ~taken
        attempt += 1
    log_g = tl.log(d) + log_v
    if len(out) == 2:
        tl.store(out[0] + element, u, mask=mask)
        tl.store(out[1] + element, log_g, mask=mask)
    else:
        drawn = mu + u * tl.exp(log_g / b - tl.log(a))
        if out[0].dtype.element_ty != tl.float64:
            drawn = drawn.to(tl.float32)
        _maths.store(out[0], element, drawn, mask)
