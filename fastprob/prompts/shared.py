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
from torch import Tensor, nn
from torch.nn import functional as F

from fastprob.prompts.tokens import PromptTokens


@dataclass(frozen=True)
class Group:
    """`count` suffixes of `length` tokens."""

    count: int
    length: int


@dataclass(frozen=True)
class Suffixes:
    """The suffixes of some classes in one row, short ones first.

    prefix: [1], the token before the context; ids, positions: [N]; groups: of equal length; order: [C], the place of
    each class's end-of-text token among the groups'.
    """

    prefix: Tensor
    ids: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    order: Tensor

    def to(self, device: torch.device) -> Suffixes:
        moved = (t.to(device) for t in (self.prefix, self.ids, self.positions))
        return Suffixes(*moved, self.groups, self.order.to(device))


def suffixes(tokens: PromptTokens, classes: Sequence[int]) -> Suffixes:
    """Lays out the suffixes of `classes`: what stands behind the context, up to end-of-text."""
    first = int(tokens.slots[0, -1]) + 1  # the same for every class
    lengths = {c: int(tokens.ends[c]) - first + 1 for c in classes}
    by_length = sorted(classes, key=lengths.__getitem__)
    positions = torch.cat([first + torch.arange(lengths[c]) for c in by_length])
    rows = torch.tensor(by_length).repeat_interleave(torch.tensor([lengths[c] for c in by_length]))
    counts = Counter(lengths.values())
    place = {c: i for i, c in enumerate(by_length)}
    return Suffixes(
        tokens.ids[0, : first - tokens.slots.shape[1]],
        tokens.ids[rows, positions],
        positions,
        tuple(Group(counts[length], length) for length in sorted(counts)),
        torch.tensor([place[c] for c in classes]),
    )


def encode(tower: nn.Module, context: Tensor, these: Suffixes) -> Tensor:
    """[B, L, d] contexts -> [B, C, width] hidden states at end-of-text, before the tower's last norm."""
    dtype = tower.transformer.get_cast_dtype()
    position = tower.positional_embedding.to(dtype)
    known = tower.token_embedding(torch.cat([these.prefix, these.ids])).to(dtype)  # [1 + N, d]
    known = known.expand(len(context), -1, -1)
    sos = len(these.prefix)
    prefix = sos + context.shape[1]
    x = torch.cat([known[:, :sos], context.to(dtype), known[:, sos:]], dim=1)  # [B, P + N, d]
    x = x + torch.cat([position[:prefix], position[these.positions]])
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        x = _rest(block, x, _attention(block, x, prefix, these.groups))
    ends = _ends(x, prefix, these.groups)
    return _rest(last, ends, _attention(last, x, prefix, these.groups, only_ends=True))[:, these.order]


def _parts(x: Tensor, prefix: int, groups: tuple[Group, ...]) -> tuple[Tensor, list[Tensor]]:
    """[B, P + N, ...] -> the prefix [B, P, ...] and, of each group, [B, count, length, ...].

    One split: slices would each have a gradient of the whole row's size.
    """
    first, *rest = x.split([prefix, *(group.count * group.length for group in groups)], dim=1)
    return first, [part.unflatten(1, (group.count, group.length)) for part, group in zip(rest, groups)]


def _ends(x: Tensor, prefix: int, groups: tuple[Group, ...]) -> Tensor:
    """The suffixes' last tokens, [B, P + N, d] -> [B, C, d]. Not by an index: that has Inductor (torch 2.11) reuse a
    buffer that the backward pass still needs."""
    return torch.cat([part[:, :, -1] for part in _parts(x, prefix, groups)[1]], dim=1)


def _rest(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """What follows attention in a block. [B, N, d] -> [B, N, d]."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _attention(block: nn.Module, x: Tensor, prefix: int, groups: tuple[Group, ...], only_ends: bool = False) -> Tensor:
    """Heads side by side: of all tokens, [B, P + N, d], or of the suffixes' last ones, [B, C, d]."""
    attn = block.attn
    d, heads = attn.embed_dim, (attn.num_heads, -1)
    h = block.ln_1(x)
    asking = _ends(h, prefix, groups) if only_ends else h
    q = F.linear(asking, attn.in_proj_weight[:d], attn.in_proj_bias[:d]).unflatten(-1, heads)
    k, v = F.linear(h, attn.in_proj_weight[d:], attn.in_proj_bias[d:]).unflatten(-1, (2, *heads)).unbind(2)
    (k_prefix, k_groups), (v_prefix, v_groups) = _parts(k, prefix, groups), _parts(v, prefix, groups)
    k_prefix, v_prefix = k_prefix.transpose(1, 2), v_prefix.transpose(1, 2)  # [B, H, P, E]
    if only_ends:
        _, q_groups = _parts(q, 0, tuple(Group(group.count, 1) for group in groups))
        results = []
    else:
        own, q_groups = _parts(q, prefix, groups)
        own = F.scaled_dot_product_attention(own.transpose(1, 2), k_prefix, v_prefix, is_causal=True)
        results = [own.transpose(1, 2).flatten(2)]  # [B, P, d]
    for of_group in zip(q_groups, k_groups, v_groups):
        results.append(_group_attention(*(t.permute(0, 3, 1, 2, 4) for t in of_group), k_prefix, v_prefix))
    return torch.cat(results, dim=1)


def _group_attention(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """Suffixes of one length S attend to the prefix and causally to themselves; q may be of the last token alone.

    q: [B, H, C, Q, E]; k, v: [B, H, C, S, E]; k_prefix, v_prefix: [B, H, P, E] -> [B, C Q, H E].
    """
    (count, queries), width = q.shape[2:4], k.shape[3]
    q = q * q.shape[-1] ** -0.5
    to_prefix = (q.flatten(2, 3) @ k_prefix.transpose(-1, -2)).unflatten(2, (count, queries))  # [B, H, C, Q, P]
    to_self = q @ k.transpose(-1, -2)  # [B, H, C, Q, S]
    if queries > 1:
        later = torch.ones(queries, width, dtype=torch.bool, device=q.device).triu(1)
        to_self = to_self.masked_fill(later, -torch.inf)
    w = torch.cat([to_prefix, to_self], dim=-1).softmax(dim=-1)
    w_prefix, w_self = w.split([k_prefix.shape[2], width], dim=-1)
    out = (w_prefix.flatten(2, 3) @ v_prefix).unflatten(2, (count, queries)) + w_self @ v  # [B, H, C, Q, E]
    return out.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
