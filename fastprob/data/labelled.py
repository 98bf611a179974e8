"""Labelled images for few-shot classification: the splits of a data set by name, k-shot samples, base and new classes.

    digits:inverted, :rotated, :thickened    single handwritten digits under a shift, built in (`digits`: as they are)
    split_zhou_OxfordPets.json               CoOp's splits {train, val, test: [[path, label, name]]}; images beside it
    split_zhou_OxfordPets.json@/data/pets    the same, images elsewhere
    imagenet/                                train/, val/ and test/ with a folder of images for each class; without
                                             test/, val/ is the test split; val/ may be missing; in classnames.txt,
                                             lines "folder name" give the classes other names than their folders'

`open_splits` takes these.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastprob.data.digitscenes import NAMES, DigitScenes
from fastprob.data.images import open_rgb

CLASSES = ("all", "base", "new")
TEMPLATE = "a photo of a {}."  # CLIP's own; the data sets of CoOp have one each, "a photo of a {}, a type of pet."
SHIFTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of scenes [N, H, W, 3], light ink on dark paper
    "": lambda scenes: scenes,
    "inverted": lambda scenes: 255 - scenes,
    "rotated": lambda scenes: np.stack([_turned(scene) for scene in scenes]),
    "thickened": lambda scenes: _dilated(scenes),
}
DIGIT_SCENES = {"train": 4000, "val": 3000, "test": 3000}  # of which a third shows one digit


class LabelledImages(Dataset):
    """Images with one class each: item i is a PIL RGB image, `labels` [N] its class, `classnames` what they are called.

    images: files or pixels [H, W, 3]; template: the prompt that suits the classes without training.
    """

    def __init__(
        self,
        name: str,
        images: Sequence[Path] | np.ndarray,
        labels: Tensor,
        classnames: list[str],
        template: str = TEMPLATE,
    ):
        self.name, self.images, self.labels, self.classnames, self.template = name, images, labels, classnames, template

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Image.Image:
        image = self.images[i]
        return Image.fromarray(image) if isinstance(image, np.ndarray) else open_rgb(image)

    def fingerprint(self) -> str:
        """sha256 over labels and pixels, or over the files' names and folders: equal for equal images, wherever."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for image in self.images:
            pixels = isinstance(image, np.ndarray)
            digest.update(image.tobytes() if pixels else f"{image.parent.name}/{image.name}\n".encode())
        return digest.hexdigest()

    def few_shot(self, shots: int, seed: int) -> LabelledImages:
        """`shots` images of every class (0: all; all of a class that has fewer), drawn by `seed`, class by class.

        Fewer shots of the same seed are among more. The draw is not that of the released code for a seed.
        """
        shots = shots or len(self)
        draw = torch.Generator().manual_seed(seed)
        chosen = []
        for label in range(len(self.classnames)):
            members = (self.labels == label).nonzero()[:, 0]
            chosen.append(members[torch.randperm(len(members), generator=draw)[:shots]])
        return self._rows(torch.cat(chosen), f"{self.name}, {shots} shots of seed {seed}")

    def of_classes(self, which: str) -> LabelledImages:
        """The images of all classes, of the first half ("base", the greater one) or of the rest ("new")."""
        if which == "all":
            return self
        half = (len(self.classnames) + 1) // 2
        if which == "new" and half == len(self.classnames):
            raise ValueError(f"of_classes: {self.name} must have two classes or more, got {self.classnames}")
        low, high = {"base": (0, half), "new": (half, len(self.classnames))}[which]
        inside = (self.labels >= low) & (self.labels < high)
        part = self._rows(inside.nonzero()[:, 0], f"{self.name}, {which} classes")
        part.labels, part.classnames = part.labels - low, self.classnames[low:high]
        return part

    def _rows(self, rows: Tensor, name: str) -> LabelledImages:
        images = self.images[rows.numpy()] if isinstance(self.images, np.ndarray) else [self.images[i] for i in rows]
        return LabelledImages(name, images, self.labels[rows], self.classnames, self.template)


def open_splits(spec: str) -> dict[str, LabelledImages]:
    """The splits "train", "test" and, where there is one, "val" of what `spec` describes.

    `fastprob.data.labelled` has the forms.

    Raises ValueError for anything else, for missing images, and for splits whose classes differ.
    """
    kind, _, shift = spec.partition(":")
    if kind == "digits":
        if shift not in SHIFTS:
            raise ValueError(f"open_splits: digits must be shifted by one of {[*SHIFTS][1:]}, got {shift!r}")
        return {split: _digits(spec, split, SHIFTS[shift]) for split in DIGIT_SCENES}
    file, root = re.fullmatch(r"(.*?\.json)@(.*)|.*", spec, re.DOTALL).groups()
    path = Path(file or spec).expanduser()
    if path.suffix == ".json" and path.is_file():
        return _coop_splits(path, Path(root).expanduser() if root else None)
    if path.is_dir():
        return _folders(path)
    expected = "digits:<shift>, CoOp's split_zhou_*.json, or a directory with train/ and test/"
    raise ValueError(f"open_splits: expected {expected}; got {spec!r}" + ("" if path.exists() else ", not found"))


