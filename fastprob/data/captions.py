"""Captioned images of any source, behind one protocol: `len()`, `[i] -> (PIL RGB image, list of captions)`,
`name`, `labels` ([N] class of each image, or None), and `digests()` of files, which may change.

    digitscenes, digitscenes:val              the built-in scenes (`fastprob.data.digitscenes`)
    captions_val2017.json                     COCO captions; images in the published place, ../val2017
    captions_val2017.json@/data/val2017       the same, images elsewhere
    results.csv, results.csv@images/          Flickr30k: `image| number| caption` after a header line
    CUB_200_2011/                             CUB: images/<class>/*.jpg and text_c10/<class>/*.txt
    oxford-flowers/                           Flowers: jpg/*.jpg and imagelabels.mat; text_c10/ is optional
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from fastprob.data.digitscenes import DigitScenes
from fastprob.data.images import open_rgb

EXPECTED = (
    "digitscenes[:train|val|test], a COCO captions .json, a Flickr30k .csv, "
    "a CUB directory (images/ and text_c10/) or a Flowers directory (jpg/ and imagelabels.mat)"
)
# The published Flickr30k file lacks the second separator in one row ("2199200615.jpg| 4   A dog runs ...").
FLICKR_ROW = re.compile(r"([^|]+?)\s*\|\s*(\d+)(?:\s*\|\s*|\s+)(.*)")


class ImageCaptions(Dataset):
    """Image files with their captions. Raises ValueError if there are none, or if an image file is missing."""

    def __init__(self, name: str, images: list[Path], captions: list[list[str]], labels: list[int] | None = None):
        missing = [path for path in images if not path.is_file()]
        if missing or not images:
            what = f"{len(missing)} of {len(images)} are missing, first {missing[0]}" if missing else "found none"
            raise ValueError(f"open_dataset: {name}: expected image files, {what}")
        self.name, self.images, self.captions = name, images, captions
        self.labels = None if labels is None else torch.tensor(labels)  # [N]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, list[str]]:
        return open_rgb(self.images[i]), self.captions[i]

    def digests(self) -> dict[str, str]:
        """SHA-256 of all captions and labels, and of every image file's name, size and time of change."""
        labels = None if self.labels is None else self.labels.tolist()
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.images]
        return {"captions": _digest((self.captions, labels)), "files": _digest(files)}


def open_dataset(spec: str) -> DigitScenes | ImageCaptions:
    """The data set that `spec` describes (the module's docstring has the forms).

    Raises ValueError for anything else, and for missing files and rows that can't be read.
    """
    if spec.split(":")[0] == "digitscenes":
        return DigitScenes(spec.partition(":")[2] or "train")
    file, _, root = re.fullmatch(r"(.*?\.(?:json|csv)|.*)(@(.*))?", spec, re.DOTALL).groups()
    path, images = Path(file).expanduser(), Path(root).expanduser() if root else None
    if images is not None and not images.is_dir():
        raise ValueError(f"open_dataset: expected the directory of the images after '@', got {str(images)!r}")
    if path.is_file() and path.suffix == ".json":
        return _coco(path, images)
    if path.is_file() and path.suffix == ".csv":
        return _flickr30k(path, images)
    if (path / "images").is_dir() and (path / "text_c10").is_dir():
        return _cub(path)
    if (path / "jpg").is_dir() and (path / "imagelabels.mat").is_file():
        return _flowers(path)
    raise ValueError(f"open_dataset: expected {EXPECTED}; got {spec!r}" + ("" if path.exists() else ", not found"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _coco(path: Path, root: Path | None) -> ImageCaptions:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"open_dataset: {path}: expected COCO captions in JSON, got {error}") from error
    files = {row["id"]: row["file_name"] for row in _coco_rows(path, data, "images", ("id", "file_name"))}
    captions: dict[Any, list[str]] = {image: [] for image in files}
    for row in _coco_rows(path, data, "annotations", ("image_id", "caption")):
        if row["image_id"] not in captions:
            raise ValueError(f"open_dataset: {path}: expected an image_id of 'images', got {row['image_id']!r}")
        captions[row["image_id"]].append(row["caption"].strip())
    root = root or path.parent.parent / path.stem.removeprefix("captions_")
    return ImageCaptions(path.stem, [root / name for name in files.values()], list(captions.values()))


def _coco_rows(path: Path, data: Any, part: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """data[part], checked to be rows with `keys`."""
    if not isinstance(data, dict) or not isinstance(data.get(part), list):
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"open_dataset: {path}: expected COCO captions with a list {part!r}, got {got}")
    for row in data[part]:
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise ValueError(f"open_dataset: {path}: expected {list(keys)} in every row of {part!r}, got {row!r}")
    return data[part]


def _flickr30k(path: Path, root: Path | None) -> ImageCaptions:
    captions: dict[str, list[str]] = {}
    with open(path, encoding="utf-8") as lines:
        next(lines, None)  # the header
        for number, line in enumerate(lines, start=2):
            row = FLICKR_ROW.fullmatch(line.strip())
            if row is None:
                got = line.rstrip("\n")
                raise ValueError(f"open_dataset: {path}, line {number}: expected 'image| number| caption', got {got!r}")
            captions.setdefault(row[1], []).append(row[3].strip())
    root = root or next((r for r in (path.parent / "flickr30k_images",) if r.is_dir()), path.parent)
    return ImageCaptions("flickr30k", [root / name for name in captions], list(captions.values()))


def _cub(path: Path) -> ImageCaptions:
    texts = sorted(path.glob("text_c10/*/*.txt"))
    classes = {name: i for i, name in enumerate(sorted({text.parent.name for text in texts}))}
    images = [path / "images" / text.parent.name / f"{text.stem}.jpg" for text in texts]
    return ImageCaptions("cub", images, [_lines(text) for text in texts], [classes[t.parent.name] for t in texts])


def _flowers(path: Path) -> ImageCaptions:
    from scipy.io import loadmat

    images = sorted((path / "jpg").glob("image_*.jpg"))
    labels = loadmat(path / "imagelabels.mat").get("labels")
    if labels is None or labels.size != len(images):
        got = "no 'labels'" if labels is None else f"{labels.size} for {len(images)} images"
        raise ValueError(
            f"open_dataset: {path / 'imagelabels.mat'}: expected a label for every jpg/image_*.jpg, got {got}"
        )
    texts = {text.stem: text for text in path.glob("text_c10/*/*.txt")}
    captions = [_lines(texts[image.stem]) if image.stem in texts else [] for image in images]
    return ImageCaptions("flowers", images, captions, [int(label) - 1 for label in labels.ravel()])


def _lines(text: Path) -> list[str]:
    return [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
