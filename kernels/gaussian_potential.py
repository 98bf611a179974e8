"""gaussian_potential: value and gradient, block of rows by block. See fastprob/ops/gaussian_potential.py.

Both products are the vendor library's, in the precision that torch is set to for float32 (TF32 where the user allows
it); between them one kernel turns a block of Gram rows into potentials and sums them. A block is at most BLOCK_BYTES:
memory does not grow with C^2.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _ggd

BLOCK_BYTES = 64 << 20  # of Gram rows at a time: products large enough for a whole GPU
COLUMNS = 1024  # that a program takes at a time
WARPS = 4


def gaussian_potential(x, *, t, reduction, normalize):
    return _run(x, t, reduction, normalize, 0, None)[0]


def _gaussian_potential_backward(grad, x, *, t, reduction, normalize, needs):
    return _run(x, t, reduction, normalize, needs, grad)[1]


def _gaussian_potential_value_and_grad(x, *, t, reduction, normalize, needs):
    return _run(x, t, reduction, normalize, needs, None)


def _run(x, t, reduction, normalize, needs, grad):
    """The value and, if needed, the gradient times `grad` (None: 1)."""
    count = len(x)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute).contiguous()
    length = y.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else None
    if normalize:
        y = y / length
    w = y - y.mean(dim=0)
    squares, sums = w.square().sum(dim=1), torch.empty(count, dtype=torch.float64, device=x.device)
    products = torch.empty_like(w) if needs else None
    step = max(BLOCK_BYTES // (max(count, 1) * w.element_size()), 1)
    for first in range(0, count, step):
        rows = w[first : first + step]
        k = rows @ w.T  # [step, C]
        with torch.cuda.device_of(x):
            _potentials[(len(rows),)](k, squares, sums, first, count, t, COLUMNS, num_warps=WARPS)
        if needs:
            torch.mm(k, w, out=products[first : first + step])
    pairs = count * (count - 1)
    total = sums.sum()
    value = total if reduction == "sum" or not pairs else total / pairs
    value = value.log() if reduction == "logmean" and pairs else value
    if not needs:
        return value.to(x.dtype), x.new_empty(0)
    scale = {"sum": 1.0, "mean": 1 / max(pairs, 1), "logmean": 1 / total if pairs else 0.0}[reduction]
    scale = -4 * t * scale * (1 if grad is None else grad.double())
    g = (w * sums.to(compute)[:, None] - products) * scale  # a number or a scalar on the device: no copy to it
    if normalize:
        g = (g - y * (g * y).sum(dim=1, keepdim=True)) / length
    return value.to(x.dtype), g.to(x.dtype)


@triton.jit(do_not_specialize=["first"])
def _potentials(gram, squares, sums, first, count, t, BLOCK: tl.constexpr):
    """A row of Gram products becomes potentials exp(-t |w_m - w_n|^2), 0 on the diagonal; and their sum."""
    row = tl.program_id(0).to(tl.int64)
    m = first + row
    gram += row * count
    square = tl.load(squares + m)
    dtype: tl.constexpr = gram.dtype.element_ty
    width = -_ggd.parameter(t, dtype)
    total = tl.zeros((BLOCK,), tl.float64)
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    start = tl.program_id(0) * 0
    while start < count:  # the interpreter's range takes no tensor
        n = start + offsets
        mask = n < count
        distance = square + tl.load(squares + n, mask=mask, other=0.0) - 2 * tl.load(gram + n, mask=mask, other=0.0)
        k = tl.exp(width * tl.where(distance < 0, 0.0, distance))
        k = tl.where(mask & (n != m), k, 0.0).to(dtype)
        tl.store(gram + n, k, mask=mask)
        total += k.to(tl.float64)
        start += BLOCK
    tl.store(sums + m, tl.sum(total))
