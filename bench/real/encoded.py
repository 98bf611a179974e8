"""Methods that need more than embeddings: the Laplace approximation of the projections, and views of the pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from fastprob.adapters.error import SIDES
from fastprob.adapters.projection import cosine_moments, fit_laplace
from fastprob.data.digitscenes import DigitScenes
from fastprob.encoders import load_encoder
from fastprob.encoders.augmentation import augmented_variance
from fastprob.evaluation.signals import fit_temperature

from .parts import Part, encode_openclipart
from .towers import Files, Head, _pixels, image_tower

VIEWS = 4
TRAINING, BATCH = 2000, 256  # of the digits: features that the approximation is fitted to, at most, of each side


@dataclass(frozen=True)
class Side:
    """Before the projection of images or of texts: its weight [D, W], and features of both parts [rows, W]."""

    weight: Tensor
    train: Tensor
    test: Tensor


def laplace(dataset: str, parts: dict[str, Part], cache: Path) -> dict[str, Tensor]:
    """Scores and ranking of the Laplace approximation, named as in `rivals`; nothing of it is random.

    The scale of the contrastive loss is the inverse of the likeliest temperature on the validation part.
    """
    test, sides = parts["test"], _SIDES[dataset](cache, parts)
    scale = 1 / fit_temperature(parts["val"].data)
    moments = {}
    for side, other in zip(SIDES, SIDES[::-1]):
        against = sides[other].train @ sides[other].weight.T
        fitted = fit_laplace(sides[side].train, sides[side].weight, against, scale)
        moments[side] = fitted(sides[side].test)
    expected, variance = cosine_moments(*(of[test.distinct] for of in moments["text"]), *moments["image"])  # [U, N]
    found = {}
    for side, (mean, spread) in moments.items():
        found[f"score|embedding variance|{side}"] = (spread.sum(1) / mean.square().sum(1)).float()
    for side, along in (("image", 0), ("text", 1)):
        first, which = expected.max(along)
        deviation = variance.gather(along, which.unsqueeze(along)).squeeze(along).sqrt()
        of = {"1 - max expected cosine": 1 - first, "deviation of the first cosine": deviation}
        rows = test.which if side == "text" else slice(None)
        found |= {f"score|{name}|{side}": value[rows] for name, value in of.items()}
        found[f"top|expected cosine|{side}"] = which[rows]
    return found


def _of_openclipart(cache: Path, parts: dict[str, Part]) -> dict[str, Side]:
    encoded = encode_openclipart(cache)
    heads, test = encoded.rows("heads"), encoded.rows("test")
    of = {"image": (encoded.heads[0], heads.image, test.image), "text": (encoded.heads[1], heads.text, test.text)}
    return {side: _of_head(*one) for side, one in of.items()}


@torch.no_grad()
def _of_head(head: Head, train: Tensor, test: Tensor) -> Side:
    """Standardised features with a 1, whose weight is the bias."""
    train, test = (torch.cat([(x - head.mean) / head.std, torch.ones(len(x), 1)], 1) for x in (train, test))
    return Side(torch.cat([head.linear.weight, head.linear.bias[:, None]], 1).detach(), train, test)


@torch.no_grad()
def _of_digits(cache: Path, parts: dict[str, Part]) -> dict[str, Side]:
    """The tiny CLIP without its projections."""
    encoder, train, test = load_encoder("tiny"), parts["train"], parts["test"]
    bare = copy.deepcopy(encoder.model)
    bare.visual.proj, bare.text_projection = None, None

    def images(scenes: DigitScenes, count: int) -> Tensor:
        pictures = torch.stack([encoder.preprocess(scenes[i][0]) for i in range(count)])
        return torch.cat([bare.encode_image(block) for block in pictures.split(BATCH)])

    def texts(part: Part, count: int) -> Tensor:
        captions = [part.captions[i] for i in part.distinct[:count].tolist()]
        return torch.cat([bare.encode_text(block) for block in encoder.tokenizer(captions).split(BATCH)])

    visible = images(DigitScenes("train"), TRAINING), images(DigitScenes("test"), len(test.data.image))
    told = texts(train, TRAINING), texts(test, len(test.distinct))[test.which]
    return {
        "image": Side(encoder.model.visual.proj.T, *visible),
        "text": Side(encoder.model.text_projection.T, *told),
    }


_SIDES = {"openclipart": _of_openclipart, "digitscenes": _of_digits}


def views(dataset: str, cache: Path, seed: int) -> dict[str, Tensor]:
    """Variance of the test pictures' views: of images alone. Digits are not flipped, that would be other digits."""
    if dataset == "digitscenes":
        score = augmented_variance(load_encoder("tiny"), DigitScenes("test"), views=VIEWS, flip=False, seed=seed)
    else:
        encoded = encode_openclipart(cache)
        pictures = _Pictures(Files([picture.path for picture in encoded.members("test")]))
        score = augmented_variance(_Towers(image_tower(cache), encoded.heads[0]), pictures, views=VIEWS, seed=seed)
    return {"score|variance of views|image": score}


@dataclass(frozen=True)
class _Pictures(Sequence):
    """Files as `augmented_variance` takes a data set."""

    files: Files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, tuple]:
        return self.files[i], ()


@dataclass(frozen=True)
class _Towers:
    """EfficientNet and its head, as `augmented_variance` takes an encoder."""

    network: nn.Module
    head: Head

    @staticmethod
    def preprocess(picture: Image.Image) -> Tensor:
        return _pixels(picture)

    @torch.no_grad()
    def encode_image(self, batch: Tensor) -> Tensor:
        return self.head(self.network.extract_features(batch).mean((2, 3)))
