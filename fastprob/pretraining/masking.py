"""Tokens hidden for masked language modelling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprob.ops._random import numbers

STREAM = (1 << 31) + 3


def hide_tokens(
    ids: Tensor, *, mask: int, vocabulary: int, keep: Sequence[int], seed: int, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hides a share of the tokens, as BERT does: 80 % of these become [MASK], 10 % any token, 10 % stay as they are.

    Args:
        ids: [R, T] int64; mask: the id of [MASK]; vocabulary: how many tokens there are.
        keep: ids that are never hidden: padding, [CLS] and their like.
        seed: any 64-bit number; the same one hides the same tokens on every device. Token e of all R x T takes the
            numbers 3 e to 3 e + 2 of Philox4x32-10: whether it is hidden, how, and which token takes its place.

    Returns:
        (shown, hidden): ids [R, T], and [R, T] bool, true where `ids` is to be told.

    Source:
        BERT (Devlin et al., NAACL 2019), sec. 3.1; ALBEF (Li et al., NeurIPS 2021).
    """
    drawn = numbers(0, 3 * ids.numel(), seed=seed, stream=STREAM, device=ids.device).view(*ids.shape, 3)
    whether, how = (drawn[..., word].double() * 2**-32 for word in (0, 1))
    hidden = whether < share
    for token in keep:
        hidden &= ids != token
    instead = torch.where(how < 0.8, mask, torch.where(how < 0.9, drawn[..., 2] % vocabulary, ids))
    return torch.where(hidden, instead, ids), hidden
