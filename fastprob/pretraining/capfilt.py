"""CapFilt: captions that a model writes for images, and of all captions those that it takes for matches.

    written = write_captions(captioner, pixels, **NUCLEUS)                     # one for each image
    matches = match_probabilities(filter, pixels, [[caption] for caption in written])   # kept from 0.5 on

Source: BLIP (Li et al., ICML 2022), sec. 3.3.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fastprob._files import replaced, write_atomically
from fastprob.data.pixels import Images, Pixels
from fastprob.pretraining.objectives import ALBEF, BLIP
from fastprob.pretraining.retrieval import batches_of, match, read
from fastprob.training import own_random_state, seed_all

NUCLEUS = {"do_sample": True, "top_p": 0.9, "top_k": 0, "min_new_tokens": 5}
"""How BLIP draws the captions that are filtered: of the likeliest words that make up 0.9."""


def write_captions(model: BLIP, pixels: Pixels, *, seed: int = 0, progress: bool = True, **options: Any) -> list[str]:
    """A caption of every image.

    Args:
        model: in evaluation mode; options: of `BLIP.caption`.
        seed: of words that are drawn; they depend on the device, and on which images are in a batch, too.
    """
    device = model.matching.weight.device
    with own_random_state(device):
        seed_all(seed, device)
        batches = batches_of(model, pixels, "caption", progress)
        return list(chain.from_iterable(model.caption(images, **options) for images in batches))


@torch.no_grad()
def match_probabilities(
    model: ALBEF | BLIP, pixels: Pixels, captions: Sequence[Sequence[str]], *, progress: bool = True
) -> list[list[float]]:
    """How likely each image matches each of its captions, of which it may have none. model: in evaluation mode."""
    texts, counts = list(chain.from_iterable(captions)), torch.tensor([len(own) for own in captions])
    if not texts:
        return [[] for _ in captions]
    images = torch.arange(len(captions)).repeat_interleave(counts)
    logits = match(model, pixels, read(model, texts)[1], images, torch.arange(len(texts)), progress)
    return [own.tolist() for own in logits.softmax(dim=1)[:, 1].split(counts.tolist())]


def save_captions(
    path: str | os.PathLike, images: Images, files: Sequence[Any], captions: Sequence[Sequence[str]]
) -> str:
    """Write captions as COCO's JSON, and return what the commands take as --data for it.

    Args:
        path: of the JSON, replaced in one step.
        images: N; files: where each is. Images that are no files of their own are written beside `path` as PNG.
        captions: of each image; those without any are left out.
    """
    path, kept = Path(path), [number for number, own in enumerate(captions) if own]
    if all(isinstance(file, Path) for file in files):
        root = Path(os.path.commonpath([file.resolve().parent for file in files]))
        names = [str(file.resolve().relative_to(root)) for file in files]
    else:
        root, names = path.with_suffix(""), [f"{number:07}.png" for number in range(len(images))]
        for number in kept:
            with replaced(root / names[number]) as file:
                images[number].save(file, format="PNG")
    about = {
        "images": [{"id": number, "file_name": names[number]} for number in kept],
        "annotations": [{"image_id": number, "caption": caption} for number in kept for caption in captions[number]],
    }
    write_atomically(path, json.dumps(about, ensure_ascii=False) + "\n")
    return f"{path}@{root}"
