"""What open_clip's towers are made of: the one file that opens their internals.

A text tower is open_clip's CLIP itself or its `TextTransformer`, an image tower its `VisionTransformer`. Both are the
caller's: nothing here changes them, copies their weights or hangs a hook on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms


@dataclass(frozen=True)
class Entered:
    """A batch on its way through a tower's blocks.

    x: [B, N, d], hidden states; mask: what attention adds to its logits, [1 or B, 1, N, N], None for nothing; at: [B],
    the one token that the tower reads, None where it reads several.
    """

    x: Tensor
    mask: Tensor | None = None
    at: Tensor | None = None

    def with_states(self, x: Tensor) -> Entered:
        """The batch S times over, with other hidden states [S, B, N, d]: a batch of S B."""
        times, mask = len(x), self.mask
        mask = mask if mask is None or len(mask) == 1 else mask.repeat(times, 1, 1, 1)
        return Entered(x.flatten(0, 1).to(self.x.dtype), mask, None if self.at is None else self.at.repeat(times))

    def token(self, x: Tensor) -> Tensor:
        """The token that is read, [B, N, d] -> [B, 1, d]."""
        return x[self._rows, self.at][:, None]

    def token_mask(self) -> Tensor | None:
        """The mask of the token that is read, [B, 1, 1, N]."""
        if self.mask is None:
            return None
        return self.mask.expand(len(self.x), -1, -1, -1)[self._rows, :, self.at][:, :, None]

    def seen(self) -> Tensor:
        """[B, N] bool, the tokens that may reach what is read: all but those that a mask hides from it."""
        if self.mask is None or self.at is None:
            return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        return self.token_mask()[:, 0, 0].isfinite().scatter(1, self.at[:, None], True)

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.x), device=self.x.device)


class _Tower:
    """What both towers share: the way through their blocks."""

    blocks: nn.ModuleList

    def run(self, batch: Entered, blocks: Sequence[nn.Module]) -> Entered:
        """The batch behind some of the blocks."""
        for block in blocks:
            batch = replace(batch, x=_output(block, batch))
        return batch

    def features(self, batch: Entered, first: int = 0) -> Tensor:
        """[B, D], of hidden states in front of block `first`. Where one token is read, the last block has it alone."""
        batch = self.run(batch, self.blocks[first:-1])
        return self.read(_output(self.blocks[-1], batch, one=batch.at is not None)).flatten(1)

    @property
    def by_parts(self) -> bool:
        """Whether `queries`, `keys_and_values` and `after_attention` make up its blocks."""
        return all(_is_plain(block) for block in self.blocks)


class TextTower(_Tower):
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
        tower = self.tower
        x, mask = self._masked(embedded, ids)
        x = tower.transformer(x, attn_mask=mask)
        if self._class_token is not None:
            return self.read(x[:, -1])
        return self._project(text_global_pool(tower.ln_final(x), ids, *_pooling(tower)))

    def enter(self, embedded: Tensor, ids: Tensor) -> Entered:
        """Texts in front of the first block, [B, T, d], [B, T]: up to the last end-of-text where the tower is causal.

        Raises ValueError for a tower that reads no single token.
        """
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        at = text_global_pool(places, ids, *_pooling(self.tower))
        if self._class_token is not None:
            at = torch.full_like(ids[:, 0], ids.shape[1])
        elif at.dim() != 1:
            raise ValueError("TextTower: model must read one token of a text, got a text tower that reads all")
        elif self.why_not_causal(ids) is None:
            length = int(at.max()) + 1
            embedded, ids = embedded[:, :length], ids[:, :length]
        x, mask = self._masked(embedded, ids)
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (len(x), -1))[:, :1]  # all heads' alike
        return Entered(x, mask, at)

    @property
    def _class_token(self) -> Tensor | None:
        return getattr(self.tower, "cls_emb", None)

    def _masked(self, embedded: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token embeddings with positions, and a class token behind them where there is one; their mask."""
        tower, x, mask = self.tower, embedded.to(self.dtype), self.tower.attn_mask
        if self._class_token is not None:
            x = torch.cat([x, self._class_token.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        length = x.shape[1]
        mask = None if mask is None else mask[:length, :length].to(x.dtype)
        if self._class_token is not None or getattr(tower, "use_pad_mask", False):
            padding = tower._build_additive_mask(ids, length, x.dtype)
            mask = padding if mask is None else mask + padding
        return x + self.positions()[:length], mask

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
        """Why its blocks are not to be taken apart; None where they are."""
        return None if self.by_parts else "the text tower's blocks are custom"


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


def _is_plain(block: nn.Module) -> bool:
    return type(block) is ResidualAttentionBlock


def _output(block: nn.Module, batch: Entered, one: bool = False) -> Tensor:
    """[B, N, d], or [B, 1, d] of the token that is read: its query is then the only one, and all after it its alone.

    A plain block's products are taken here, over rows: `nn.MultiheadAttention` takes one per token.
    """
    if not _is_plain(block):
        x = block(batch.x, attn_mask=batch.mask)
        return batch.token(x) if one else x
    x = asking = before_attention(block, batch.x)
    k, v = keys_and_values(block, x).unbind(2)
    before, mask = batch.x, batch.mask
    if one:
        before, asking, mask = batch.token(before), batch.token(x), batch.token_mask()
    q, k, v = (t.transpose(1, 2) for t in (queries(block, asking), k, v))
    return after_attention(block, before, F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2))


def attention_weights(block: ResidualAttentionBlock, batch: Entered) -> Tensor:
    """[B, H, N, N], of the block's attention; a row is what one token attends to."""
    h = before_attention(block, batch.x)
    q, k = (t.transpose(1, 2) for t in (queries(block, h), keys_and_values(block, h)[:, :, 0]))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if batch.mask is None else logits + batch.mask).softmax(dim=-1)


class ImageTower(_Tower):
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

    @property
    def image_size(self) -> tuple[int, int]:
        return self.tower.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.tower.grid_size

    def enter(self, images: Tensor) -> Entered:
        """[B, 3, H, W] in front of the first block."""
        x = self.embed(images.to(self.patch_weight.dtype))
        one = self.tower.pool_type == "tok" and self.tower.attn_pool is None
        return Entered(x, at=torch.zeros_like(x[:, 0, 0], dtype=torch.int64) if one else None)

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> class token and patches as the first block takes them, [B, 1 + N, d]."""
        return self.tower._embeds(images)

    def states(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + N, d], normed: what the tower pools, then a state for every patch."""
        batch = self.enter(images)
        pooled, patches = self.tower._pool(self.run(batch, self.blocks).x)
        return torch.cat([pooled[:, None], patches], dim=1)

    def read(self, x: Tensor) -> Tensor:
        """Hidden states behind the last block, [B, 1 + N, d] -> image features [B, D]."""
        pooled, _ = self.tower._pool(x)
        return pooled if self.tower.proj is None else pooled @ self.tower.proj


def conversion(preprocess: Callable) -> list[Callable]:
    """The last steps of open_clip's transform, of an image that has its size: RGB, tensor, normalised."""
    return preprocess.transforms[-3:]


def augmented(
    preprocess: Callable, size: Sequence[int], *, least: float = 0.08, then: Sequence[Callable] = ()
) -> Callable:
    """The transform with a random crop of this share of the image or more instead of `resizing`, flipped every other
    time, and what else is to come then. size: H, W."""
    crop = transforms.RandomResizedCrop(size, (least, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *then, *conversion(preprocess)])


def resizing(preprocess: Callable) -> list[Callable]:
    """The steps before `conversion`, which give an image its size: what a model sees of it."""
    return preprocess.transforms[:-3]
