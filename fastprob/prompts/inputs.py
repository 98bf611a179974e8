"""The images of a data set as a method takes them: features, encoded once, or preprocessed images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from fastprob.data.labelled import LabelledImages
from fastprob.data.pixels import Pixels
from fastprob.encoders import Encoder
from fastprob.encoders.towers import augmented


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
        self.data, self.encoder, self.batch_size = data, encoder, batch_size
        self.augment, self.progress = augment, progress
        self._pixels = Pixels(data, encoder.preprocess, batch_size=batch_size, workers=workers)
        self.labels = data.labels.to(encoder.device)

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def features(self) -> Tensor:
        """[N, D] of unit norm, on the encoder's device."""
        rows = torch.arange(len(self)).split(self.batch_size)
        read = self._pixels.read(rows, keep=False)
        bar = tqdm(read, f"encode {self.data.name}", len(rows), leave=False, disable=not self.progress)
        with torch.autocast(self.encoder.device.type, enabled=False):  # whoever asks first, and in which precision
            return torch.cat([self.encoder.encode_image(images) for images in bar])

    def images(self, batches: list[Tensor], seed: int = 0) -> Iterator[Tensor]:
        """For every batch of rows [B] the preprocessed images [B, 3, H, W] on the encoder's device.

        With `augment`, an image's crop depends on its row and on `seed`.
        """
        if self.augment:
            read = self._pixels.load(batches, augmented(self.encoder.preprocess, self._pixels.size), seed)
        else:
            read = self._pixels.read(batches)
        return (images.to(self.encoder.device, non_blocking=True) for images in read)
