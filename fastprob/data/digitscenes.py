"""DigitScenes: real handwritten digits in small scenes, with captions whose truth is known for every scene.

A scene is a 2 x 2 grid of cells (0 top left, 1 top right, 2 bottom left, 3 bottom right) with one to three
digits of scikit-learn's `load_digits`. Each scene has five true captions of falling specificity:

    level  one digit                       two digits               three digits
    0      a lone three at the top left    a three above a seven    a three above a seven, with a two
    1      a lone three                    a three and a seven      a three, a seven and a two
    2      a three                         a three                  a three
    3      one digit                       two digits               three digits
    4      handwriting                     handwriting              handwriting

How captions are read: "a three" says that there is a three, not that there is nothing else; "another three" is
a different one; "a lone three" says that it is the only digit; "two digits" means exactly two in all; "above"
means in the upper row, "left of" in the left column, whatever the other axis. A `Caption` holds what it claims,
and both its text and its truth are derived from that, so that they cannot drift apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SCENE = 32  # pixels a side
CELL = 16  # pixels a side of a grid cell
DIGIT = 14  # a digit's pixels a side, so that it can move by up to CELL - DIGIT within its cell
LEVELS = 5
EMPTY = -1  # a cell without a digit
SPLITS = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}  # shares of each class's digit images
DEFAULT_SCENES = {"train": 4000, "val": 1000, "test": 1000}
SPLIT_SEED = 1797  # one split for every seed: scenes of two splits never share a digit image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = {"at the top left": 0, "at the top right": 1, "at the bottom left": 2, "at the bottom right": 3}
RELATIONS = {  # phrase -> the signs of (row, column) of the first digit less those of the second; None: either
    "above": (-1, None),
    "below": (1, None),
    "left of": (None, -1),
    "right of": (None, 1),
    "above and left of": (-1, -1),
    "above and right of": (-1, 1),
    "below and left of": (1, -1),
    "below and right of": (1, 1),
}


class Box(NamedTuple):
    """The tight box of a digit's ink, in pixels, half open: rows y0..y1 - 1, columns x0..x1 - 1."""

    label: int
    x0: int
    y0: int
    x1: int
    y1: int


