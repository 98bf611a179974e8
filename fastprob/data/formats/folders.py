"""Directories of image files.

CUB_200_2011/      CUB: images/<class>/*.jpg and text_c10/<class>/*.txt
oxford-flowers/    Flowers: jpg/*.jpg and imagelabels.mat; text_c10/ is optional
classes/           a folder of images for each class, which is their label; captions are made of the folders' names
pictures/          images with a text file of captions, a line each, for each: a.jpg and a.txt
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastprob.data.rows import Rows, open_text

EXPECTED = (
    "a directory of CUB (images/ and text_c10/), of Flowers (jpg/ and imagelabels.mat), "
    "with a folder of images for each class, or with images and .txt files beside them"
)
TEMPLATE = "a photo of a {}."  # CLIP's own
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def reader(path: Path) -> Callable | None:
    if (path / "images").is_dir() and (path / "text_c10").is_dir():
        return read_cub
    if (path / "jpg").is_dir() and (path / "imagelabels.mat").is_file():
        return read_flowers
    if not path.is_dir():
        return None
    return read_pictures if _images(path) else read_classes if _folders(path) else None


def read_cub(rows: Rows, path: Path, root: Path | None) -> str:
    texts = sorted(path.glob("text_c10/*/*.txt"))
    classes = {name: i for i, name in enumerate(sorted({text.parent.name for text in texts}))}
    for text in texts:
        image = path / "images" / text.parent.name / f"{text.stem}.jpg"
        rows.add(str(text), f"{text.parent.name}/{image.name}", image, _lines(rows, text), classes[text.parent.name])
    return "cub"


def read_flowers(rows: Rows, path: Path, root: Path | None) -> str:
    """Without text_c10/ no image has captions; with it, each must."""
    from scipy.io import loadmat

    images = sorted((path / "jpg").glob("image_*.jpg"))
    try:
        labels = loadmat(path / "imagelabels.mat").get("labels")
    except Exception as error:  # of many kinds, where the file is damaged
        raise ValueError(f"open_dataset: {path / 'imagelabels.mat'}: expected a .mat file, got: {error}") from error
    if labels is None or labels.size != len(images):
        got = "no 'labels'" if labels is None else f"{labels.size} for {len(images)} images"
        raise ValueError(
            f"open_dataset: {path / 'imagelabels.mat'}: expected a label for every jpg/image_*.jpg, got {got}"
        )
    texts = {text.stem: text for text in path.glob("text_c10/*/*.txt")}
    rows.captioned = bool(texts)
    for image, label in zip(images, labels.ravel()):
        captions = _lines(rows, texts[image.stem]) if image.stem in texts else []
        rows.add(str(image), image.name, image, captions, int(label) - 1)
    return "flowers"


def read_classes(rows: Rows, path: Path, root: Path | None, *, template: str | None = None) -> str:
    """template: the caption, with {} in place of the class: the folder's name, blanks for its underscores."""
    template = template or TEMPLATE
    if template.count("{}") != 1:
        raise ValueError(f"open_dataset: template must have one {{}} in it, for the class, got {template!r}")
    for label, folder in enumerate(_folders(path)):
        images = _images(folder)
        if not images:
            inner = [each.name for each in _folders(folder)]
            got = f"the folders {inner[:3]}: one too high?" if inner else "none"
            raise ValueError(f"open_dataset: {folder}: expected images of a class in it, got {got}")
        caption = rows.caption(str(folder), template.replace("{}", folder.name.replace("_", " ")))
        for image in images:
            rows.add(str(image), f"{folder.name}/{image.name}", image, [caption], label)
    return path.resolve().name


def read_pictures(rows: Rows, path: Path, root: Path | None) -> str:
    for image in _images(path):
        text = image.with_suffix(".txt")
        if text.is_file():
            rows.add(str(image), image.name, image, _lines(rows, text))
        else:
            rows.reject(str(image), f"expected its captions in {text.name}, found no such file")
    return path.resolve().name


def _images(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES)


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _lines(rows: Rows, text: Path) -> list[str | None]:
    with open_text(text) as file:
        return [rows.caption(f"{text}, line {n}", line) for n, line in enumerate(file, start=1) if line.strip()]
