"""How good maps are: by what a match loses without what they point to, by boxes, and by random weights.

Parts of inputs are left out in one way everywhere. Of an image x and of the token embeddings e of a text's words, a map
or a mask m, from 0 to 1, leaves

    m x + (1 - m) blank    and    m e + (1 - m) (the padding token's embedding)

A metric is of the image's map, the text's map, or of both at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprob._arguments import one_of
from fastprob.attribution.method import Attribution, Method, unit
from fastprob.attribution.words import membership
from fastprob.encoders.towers import ImageTower, TextTower
from fastprob.evaluation.statistics import spearman

SIDES = ("image", "text", "both")

AT_ONCE = 256
"""Images or texts at once."""

Box = Sequence[int]
"""x0, y0, x1, y1 in pixels, half open: columns x0..x1 - 1, rows y0..y1 - 1."""


class Pairs:
    """Images and their texts in a model, whole or in part.

    Args:
        model, tokenizer, images, texts: as a `Method` takes them.
        blank: what stands where an image is left out, in units of the preprocessed images: a number, or what broadcasts
            to [P, 3, H, W], as channel means [3, 1, 1]. 0 is the mean colour of what a model was trained on.

    Raises:
        ValueError: for a model as `Method`, or unless there is a text for each image.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        images: Tensor,
        texts: Sequence[str],
        *,
        blank: Tensor | float = 0.0,
    ):
        if isinstance(texts, str) or len(texts) != len(images):
            got = repr(texts) if isinstance(texts, str) else len(texts)
            raise ValueError(f"Pairs: texts must be a list of {len(images)}, one for each image, got {got}")
        self.image_tower, self.text_tower = ImageTower(model), TextTower(model)
        device = self.text_tower.device
        self.images, self.ids = images.to(device), tokenizer(list(texts)).to(device)
        self.blank = torch.as_tensor(blank).to(self.images)
        self.padding = tokenizer([""])[0, -1].to(device)

    def __len__(self) -> int:
        return len(self.images)

    def images_of(self, kept: Tensor) -> Tensor:
        """[P, 3, H, W], what a mask [P, H, W] leaves of the images."""
        kept = kept[:, None].to(self.images)
        return kept * self.images + (1 - kept) * self.blank

    def ids_of(self, kept: Tensor) -> Tensor:
        """[P, T], what a mask [P, T] bool leaves of the tokens, padding in the place of the others."""
        return torch.where(kept, self.ids, self.padding)

    @torch.inference_mode(False)
    @torch.no_grad()
    def cosines(self, image: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """[P], of what masks [P, H, W] of the images and [P, T] of the tokens leave; without a mask, of all."""
        images = self._whole_images if image is None else self._of_images(self.images_of(image))
        texts = self._whole_texts if text is None else self._of_texts(text)
        return (images * texts).sum(-1)

    @cached_property
    def _whole_images(self) -> Tensor:
        return self._of_images(self.images)

    @cached_property
    def _whole_texts(self) -> Tensor:
        return self._of_texts(torch.ones_like(self.ids))

    def _of_images(self, images: Tensor) -> Tensor:
        """[P, D], of unit norm."""
        tower = self.image_tower
        return torch.cat([unit(tower.features(tower.enter(some))) for some in images.split(AT_ONCE)])

    def _of_texts(self, kept: Tensor) -> Tensor:
        """[P, D], of unit norm."""
        return torch.cat([self._of_some(*some) for some in zip(self.ids.split(AT_ONCE), kept.split(AT_ONCE))])

    def _of_some(self, ids: Tensor, kept: Tensor) -> Tensor:
        tower = self.text_tower
        embedded = tower.embed(ids)
        kept = kept[..., None].to(embedded)
        return unit(tower.features(tower.enter(kept * embedded + (1 - kept) * tower.embed(self.padding), ids)))


# ---- what a map leaves ----------------------------------------------------------------------------------------------


class Masks(NamedTuple):
    """Of the images [P, H, W] and of the tokens [P, T]; None leaves all of a side."""

    image: Tensor | None
    text: Tensor | None


def _masks(who: str, side: str, image: Tensor, text: Tensor) -> Masks:
    one_of(who, "side", side, SIDES)
    return Masks(None if side == "text" else image, None if side == "image" else text)


def _of_words(found: Attribution) -> Tensor:
    """[P, W, T] bool, which tokens are of a text's word."""
    return membership(found.words, found.text.shape[1]).to(found.text.device)


def order(found: Attribution) -> tuple[Tensor, Tensor]:
    """The share of its image that is more important than a pixel, [P, H, W], and of its text's words, than a token's
    word, [P, T], NaN at tokens of no word; from 0 on, below 1. Of equal values the first is more important."""
    member = _of_words(found)
    words, counted = (member * found.text[:, None]).amax(-1), member.any(-1)  # [P, W]
    ranks = _ranks(words.masked_fill(~counted, -1)) / counted.sum(1, keepdim=True)
    text = (member * ranks[..., None]).sum(1).masked_fill(~member.any(1), math.nan)
    image = _ranks(found.image.flatten(1)) / found.image[0].numel()
    return image.view_as(found.image), text


def _ranks(values: Tensor) -> Tensor:
    """[P, K], the greatest first, from 0 on."""
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(values.dtype)


# ---- metrics --------------------------------------------------------------------------------------------------------


class Confidence(NamedTuple):
    """Of every pair, [P]."""

    drop: Tensor
    increase: Tensor


def confidence(pairs: Pairs, found: Attribution, side: str = "both") -> Confidence:
    """How a match changes if its inputs are multiplied by their maps.

        drop = 100 max(0, s - s_m),    increase = 100 if s_m > s, else 0

    with s the cosine of a pair and s_m that of what the maps leave. A good map has a low drop and a high increase.
    Drops are from 0 to 200. The released code cuts a text's map in two at its median, and takes an image's as it
    is.

    Args:
        pairs: what the maps are of.
        found: their maps.
        side: whose map is taken: image, text or both.

    Raises:
        ValueError: for another side.

    Source:
        Chattopadhay et al., Grad-CAM++, WACV 2018; for cosines Wang, Rudner and Wilson (M2IB), NeurIPS 2023.
    """
    text = torch.where(_of_words(found).any(1), found.text, 1)
    change = pairs.cosines(*_masks("confidence", side, found.image, text)) - pairs.cosines()
    return Confidence(100 * (-change).clamp_min(0), 100.0 * (change > 0))


def insertion(pairs: Pairs, found: Attribution, side: str = "image", *, steps: int = 16) -> Tensor:
    """[P], the area under the cosine as pixels or words are put in, the most important first; higher is better.

        sum_i (s_(i-1) + s_i) / (2 n),    i = 1..n, s_i the cosine with the share i / n put in

    From -1 to 1. It starts from blank where the source blurs the image.

    Args:
        pairs, found, side: as `confidence`.
        steps: n.

    Raises:
        ValueError: for another side, or steps below 1.

    Source:
        Petsiuk, Das and Saenko, RISE, BMVC 2018.
    """
    return _area("insertion", pairs, found, side, steps, lambda before, share: before < share)


def deletion(pairs: Pairs, found: Attribution, side: str = "image", *, steps: int = 16) -> Tensor:
    """[P], as `insertion`, as they are taken out, the most important first; lower is better."""
    return _area("deletion", pairs, found, side, steps, lambda before, share: before >= share)


def _area(
    who: str, pairs: Pairs, found: Attribution, side: str, steps: int, keeps: Callable[[Tensor, float], Tensor]
) -> Tensor:
    if steps < 1:
        raise ValueError(f"{who}: steps must be at least 1, got {steps}")
    image, text = order(found)
    cosines = []
    for share in (step / steps for step in range(steps + 1)):
        kept = keeps(image, share), keeps(text, share) | text.isnan()
        cosines.append(pairs.cosines(*_masks(who, side, *kept)))
    return torch.trapezoid(torch.stack(cosines), dx=1 / steps, dim=0)


def pointing_game(maps: Tensor, boxes: Sequence[Sequence[Box]], *, margin: int = 0) -> Tensor:
    """[P], whether the greatest value of a map lies in a box: where it is at several pixels, the share of these.

    So a map without differences gets the share of its area that boxes have. From 0 to 1, higher is better.

    Args:
        maps: [P, H, W], not negative.
        boxes: of each map one or more.
        margin: pixels around a box that count as well; the source has 15 in photographs.

    Raises:
        ValueError: unless there are boxes for each map.

    Source:
        Zhang et al., Top-down neural attention by excitation backprop, ECCV 2016.
    """
    inside = _inside("pointing_game", maps, boxes, margin)
    greatest = maps == maps.amax((1, 2), keepdim=True)
    return (greatest & inside).sum((1, 2)) / greatest.sum((1, 2))


def mass_in_box(maps: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
    """[P], the share of a map's sum that lies in boxes; of a map that is 0 everywhere their share of its area.

    From 0 to 1, higher is better; a map without differences has the boxes' share of the area.

    Args, Raises: as `pointing_game`.

    Source:
        The energy-based pointing game of Wang et al., Score-CAM, CVPR workshops 2020.
    """
    inside = _inside("mass_in_box", maps, boxes, 0)
    total = maps.sum((1, 2))
    return torch.where(total > 0, (maps * inside).sum((1, 2)) / total, inside.to(maps).mean((1, 2)))


def _inside(who: str, maps: Tensor, boxes: Sequence[Sequence[Box]], margin: int) -> Tensor:
    """[P, H, W] bool"""
    if len(boxes) != len(maps) or not all(boxes):
        got = f"{len(boxes)} with {sum(map(len, boxes))} boxes"
        raise ValueError(f"{who}: boxes must be a list of {len(maps)}, with one box or more for each map, got {got}")
    inside = torch.zeros_like(maps, dtype=torch.bool)
    for each, of_map in zip(inside, boxes):
        for x0, y0, x1, y1 in of_map:
            each[max(y0 - margin, 0) : y1 + margin, max(x0 - margin, 0) : x1 + margin] = True
    return inside


# ---- random weights -------------------------------------------------------------------------------------------------


class Sanity(NamedTuple):
    """What weights are random, and the mean rank correlation of the maps with those of the model as it was."""

    weights: str
    image: float
    text: float


def sanity_check(
    method: Callable[[nn.Module], Method], model: nn.Module, images: Tensor, texts: Sequence[str], *, seed: int = 0
) -> list[Sanity]:
    """Whether maps depend on the model's weights: they should change as these become random.

    The last block of both towers, the last two and so on, and at last all weights are shuffled, each parameter's
    numbers among themselves, so that their mean and spread stay; and maps are compared with those of the model as
    it was: Spearman's correlation over pixels, and over words, mean over pairs. 1: a map does not depend on these
    weights. NaN where no map has differences.

    Args:
        method: makes a `Method` of a model, as `lambda model: M2IB(model, tokenizer)`.
        model, images, texts: as the method takes them; the model stays as it is.
        seed: of the shuffling.

    Source:
        Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018; they draw the weights anew.
    """
    shuffled, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    towers = ImageTower(shuffled), TextTower(shuffled)
    before, result = method(model)(images, texts), []
    depth = max(len(tower.blocks) for tower in towers)
    for last in range(1, depth + 1):
        for block in [tower.blocks[-last] for tower in towers if last <= len(tower.blocks)]:
            _shuffle(block, generator)
        result.append(_compared("last block" if last == 1 else f"last {last}", before, method(shuffled)(images, texts)))
    _shuffle(shuffled, generator)
    return [*result, _compared("all", before, method(shuffled)(images, texts))]


@torch.no_grad()
def _shuffle(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        places = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[places].view_as(parameter))


def _compared(weights: str, before: Attribution, after: Attribution) -> Sanity:
    images = [spearman(*maps) for maps in zip(before.image.flatten(1), after.image.flatten(1))]
    texts = [_of_text(before, after, pair) for pair in range(len(before.words))]
    return Sanity(weights, _mean(images), _mean(texts))


def _of_text(before: Attribution, after: Attribution, pair: int) -> float:
    starts = [word.start for word in before.words[pair]]
    return spearman(before.text[pair, starts], after.text[pair, starts]) if len(starts) > 1 else math.nan


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values).nanmean())
