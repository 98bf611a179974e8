"""The images of a data set as a method takes them: features, encoded once, or preprocessed images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from fastprob.data.labelled import LabelledImages
from fastprob.encoders import Encoder
from fastprob.encoders.towers import conversion
from fastprob.training import seed_of

KEEP = 2**30
"""Bytes of preprocessed images that are kept in memory; above, they are read again every time."""


class Inputs:
    """A data set's images for an encoder, each read and encoded as rarely as can be.

    Features are encoded once. Preprocessed images are kept, if they are few and the transform has no chance in it.

    labels: [N] on the encoder's device; batch_size, workers: of reading and encoding; augment: random crops and flips
    as released, another one each epoch; features are always of the images as they are.
    """

    def __init__(
        self,
        data: LabelledImages,
        encoder: Encoder,
        *,
        batch_size: int = 256,
        workers: int = 0,
        augment: bool = False,
        progress: bool = True,
    ):
        self.data, self.encoder, self.batch_size, self.workers = data, encoder, batch_size, workers
        self.augment, self.progress = augment, progress
        self.labels = data.labels.to(encoder.device)

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def features(self) -> Tensor:
        """[N, D] of unit norm, on the encoder's device."""
        rows = torch.arange(len(self)).split(self.batch_size)
        read = self._read(rows) if "_kept" in self.__dict__ else self._load(rows, self.encoder.preprocess)
        bar = tqdm(read, f"encode {self.data.name}", len(rows), leave=False, disable=not self.progress)
        with torch.autocast(self.encoder.device.type, enabled=False):  # whoever asks first, and in which precision
            return torch.cat([self.encoder.encode_image(images) for images in bar])

    def images(self, batches: list[Tensor], seed: int = 0) -> Iterator[Tensor]:
        """For every batch of rows [B] the preprocessed images [B, 3, H, W] on the encoder's device.

        With `augment`, an image's crop depends on its row and on `seed`.
        """
        if self.augment:
            read = self._load(batches, _augmented(self.encoder.preprocess, self._first.shape[1:]), seed)
        else:
            read = self._read(batches)
        return (images.to(self.encoder.device, non_blocking=True) for images in read)

    def _read(self, batches: list[Tensor]) -> Iterator[Tensor]:
        if self._kept is not None:
            return (self._kept[rows] for rows in batches)
        return self._load(batches, self.encoder.preprocess)

    @cached_property
    def _first(self) -> Tensor:
        """The first preprocessed image, [3, H, W]."""
        return self.encoder.preprocess(self.data[0])

    @cached_property
    def _kept(self) -> Tensor | None:
        """All preprocessed images [N, 3, H, W], unless they take more than `KEEP`."""
        if self._first.nbytes * len(self) > KEEP:
            return None
        return torch.cat(list(self._load(torch.arange(len(self)).split(self.batch_size), self.encoder.preprocess)))

    def _load(self, batches: list[Tensor], transform, seed: int = 0) -> Iterator[Tensor]:
        options = {"batch_sampler": [rows.tolist() for rows in batches], "num_workers": self.workers}
        own = torch.Generator()  # else the loader draws from the run's
        return iter(DataLoader(_Transformed(self.data, transform, seed), generator=own, **options))


class _Transformed(Dataset):
    """Images after a transform, whose chances an image's index and `seed` decide."""

    def __init__(self, data: LabelledImages, transform, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, i: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, i))  # the CPU's alone
            return self.transform(self.data[i])


def _augmented(preprocess: transforms.Compose, size: torch.Size) -> transforms.Compose:
    """The released augmentation: a random crop of 8 to 100 % of the image, flipped every other time; then as before."""
    crop = transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *conversion(preprocess)])
