"""Values of all pairs of generalised Gaussians and targets: what the operators of such pairs share.

Two kernels. The first makes tables of what depends on a distribution's coordinate alone, transposed to [D, N], and the
normalisers' sums. In the second a program owns a tile of pairs and walks over the coordinates, a column of tables and
of targets at a time.

LEAN: log2 and exp2 by the GPU's instructions alone, two for an element. Their errors of 2^-22 in the exponent show in a
single residual, not in a sum of many; so from LEAN_DIM coordinates on, and for residuals up to LEAN_MOST.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _ggd, _launch, _maths

LEAN_DIM, LEAN_MOST = 64, 1024.0
TABLES = 5  # mu; the parts of a's `factor`; b
WARPS = 4
ROWS, DEPTH = 16, 32  # distributions and coordinates at a time that tables are made of
HEIGHT = 32  # distributions of a tile
WIDTHS = {True: 64, False: 32}  # LEAN -> targets: 16 or eight pairs a thread, for which the registers suffice


class Pairs:
    """The distributions' tables and the targets [D, M]; `values` fills in the pairs of some rows."""

    def __init__(self, mu, inv_alpha, beta, target, form, eps, clamp_min, clamp_max):
        mu, inv_alpha, beta = _launch.contiguous((mu, inv_alpha, beta))
        self.compute = torch.float64 if mu.dtype == torch.float64 else torch.float32
        (self.count, self.dim), self.paper, self.bounds = mu.shape, form == "paper", (clamp_min, clamp_max)
        half = mu.dtype in (torch.bfloat16, torch.float16)
        many = self.dim >= LEAN_DIM and clamp_max <= LEAN_MOST and self.compute == torch.float32
        self.lean = half or many or not self.paper
        self.targets = target.to(self.compute).T.contiguous()
        self.tables = self.targets.new_empty(TABLES, self.dim, self.count)
        self.norms = self.targets.new_empty(self.count)
        if self.count:
            with torch.cuda.device_of(mu):
                _tables[(triton.cdiv(self.count, ROWS),)](
                    mu, inv_alpha, beta, self.tables, self.norms, self.count, self.dim, eps, self.lean, ROWS, DEPTH,
                    num_warps=WARPS
                )  # fmt: skip

    def values(self, first: int, out: torch.Tensor) -> torch.Tensor:
        """Fills `out` [rows, M] with the values of the distributions from `first` on."""
        rows, columns = out.shape
        if out.numel():
            width = WIDTHS[self.lean and self.compute == torch.float32]
            across = triton.cdiv(columns, width)
            with torch.cuda.device_of(out):
                _pairs[(triton.cdiv(rows, HEIGHT) * across,)](
                    self.tables, self.norms, self.targets, out, first, rows, self.count, columns, self.dim, across,
                    *self.bounds, self.paper, self.lean, HEIGHT, width, num_warps=WARPS
                )  # fmt: skip
        return out


@triton.jit(do_not_specialize=["count", "dim"])
def _tables(
    mu, inv_alpha, beta, tables, norms, count, dim, eps: tl.float64,
    LEAN: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes the tables [TABLES, dim, count] of ROWS distributions, and the sums of their normalisers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DEPTH).to(tl.int64)
    total = tl.zeros((ROWS,), tl.float64)
    FAST: tl.constexpr = mu.dtype.element_ty.primitive_bitwidth == 16
    size = dim * count.to(tl.int64)
    start = tl.program_id(0) * 0
    while start < dim:  # the interpreter's range takes no tensor under NumPy 2.4
        d = start + column
        mask = (row < count)[:, None] & (d < dim)[None, :]
        at = row[:, None] * dim + d[None, :]
        x, y, z = _maths.load(mu, at, mask), _maths.load(inv_alpha, at, mask), _maths.load(beta, at, mask)
        a, b, _, stirling, p, _ = _ggd.shape_of(y, z, _maths.parameter(eps, x.dtype), FAST)
        one = tl.full(a.shape, 1.0, a.dtype)
        norm = stirling - _maths.log_product(a, one, p, one, FAST)
        total += tl.sum(tl.where(mask, norm, 0.0).to(tl.float64), 1)
        if LEAN and x.dtype != tl.float64:
            exponent, mantissa, limit = _maths.log_product(a, one, one, one, FAST) * _maths.LOG2_E, a, a
        else:
            exponent, mantissa, limit = _maths.factor(a, False)
        to = tables + (d[None, :] * count + row[:, None])
        tl.store(to, x, mask=mask)
        tl.store(to + size, exponent, mask=mask)
        tl.store(to + 2 * size, mantissa, mask=mask)
        tl.store(to + 3 * size, limit, mask=mask)
        tl.store(to + 4 * size, b, mask=mask)
        start += DEPTH
    tl.store(norms + row, total.to(norms.dtype.element_ty), mask=row < count)


@triton.jit
def _numbers(of_row, size, inside, of_target, of_column):
    """A coordinate of some distributions' tables and of some targets."""
    return (
        tl.load(of_row, mask=inside, other=0.0),
        tl.load(of_row + size, mask=inside, other=0.0),
        tl.load(of_row + size * 2, mask=inside, other=1.0),
        tl.load(of_row + 3 * size, mask=inside, other=0.0),
        tl.load(of_row + 4 * size, mask=inside, other=1.0),
        tl.load(of_target, mask=of_column, other=0.0),
    )


@triton.jit(do_not_specialize=["first", "rows", "count", "columns", "dim", "across"])
def _pairs(
    tables, norms, targets, out, first, rows, count, columns, dim, across, clamp_min: tl.float64, clamp_max: tl.float64,
    PAPER: tl.constexpr, LEAN: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes a tile of the pairs of `rows` distributions from `first` on and all targets."""
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = (program % across).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside, of_column = row < rows, column < columns
    of_row = tables + (row + first)
    size = dim * count.to(tl.int64)
    total = tl.zeros((WIDTH, HEIGHT), norms.dtype.element_ty)  # distributions side by side: a thread reads one's tables
    lo, hi = _maths.parameter(clamp_min, total.dtype), _maths.parameter(clamp_max, total.dtype)
    d, at, at_target = program * 0, first.to(tl.int64) * 0, column
    numbers = _numbers(of_row, size, inside & (d < dim), targets + at_target, of_column & (d < dim))
    while d < dim:
        d += 1
        at += count
        at_target += columns
        # The next coordinate's numbers are on their way while this one's are computed with.
        following = _numbers(of_row + at, size, inside & (d < dim), targets + at_target, of_column & (d < dim))
        mu, exponent, mantissa, limit, b, z = numbers
        r = tl.abs(mu[None, :] - z[:, None])
        if PAPER:
            t, _ = _maths.power(r, (exponent[None, :], mantissa[None, :], limit[None, :]), b[None, :], LEAN)
        else:
            t = r * mantissa[None, :] * b[None, :]
        total += tl.where(t < lo, lo, tl.where(t > hi, hi, t))
        numbers = following
    total = tl.trans(total) + tl.load(norms + (row + first), mask=inside, other=0.0)[:, None]
    mask = inside[:, None] & of_column[None, :]
    _maths.store(out, row[:, None] * columns + column[None, :], total, mask)
