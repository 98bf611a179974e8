"""mc_dropout: mean and variance over passes, some passes at a time. See fastprob/ops/mc_dropout.py.

The products are the vendor library's, in the precision that torch is set to for float32. One kernel draws masks, a
second makes units of the products, less their mean, a third sums squares. A block of passes has a bounded number of
rows, so that it stays in the L2 cache and memory does not grow with passes.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _maths, _random

ROWS = 8192  # rows of a block of passes, if not of one pass: 16 MB of 512 float32 units
BLOCK, WARPS = 512, 4


def mc_dropout(hidden, constant, fold, last, *, passes, p, seed, products):
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    wide, constant, fold, last = (t.to(compute).contiguous() for t in (hidden, constant, fold, last))
    wide = torch.where(wide.isfinite().all(dim=1, keepdim=True), wide, torch.nan) / (1 - p)
    half = products == "bfloat16" and compute == torch.float32
    weight = last.bfloat16() if half else last
    rows, threshold = len(wide), int(p * 2**32)
    at_once = max(1, ROWS // max(rows, 1))
    blocks = [(first, min(at_once, passes - first)) for first in range(0, passes, at_once)]

    def units(first, some, mean, dtype):
        """Those of passes from `first` on, [some, N, C], less their mean."""
        keep = torch.empty(some, 1, wide.shape[1], dtype=torch.bool, device=wide.device)
        with torch.cuda.device_of(keep):
            programs = triton.cdiv(keep.numel() + 3, BLOCK)  # the first group may begin before the first element
            _draw[(programs,)](keep, first * wide.shape[1], threshold, seed, keep.numel(), BLOCK // 4, num_warps=1)
        product = torch.where(keep, wide, 0).flatten(0, 1) @ fold.T
        out = torch.empty(some, *constant.shape, dtype=dtype, device=wide.device)
        _launch(_rectify, out, product, constant, mean, out, constant.numel())
        return out

    mean = torch.zeros_like(constant)
    for first, some in blocks:
        mean += units(first, some, None, compute).sum(0)
    mean /= passes
    squares = mean.new_zeros(rows, last.shape[0])
    for first, some in blocks:
        y = units(first, some, mean, weight.dtype).flatten(0, 1) @ weight.T
        _launch(_add_squares, squares, y, squares, some)
    return (mean @ last.T).to(hidden.dtype), squares.div_(passes).to(hidden.dtype)


def _launch(kernel, like, *arguments):
    """One program for every BLOCK elements of `like`."""
    if like.numel():
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(like.numel(), BLOCK),)](*arguments, like.numel(), BLOCK, num_warps=WARPS)


@triton.jit
def _block(n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n


@triton.jit(do_not_specialize=["first", "threshold", "seed", "n"])
def _draw(out, first, threshold, seed, n, BLOCK: tl.constexpr):
    """Writes whether dropout keeps n elements from `first` on, in BLOCK groups of four."""
    group = first // 4 + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = _random.words(group, seed, 0, 0)
    for i in tl.static_range(4):
        at = group * 4 + i - first
        tl.store(out + at, words[i].to(tl.int64) >= threshold, mask=(at >= 0) & (at < n))


@triton.jit(do_not_specialize=["of_pass", "n"])
def _rectify(product, constant, mean, out, of_pass, n, BLOCK: tl.constexpr):
    """Writes relu(product + constant), less the mean unless it is None, to out [passes, N, C]."""
    at, mask = _block(n, BLOCK)
    z = _maths.load(product, at, mask) + _maths.load(constant, at % of_pass, mask)
    unit = tl.where(z < 0, 0.0, z)
    if mean is not None:
        unit -= _maths.load(mean, at % of_pass, mask)
    _maths.store(out, at, unit, mask)


@triton.jit(do_not_specialize=["passes", "n"])
def _add_squares(y, squares, passes, n, BLOCK: tl.constexpr):
    """Adds the squares of y [passes, N, D] to squares [N, D], pass by pass."""
    at, mask = _block(n, BLOCK)
    total = _maths.load(squares, at, mask)
    k = tl.program_id(1)
    while k < passes:  # the interpreter's range takes no tensor
        x = _maths.load(y, at + k.to(tl.int64) * n, mask)
        total += x * x
        k += 1
    _maths.store(squares, at, total, mask)
