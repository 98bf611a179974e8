"""ggd_match_nll of all pairs of rows, summed over their coordinates: what the operators of such pairs share.

A program has some pairs, side by side in its threads, and DEPTH coordinates of them at a time. An element takes so long
that neither loads nor what could be computed of a row alone count.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _launch, _maths
from fastprob.kernels._ggd_match import match, nodes_for

WARPS, DEPTH = 4, 32
PAIRS = 256 if _maths.INTERPRETED else WARPS  # the interpreter takes its time for a program of any size


class Pairs:
    """The distributions [N, D] and the others [M, D]; `values` fills in the pairs of some rows."""

    def __init__(self, tensors, eps):
        self.tensors, self.eps = _launch.contiguous(tensors), eps

    def values(self, first: int, out: torch.Tensor) -> torch.Tensor:
        """Fills `out` [rows, M] with the values of the distributions from `first` on."""
        mu = self.tensors[0]
        if out.numel():
            with torch.cuda.device_of(out):
                _pairs[(triton.cdiv(out.numel(), PAIRS),)](
                    self.tensors[:3], self.tensors[3:], nodes_for(mu), out, first, out.numel(), out.shape[1],
                    mu.shape[1], self.eps, PAIRS, DEPTH, num_warps=WARPS, maxnreg=_launch.registers(mu),
                )  # fmt: skip
        return out


@triton.jit(do_not_specialize=["first", "count", "columns", "dim"])
def _pairs(
    ones, others, table, out, first: tl.int64, count: tl.int64, columns: tl.int64, dim: tl.int64, eps: tl.float64,
    PAIRS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes the first `count` pairs of the rows from `first` on."""
    FAST: tl.constexpr = ones[0].dtype.element_ty.primitive_bitwidth == 16
    start = tl.program_id(0).to(tl.int64) * PAIRS
    lane = tl.arange(0, PAIRS * DEPTH)
    pair = start + lane // DEPTH
    row, column = (first + pair // columns) * dim, pair % columns * dim
    total = tl.zeros((PAIRS * DEPTH,), tl.float64)
    d = (lane % DEPTH).to(tl.int64)
    at = tl.program_id(0) * 0
    while at < dim:  # the interpreter's range takes no tensor under NumPy 2.4
        mask = (pair < count) & (d < dim)
        one = [_maths.load(pointer, row + d, mask) for pointer in ones]
        other = [_maths.load(pointer, column + d, mask) for pointer in others]
        value, _ = match(*one, *other, _maths.parameter(eps, one[0].dtype), table, FAST)
        total += tl.where(mask, value, 0.0).to(tl.float64)
        d += DEPTH
        at += DEPTH
    sums = tl.sum(tl.reshape(total, (PAIRS, DEPTH)), 1)
    if out.dtype.element_ty != tl.float64:
        sums = sums.to(tl.float32)
    pair = start + tl.arange(0, PAIRS)
    _maths.store(out, pair, sums, pair < count)
