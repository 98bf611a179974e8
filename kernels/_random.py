"""Random numbers by counter, Philox4x32-10: which bits belong to which element stands in fastprob/ops/_random.py."""

import triton
import triton.language as tl


@triton.jit
def words(group, seed, stream, draw):
    """The four words, uint32, of every group (int64) of four elements."""
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + stream, zero + draw)


@triton.jit
def kept(element, threshold, seed, stream):
    """Whether dropout keeps each element (int64): its number is at least the threshold, floor(p 2^32)."""
    w0, w1, w2, w3 = words(element >> 2, seed, stream, 0)
    word = element & 3
    number = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return number.to(tl.int64) >= threshold
