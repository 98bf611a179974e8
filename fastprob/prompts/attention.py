"""Attention among prompts with one beginning: of the prefix to itself, of each suffix to the prefix and to itself.

    out_i = sum over j of softmax_j(q_i k_j / sqrt(E)) v_j,  j: the prefix and, in its own suffix, the tokens up to i

All tokens lie in one row: the prefix, then the suffixes, grouped by length. Under torch.compile this is an operator of
its own, which Inductor does not look into. What it makes of matmul, cat, softmax and split has wrong gradients (torch
2.11): AOTAutograd takes split_with_sizes for no view, so it keeps both the softmax and its two parts for the backward
pass, and declares both free to overwrite ("donated") though they share memory; Inductor then puts the gradient of the
softmax in its place before the parts were read. Which comes first depends on widths and lengths. Of the operator only
its inputs are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def attention(q: Tensor, kv: Tensor, prefix: int, counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """[B, N, H, E], a causal attention of tokens in one row.

    q: [B, N, H, E], of all T tokens, or of every suffix's last one alone (N = C); kv: [B, T, 2, H, E], keys and values;
    prefix: how many tokens come first; counts, lengths: of the groups of suffixes that follow.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastprob._prompt_attention.default(q, kv, prefix, counts, lengths)
    return _attention(q, kv, prefix, counts, lengths)


def _attention(q: Tensor, kv: Tensor, prefix: int, counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    results = []
    for asking, k, v, k_before, v_before in _by_group((q,), kv, prefix, counts, lengths):
        w_before, w_own = _weights(asking, k, k_before)
        results.append(_rows(w_before, v_before) + w_own @ v)
    return _one_row(results)


def _gradients(
    grad: Tensor, q: Tensor, kv: Tensor, prefix: int, counts: Sequence[int], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of q and kv, from the gradient of the result: with w the weights and g = grad,

    dv = w' g,  ds = w (g v' - sum(w g v')) / sqrt(E),  dq = ds k,  dk = ds' q
    """
    scale = q.shape[-1] ** -0.5
    dq, dk, dv, dk_prefix, dv_prefix = [], [], [], [], []
    for g, asking, k, v, k_before, v_before in _by_group((grad, q), kv, prefix, counts, lengths):
        w = torch.cat(_weights(asking, k, k_before), dim=-1)
        dw = torch.cat([_rows(g, v_before.mT), g @ v.mT], dim=-1)
        ds = w * (dw - (w * dw).sum(dim=-1, keepdim=True)) * scale
        widths = [k_before.shape[2], k.shape[3]]
        (w_before, w_own), (ds_before, ds_own) = w.split(widths, dim=-1), ds.split(widths, dim=-1)
        dq.append(_rows(ds_before, k_before) + ds_own @ k)
        dk.append(ds_own.mT @ asking)
        dv.append(w_own.mT @ g)
        if len(dk) > 1:  # a group of suffixes
            dk_prefix.append(ds_before.flatten(2, 3).mT @ asking.flatten(2, 3))  # [B, H, P, E]
            dv_prefix.append(w_before.flatten(2, 3).mT @ g.flatten(2, 3))
    dk[0], dv[0] = dk[0] + sum(dk_prefix)[:, :, None], dv[0] + sum(dv_prefix)[:, :, None]
    return _one_row(dq), torch.stack([_one_row(dk), _one_row(dv)], dim=2)


def _by_group(
    asking: Sequence[Tensor], kv: Tensor, prefix: int, counts: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Of the prefix, then of every group of suffixes: the parts of `asking`, keys and values of their own,
    [B, H, C, S, E], and those of the prefix before them, [B, H, P, E], or none, [B, H, 0, E]."""
    counts, lengths = [1, *counts], [prefix, *lengths]
    k, v = (_groups(t, counts, lengths) for t in kv.unbind(2))
    everyone = asking[0].shape[1] == kv.shape[1]
    queries = lengths if everyone else [0] + [1] * (len(lengths) - 1)
    for i, parts in enumerate(zip(*(_groups(t, counts, queries) for t in asking), k, v)):
        before = prefix if i else 0
        yield *parts, k[0][:, :, 0, :before], v[0][:, :, 0, :before]


def _groups(x: Tensor, counts: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
    """[B, N, H, E] -> of each group [B, H, C, S, E]. One split: slices would each have a gradient of the whole row."""
    parts = x.split([count * length for count, length in zip(counts, lengths)], dim=1)
    return [part.unflatten(1, shape).permute(0, 3, 1, 2, 4) for part, shape in zip(parts, zip(counts, lengths))]


def _one_row(groups: Sequence[Tensor]) -> Tensor:
    """The inverse of `_groups`."""
    return torch.cat([x.permute(0, 2, 3, 1, 4).flatten(1, 2) for x in groups], dim=1)


def _rows(x: Tensor, y: Tensor) -> Tensor:
    """A product with what all suffixes have in common: [B, H, C, Q, K], [B, H, K, M] -> [B, H, C, Q, M]."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _weights(q: Tensor, k: Tensor, k_before: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens before, [B, H, C, Q, P], and of the suffix's own, [B, H, C, Q, S]; Q: all of them or the last."""
    asking, width = q.shape[3], k.shape[3]
    q = q * q.shape[-1] ** -0.5
    own = q @ k.mT
    if asking > 1:
        later = torch.ones(asking, width, dtype=torch.bool, device=q.device).triu(1)
        own = own.masked_fill(later, -torch.inf)
    weights = torch.cat([_rows(q, k_before.mT), own], dim=-1).softmax(dim=-1)
    return weights.split([k_before.shape[2], width], dim=-1)


# ---- the operator ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastprob::_prompt_attention", mutates_args=())
def _operator(q: Tensor, kv: Tensor, prefix: int, counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return _attention(q, kv, prefix, counts, lengths)


@torch.library.custom_op("fastprob::_prompt_attention_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, q: Tensor, kv: Tensor, prefix: int, counts: Sequence[int], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, q, kv, prefix, counts, lengths)


@_operator.register_fake
def _(q, kv, prefix, counts, lengths):
    return q.new_empty(q.shape)


@_operator_backward.register_fake
def _(grad, q, kv, prefix, counts, lengths):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.layout = inputs[2:]


def _backward(ctx, grad):
    gradients = torch.ops.fastprob._prompt_attention_backward.default(grad, *ctx.saved_tensors, *ctx.layout)
    return *gradients, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)
