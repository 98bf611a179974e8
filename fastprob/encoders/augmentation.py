"""Test-time augmentation: how far an encoder's embeddings of changed copies of a picture are apart.

    variance = mean over D of the population variance, over the views, of their unit embeddings

A view is a random crop, resized to the picture's size, and flipped left to right every other time. Source: Wang et al.,
Aleatoric uncertainty estimation with test-time augmentation, Neurocomputing 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from fastprob.training import own_random_state
from fastprob.training.random import seed_of


class ImageEncoder(Protocol):
    """What is needed of an `Encoder`."""

    preprocess: Callable[[Image.Image], Tensor]

    def encode_image(self, batch: Tensor) -> Tensor:
        """[B, 3, H, W] preprocessed images -> [B, D] of unit norm."""


def augmented_variance(
    encoder: ImageEncoder,
    dataset: Sequence[tuple[Image.Image, Any]],
    *,
    views: int = 8,
    least: float = 0.7,
    flip: bool = True,
    seed: int = 0,
) -> Tensor:
    """Variance of the embeddings of each picture's views, [N]; larger for less certain.

    Args:
        encoder: an `Encoder`, or whatever has its `preprocess` and `encode_image`.
        dataset: the pictures, first in each item, as PIL images.
        views: of a picture, at least 2.
        least: smallest share of the picture's area that a crop keeps; 1 crops nothing.
        flip: whether views may be flipped; a flip changes what some pictures mean, such as digits.
        seed: of the views. A picture's do not depend on the other pictures but on its place.

    Raises:
        ValueError: an argument out of its range.
    """
    if views < 2:
        raise ValueError(f"augmented_variance: views must be at least 2, got {views}")
    if not 0 < least <= 1:
        raise ValueError(f"augmented_variance: least must be in (0, 1], got {least}")
    result = torch.zeros(len(dataset))
    with own_random_state(torch.device("cpu")):
        for row in tqdm(range(len(dataset)), "views", unit="picture", delay=5, leave=False):
            torch.default_generator.manual_seed(seed_of(seed, row))
            picture = dataset[row][0]
            change = _change(picture, least, flip)
            batch = torch.stack([encoder.preprocess(change(picture)) for _ in range(views)])
            result[row] = encoder.encode_image(batch).var(0, correction=0).mean()
    return result


def _change(picture: Image.Image, least: float, flip: bool) -> Callable[[Image.Image], Image.Image]:
    ratio = (0.9, 1.1) if least < 1 else (picture.width / picture.height,) * 2
    crop = v2.RandomResizedCrop((picture.height, picture.width), scale=(least, 1.0), ratio=ratio, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if flip else 0.0)])
