"""Paired embeddings of images and captions: what a usable set is, and how training draws batches from it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fastprob._arguments import as_tensor
from fastprob.training import seed_of, share

_ROWS_AT_ONCE = 65536
"""Rows that are read at a time where all are, so that a memory-mapped store is never copied whole."""


class Paired(Protocol):
    """Anything with these three tensors: `PairedEmbeddings`, or an embedding store on disk."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    caption_image: Tensor  # [M], int64: the image that each caption describes


@dataclass(frozen=True)
class PairedEmbeddings:
    """Frozen embeddings of N images and of their M captions, tensors or arrays of numpy.

    Args:
        image: [N, D], floating point.
        text: [M, D], floating point.
        caption_image: [M], int64, index in 0..N-1 of the image of each caption. Every image has one or more.

    Raises:
        ValueError: shapes, dtypes or indices that don't fit together, or a value that is not finite.
    """

    image: Tensor
    text: Tensor
    caption_image: Tensor

    def __post_init__(self):
        for field in fields(self):
            value = as_tensor(f"PairedEmbeddings: {field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # frozen
        check_paired("PairedEmbeddings", self)


def check_paired(name: str, data: Paired) -> None:
    """Raise ValueError, as `name`, unless `data` is a usable set of pairs."""
    image, text, owner = data.image, data.text, data.caption_image
    for label, rows in (("image", image), ("text", text)):
        if rows.dim() != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise ValueError(
                f"{name}: {label} must be a floating-point [rows, D] tensor with at least one row, "
                f"got {tuple(rows.shape)} {rows.dtype}"
            )
    if image.shape[1] != text.shape[1]:
        widths = f"{image.shape[1]} and {text.shape[1]}"
        raise ValueError(f"{name}: image and text must have one width, got {widths}")
    if owner.shape != (len(text),) or owner.dtype != torch.int64:
        raise ValueError(f"{name}: caption_image must be int64 [{len(text)}], got {tuple(owner.shape)} {owner.dtype}")
    if owner.min() < 0 or owner.max() >= len(image):
        span = f"{int(owner.min())}..{int(owner.max())}"
        raise ValueError(f"{name}: caption_image must be in 0..{len(image) - 1}, got {span}")
    bare = torch.bincount(owner, minlength=len(image)) == 0
    if bare.any():
        raise ValueError(f"{name}: every image needs a caption, image {int(bare.nonzero()[0])} has none")
    for label, rows in (("image", image), ("text", text)):
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            bad = ~rows[start : start + _ROWS_AT_ONCE].isfinite().all(1)
            if bad.any():
                row = start + int(bad.nonzero()[0])
                raise ValueError(f"{name}: {label} row {row} has a NaN or infinite value")


class Owned:
    """Which captions an image has. owner: [M], the image of every caption; images: N, each with a caption.

    order: [M], the captions of image 0, then of image 1, ...; count, start: [N], how many an image has, and where its
    own begin in `order`.
    """

    def __init__(self, owner: Tensor, images: int):
        self.order = owner.argsort(stable=True)
        self.count = torch.bincount(owner, minlength=images)
        self.start = self.count.cumsum(0) - self.count

    def epoch(self, seed: int, each: int = 1) -> tuple[Tensor, Tensor]:
        """Every image once in random order, [N], and `each` of its captions, [N, each]: the one after a random one
        follows it, so that they differ where an image has so many."""
        generator = torch.Generator().manual_seed(seed)
        image = torch.randperm(len(self.count), generator=generator)  # [N]
        draw = torch.randint(2**62, (len(self.count),), generator=generator)
        place = (draw[:, None] + torch.arange(each)) % self.count[:, None]  # [N, each]
        return image, self.order[self.start[:, None] + place][image]


class Pairs:
    """The rows of paired embeddings, on a device, by batch.

    The embeddings move to an accelerator once if they take less than a quarter of its free memory;
    otherwise each batch moves on its own.
    """

    def __init__(self, data: Paired, device: torch.device):
        self.device = device
        self.images, self.captions, self.dim = len(data.image), len(data.text), data.image.shape[1]
        self._of = Owned(data.caption_image.cpu(), self.images)
        resident = _fits(device, data.image, data.text)
        self._image = data.image.to(device) if resident else data.image
        self._text = data.text.to(device) if resident else data.text

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows and of whose the captions are."""
        digest = hashlib.sha256()
        for rows in (self._image, self._text, self._of.order, self._of.count):
            for part in rows.split(_ROWS_AT_ONCE):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def epoch(self, seed: int, epoch: int, batch_size: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every image once, in random order, each with one random caption of its own.

        The order depends on (seed, epoch) alone; batches before `first` are left out. Of each batch come this
        rank's share, image [B, D] and text [B, D], in float32.
        """
        image, caption = self._of.epoch(seed_of(seed, epoch))
        image, caption = image.to(self._image.device), caption[:, 0].to(self._text.device)
        for start in range(first * batch_size, self.images, batch_size):
            batch = slice(start, start + batch_size)
            yield self._float32(self._image[share(image[batch])]), self._float32(self._text[share(caption[batch])])

    def blocks(self, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield every image once and every caption once: (image [B, D], text [C, D], owner [C]).

        `owner` says which of the B images each caption describes.
        """
        for start in range(0, self.images, rows):
            stop = min(start + rows, self.images)
            last = int(self._of.start[stop]) if stop < self.images else self.captions
            caption = self._of.order[int(self._of.start[start]) : last].to(self._text.device)  # [C]
            owner = torch.repeat_interleave(self._of.count[start:stop]).to(self.device)  # [C]
            yield self._float32(self._image[start:stop]), self._float32(self._text[caption]), owner

    def _float32(self, rows: Tensor) -> Tensor:
        return rows.to(self.device, torch.float32, non_blocking=True)


def _fits(device: torch.device, *tensors: Tensor) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) < free / 4
