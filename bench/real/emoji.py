"""Emoji as four vendors draw them, for a shift of style: adapt to three vendors' drawings, recognise the fourth's.

Every vendor has one sheet of 32 x 32 pictures. A class is a group of Unicode's, such as "food fruit". Names are split
in three, within every class, so that no name is in two parts: those that the CLIP is trained on (with all names of
smaller groups), those to adapt it to, and those to test it on. Left out are flags, skin tones, and the man's and the
woman's form of a person's picture, which would be nearly the same picture under another name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

VENDORS = ("apple", "facebook", "google")
HELD_OUT = "twitter"  # drawn flat
SIDE = 32
LEAST = 14  # names of a class
SHARES = {"clip": 0.3, "train": 0.25, "test": 0.45}  # of a class's names
SPLIT_SEED = 0
FORMS = ("man-", "woman-", "male-", "female-")


@dataclass(frozen=True)
class Emoji:
    """An emoji's name, the other names it goes by, its group, its place on a sheet and who draws it themselves."""

    name: str
    others: tuple[str, ...]
    group: str
    cell: tuple[int, int]
    vendors: frozenset[str]

    @property
    def captions(self) -> list[str]:
        """What the CLIP reads of it; its group, the class to be recognised, is not among it."""
        return list(dict.fromkeys((self.name, f"an emoji of {self.name}", *self.others)))


def read_emoji(directory: Path) -> list[Emoji]:
    """Those of emoji.json in the unpacked package that are used here, in its order."""
    rows = json.loads((directory / "package" / "emoji.json").read_text(encoding="utf-8"))
    used = [row for row in rows if row["category"] not in ("Flags", "Component")]
    return [_emoji(row) for row in used if not row["short_name"].startswith(FORMS)]


def _emoji(row: dict) -> Emoji:
    vendors = frozenset(vendor for vendor in (*VENDORS, HELD_OUT) if row[f"has_img_{vendor}"])
    others = tuple(_words(name) for name in row["short_names"])
    return Emoji(row["name"].lower(), others, _words(row["subcategory"]), (row["sheet_x"], row["sheet_y"]), vendors)


def _words(name: str) -> str:
    return name.replace("-", " ").replace("_", " ")


def split(emoji: Sequence[Emoji]) -> dict[str, list[Emoji]]:
    """The parts of `SHARES`, drawn once for all."""
    draw = torch.Generator().manual_seed(SPLIT_SEED)
    parts: dict[str, list[Emoji]] = {name: [] for name in SHARES}
    for group in dict.fromkeys(each.group for each in emoji):
        members = [each for each in emoji if each.group == group]
        if len(members) < LEAST:
            parts["clip"] += members
            continue
        order = [members[i] for i in torch.randperm(len(members), generator=draw)]
        first = round(SHARES["clip"] * len(order))
        second = first + round(SHARES["train"] * len(order))
        for name, rows in zip(parts, (order[:first], order[first:second], order[second:])):
            parts[name] += rows
    return parts


def draw(directory: Path, vendor: str, emoji: Sequence[Emoji]) -> list[tuple[Emoji, Image.Image]]:
    """The vendor's own drawings of these emoji, in RGB; where it has none, its sheet shows another vendor's."""
    with Image.open(directory / "package" / "img" / vendor / "sheets" / f"{SIDE}.png") as file:
        sheet = file.convert("RGBA")
    return [(each, _cut(sheet, each.cell)) for each in emoji if vendor in each.vendors]


def _cut(sheet: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """The picture of a cell, which has a border of one pixel, on white."""
    left, top = (place * (SIDE + 2) + 1 for place in cell)
    drawing = sheet.crop((left, top, left + SIDE, top + SIDE))
    return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
