"""queue_contrastive_loss, block by block of keys. See fastprob/ops/queue_contrastive_loss.py.

The similarities of a block are a product of the vendor library's, small enough to stay in the L2 cache, in the
precision that torch is set to for float32. A first round sums up what both softmaxes need; a second one, for the
gradient of the queries alone, makes the similarities anew, turns them into their slopes where they lie, and multiplies
these with the keys. So it takes five products where a round that keeps the sums of keys under each softmax takes four,
and under the positives a fifth.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _maths

KEYS = 8192  # of a block: for 256 queries 8 MB of float32 similarities, and as many of the teacher's
CHUNK, WARPS = 1024, 8
STATE = 8  # numbers of a query


def queue_contrastive_loss(*tensors):
    return _Sweep(*tensors).value()


def _queue_contrastive_loss_backward(grad, *tensors, needs):
    return _Sweep(*tensors).gradients(grad, needs)


def _queue_contrastive_loss_value_and_grad(*tensors, needs):
    sweep = _Sweep(*tensors)
    return sweep.value(), *sweep.gradients(torch.ones_like(tensors[4]), needs)


class _Sweep:
    """The first round, and what follows from it."""

    def __init__(
        self, queries, keys, query_ids, key_ids, temperature, teacher=None, teacher_temperature=None, alpha=None
    ):
        self.dtype = queries.dtype
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.queries, self.keys = queries.to(compute).contiguous(), keys.contiguous()
        self.ids, self.key_ids = query_ids.contiguous(), key_ids.contiguous()
        self.teacher = None if teacher is None else teacher.to(compute).contiguous()
        self.inverse = temperature.to(compute).reciprocal()
        self.teacher_inverse = None if teacher is None else teacher_temperature.to(compute).reciprocal()
        self.count = len(queries)
        self.state = self.queries.new_zeros(STATE, self.count, dtype=torch.float64)
        self.state[:2] = -torch.inf
        for block in self.blocks():
            self.launch(_sums, self.state, *block)
        self.greatest, _, self.total, self.weighted, self.teacher_total, of_teacher, own, counts = self.state
        alpha = torch.zeros_like(self.total[:1]) if teacher is None else alpha.double()
        self.own = torch.where(counts > 0, (1 - alpha) / counts, 0.0)  # h_ij times 1 - alpha
        self.soft = torch.zeros_like(self.own) if teacher is None else alpha / self.teacher_total
        self.weight = torch.where(counts > 0, 1.0, alpha)
        self.expected = self.own * own - self.weight * self.greatest  # of s - greatest, under the targets
        if teacher is not None:
            self.expected += self.soft * of_teacher

    def blocks(self):
        """(keys, ids of them, s, the teacher's s) of every block, both still without the temperature."""
        for first in range(0, len(self.keys), KEYS):
            keys = self.keys[first : first + KEYS].to(self.queries.dtype)
            teacher = None if self.teacher is None else self.teacher @ keys.T
            yield keys, self.key_ids[first : first + KEYS], self.queries @ keys.T, teacher

    def launch(self, kernel, numbers, keys, key_ids, s, teacher):
        if not self.count:
            return
        with torch.cuda.device_of(s):
            kernel[(self.count,)](
                s, teacher, self.ids, key_ids, self.inverse, self.teacher_inverse, numbers, self.count, len(keys),
                CHUNK, num_warps=WARPS
            )  # fmt: skip

    def value(self):
        values = self.weight * self.total.log() - self.expected
        return (values.sum() / max(self.count, 1)).to(self.dtype)

    def gradients(self, grad, needs):
        """Of every tensor, for what reaches the value; empty where none is needed."""
        dtypes = [torch.int64 if i in (2, 3) else self.dtype for i in range(8)]
        result = [self.queries.new_empty(0, dtype=dtype) for dtype in dtypes]
        scale, chances = grad.double() / max(self.count, 1), self.weight / self.total
        if needs & 1:
            factors = torch.stack([chances, self.soft, self.own]) * (scale * self.inverse)
            numbers, gradient = torch.cat([self.state[:2], factors]), torch.zeros_like(self.queries)
            for block in self.blocks():
                self.launch(_slopes, numbers, *block)
                gradient.addmm_(block[2], block[0])
            result[0] = gradient.to(self.dtype)
        if needs & 16:
            slopes = chances * self.weighted - self.weight * self.greatest - self.expected
            result[4] = (-slopes.sum() * scale * self.inverse).to(self.dtype)
        return tuple(result)


@triton.jit(do_not_specialize=["count", "n"])
def _sums(s, teacher, ids, key_ids, inverse, teacher_inverse, state, count, n, CHUNK: tl.constexpr):
    """Adds a query's n similarities to its sums: the greatest exponents of both softmaxes; of its own the sum of the
    exponentials and that of these times s, of the teacher's the same; the sum of s over keys with its id, and how many.
    """
    row, count = tl.program_id(0).to(tl.int64), tl.cast(count, tl.int64)
    at, lane, id = state + row, tl.arange(0, CHUNK), tl.load(ids + row)
    step, warmer = tl.load(inverse), tl.load(inverse if teacher is None else teacher_inverse)
    greatest, total, weighted = tl.load(at), tl.load(at + 2 * count), tl.load(at + 3 * count)
    teachers, teacher_total = tl.load(at + count), tl.load(at + 4 * count)
    teacher_weighted, own, counts = tl.load(at + 5 * count), tl.load(at + 6 * count), tl.load(at + 7 * count)
    start = row * 0
    while start < n:
        j = start + lane
        mask = j < n
        x = tl.load(s + row * n + j, mask=mask, other=0.0) * step
        equal = mask & (tl.load(key_ids + j, mask=mask, other=0) == id)
        own += tl.sum(tl.where(equal, x, 0.0)).to(tl.float64)
        counts += tl.sum(equal.to(tl.int32)).to(tl.float64)
        if teacher is not None:
            y = tl.load(teacher + row * n + j, mask=mask, other=0.0) * warmer
            teachers, teacher_total, teacher_weighted = _add(teachers, teacher_total, teacher_weighted, y, x, mask)
        greatest, total, weighted = _add(greatest, total, weighted, x, x, mask)
        start += CHUNK
    tl.store(at, greatest)
    tl.store(at + count, teachers)
    tl.store(at + 2 * count, total)
    tl.store(at + 3 * count, weighted)
    tl.store(at + 4 * count, teacher_total)
    tl.store(at + 5 * count, teacher_weighted)
    tl.store(at + 6 * count, own)
    tl.store(at + 7 * count, counts)


@triton.jit
def _add(greatest, total, weighted, x, s, mask):
    """The sums of a softmax with exponents x more: relative to the greatest one."""
    most = _greatest(tl.where(mask, x, -_maths.INF)).to(tl.float64)
    most = tl.where(most > greatest, most, greatest)
    factor = tl.where(most == greatest, 1.0, tl.exp(greatest - most))
    e = tl.where(mask, tl.exp(x - most.to(x.dtype)), 0.0)
    weighted = weighted * factor + tl.sum(tl.where(mask, e * s, 0.0)).to(tl.float64)
    return most, total * factor + tl.sum(e).to(tl.float64), weighted


@triton.jit
def _greatest(x):
    """As integers of the same order, whose maximum keeps NaN, which that of floating numbers drops."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        most = tl.max(bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
        most ^= (most >> 63) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True)
        most = tl.max(bits ^ ((bits >> 31) & 0x7FFFFFFF))
        most ^= (most >> 31) & 0x7FFFFFFF
    return most.to(x.dtype, bitcast=True)


@triton.jit(do_not_specialize=["count", "n"])
def _slopes(s, teacher, ids, key_ids, inverse, teacher_inverse, numbers, count, n, CHUNK: tl.constexpr):
    """A query's n similarities become the loss's slopes for them; numbers [5, count] are the greatest exponents of both
    softmaxes, and what p, r and the keys with its id are multiplied by.
    """
    row, count = tl.program_id(0).to(tl.int64), tl.cast(count, tl.int64)
    at, lane, id = numbers + row, tl.arange(0, CHUNK), tl.load(ids + row)
    step, warmer = tl.load(inverse), tl.load(inverse if teacher is None else teacher_inverse)
    greatest, teachers = tl.load(at).to(step.dtype), tl.load(at + count).to(step.dtype)
    chances, soft = tl.load(at + 2 * count).to(step.dtype), tl.load(at + 3 * count).to(step.dtype)
    own = tl.load(at + 4 * count).to(step.dtype)
    start = row * 0
    while start < n:
        j = start + lane
        mask = j < n
        x = tl.load(s + row * n + j, mask=mask, other=0.0) * step
        equal = tl.load(key_ids + j, mask=mask, other=0) == id
        slope = chances * tl.exp(x - greatest) - tl.where(equal, own, 0.0)
        if teacher is not None:
            slope -= soft * tl.exp(tl.load(teacher + row * n + j, mask=mask, other=0.0) * warmer - teachers)
        tl.store(s + row * n + j, slope, mask=mask)
        start += CHUNK
