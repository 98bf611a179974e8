"""Scenes to explain, and maps of them: M2IB's, its rivals', a trivial one's, and the true ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprob.attribution import (
    M2IB,
    NIB,
    RISE,
    AttentionRollout,
    Attribution,
    GradCAM,
    GradientInput,
    Random,
    RawAttention,
)
from fastprob.attribution.method import min_max
from fastprob.attribution.metrics import Pairs
from fastprob.attribution.words import membership
from fastprob.data.digitscenes import CELL, LEVELS, NAMES, SCENE, Box, DigitScenes
from fastprob.encoders import load_encoder

FULL, ONE = 0, 2
"""Levels of captions: all digits and how they stand, "a three above a seven"; one of them, "a three"."""

PAPER, CHOSEN, TRIVIAL, TRUTH = "M2IB", "M2IB, chosen", "ink and letters", "the truth"


@dataclass(frozen=True)
class Size:
    """Of a seed's run: scenes that methods are judged on, that M2IB's settings are chosen on, and of the sanity check;
    ROAR+'s scenes, steps and batch; RISE's masks."""

    scenes: int = 80
    chosen_on: int = 48
    checked: int = 24
    tuned_on: int = 320
    steps: int = 50
    batch: int = 64
    masks: int = 200


class Setting(NamedTuple):
    """M2IB's, for one side."""

    layer: int
    beta: float


Chosen = Mapping[str, Setting]
"""Settings for "image" and "text"."""


encoder_of = cache(load_encoder)


class Scenes:
    """Scenes with two digits or more that differ, their captions by level, and both as pairs."""

    def __init__(self, split: str, count: int, seed: int):
        self.encoder = encoder_of("tiny")
        self.all = DigitScenes(split, seed=seed, num_scenes=3 * count + 20)  # of which over a half are such scenes
        self.rows = [i for i, boxes in enumerate(self.all.boxes) if len({box.label for box in boxes}) > 1][:count]
        self.images = torch.stack([self.encoder.preprocess(self.all[row][0]) for row in self.rows])

    def texts(self, level: int) -> list[str]:
        return [self.all.captions[LEVELS * row + level] for row in self.rows]

    def named(self, level: int) -> list[list[Box]]:
        """The boxes of the digits that the captions name."""
        return [self.all.named(LEVELS * row + level) for row in self.rows]

    def pairs(self, level: int) -> Pairs:
        """What is left out of a scene has the mean colour of training scenes."""
        return Pairs(self.encoder.model, self.encoder.tokenizer, self.images, self.texts(level), blank=blank())


scenes_of = cache(Scenes)


@cache
def blank() -> Tensor:
    """[3, 1, 1]"""
    return scenes_of("train", 320, 0).images.mean((0, 2, 3))[:, None, None]


Maps = Callable[[Tensor, Sequence[str]], Attribution]


def methods(size: Size, chosen: Chosen, seed: int) -> dict[str, Callable[[nn.Module], Maps]]:
    """What makes maps by a model, by name."""
    words = encoder_of("tiny").tokenizer

    def by_chosen(model: nn.Module) -> Maps:
        image, text = (M2IB(model, words, seed=seed, **chosen[side]._asdict()) for side in ("image", "text"))
        return lambda images, texts: replace(image(images, texts), text=text(images, texts).text)

    return {
        PAPER: lambda model: M2IB(model, words, seed=seed),
        CHOSEN: by_chosen,
        "NIB": lambda model: NIB(model, words),
        "Grad-CAM": lambda model: GradCAM(model, words),
        "gradient x input": lambda model: GradientInput(model, words),
        "raw attention": lambda model: RawAttention(model, words),
        "attention rollout": lambda model: AttentionRollout(model, words),
        "RISE": lambda model: RISE(model, words, masks=size.masks, seed=seed),
        "random": lambda model: Random(model, words, seed=seed),
    }


def maps(size: Size, chosen: Chosen, seed: int, name: str, scenes: Scenes, level: int) -> Attribution:
    """A method's, or what asks no model: bright pixels and long words; the cells and the words of what is named."""
    method = methods(size, chosen, seed).get(name, lambda model: Random(model, scenes.encoder.tokenizer))
    found = method(scenes.encoder.model)(scenes.images, scenes.texts(level))
    if name == TRIVIAL:
        ink = (scenes.images - blank()).norm(dim=1)  # [N, H, W]
        return replace(found, image=min_max(ink.flatten(1)).view_as(ink), text=_by_word(found, len))
    if name == TRUTH:
        text = _by_word(found, lambda word: word.strip(",") in NAMES)
        return replace(found, image=_cells(scenes.named(level)), text=text)
    return found


def _by_word(found: Attribution, value: Callable[[str], float]) -> Tensor:
    """[P, T], from 0 to 1 in a text, by a value of its words."""
    member = membership(found.words, found.text.shape[1])  # [P, W, T]
    values = torch.zeros(member.shape[:2])
    for row, words in zip(values, found.words):
        row[: len(words)] = torch.tensor([float(value(word.text)) for word in words])
    return (member * min_max(values, member.any(-1))[..., None]).sum(1)


def _cells(boxes: Sequence[Sequence[Box]]) -> Tensor:
    """[P, H, W], stretched as a method's map is, of the cells that boxes are in."""
    cells = torch.zeros(len(boxes), 1, SCENE // CELL, SCENE // CELL)
    for each, of_scene in zip(cells, boxes):
        for box in of_scene:
            each[0, (box.y0 + box.y1) // 2 // CELL, (box.x0 + box.x1) // 2 // CELL] = 1
    return F.interpolate(cells, (SCENE, SCENE), mode="bilinear")[:, 0]
