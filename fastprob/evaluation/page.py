"""A page for people: one HTML file of sections with text, figures, tables, and items with what each of them matched.

The file holds all that it shows: styles are inline, pictures are data: URIs, there is no script, and its content
security policy lets a browser load nothing else. `page.html` is the template; it escapes whatever it is given.
"""

import base64
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
from PIL import Image

import fastprob
from fastprob._files import write_atomically

THUMBNAIL = 160
"""Longest side of a picture of an item, in pixels."""

HEAT = (255, 122, 26)
"""Red, green and blue of what matters most, from 0 to 255."""

_CHARACTERS = 300
"""Of a text that are shown."""

_TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture in the page: its data: URI, width and height in pixels, and what it shows in words."""

    uri: str
    width: int
    height: int
    alt: str


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that was queried with, or found."""

    name: str
    """What it is called."""
    about: Sequence[str] = ()
    """What else is said of it."""
    numbers: Sequence[tuple[str, str]] = ()
    """What each is called, and its value."""
    picture: Picture | None = None
    right: bool | None = None
    """Whether it is a match, where that is known."""
    matches: Sequence["Item"] = ()
    """What was found with it, the best first."""
    words: Sequence[tuple[str, float]] = ()
    """The words of the name, each with a value from 0 to 1 by which it is shaded."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under a header, and what each of some facts is called and what it is."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """What a heading has under it: the warnings, then the others in the order of the fields."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs."""
    facts: Sequence[tuple[str, str]] = ()
    """What each is called, and what it is."""
    figures: Sequence[tuple[str, str | os.PathLike]] = ()
    """Title and PNG file of each."""
    tables: Sequence[Table] = ()
    groups: Sequence[tuple[str, Sequence[Item]]] = ()
    """Heading and items of each."""
    warnings: Sequence[str] = ()
    grid: Sequence[Item] = ()
    """Items side by side."""


def write_page(path: str | os.PathLike, title: str, sections: Sequence[Section]) -> Path:
    """Write the page, in one step; return its path."""
    text = _TEMPLATE.get_template("page.html").render(
        title=title, sections=sections, version=fastprob.__version__, figure=_figure, clip=_clip, heat=HEAT
    )
    write_atomically(path, text.encode("utf-8", "replace"))  # half of a surrogate pair is no text
    return Path(path)


def thumbnail(image: Image.Image, alt: str) -> Picture:
    """The image, its longest side at most `THUMBNAIL` pixels: shrunk, as JPEG, or magnified by a whole number, as PNG.

    Of what its file says beside, such as the place where it was taken, nothing is kept.
    """
    small = image.convert("RGB")
    small.info.clear()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    format, options = ("jpeg", {"quality": 85}) if small.size != image.size else ("png", {})
    times = THUMBNAIL // max(small.size)
    small = small.resize((times * small.width, times * small.height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, format, **options)
    return Picture(_data_uri(buffer.getvalue(), format), *small.size, alt)


def _data_uri(data: bytes, format: str) -> str:
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"


def _figure(title: str, path: str | os.PathLike) -> Picture:
    with Image.open(path) as image:
        width, height = image.size
    return Picture(_data_uri(Path(path).read_bytes(), "png"), width, height, f"Plot: {title}")


def _clip(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