def _related(relation: str, first: int, second: int) -> bool:
    """Whether a digit in cell `first` stands in `relation` to one in cell `second`."""
    row, column = RELATIONS[relation]
    return row in (None, first // 2 - second // 2) and column in (None, first % 2 - second % 2)


@cache
def _placements(num_digits: int, relation: str) -> tuple[tuple[int, ...], ...]:
    """Every way to put `num_digits` digits in different cells such that `relation` holds."""
    ways = permutations(range(4), num_digits)
    if not relation:
        return tuple(ways)
    if num_digits == 1:
        return ((PLACES[relation],),)
    return tuple(way for way in ways if _related(relation, way[0], way[1]))


@dataclass(frozen=True)
class Caption:
    """A statement on a scene: the scene holds `digits`, placed as `relation` says, and `count` digits in all.

    digits: 0 to 3 different objects; relation: of the first to the second (`RELATIONS`), the place of a single
    one (`PLACES`), or ""; count: the exact number of digits in the scene, or None.
    """

    digits: tuple[int, ...] = ()
    relation: str = ""
    count: int | None = None

    @property
    def text(self) -> str:
        said = [self._mention(i) for i in range(len(self.digits))]
        relation = f" {self.relation}" if self.relation else ""
        if not said:
            return "handwriting" if self.count is None else f"{NAMES[self.count]} digit{'s' * (self.count > 1)}"
        if len(said) == 1:
            return said[0] + relation
        if len(said) == 2:
            return f"{said[0]}{relation or ' and'} {said[1]}"
        return f"{said[0]}{relation} {said[1]}, with {said[2]}" if relation else f"{said[0]}, {said[1]} and {said[2]}"

    def _mention(self, i: int) -> str:
        digit = self.digits[i]
        if self.count == 1:
            return f"a lone {NAMES[digit]}"
        if digit in self.digits[:i]:
            return f"another {NAMES[digit]}"
        return f"{'an' if digit == 8 else 'a'} {NAMES[digit]}"

    @staticmethod
    def read(text: str) -> "Caption | None":
        """The caption that has this text; None where none has."""
        return _by_text().get(text)

    def true_of(self, scenes: Tensor) -> Tensor:
        """Truth for each scene, [N] bool. scenes: [N, 4] digit in each cell, or EMPTY."""
        return truth([self], scenes)[0]


@cache
def _by_text() -> dict[str, Caption]:
    said = [Caption(count=count) for count in (None, 1, 2, 3)]
    said += [Caption((digit,), place, count) for digit in range(10) for place in ("", *PLACES) for count in (None, 1)]
    pairs = [*product(range(10), repeat=2), *product(range(10), repeat=3)]
    said += [Caption(digits, relation) for digits in pairs for relation in ("", *RELATIONS)]
    return {caption.text: caption for caption in said}


def truth(captions: Sequence[Caption], scenes: Tensor) -> Tensor:
    """Truth of every caption for every scene: [C, N] bool. scenes: [N, 4] digit in each cell, or EMPTY."""
    holds = torch.stack([(scenes == digit).T for digit in range(10)])  # [10, 4, N]
    total = (scenes != EMPTY).sum(dim=1)  # [N]
    result = torch.zeros(len(captions), len(scenes), dtype=torch.bool)  # [C, N]
    groups: dict[tuple, list[int]] = {}
    for i, caption in enumerate(captions):
        groups.setdefault((len(caption.digits), caption.relation, caption.count), []).append(i)
    for (num_digits, relation, count), members in groups.items():
        digits = torch.tensor([captions[i].digits for i in members]).long()  # [G, num_digits]
        fits = torch.zeros(len(members), len(scenes), dtype=torch.bool)  # [G, N]
        for way in _placements(num_digits, relation):
            here = torch.ones(1, len(scenes), dtype=torch.bool)
            for k, cell in enumerate(way):
                here = here & holds[digits[:, k], cell]  # [G, N]
            fits |= here
        result[members] = fits if count is None else fits & (total == count)
    return result


def _captions_of(digits: list[int], cells: list[int], choice: np.ndarray) -> list[Caption]:
    """The five captions of a scene whose (shuffled) objects are `digits` in `cells`; choice: [2] in [0, 1)."""
    said, count = tuple(digits), len(digits)
    if count == 1:
        place = next(name for name, cell in PLACES.items() if cell == cells[0])
        first, second = Caption(said, place, 1), Caption(said, "", 1)
    else:
        true = [name for name in RELATIONS if _related(name, cells[0], cells[1])]
        first, second = Caption(said, true[int(choice[0] * len(true))]), Caption(said)
    return [first, second, Caption((said[int(choice[1] * count)],)), Caption(count=count), Caption()]


@cache
def _digit_bank(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The split's digit images: index in `load_digits` [M], label [M], ink in [0, 1] [M, DIGIT, DIGIT]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("DigitScenes: needs scikit-learn; install it with `pip install fastprob[demo]`") from error
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    low, high = SPLITS[split]
    chosen = []
    for digit in range(10):
        members = order[data.target[order] == digit]
        chosen.append(members[round(low * len(members)) : round(high * len(members))])
    index = np.sort(np.concatenate(chosen))
    ink = torch.from_numpy(data.images[index]).float()[:, None] / 16  # [M, 1, 8, 8]
    ink = torch.nn.functional.interpolate(ink, size=DIGIT, mode="bilinear", align_corners=False)[:, 0]
    return index, data.target[index], ink.clamp(0, 1).numpy()


class DigitScenes(Dataset):
    """Scenes of one to three handwritten digits with five true captions each.

    split: "train", "val" or "test", disjoint in digit images whatever the seed. num_scenes: 4000, 1000 and 1000
    by default; the first scenes of a longer data set are those of a shorter one. Item i is
    (32 x 32 RGB PIL image, five captions from the most specific to the least).

    grid [N, 4]: digit in each cell or EMPTY; digit_index [N, 4]: which image of `load_digits`, or EMPTY;
    boxes: for each scene a list of `Box`, `named` those of a caption's digits; captions: 5 N texts, scene by scene;
    caption_image, caption_level [5 N]. Raises ValueError on an unknown split or fewer than one scene, ImportError
    without scikit-learn.
    """

    labels = None  # a scene has several digits, so no single class

    def __init__(self, split: str = "train", *, seed: int = 0, num_scenes: int | None = None):
        if split not in SPLITS:
            raise ValueError(f"DigitScenes: split must be one of {list(SPLITS)}, got {split!r}")
        num_scenes = DEFAULT_SCENES[split] if num_scenes is None else num_scenes
        if num_scenes < 1:
            raise ValueError(f"DigitScenes: num_scenes must be at least 1, got {num_scenes}")
        self.split, self.seed = split, seed
        self.name = f"digitscenes:{split}" + (f":seed={seed}" if seed else "")
        # One row of uniform draws a scene: 1 count, 4 cells, 3 x (image, 2 shifts, 3 ink), 3 paper, 2 captions.
        draws = np.random.default_rng([seed, *split.encode()]).random((num_scenes, 28))
        self._place(draws[:, 0], draws[:, 1:5], draws[:, 5:14].reshape(-1, 3, 3))
        self._paint(ink_colour=draws[:, 14:23].reshape(-1, 3, 3), paper=draws[:, 23:26])
        self.statements = [
            caption
            for row, cells, count, choice in zip(self.grid.tolist(), self._cells, self._count, draws[:, 26:])
            for caption in _captions_of([row[c] for c in cells[:count]], cells[:count].tolist(), choice)
        ]  # 5 N `Caption`s
        self.captions = [caption.text for caption in self.statements]
        self.caption_image = torch.arange(num_scenes).repeat_interleave(LEVELS)  # [5 N]
        self.caption_level = torch.arange(LEVELS).repeat(num_scenes)  # [5 N]

    def _place(self, count: np.ndarray, cells: np.ndarray, objects: np.ndarray) -> None:
        """Choose how many digits, their cells, images and positions. count: [N]; cells: [N, 4]; objects: [N, 3, 3]."""
        index, label, _ = _digit_bank(self.split)
        rows = np.arange(len(count))
        self._count = 1 + (count * 3).astype(int)  # [N]
        self._cells = np.argsort(cells, axis=1)[:, :3]  # [N, 3], the objects' order in captions
        self._image = (objects[..., 0] * len(index)).astype(int)  # [N, 3] row of the digit bank
        shift = (objects[..., 1:] * (CELL - DIGIT + 1)).astype(int)  # [N, 3, 2]
        self._corner = np.stack([self._cells // 2, self._cells % 2], axis=-1) * CELL + shift  # [N, 3, 2] (y, x)
        grid, used = np.full((2, len(count), 4), EMPTY)
        for k in range(3):
            there = rows[self._count > k]
            grid[there, self._cells[there, k]] = label[self._image[there, k]]
            used[there, self._cells[there, k]] = index[self._image[there, k]]
        self.grid, self.digit_index = torch.from_numpy(grid), torch.from_numpy(used)

    def _paint(self, ink_colour: np.ndarray, paper: np.ndarray) -> None:
        """Render all scenes: light ink on dark paper. ink_colour: [N, 3, RGB]; paper: [N, RGB]; both in [0, 1)."""
        ink = _digit_bank(self.split)[2]
        colour = 0.6 + 0.4 * ink_colour
        canvas = np.empty((len(paper), SCENE, SCENE, 3), dtype=np.float32)
        canvas[:] = 0.2 * paper[:, None, None]
        offset = np.arange(DIGIT)
        for k in range(3):
            there = np.flatnonzero(self._count > k)
            y = self._corner[there, k, 0, None] + offset  # [M, DIGIT]
            x = self._corner[there, k, 1, None] + offset
            at = there[:, None, None], y[:, :, None], x[:, None, :]
            cover = ink[self._image[there, k]][..., None]  # [M, DIGIT, DIGIT, 1]
            canvas[at] += cover * (colour[there, k, None, None] - canvas[at])
        self.pixels = np.rint(canvas * 255).astype(np.uint8)  # [N, 32, 32, 3]

    @cached_property
    def boxes(self) -> list[list[Box]]:
        """The digits' boxes, scene by scene, in the order in which the captions name the digits."""
        _, label, ink = _digit_bank(self.split)
        seen = ink > 0  # [M, DIGIT, DIGIT]
        y, x = seen.any(axis=2), seen.any(axis=1)  # [M, DIGIT]
        tight = np.stack([x.argmax(1), y.argmax(1), DIGIT - x[:, ::-1].argmax(1), DIGIT - y[:, ::-1].argmax(1)], 1)
        corner = self._corner[..., [1, 0, 1, 0]]  # [N, 3, 4]
        edges, labels = (tight[self._image] + corner).tolist(), label[self._image].tolist()
        return [[Box(labels[i][k], *edges[i][k]) for k in range(count)] for i, count in enumerate(self._count.tolist())]

    def named(self, caption: int) -> list[Box]:
        """The boxes of all digits in its scene that a caption names; none for "two digits" and for "handwriting"."""
        digits = self.statements[caption].digits
        return [box for box in self.boxes[caption // LEVELS] if box.label in digits]

    @cached_property
    def _truth(self) -> tuple[Tensor, Tensor]:
        """Truth of the different captions [U, N], and which of them each caption is [5 N]."""
        different = {caption: i for i, caption in enumerate(dict.fromkeys(self.statements))}
        which = torch.tensor([different[caption] for caption in self.statements])
        return truth(list(different), self.grid), which

    def matches(self) -> Tensor:
        """Whether each caption is true of each scene: [5 N, N] bool."""
        table, which = self._truth
        return table[which]

    def ambiguity(self) -> Tensor:
        """The number of scenes each caption is true of: [5 N] int64, at least 1."""
        table, which = self._truth
        return table.sum(dim=1)[which]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image, list[str]]:
        i = range(len(self))[i]
        return Image.fromarray(self.pixels[i]), self.captions[LEVELS * i : LEVELS * (i + 1)]
