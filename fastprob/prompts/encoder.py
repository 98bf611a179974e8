"""Class embeddings from tuned context vectors, by the cheapest of three equal ways through a frozen text tower."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastprob.encoders.towers import TextTower
from fastprob.prompts import shared
from fastprob.prompts.tokens import PromptTokens, prompt_tokens

PATHS = ("auto", "shared", "truncated", "plain")
CPU_CHUNK = 512
"""Prompts at once on a CPU: 1000 classes on ViT-B-32's tower take 3.4 s so, 4.6 s at once and 6.4 s by 64."""


class PromptTextEncoder(nn.Module):
    """Encodes the prompts "<context> <class name>." of C classes, the context being vectors that are tuned.

        w_c = normalize(g([SOS, v_1 .. v_L, name_c, ".", EOT]))

    Three paths with equal results, to rounding, and equal gradients for the context:

    - "shared": SOS and the context once, then each class's few tokens (`fastprob.prompts.shared`); for contexts that
      all classes share, in front of the name, in a causal tower. Some 17 + 5 C tokens instead of 77 C.
    - "truncated": every prompt, but only up to the longest end-of-text; for causal towers.
    - "plain": all tokens, as open_clip's own `encode_text`; for every tower.

    Args:
        model: an open_clip model, frozen by the caller. It is neither a submodule nor in the state dict.
        tokenizer: its tokenizer (`open_clip.get_tokenizer`).
        classnames: C names; "_" counts as a space.
        context_length: L, the number of context vectors.
        class_position: where the name stands: "end", "middle" or "front" of the context.
        path: "auto" takes the first of the three that holds for the tower and the context, and warns where a tower
            leaves only the plain one; any other is taken or refused.
        chunk: most prompts to encode at once; bounds memory together with `recompute`. None: all, on a CPU `CPU_CHUNK`.
        recompute: compute activations again in the backward pass instead of keeping them.

    Raises:
        ValueError: for a tower whose token embeddings cannot be reached, a path that does not hold for it, classnames
            that do not fit, and in `forward` for contexts of another shape.

    Source:
        The prompts: CoOp (Zhou et al., IJCV 2022) and CoCoOp (CVPR 2022).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        classnames: Sequence[str],
        *,
        context_length: int,
        class_position: str = "end",
        path: str = "auto",
        chunk: int | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        if path not in PATHS:
            raise ValueError(f"PromptTextEncoder: path must be one of {', '.join(map(repr, PATHS))}, got {path!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"PromptTextEncoder: chunk must be at least 1 or None, got {chunk}")
        self.tower = TextTower(model)  # no submodule: its weights are the caller's
        self.classnames, self.context_length, self.chunk, self.recompute = classnames, context_length, chunk, recompute
        self.tokens = prompt_tokens(tokenizer, classnames, context_length, class_position)
        not_causal = self.tower.why_not_causal(self.tokens.ids)
        elsewhere = f"the class name stands in the {class_position} of the context" if class_position != "end" else None
        not_shared = not_causal or elsewhere or self.tower.why_not_by_parts()
        for wanted, reason in (("truncated", not_causal), ("shared", not_shared)):
            if path == wanted and reason:
                raise ValueError(f"PromptTextEncoder: path must be 'auto' or another, got {path!r}: {reason}")
        if path == "auto" and not_causal:
            length = self.tokens.ids.shape[1]
            warnings.warn(f"PromptTextEncoder: encodes all {length} tokens, as {not_causal}", stacklevel=2)
        self.asked, self.path = path, path
        if path == "auto":
            self.path = "plain" if not_causal else "truncated" if not_shared else "shared"
        self._suffixes: dict[tuple[int, int, torch.device], shared.Suffixes] = {}
        self._tokens: dict[torch.device, PromptTokens] = {}
        self._prepare(self.tower.device)

    @property
    def width(self) -> int:
        """d, the length of a context vector."""
        return self.tower.width

    def extra_repr(self) -> str:
        return f"{len(self.classnames)} classes, context_length={self.context_length}, path={self.path!r}"

    def forward(self, context: Tensor) -> Tensor:
        """Class embeddings of unit norm: [C, D] for a context [L, d] (shared) or [C, L, d] (each class its own),
        [B, C, D] for contexts [B, 1, L, d] (each image its own)."""
        classes, tail = len(self.classnames), (self.context_length, self.width)
        if context.shape[-2:] != tail or context.shape[:-2] not in ((), (classes,), (*context.shape[:1], 1)):
            expected = f"[L, d], [C, L, d] or [B, 1, L, d] with C = {classes}, L = {tail[0]}, d = {tail[1]}"
            raise ValueError(f"PromptTextEncoder: context must be {expected}, got {list(context.shape)}")
        own = context.dim() == 3
        batch = context if context.dim() == 4 else context[None] if own else context[None, None]  # [B, 1 or C, L, d]
        path = "truncated" if self.path == "shared" and own and self.asked == "auto" else self.path
        if path == "shared" and own:
            raise ValueError(
                "PromptTextEncoder: context must be [L, d] or [B, 1, L, d] for path='shared', got [C, L, d]"
            )
        encode = {"shared": self._shared, "truncated": self._truncated, "plain": self._plain}[path]
        rows = []
        chunk = self._chunk_on(context.device) or max(len(batch) * classes, 1)
        for images in self._image_chunks(len(batch), chunk):
            columns = []
            for some in self._class_chunks(chunk):
                part = batch[images, some.start : some.stop] if own else batch[images]
                if self.recompute and torch.is_grad_enabled():
                    columns.append(checkpoint(encode, part, some, use_reentrant=False))
                else:
                    columns.append(encode(part, some))
            rows.append(torch.cat(columns, dim=1))
        result = F.normalize(torch.cat(rows), dim=-1)  # [B, C, D]
        return result if context.dim() == 4 else result[0]

    def _chunk_on(self, device: torch.device) -> int | None:
        return self.chunk or (CPU_CHUNK if device.type == "cpu" else None)

    def _class_chunks(self, chunk: int) -> Iterator[range]:
        count = len(self.classnames)
        step = min(chunk, count)
        return (range(at, min(at + step, count)) for at in range(0, count, step))

    def _image_chunks(self, count: int, chunk: int) -> Iterator[slice]:
        step = max(chunk // len(self.classnames), 1)
        return (slice(at, at + step) for at in range(0, count, step))

    def _prepare(self, device: torch.device) -> None:
        """Lays out all tokens there: a first call may be one that is compiled, and keeps nothing that it makes."""
        self._tokens_on(device)
        if self.path == "shared":
            for classes in self._class_chunks(self._chunk_on(device) or len(self.classnames)):
                self._suffixes_on(device, classes)

    def _tokens_on(self, device: torch.device) -> PromptTokens:
        if device not in self._tokens:
            moved = self.tokens.to(device)
            if torch.compiler.is_compiling():
                return moved
            self._tokens[device] = moved
        return self._tokens[device]

    def _suffixes_on(self, device: torch.device, classes: range) -> shared.Suffixes:
        key = classes.start, classes.stop, device
        if key not in self._suffixes:
            made = shared.suffixes(self.tokens, classes).to(device)
            if torch.compiler.is_compiling():
                return made
            self._suffixes[key] = made
        return self._suffixes[key]

    # Each path: contexts [B, 1 or c, L, d] and a range of c classes -> [B, c, D].

    def _shared(self, context: Tensor, classes: range) -> Tensor:
        these = self._suffixes_on(context.device, classes)
        return self.tower.read(shared.encode(self.tower, context[:, 0], these))

    def _truncated(self, context: Tensor, classes: range) -> Tensor:
        x = self.tower.causal(self._with_context(context, classes, max(self.tokens.lengths)))  # [B c, T, d]
        ends = self._tokens_on(x.device).ends[classes.start : classes.stop].repeat(len(context))
        x = x[torch.arange(len(x), device=x.device), ends]
        return self.tower.read(x).unflatten(0, (len(context), len(classes)))

    def _plain(self, context: Tensor, classes: range) -> Tensor:
        ids = self._tokens_on(context.device).ids[classes.start : classes.stop]
        embedded = self._with_context(context, classes, ids.shape[1])
        return self.tower.encode(embedded, ids.repeat(len(context), 1)).unflatten(0, (len(context), len(classes)))

    def _with_context(self, context: Tensor, classes: range, length: int) -> Tensor:
        """Token embeddings of every image's and class's prompt, the context in its slots: [B c, T, d]."""
        tokens, some = self._tokens_on(context.device), slice(classes.start, classes.stop)
        ids, slots = tokens.ids[some, :length], tokens.slots[some]
        x = self.tower.embed(ids).expand(len(context), -1, -1, -1)  # [B, c, T, d]
        where = slots[..., None].expand(*x.shape[:2], -1, x.shape[-1])  # [B, c, L, d]
        return x.scatter(2, where, context.to(x.dtype).expand_as(where)).flatten(0, 1)
