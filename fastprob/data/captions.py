"""Captioned images of any source, behind one protocol: `len()`, `[i] -> (PIL RGB image, list of captions)`,
`name`, `labels` ([N] class of each image, or None), `ids` ([N] what each image is called in its source), and
`digests()` of files, which may change.

    digitscenes, digitscenes:val              the built-in scenes (`fastprob.data.digitscenes`)
    captions.csv, captions.tsv                a table with columns image and caption; a row for each caption
    captions_val2017.json                     COCO captions; images in the published place, ../val2017
    dataset_coco.json                         Karpathy's splits of COCO, Flickr30k or Flickr8k
    results.csv                               Flickr30k: `image| number| caption` after a header line
    Flickr8k.token.txt                        Flickr8k: `image#number<tab>caption`
    captions.csv@/data/val2017                any of these, images elsewhere
    00000.tar, shards/                        webdataset, as img2dataset writes it: key.jpg with key.txt or key.json
    metadata.parquet, shards/                 image_path and caption, or img2dataset's key and caption, images beside
    hf:NAME:SPLIT                             Hugging Face's, from the hub or a directory of `save_to_disk`
    classes/                                  a folder of images for each class; captions from the folders' names
    pictures/                                 images with a .txt of captions beside each
    CUB_200_2011/                             CUB: images/<class>/*.jpg and text_c10/<class>/*.txt
    oxford-flowers/                           Flowers: jpg/*.jpg and imagelabels.mat; text_c10/ is optional

`fastprob.data.formats` has a file for each kind.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from fastprob.data import formats
from fastprob.data.digitscenes import DigitScenes
from fastprob.data.formats import huggingface
from fastprob.data.images import ImageSource, open_rgb, stamp
from fastprob.data.rows import Rows

EXPECTED = f"digitscenes[:train|val|test]; {formats.EXPECTED}; {huggingface.EXPECTED}"
WITH_ROOT = re.compile(r"(.*?\.(?:json|csv|tsv|txt|token|parquet)|.*)(@(.*))?", re.DOTALL)


class ImageCaptions(Dataset):
    """Images, files or what else opens, with their captions.

    labels: a class each; rows: where each comes from, for errors; skipped: {"row", "reason"} of what was left out.
    """

    def __init__(
        self,
        name: str,
        images: Sequence[Path | ImageSource],
        captions: list[list[str]],
        labels: list[int] | None = None,
        *,
        ids: list[str] | None = None,
        rows: list[str] | None = None,
        skipped: Sequence[dict[str, str]] = (),
    ):
        self.name, self.images, self.captions, self.rows, self.skipped = name, images, captions, rows, list(skipped)
        self.labels = None if labels is None else torch.tensor(labels)  # [N]
        self.ids = [image.name for image in images] if ids is None else ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, list[str]]:
        try:
            return open_rgb(self.images[i]), self.captions[i]
        except ValueError as error:
            where = f"{self.name}, image {i}" if self.rows is None else self.rows[i]
            raise ValueError(f"{where}: {error}") from error

    def digests(self) -> dict[str, str]:
        """SHA-256 of all captions and labels, and of every image file's name, size and time of change."""
        labels = None if self.labels is None else self.labels.tolist()
        files = [stamp(image) for image in self.images]
        return {"captions": _digest((self.captions, labels)), "files": _digest(files)}


class Recaptioned(Dataset):
    """The images of captioned ones with other captions; those that get none are left out.

    captions: of every image.
    """

    labels = None

    def __init__(self, data: Any, captions: Sequence[Sequence[str]]):
        self.data, self.name = data, data.name
        self.kept = [number for number, own in enumerate(captions) if own]
        self.captions = [list(captions[number]) for number in self.kept]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> tuple[Image.Image, list[str]]:
        return self.data[self.kept[i]][0], self.captions[i]


def open_dataset(
    spec: str,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    allow_outside: bool = False,
    progress: bool = True,
    **options: str | None,
) -> DigitScenes | ImageCaptions:
    """The data set that `spec` describes; `fastprob.data.captions` has the forms.

    Args:
        spec: what the command line takes as --data.
        limit: only the first images, so many of them.
        skip_bad: leave out rows that can't be used, and list them as `skipped`. Every image is decoded for that;
            without it, only opened, and a file that is torn further on is found when it is read.
        allow_outside: take images whose path leaves the directory of the images.
        progress: show a progress bar.
        options: image_key, caption_key (names of columns) and separator, of tables; split, of Karpathy's JSON;
            template, of class folders. None leaves each to its format.

    Raises:
        ValueError: for anything else, for an option that the format does not have, and, naming file and row, for the
            first row that can't be used: an image that is missing or none, a caption that is no text, an image without
            one.
        ImportError: without the package that a format needs.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if limit is not None and limit < 1:
        raise ValueError(f"open_dataset: limit must be at least 1, got {limit}")
    if spec.split(":")[0] == "digitscenes":
        _check_options(spec, DigitScenes, options)
        split = spec.partition(":")[2] or "train"
        scenes = DigitScenes(split)
        return scenes if limit is None or limit >= len(scenes) else DigitScenes(split, num_scenes=limit)
    rows = Rows(skip_bad=skip_bad, allow_outside=allow_outside)
    if spec.startswith(huggingface.PREFIX):
        _check_options(spec, huggingface.read, options)
        name = huggingface.read(rows, spec, **options)
    else:
        read, path, root = _reader(spec)
        _check_options(spec, read, options)
        name = read(rows, path, root, **options)
    rows.samples = rows.samples[:limit]
    rows.check(progress=progress)
    samples = rows.samples
    labels = None if samples[0].label is None else [sample.label for sample in samples]
    return ImageCaptions(
        name,
        [sample.image for sample in samples],
        [sample.captions for sample in samples],
        labels,
        ids=[sample.id for sample in samples],
        rows=[sample.where for sample in samples],
        skipped=rows.skipped,
    )


def captions_of(dataset: Any) -> list[list[str]]:
    """The captions of every image of what `open_dataset` returns. No image is opened."""
    if isinstance(dataset, ImageCaptions | Recaptioned):
        return dataset.captions
    captions: list[list[str]] = [[] for _ in range(len(dataset))]
    for caption, image in zip(dataset.captions, dataset.caption_image.tolist()):
        captions[image].append(caption)
    return captions


def _reader(spec: str) -> tuple[Callable, Path, Path | None]:
    """What reads `spec`, its path and the directory of the images after '@'."""
    file, _, root = WITH_ROOT.fullmatch(spec).groups()
    path, images = Path(file).expanduser(), Path(root).expanduser() if root else None
    if images is not None and not images.is_dir():
        raise ValueError(f"open_dataset: expected the directory of the images after '@', got {str(images)!r}")
    for format in formats.FORMATS:
        read = format.reader(path)
        if read is not None:
            return read, path, images
    raise ValueError(f"open_dataset: expected {EXPECTED}; got {spec!r}" + ("" if path.exists() else ", not found"))


def _check_options(spec: str, read: Callable, options: dict[str, Any]) -> None:
    """Raises ValueError for an option that `read` does not have."""
    takes = inspect.signature(read).parameters
    odd = [name for name in options if name not in takes or takes[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    if odd or (read is DigitScenes and options):
        raise ValueError(f"open_dataset: {spec} has no {' or '.join(odd or options)}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
