"""Hard negatives for matching: others that a query is like, drawn by how much it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob.ops._random import numbers

STREAM = (1 << 31) + 2


@torch.no_grad()
def hard_negatives(similarities: Tensor, query_ids: Tensor, ids: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """For every query one other whose id is not its own, drawn with probability softmax(similarities) among these:

        argmax over j with id_j != id_i of s_ij + g_ij,    g_ij = -log(-log u_ij)

    No device is waited for, and none of the cases in which torch.multinomial stops is special: a batch of one, a row
    without a candidate, similarities so far apart that all chances but one are 0, half types.

    Args:
        similarities: [B, N], s, divided by their temperature; any floating type.
        query_ids: [B] int64; ids: [N] int64. Those of equal ids are never negatives of each other.
        seed: any 64-bit number; the same one draws the same negatives on every device. u of pair e = i N + j is
            (w + 1/2) / 2^32, where w is word e & 3 that Philox4x32-10 makes of group e >> 2.

    Returns:
        (which, found): [B] int64, a number in 0..N-1; and [B] bool, false for a query without a candidate, whose number
        means nothing.

    Raises:
        ValueError: for other shapes.

    Source:
        ALBEF (Li et al., NeurIPS 2021), sec. 3.2; Gumbel, 1954, for the maximum.
    """
    if similarities.dim() != 2 or not similarities.shape[1]:
        got = list(similarities.shape)
        raise ValueError(f"hard_negatives: similarities must be [B, N] with N at least 1, got {got}")
    for name, each, length in zip(("query_ids", "ids"), (query_ids, ids), similarities.shape):
        if each.shape != (length,):
            raise ValueError(f"hard_negatives: {name} must be [{length}], got {list(each.shape)}")
    drawn = numbers(0, similarities.numel(), seed=seed, stream=STREAM, device=similarities.device)
    noise = -(-((drawn.double() + 0.5) * 2**-32).log()).log().view_as(similarities)
    candidates = query_ids[:, None] != ids
    chances = (similarities.nan_to_num() + noise).masked_fill(~candidates, -torch.inf)
    return chances.argmax(1), candidates.any(1)
