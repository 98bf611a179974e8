"""prototype_dispersion: value, gradients or both. See fastprob/ops/prototype_dispersion.py.

One pass over x for the value and its gradient, a program for a block of one point's coordinates. The prototypes'
gradient, rarely wanted, is a second kernel: a program owns a block of one class's and takes its points in the batch's
order, out of all points sorted by class. A label out of range, which only the device knows of, makes the value and its
point's gradient NaN; nothing is read there.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _launch, _maths


def prototype_dispersion(x, prototypes, labels):
    return _valued((x, prototypes, labels), 0)[0]


def _prototype_dispersion_backward(grad, x, prototypes, labels, *, needs):
    inputs = _launch.contiguous((x, prototypes, labels))
    grads = _launch.gradients_like(inputs, needs)
    _run(inputs, grad, None, grads, needs)
    return grads


def _prototype_dispersion_value_and_grad(x, prototypes, labels, *, needs):
    return _valued((x, prototypes, labels), needs)


def _valued(inputs, needs):
    """The value, and the gradients that `needs` asks for."""
    inputs = _launch.contiguous(inputs)
    x, grads = inputs[0], _launch.gradients_like(inputs, needs)
    partials = torch.empty(x.shape[0] * _blocks(x), dtype=torch.float64, device=x.device)
    _run(inputs, None, partials, grads, needs)
    with torch.cuda.device_of(x):
        return _launch.total(partials, x, max(x.numel(), 1)), *grads


def _blocks(x):
    """Programs for a point."""
    return triton.cdiv(x.shape[1], _launch.block_size(x))


def _run(inputs, grad, partials, grads, needs):
    x, prototypes, labels = inputs
    (count, dim), classes = x.shape, prototypes.shape[0]
    block = _launch.block_size(x)
    with torch.cuda.device_of(x):
        if x.numel() and (needs & 1 or partials is not None):
            _points[(count, _blocks(x))](
                *inputs, grad, partials, grads[0], x.numel(), dim, classes, needs & 1, block, num_warps=_launch.WARPS
            )
        if prototypes.numel() and needs & 2:
            _classes[(classes, _blocks(x))](
                x, prototypes, *_by_class(labels, classes), grad, grads[1], max(x.numel(), 1), dim, block,
                num_warps=_launch.WARPS
            )  # fmt: skip


def _by_class(labels, classes):
    """The points [B] sorted by class, in the batch's order within one; and where each class begins [C + 1]."""
    ordered, points = torch.sort(labels, stable=True)
    return points, torch.searchsorted(ordered, torch.arange(classes + 1, device=labels.device))


@triton.jit(do_not_specialize=["n", "classes"])
def _points(
    x, prototypes, labels, grad, partials, out, n, dim, classes, NEEDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the program's sum of squares to `partials`, unless it is None, and (NEEDED) the gradient of the mean for
    its coordinates, times grad's scalar, to `out`.
    """
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < dim
    label = tl.load(labels + b)
    inside = (label >= 0) & (label < classes)
    d = _maths.load(x, b * dim + column, mask) - _maths.load(prototypes, label * dim + column, mask & inside)
    d = tl.where(inside, d, _maths.NAN)
    if partials is not None:
        squares = tl.sum(tl.where(mask, d * d, 0.0))
        tl.store(partials + b * tl.num_programs(1) + tl.program_id(1), squares.to(tl.float64))
    if NEEDED:
        _maths.store(out, b * dim + column, 2 * _launch.gradient_scale(grad, n, d.dtype) * d, mask)


@triton.jit(do_not_specialize=["n"])
def _classes(x, prototypes, points, bounds, grad, out, n, dim, BLOCK: tl.constexpr):
    """Writes the gradient of the mean for a class's coordinates, times grad's scalar: minus the sum of its points'."""
    c = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < dim
    prototype = _maths.load(prototypes, c * dim + column, mask)
    total = tl.zeros((BLOCK,), tl.float64)
    at, end = tl.load(bounds + c), tl.load(bounds + c + 1)
    while at < end:  # the interpreter's range takes no tensor
        total += (_maths.load(x, tl.load(points + at) * dim + column, mask) - prototype).to(tl.float64)
        at += 1
    scale = 2 * _launch.gradient_scale(grad, n, prototype.dtype)
    _maths.store(out, c * dim + column, -scale * total.to(prototype.dtype), mask)
