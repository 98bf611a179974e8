"""gaussian_potential: value and gradient, tile by tile. See fastprob/ops/gaussian_potential.py.

The points are cut into tiles. A pair of tiles takes one product, which becomes potentials and their sums where it lies,
in a block that stays in the L2 cache; and two products that read them, one for the points of either tile. So each
potential is computed once, in 3 C^2 D operations where the whole matrix takes 4 C^2 D. The products are the vendor
library's, in the precision that torch is set to for float32 (TF32 where the user allows it).

A point's sums over BLOCK others are written once each and added up in that order at the end. For logmean the distances
are computed twice: the nearest pair's comes before the first potential.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _maths
from fastprob.ops.gaussian_potential import SHORTEST, points, rounding, slope, width

TILE = 2048  # points: 16 MB of float32 potentials, a third of an H200's L2, and one wave of a product's own tiles
BLOCK, ROWS = 128, 32  # points in either direction that a program takes, and rows of them at a time
WARPS = 4


def gaussian_potential(x, *, t, reduction, normalize):
    return _run(x, t, reduction, normalize, 0, None)[0]


def _gaussian_potential_backward(grad, x, *, t, reduction, normalize, needs):
    return _run(x, t, reduction, normalize, needs, grad)[1]


def _gaussian_potential_value_and_grad(x, *, t, reduction, normalize, needs):
    return _run(x, t, reduction, normalize, needs, None)


def _run(x, t, reduction, normalize, needs, grad):
    """The value and, if needed, the gradient times `grad` (None: 1)."""
    if x.shape[0] < 2:
        return x.new_zeros(()), torch.zeros_like(x) if needs else x.new_empty(0)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    w, length, root = points(x.to(compute).contiguous(), t, normalize)
    mean = w.mean(dim=0)
    tiles = _Tiles(w.sub_(mean), width(root))
    nearest = tiles.nearest() if reduction == "logmean" else w.new_zeros(())
    sums, products = tiles.potentials(nearest, needs)
    total, pairs = sums.sum(), x.shape[0] * (x.shape[0] - 1)
    value = total if reduction == "sum" else total / pairs
    value = value.log() - (root * (root * nearest)).sum() if reduction == "logmean" else value
    if not needs:
        return value.to(x.dtype), x.new_empty(0)
    del tiles  # its memory, before more is taken
    g = products.neg_().addcmul_(w, sums.to(compute)[:, None])
    if normalize:
        w.add_(mean)
        g.addcmul_(w, (g * w).sum(dim=1, keepdim=True) * (length > SHORTEST), value=-1).div_(length)
    scale = {"sum": 1.0, "mean": 1 / pairs, "logmean": 1 / total}[reduction]
    scale = -4 * slope(t, root.double()) * scale * (1 if grad is None else grad.double())
    most = torch.finfo(compute).max
    return value.to(x.dtype), g.mul_(scale.clamp(-most, most).to(compute)).to(x.dtype)


class _Tiles:
    """The pairs of tiles of points w [C, D], whose potentials are exp(-width (distance - nearest))."""

    def __init__(self, w, width):
        self.w, self.width, self.count = w, width, w.shape[0]
        size = triton.cdiv(self.count, triton.cdiv(self.count, TILE))  # all of about one size
        self.size = triton.cdiv(size, BLOCK) * BLOCK
        self.block, self.squares = w.new_empty(self.size, self.size), w.new_empty(self.count)

    def grams(self):
        """(m, n, products) of the tiles from points m and n on, each tile's with itself first: its squared norms."""
        starts = range(0, self.count, self.size)
        for m, n in [(m, m) for m in starts] + [(m, n) for m in starts for n in starts if m < n]:
            rows, columns = self.w[m : m + self.size], self.w[n : n + self.size]
            gram = torch.mm(rows, columns.T, out=self.block[: len(rows), : len(columns)])
            if m == n:
                self.squares[m : m + self.size].copy_(gram.diagonal())
            yield m, n, gram

    def launch(self, m, n, gram, partials, nearest):
        grid = tuple(triton.cdiv(length, BLOCK) for length in gram.shape)
        with torch.cuda.device_of(gram):
            _tile[grid](
                gram, self.squares, partials, self.width, nearest, m, n, self.count, self.size, rounding(self.w), ROWS,
                BLOCK, num_warps=WARPS * gram.element_size() // 4
            )  # fmt: skip

    def nearest(self):
        """The squared distance of the nearest pair."""
        least = self.w.new_full((), torch.inf)
        for m, n, gram in self.grams():
            self.launch(m, n, gram, None, None)
            torch.minimum(least, gram.amin(), out=least)
        return least.clamp_(min=0)

    def potentials(self, nearest, needs):
        """Of every point m, sum_n k_mn in float64 [C] and, if needed, sum_n k_mn w_n [C, D]."""
        partials = self.w.new_empty(triton.cdiv(self.count, BLOCK), self.count)
        products = torch.zeros_like(self.w) if needs else None
        for m, n, gram in self.grams():
            self.launch(m, n, gram, partials, nearest)
            if needs:
                products[m : m + self.size].addmm_(gram, self.w[n : n + self.size])
            if needs and m < n:
                products[n : n + self.size].addmm_(gram.T, self.w[m : m + self.size])
        return partials.sum(dim=0, dtype=torch.float64), products


@triton.jit(do_not_specialize=["count"])
def _tile(
    gram, squares, partials, width, nearest, first_row, first_column, count, stride, rounding, ROWS: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Gram products of points from first_row and first_column on become squared distances, infinite on the diagonal, or
    potentials. Then partials [blocks, count] gets, for each point of a row, their sum over this block of columns; and
    for each of a column, over this block of rows.
    """
    row, column = tl.program_id(0).to(tl.int64) * BLOCK, tl.program_id(1).to(tl.int64) * BLOCK
    j = column + tl.arange(0, BLOCK)
    n = first_column + j
    square_n = tl.load(squares + n, mask=n < count, other=0.0)
    limit = _maths.parameter(rounding, square_n.dtype)
    to_columns = tl.zeros((BLOCK,), square_n.dtype)
    for start in tl.static_range(0, BLOCK, ROWS):
        i = row + start + tl.arange(0, ROWS)
        m = first_row + i
        at = gram + (i[:, None] * stride + j[None, :])
        mask = (m < count)[:, None] & (n < count)[None, :]
        square = tl.load(squares + m, mask=m < count, other=0.0)[:, None] + square_n[None, :]
        distance = square - 2 * tl.load(at)  # the block holds whole tiles: no mask, which would split its accesses
        distance = tl.where(mask & (m[:, None] != n[None, :]), distance, _maths.INF)
        if partials is None:
            tl.store(at, distance)
        else:
            distance -= tl.load(nearest)
            k = tl.exp(-tl.load(width) * tl.where(distance <= limit * square, 0.0, distance))
            tl.store(at, k)
            to_columns += tl.sum(k, 0)
            block = (first_column + column) // BLOCK
            tl.store(partials + block * count + m, tl.sum(k, 1), mask=m < count)
    if partials is not None:
        block = (first_row + row) // BLOCK
        tl.store(partials + block * count + n, to_columns, mask=(n < count) & (first_row != first_column))
