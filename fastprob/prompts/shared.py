"""Many prompts with one beginning through a causal text tower: the beginning once, then each class's few tokens.

In a causal tower a token sees only what stands before it, and the embedding is read at the end-of-text token. So with
the prompts [SOS, v_1 .. v_L, name, ".", EOT, padding] of C classes

    the prefix SOS, v_1 .. v_L has the same hidden states in every prompt: it is computed once,
    a class's suffix (name, ".", EOT) attends to the prefix's keys and values and causally to itself,
    padding is never looked at, and in the last block only EOT is.

That is 1 + L tokens and a few for every class, not 77 C.

All tokens lie in one row, prefix first, then the suffixes by length, so that linear layers see no padding and attention
runs over one batch per length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprob.encoders.towers import TextTower, after_attention, before_attention, keys_and_values, queries
from fastprob.prompts.attention import attention
from fastprob.prompts.tokens import PromptTokens


@dataclass(frozen=True)
class Suffixes:
    """The suffixes of some classes in one row, short ones first.

    prefix: [1], the token before the context; ids, positions: [N]; counts, lengths: of the groups of equal length;
    order: [C], the place of each class's end-of-text token among the groups'.
    """

    prefix: Tensor
    ids: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    order: Tensor

    def to(self, device: torch.device) -> Suffixes:
        prefix, ids, positions, order = (t.to(device) for t in (self.prefix, self.ids, self.positions, self.order))
        return Suffixes(prefix, ids, positions, self.counts, self.lengths, order)


def suffixes(tokens: PromptTokens, classes: Sequence[int]) -> Suffixes:
    """Lays out the suffixes of `classes`: what stands behind the context, up to end-of-text."""
    first = tokens.start + tokens.slots.shape[1]  # the same for every class
    length_of = {c: tokens.lengths[c] - first for c in classes}
    by_length = sorted(classes, key=length_of.__getitem__)
    places = [(c, first + i) for c in by_length for i in range(length_of[c])]
    rows, positions = torch.tensor(places).unbind(1)
    counts = Counter(length_of.values())
    place = {c: i for i, c in enumerate(by_length)}
    lengths = tuple(sorted(counts))
    return Suffixes(
        tokens.ids[0, : tokens.start],
        tokens.ids[rows, positions],
        positions,
        tuple(counts[length] for length in lengths),
        lengths,
        torch.tensor([place[c] for c in classes]),
    )


def encode(tower: TextTower, context: Tensor, these: Suffixes) -> Tensor:
    """[B, L, d] contexts -> [B, C, width] hidden states at end-of-text, before the tower's last norm."""
    position = tower.positions()
    known = tower.embed(torch.cat([these.prefix, these.ids])).to(position.dtype)  # [1 + N, d]
    known = known.expand(len(context), -1, -1)
    sos = len(these.prefix)
    prefix = sos + context.shape[1]
    x = torch.cat([known[:, :sos], context.to(position.dtype), known[:, sos:]], dim=1)  # [B, P + N, d]
    x = x + torch.cat([position[:prefix], position[these.positions]])
    layout = prefix, these.counts, these.lengths
    *blocks, last = tower.blocks
    for block in blocks:
        h = before_attention(block, x)
        x = after_attention(block, x, attention(queries(block, h), keys_and_values(block, h), *layout))
    h = before_attention(last, x)
    attended = attention(queries(last, _ends(h, *layout)), keys_and_values(last, h), *layout)  # [B, C, H, E]
    return after_attention(last, _ends(x, *layout), attended)[:, these.order]


def _ends(x: Tensor, prefix: int, counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The suffixes' last tokens, [B, P + N, d] -> [B, C, d]. One split: an index's gradient is of the whole row."""
    sizes = [count * length for count, length in zip(counts, lengths)]
    parts = x.split([prefix, *sizes], dim=1)[1:]
    return torch.cat([part[:, length - 1 :: length] for part, length in zip(parts, lengths)], dim=1)
