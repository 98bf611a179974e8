"""What determines a pretraining run, the model of it, and the files that hold a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import image_transform
from open_clip.transformer import VisionTransformer
from transformers import AutoTokenizer, BlipTextConfig, PreTrainedTokenizerBase

from fastprob._files import read_tensors, write_tensors
from fastprob._op import one_of
from fastprob.encoders import load_encoder
from fastprob.encoders.towers import ImageTower
from fastprob.pretraining.objectives import ALBEF, BLIP

MODEL = "model.safetensors"
FORMAT = "fastprob.pretraining/1"
OBJECTIVES = {"albef": ALBEF, "blip": BLIP}
PRECISIONS = {"fp32": None, "amp_bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """Pixels of an image's side and of a patch's; states, blocks and heads of either tower; tokens of a text; D."""

    image: int
    patch: int
    width: int
    layers: int
    heads: int
    length: int
    dim: int


SIZES = {
    "tiny": Size(32, 16, 64, 2, 2, 16, 64),
    "small": Size(32, 8, 128, 4, 4, 32, 64),
    "base": Size(224, 16, 768, 12, 12, 40, 256),
}
"""The built-in scenes', a minute or two of one core; one for small pictures and few words; the papers'."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PretrainConfig:
    """What determines a run, with the data and the device.

    Raises ValueError for a value out of its range.
    """

    objective: str = _option("blip", "blip, which writes captions, or albef")
    size: str = _option("small", f"one of {', '.join(SIZES)}: of both towers")
    model: str | None = _option(None, "image tower: that of an open_clip model, a vision transformer; else by size")
    pretrained: str | None = _option(None, "its weights: open_clip tag or checkpoint file")
    losses: str = _option("all", "those that train, as itc,itm for a filter and lm for a captioner")
    epochs: int = _option(20, "passes over the images")
    batch_size: int = _option(64, "images of a step")
    augment: bool = _option(False, "random crops, flips and RandAugment, as BLIP; not where a flip changes the meaning")
    captions: int = _option(1, "captions of an image in a step; they share the image's keys and values")
    lr: float = _option(3e-4, "learning rate of AdamW after its warm-up; it falls to zero along a cosine")
    weight_decay: float = _option(0.05, "of AdamW")
    queue: int = _option(4096, "pairs in the queue; 57600 in BLIP, 65536 in ALBEF")
    momentum: float = _option(0.995, "of the teacher's weights")
    alpha: float = _option(0.4, "the teacher's weight, from 0 up over the first two epochs")
    precision: str = _option("fp32", f"one of {', '.join(PRECISIONS)}")
    seed: int = _option(0, "of initial weights, batches, captions, negatives and hidden words")

    def __post_init__(self):
        for name, choices in (("objective", OBJECTIVES), ("size", SIZES), ("precision", PRECISIONS)):
            one_of("PretrainConfig", name, getattr(self, name), tuple(choices))
        names = OBJECTIVES[self.objective].names
        if self.losses != "all" and not set(self.losses.split(",")) <= set(names):
            raise ValueError(f"PretrainConfig: losses must be all, or of {','.join(names)}, got {self.losses!r}")
        least = {"epochs": 1, "batch_size": 1, "captions": 1, "queue": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"PretrainConfig: {name} must be an integer >= {bound}, got {value!r}")
        for name, inside in (("momentum", 0 <= self.momentum <= 1), ("alpha", 0 <= self.alpha <= 1)):
            if not inside:
                raise ValueError(f"PretrainConfig: {name} must be in 0..1, got {getattr(self, name)!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"PretrainConfig: lr must be finite and > 0, got {self.lr!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"PretrainConfig: weight_decay must be finite and >= 0, got {self.weight_decay!r}")
        if self.pretrained is not None and self.model is None:
            raise ValueError(f"PretrainConfig: model must be given with pretrained, {self.pretrained!r}; got None")


@dataclass(frozen=True)
class Pretrained:
    """A model, in evaluation mode, with what it takes to use it.

    model: `ALBEF` or `BLIP`; preprocess: PIL image -> [3, H, W]; config: of its run.
    """

    model: ALBEF | BLIP
    preprocess: Callable
    config: PretrainConfig

    def save(self, directory: str | os.PathLike) -> None:
        """Write model.safetensors, in one step, and transformers' tokenizer.json beside it."""
        self.model.tokenizer.save_pretrained(directory)
        about = {"format": FORMAT, "config": json.dumps(asdict(self.config))}
        write_tensors(Path(directory) / MODEL, dict(self.model.named_parameters()), about)

    @staticmethod
    def load(directory: str | os.PathLike, device: str | torch.device = "cpu") -> Pretrained:
        """What `save` wrote. Raises FileNotFoundError without it, and ValueError for files of another kind."""
        path = Path(directory) / MODEL
        weights, about = read_tensors("Pretrained.load", path)
        if about.get("format") != FORMAT:
            raise ValueError(f"Pretrained.load: {path} must have format {FORMAT!r}, got {about.get('format')!r}")
        made = build(PretrainConfig(**json.loads(about["config"])), AutoTokenizer.from_pretrained(directory))
        wanted = {name: weight.shape for name, weight in made.model.named_parameters()}
        if {name: weight.shape for name, weight in weights.items()} != wanted:
            raise ValueError(f"Pretrained.load: {path} must have the weights of its config, got others")
        made.model.load_state_dict(weights, strict=False)  # one of the names of each shared weight
        made.model.to(device).eval()
        return made


def build(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Pretrained:
    """The model that a run begins with; torch's random state draws its weights."""
    size = SIZES[config.size]
    if config.model is None:
        visual = VisionTransformer(size.image, size.patch, size.width, size.layers, size.heads, 4.0)
        preprocess = image_transform(size.image, is_train=False)
    else:
        encoder = load_encoder(config.model, config.pretrained)
        visual, preprocess = ImageTower(encoder.model).tower, encoder.preprocess
    visual.requires_grad_(True).proj = None  # contrast has its own
    text = BlipTextConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
    )
    model = OBJECTIVES[config.objective](visual, tokenizer, text, dim=size.dim)
    return Pretrained(model, preprocess, config)
