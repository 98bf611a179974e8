"""What the tests of encoding share: an open_clip model that is built in no time, and a data set of real digits."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from sklearn.datasets import load_digits

DIM = 24
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def register(directory: Path, name: str, dim: int = DIM, context_length: int = 16, layers: int = 1) -> Path:
    """Write and register an open_clip model config, as users do with theirs; return its file."""
    vision = {"image_size": 16, "patch_size": 8, "layers": layers, "width": 32, "head_width": 16}
    text = {"context_length": context_length, "vocab_size": 49408, "width": 32, "heads": 2, "layers": layers}
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text}
    file = directory / f"{name}.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    return file


def weights(directory: Path, name: str, seed: int) -> str:
    """Write random weights of a registered model; return their file, for `pretrained`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
    file = directory / f"{name}-{seed}.pt"
    torch.save(model.state_dict(), file)
    return str(file)


class Digits:
    """Real handwritten digits with zero to three captions each, some of which many digits share."""

    def __init__(self, count=23, name="digits", labelled=True):
        data = load_digits()
        self.images, self.digits, self.name = data.images[:count], data.target[:count], name
        self.labels = self.digits if labelled else None
        self.reads = []
        self.fail_at = {}  # index -> the exception to raise when it is read

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads.append(i)
        if i in self.fail_at:
            raise self.fail_at[i]
        pixels = np.uint8(self.images[i] * 15.9).repeat(2, 0).repeat(2, 1)  # [16, 16]
        captions = [f"number {i}", f"a {NAMES[self.digits[i]]}", "handwriting"]
        return Image.fromarray(pixels).convert("RGB"), captions[: i % 4]
