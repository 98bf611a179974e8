"""Random numbers by counter, Philox4x32-10: which bits belong to which element stands in fastprob/ops/_random.py."""

import triton
import triton.language as tl


@triton.jit
def words(group, seed, stream, draw):
    """The four words, uint32, of every group (int64) of four elements."""
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + stream, zero + draw)
