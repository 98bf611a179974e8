"""Momentum encoders: twins that follow their models slowly, and a queue of what they made of the last pairs."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMPTY = -1
"""The id of a place of the queue that no pair has filled yet: no pair has it."""

Model = TypeVar("Model", bound=nn.Module)


def twin_of(model: Model) -> Model:
    """A copy that asks for no gradients, in evaluation mode, for `follow`.

    Raises:
        ValueError: for parameters of a half type, in which a twin that follows slowly would stand still.
    """
    half = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.itemsize < 4}
    if half:
        raise ValueError(f"twin_of: model must have float32 or float64 parameters, got {', '.join(sorted(half))}")
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def follow(twin: nn.Module, model: nn.Module, momentum: float = 0.995) -> None:
    """Moves the twin's parameters: theta' <- m theta' + (1 - m) theta. Buffers become the model's.

    Args:
        twin: of `twin_of`; model: as it is now.
        momentum: m, in 0..1.

    Raises:
        ValueError: for momentum out of range, or a model of other parameters.

    Source:
        He et al., Momentum contrast, CVPR 2020, eq. 2; ALBEF (Li et al., NeurIPS 2021).
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"follow: momentum must be in 0..1, got {momentum}")
    mine, theirs = list(twin.parameters()), list(model.parameters())
    if [p.shape for p in mine] != [p.shape for p in theirs]:
        raise ValueError(
            f"follow: model must have the twin's {len(mine)} parameters, got {len(theirs)}, or other shapes"
        )
    torch._foreach_lerp_(mine, theirs, 1 - momentum)
    for buffer, other in zip(twin.buffers(), model.buffers()):
        buffer.copy_(other)


class Queue(nn.Module):
    """The momentum encoders' features of the last pairs, as keys beside those of a batch.

    Its buffers, which a checkpoint holds: image and text [Q, D], ids [Q] and place, where the next pair goes. Places
    that no pair has filled hold random unit vectors of the id -1.

    Args:
        size: Q, 65,536 in ALBEF and 57,600 in BLIP; any number, batches need not divide it.
        dim: D.
        seed: of the first vectors.

    Raises:
        ValueError: for sizes below 1.

    Source:
        ALBEF (Li et al., NeurIPS 2021), sec. 3.2.
    """

    image: Tensor
    text: Tensor
    ids: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int, *, seed: int = 0):
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"Queue: {name} must be at least 1, got {value}")
        generator = torch.Generator().manual_seed(seed)
        for name in ("image", "text"):
            self.register_buffer(name, F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("ids", torch.full((size,), EMPTY))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def keys(self, side: str, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """A side's features of a batch [B, D] and then the queue's [B + Q, D], in the wider type; the ids of both."""
        return torch.cat([features, getattr(self, side)]), torch.cat([ids, self.ids])

    @torch.no_grad()
    def add(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Puts pairs in the place of the oldest ones; of more than Q the last. No device is waited for.

        Args:
            image, text: [B, D], the momentum encoders' features, of unit norm. Under torchrun those of all ranks, in
                the same order on each.
            ids: [B] int64, from 0 up; equal ones are of one image.

        Raises:
            ValueError: for other shapes.
        """
        size, dim = self.image.shape
        if image.dim() != 2 or image.shape[1] != dim or text.shape != image.shape or ids.shape != image.shape[:1]:
            got = ", ".join(str(list(t.shape)) for t in (image, text, ids))
            raise ValueError(f"Queue: image, text and ids must be [B, {dim}], [B, {dim}] and [B], got {got}")
        count = image.shape[0]
        last = slice(max(count - size, 0), None)
        places = (self.place + torch.arange(count, device=self.ids.device)[last]) % size
        for buffer, rows in ((self.image, image), (self.text, text), (self.ids, ids)):
            buffer[places] = rows[last].to(buffer.dtype)
        self.place.add_(count).remainder_(size)