def _digits(name: str, split: str, shift: Callable[[np.ndarray], np.ndarray]) -> LabelledImages:
    """The scenes of `DigitScenes` that show one digit; no digit image is in two splits."""
    scenes = DigitScenes(split, num_scenes=DIGIT_SCENES[split])
    lone = (scenes.grid >= 0).sum(dim=1) == 1
    pixels = np.ascontiguousarray(shift(scenes.pixels[lone.numpy()]))
    return LabelledImages(f"{name} {split}", pixels, scenes.grid[lone].amax(dim=1), list(NAMES), "a lone {}")


def _turned(scene: np.ndarray) -> np.ndarray:
    """By 10 degrees, with paper in the corners; at 30 the tiny CLIP already guesses."""
    return np.asarray(Image.fromarray(scene).rotate(10, Image.Resampling.BILINEAR, fillcolor=tuple(scene[0, 0])))


def _dilated(scenes: np.ndarray) -> np.ndarray:
    """The lightest of every 3 x 3 pixels."""
    pixels = torch.from_numpy(scenes).permute(0, 3, 1, 2).float()
    return torch.nn.functional.max_pool2d(pixels, 3, 1, 1).permute(0, 2, 3, 1).byte().numpy()


def _coop_splits(path: Path, root: Path | None) -> dict[str, LabelledImages]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = {split: [(str(p), int(label), str(name)) for p, label, name in of] for split, of in data.items()}
    except (ValueError, TypeError, AttributeError) as error:
        expected = "{train, val, test: [[path, label, name]]}"
        raise ValueError(f"open_splits: {path}: expected {expected}, got {type(error).__name__}: {error}") from error
    if not rows.get("train") or not rows.get("test"):
        raise ValueError(f"open_splits: {path}: expected rows of 'train' and of 'test', got {sorted(rows)}")
    names: dict[int, str] = {}
    for _, label, name in (row for of in rows.values() for row in of):
        if names.setdefault(label, name) != name:
            raise ValueError(f"open_splits: {path}: expected one name of label {label}, got {names[label]!r}, {name!r}")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"open_splits: {path}: expected labels 0 to {len(names) - 1}, got {sorted(names)}")
    first = rows["train"][0][0]
    places = [root] if root else [path.parent, *sorted(each for each in path.parent.iterdir() if each.is_dir())]
    found = next((place for place in places if (place / first).is_file()), None)
    if found is None:
        raise ValueError(f"open_splits: {path}: expected {first} in {root or f'{path.parent} or a folder in it'}")
    classnames = [names[label] for label in range(len(names))]
    return {
        split: _files(f"{path.stem} {split}", [found / row[0] for row in of], [row[1] for row in of], classnames)
        for split, of in rows.items()
        if of
    }


def _folders(path: Path) -> dict[str, LabelledImages]:
    from torchvision.datasets import ImageFolder

    try:
        there = [split for split in ("train", "val", "test") if (path / split).is_dir()]
        folders = {split: ImageFolder(str(path / split)) for split in there}
    except FileNotFoundError as error:
        raise ValueError(f"open_splits: {path}: expected a folder of images for each class: {error}") from error
    if "test" not in folders and "val" in folders:
        folders["test"] = folders.pop("val")
    if not {"train", "test"} <= folders.keys():
        raise ValueError(f"open_splits: {path}: expected train/ and test/ (or val/) in it, got {sorted(folders)}")
    classes = folders["train"].classes
    for split, folder in folders.items():
        if folder.classes != classes:
            odd = sorted(set(classes) ^ set(folder.classes))
            raise ValueError(f"open_splits: {path}: expected the classes of train/ in {split}/, they differ by {odd}")
    file = path / "classnames.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = dict(line.split(maxsplit=1) for line in map(str.strip, lines) if len(line.split()) > 1)
    if names and not names.keys() & set(classes):
        raise ValueError(f"open_splits: {file}: expected lines 'folder name' of {classes[:3]}, got {lines[:3]}")
    classnames = [names.get(each, each) for each in classes]
    return {
        split: _files(f"{path.name} {split}", [Path(p) for p, _ in of.samples], of.targets, classnames)
        for split, of in folders.items()
    }


def _files(name: str, images: list[Path], labels: list[int], classnames: list[str]) -> LabelledImages:
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise ValueError(f"open_splits: {name}: {len(missing)} of {len(images)} images are missing, first {missing[0]}")
    return LabelledImages(name, images, torch.tensor(labels), classnames)
