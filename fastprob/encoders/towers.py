"""What open_clip's towers are made of: the one file that opens their internals.

A text tower is open_clip's CLIP itself or its `TextTransformer`, an image tower its `VisionTransformer`. Both are the
caller's: nothing here changes them, copies their weights or hangs a hook on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F


class TextTower:
    """The text side of an open_clip model, its token embeddings apart from what follows them.

    Raises ValueError for a model whose text tower is not open_clip's own.
    """

    def __init__(self, model: nn.Module):
        self.tower = getattr(model, "text", model)
        if not isinstance(getattr(self.tower, "token_embedding", None), nn.Embedding):
            raise ValueError(
                f"TextTower: model must have a text tower of open_clip's own, got {type(self.tower).__name__}"
            )

    @property
    def width(self) -> int:
        """d, of the token embeddings."""
        return self.tower.token_embedding.embedding_dim

    @property
    def dim(self) -> int:
        """D, of the text features."""
        projection = self.tower.text_projection
        if projection is None:
            return self.width
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tower.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.tower.transformer.get_cast_dtype()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.tower.transformer.resblocks

    def embed(self, ids: Tensor) -> Tensor:
        """[...] token ids -> [..., d]."""
        return self.tower.token_embedding(ids)

    def positions(self) -> Tensor:
        """[T, d], one embedding for every place in a text."""
        return self.tower.positional_embedding.to(self.dtype)

    def causal(self, embedded: Tensor) -> Tensor:
        """[B, T, d] token embeddings of beginnings of texts -> hidden states [B, T, d], in a causal tower."""
        length = embedded.shape[1]
        x = embedded.to(self.dtype) + self.positions()[:length]
        return self.tower.transformer(x, attn_mask=self.tower.attn_mask[:length, :length])

    def read(self, x: Tensor) -> Tensor:
        """Features [..., D] of the hidden states [..., d] at the token that the tower reads."""
        return self._project(self.tower.ln_final(x))

    def encode(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """What `encode_text(ids)` would return, had the tokens these embeddings. [B, T, d], [B, T] -> [B, D]."""
        tower, x, mask = self.tower, embedded.to(self.dtype), self.tower.attn_mask
        class_token = getattr(tower, "cls_emb", None)
        if class_token is not None:
            x = torch.cat([x, class_token.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        length = x.shape[1]
        if class_token is not None or getattr(tower, "use_pad_mask", False):
            padding = tower._build_additive_mask(ids, length, x.dtype)
            mask = padding if mask is None else mask[:length, :length] + padding
        x = tower.transformer(x + self.positions()[:length], attn_mask=mask)
        if class_token is not None:
            return self.read(x[:, -1])
        return self._project(text_global_pool(tower.ln_final(x), ids, *_pooling(tower)))

    def _project(self, x: Tensor) -> Tensor:
        projection = self.tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection

    def why_not_causal(self, ids: Tensor) -> str | None:
        """Why the tokens behind end-of-text matter to this tower; None where they do not. ids: [B, T] of its texts."""
        pool, _ = _pooling(self.tower)
        if self.tower.attn_mask is None:
            return "the text tower is not causal"
        if getattr(self.tower, "cls_emb", None) is not None:
            return "the text tower appends a class token"
        if pool == "argmax":
            return None if (ids == ids.max()).sum(dim=1).min() > 0 else "end-of-text is not the greatest token"
        return None if pool == "eos" else f"the text tower reads the {pool!r} token, not end-of-text"

    def why_not_by_parts(self) -> str | None:
        """Why `queries`, `keys_and_values` and `after_attention` do not make up its blocks; None where they do."""
        own = all(type(block) is ResidualAttentionBlock for block in self.blocks)
        return None if own else "the text tower's blocks are custom"


def _pooling(tower: nn.Module) -> tuple[str, int | None]:
    """How a text tower finds the token that it reads, and the end-of-text token by which it may."""
    if hasattr(tower, "text_pool_type"):  # CLIP's
        return tower.text_pool_type, getattr(tower, "text_eos_id", None)
    return tower.pool_type, getattr(tower, "eos_id", None)


# A block is x + out(attention(norm(x))), then x + mlp(norm(x)). Its parts, around an attention of another kind:


def before_attention(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """What a block makes queries, keys and values of. [B, N, d] -> [B, N, d]."""
    return block.ln_1(x)


def queries(block: ResidualAttentionBlock, normed: Tensor) -> Tensor:
    """[B, N, d], from `before_attention` -> [B, N, H, E]."""
    attn = block.attn
    d = attn.embed_dim
    return F.linear(normed, attn.in_proj_weight[:d], attn.in_proj_bias[:d]).unflatten(-1, (attn.num_heads, -1))


def keys_and_values(block: ResidualAttentionBlock, normed: Tensor) -> Tensor:
    """[B, N, d], from `before_attention` -> [B, N, 2, H, E]."""
    attn = block.attn
    d = attn.embed_dim
    return F.linear(normed, attn.in_proj_weight[d:], attn.in_proj_bias[d:]).unflatten(-1, (2, attn.num_heads, -1))


def after_attention(block: ResidualAttentionBlock, x: Tensor, attended: Tensor) -> Tensor:
    """x: [B, N, d], the block's input; attended: [B, N, H, E] -> its output [B, N, d]."""
    x = x + block.ls_1(block.attn.out_proj(attended.flatten(-2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


class ImageTower:
    """The image side of an open_clip model, if it is a vision transformer. Raises ValueError for any other."""

    def __init__(self, model: nn.Module):
        self.tower = getattr(model, "visual", None)
        if not isinstance(self.tower, VisionTransformer):
            got = type(self.tower).__name__
            raise ValueError(f"ImageTower: model.visual must be open_clip's VisionTransformer, got {got}")

    @property
    def patch_weight(self) -> Tensor:
        """[d, 3, p, p], what embeds a patch of p x p pixels."""
        return self.tower.conv1.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.tower.transformer.resblocks

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> class token and patches as the first block takes them, [B, 1 + N, d]."""
        return self.tower._embeds(images)

    def read(self, x: Tensor) -> Tensor:
        """Hidden states behind the last block, [B, 1 + N, d] -> image features [B, D]."""
        pooled, _ = self.tower._pool(x)
        return pooled if self.tower.proj is None else pooled @ self.tower.proj


def conversion(preprocess: Callable) -> list[Callable]:
    """The last steps of open_clip's transform, of an image that has its size: RGB, tensor, normalised."""
    return preprocess.transforms[-3:]
