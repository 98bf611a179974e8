"""Images as a model takes them: kept in memory where they are few, read again every time where they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastprob.training import seed_of

KEEP = 2**30
"""Bytes of preprocessed images that are kept in memory."""


class Images(Protocol):
    """What holds images: `len()`, and `[i]`, a PIL image."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Image.Image: ...


class ImagesOf:
    """The images of captioned ones, of `open_dataset`."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Image.Image:
        return self.data[i][0]


class Pixels:
    """Preprocessed images, [3, H, W] each.

    preprocess: PIL image -> [3, H, W], without chance in it; batch_size, workers: of reading.
    """

    def __init__(
        self, images: Images, preprocess: Callable[[Image.Image], Tensor], *, batch_size: int = 256, workers: int = 0
    ):
        self.images, self.preprocess, self.batch_size, self.workers = images, preprocess, batch_size, workers

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def size(self) -> torch.Size:
        """H, W."""
        return self.preprocess(self.images[0]).shape[1:]

    def read(self, batches: list[Tensor], *, keep: bool = True) -> Iterator[Tensor]:
        """For every batch of rows [B] its images [B, 3, H, W]. keep: whether others will be asked for."""
        kept = self._kept if keep else self.__dict__.get("_kept")
        return self.load(batches, self.preprocess) if kept is None else (kept[rows] for rows in batches)

    def load(self, batches: list[Tensor], transform: Callable, seed: int = 0) -> Iterator[Tensor]:
        """The same after another transform, whose chances an image's row and `seed` decide."""
        options = {"batch_sampler": [rows.tolist() for rows in batches], "num_workers": self.workers}
        own = torch.Generator()  # else the loader draws from the run's
        return iter(DataLoader(_Transformed(self.images, transform, seed), generator=own, **options))

    @cached_property
    def _kept(self) -> Tensor | None:
        """All of them, [N, 3, H, W], unless they take more than `KEEP`."""
        if 3 * self.size.numel() * 4 * len(self) > KEEP:
            return None
        return torch.cat(list(self.load(torch.arange(len(self)).split(self.batch_size), self.preprocess)))


class _Transformed(Dataset):
    def __init__(self, images: Images, transform: Callable, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, i: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, i))  # the CPU's alone
            return self.transform(self.images[i])
