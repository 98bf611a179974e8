"""What is selected in, and the models that are tuned: frozen features, and two linear heads that bring them together.

    openclipart    the towers' features; the heads start as trained on the 300 labelled pictures
    digitscenes    the built-in CLIP's embeddings; 300 labelled scenes are as they are, those of pool and test are of
                   inverted brightness, which it has never seen; the heads start as the identity

Both fine-tune by open_clip's contrastive loss on pairs of the pool; the towers stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from open_clip import ClipLoss
from PIL import ImageOps
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastprob._files import read_tensors, write_tensors
from fastprob.adapters import PairedEmbeddings
from fastprob.data.digitscenes import DigitScenes
from fastprob.data.pairs import Pairs
from fastprob.encoders import load_encoder
from fastprob.training import cosine, own_random_state, seed_all

from . import parts
from .fetch import work_directory
from .openclipart import captions_of, split, truth
from .towers import Rows, train_heads

LABELLED = 300  # pictures
BATCH, WEIGHT_DECAY = 128, 0.1
RATE = {"openclipart": 1e-3, "digitscenes": 3e-3}  # of 3e-4 to 1e-2, the best with 400 random pictures
PARTS = ("labelled", "pool", "val", "test")
CPU = torch.device("cpu")

Heads = tuple[nn.Module, nn.Module]


class Unit(nn.Module):
    """A linear map, at first the identity, to unit vectors: [B, D] -> [B, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return normalize(self.linear(rows), dim=1)


@dataclass(frozen=True)
class Target:
    """Features by part: labelled, pool, val (of labelled kind), test; the test part's truth [M, N]; the first heads."""

    rows: dict[str, Rows]
    truth: Tensor
    heads: Heads

    def through(self, heads: Heads, part: str) -> PairedEmbeddings:
        """The embeddings of a part."""
        return embedded(heads, self.rows[part])


def embedded(heads: Heads, rows: Rows) -> PairedEmbeddings:
    """What the heads make of features."""
    with torch.no_grad():
        return PairedEmbeddings(heads[0](rows.image), heads[1](rows.text), rows.caption_image)


def some(rows: Rows, images: Tensor) -> Rows:
    """The rows of these pictures, in this order, and of their captions."""
    place = torch.full((len(rows.image),), -1)
    place[images] = torch.arange(len(images))
    texts = (place[rows.caption_image] >= 0).nonzero()[:, 0]
    return Rows(rows.image[images], rows.text[texts], place[rows.caption_image[texts]])


def joined(first: Rows, second: Rows) -> Rows:
    """Both sets of pictures."""
    owner = torch.cat([first.caption_image, second.caption_image + len(first.image)])
    return Rows(torch.cat([first.image, second.image]), torch.cat([first.text, second.text]), owner)


def tune(heads: Heads, rows: Rows, steps: int, rate: float, seed: int) -> Heads:
    """Copies of the heads, trained on pairs; every step has pictures with a random caption of each."""
    with own_random_state(CPU):
        seed_all(seed, CPU)
        image_head, text_head = copied = copy.deepcopy(heads)
        for head in copied:
            head.train()
        scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as open_clip's models start
        parameters = [*image_head.parameters(), *text_head.parameters(), scale]
        optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY, fused=True)
        loss_of, pairs, done = ClipLoss(), Pairs(rows, CPU), 0
        while done < steps:
            for image, text in pairs.epoch(seed, done, BATCH):
                optimizer.param_groups[0]["lr"] = rate * cosine(done / steps)
                loss = loss_of(image_head(image), text_head(text), scale.exp())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break
    return image_head.eval(), text_head.eval()


def openclipart(cache: Path) -> Target:
    """Pictures through the towers."""
    pictures, image, text, own = parts.encoded(cache)
    members = split(len(pictures))
    members["labelled"], members["pool"] = members["heads"][:LABELLED], members["heads"][LABELLED:] + members["train"]
    rows = {part: parts.rows_of(image, text, own, members[part]) for part in PARTS}
    tested = [pictures[i] for i in members["test"]]
    true = truth([caption for picture in tested for caption in captions_of(picture)], tested)
    return Target(rows, true, train_heads(rows["labelled"]))


def digitscenes(cache: Path) -> Target:
    """Scenes through the built-in CLIP."""
    known = parts.digitscenes(cache)
    file = work_directory(cache) / "inverted.safetensors"
    if not file.exists():
        write_tensors(file, {part: _inverted(part) for part in ("train", "test")}, {})
    images, _ = read_tensors("digitscenes", file)
    rows = {part: Rows(each.data.image, each.data.text, each.data.caption_image) for part, each in known.items()}
    inverted = {part: replace(rows[part], image=image) for part, image in images.items()}
    labelled = some(rows["train"], torch.arange(LABELLED))
    taken = {"labelled": labelled, "pool": inverted["train"], "val": rows["val"], "test": inverted["test"]}
    dim = images["test"].shape[1]
    return Target(taken, known["test"].truth, (Unit(dim).eval(), Unit(dim).eval()))


@torch.no_grad()
def _inverted(part: str, batch: int = 100) -> Tensor:
    encoder, scenes = load_encoder("tiny"), DigitScenes(part)
    pictures = [encoder.preprocess(ImageOps.invert(scenes[i][0])) for i in range(len(scenes))]
    blocks = [encoder.encode_image(torch.stack(pictures[i : i + batch])) for i in range(0, len(pictures), batch)]
    return torch.cat(blocks).float()


TARGETS: dict[str, Callable[[Path], Target]] = {"openclipart": openclipart, "digitscenes": digitscenes}
