"""What the readers of formats gather: images with their captions, row by row, and the rows that can't be used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fastprob.data.images import ImageSource, unreadable

_CHECKED_AT_ONCE = 1024
"""Images whose checks wait for threads at a time."""

_LONGEST = 500
"""Characters of a reason, which may quote a row."""


@dataclass
class Sample:
    """An image with its captions. `where` is the row that it comes from, `id` its name there."""

    where: str
    id: str
    image: Path | ImageSource
    captions: list[str]
    label: int | None = None


class Rows:
    """Samples, and the bad rows. Where those are not to be skipped, `check` raises the first of them.

    `where` is a file and a row in it for people: "cats.csv, line 3".
    """

    def __init__(self, *, skip_bad: bool = False, allow_outside: bool = False):
        self.skip_bad, self.allow_outside = skip_bad, allow_outside
        self.captioned = True
        """Whether an image without a caption is a bad row."""
        self.samples: list[Sample] = []
        self.skipped: list[dict[str, str]] = []
        """{"row": where, "reason": why} of all bad rows."""

    def reject(self, where: str, reason: str) -> None:
        if len(reason) > _LONGEST:
            reason = reason[:_LONGEST] + " ..."
        self.skipped.append({"row": where, "reason": reason})

    def caption(self, where: str, text: Any) -> str | None:
        """The caption without blanks around it; None, and rejected, where it is empty or no text."""
        if not isinstance(text, str) or not text.strip():
            return self.reject(where, f"expected a caption, got {text!r}")
        return self._unicode(where, text.strip())

    def file(self, where: str, root: Path, name: Any) -> Path | None:
        """The image file of that name; None, and rejected, where it is no name or leaves `root`."""
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            return self.reject(where, f"expected the name of an image file, got {name!r}")
        if self._unicode(where, name) is None:
            return None
        path = root / name
        if not self.allow_outside and not _within(root, path):
            return self.reject(where, f"expected an image in {root}, got {name!r} (allow_outside takes it)")
        return path

    def add(
        self,
        where: str,
        id: str,
        image: Path | ImageSource | None,
        captions: Iterable[str | None],
        label: int | None = None,
    ) -> None:
        """An image and its captions, as `file` and `caption` return them."""
        if image is not None:
            self.samples.append(Sample(where, id, image, [text for text in captions if text is not None], label))

    def add_pairs(self, pairs: list[tuple[str, Any, Any]], file: Path, root: Path | None) -> None:
        """(where, name of the image, caption) of each row of `file`; rows of one image are its captions.

        Without a `root`, images are in the file's folder or in a folder beside it.
        """
        root = root or beside(file, [name for _, name, _ in pairs])
        samples: dict[str, Sample] = {}
        for where, name, text in pairs:
            caption = self.caption(where, text)
            if not isinstance(name, str) or name not in samples:
                path = self.file(where, root, name)
                if path is None:
                    continue
                samples[name] = Sample(where, name, path, [])
            if caption is not None:
                samples[name].captions.append(caption)
        self.samples += samples.values()

    def check(self, *, progress: bool = True) -> None:
        """Reject images that can't be read or have no captions; raise ValueError for bad rows, or if nothing is left.

        Images are opened, and those of a data set whose bad rows are left out decoded: all torn ones are found too.
        """
        self._raise()
        if self.captioned:
            self._keep_captioned()
        self._keep_readable(progress)
        self._raise()
        if not self.samples:
            raise ValueError("open_dataset: expected images with captions, found none" + self._first())

    def _keep_captioned(self) -> None:
        rejected = {row["row"] for row in self.skipped}  # an image whose only caption was bad has been named
        for sample in self.samples:
            if not sample.captions and sample.where not in rejected:
                self.reject(sample.where, f"{sample.image}: expected a caption, got none")
        self.samples = [sample for sample in self.samples if sample.captions]

    def _keep_readable(self, progress: bool) -> None:
        readable = []
        for sample, reason in zip(self.samples, self._unreadable(progress)):
            if reason is None:
                readable.append(sample)
            else:
                self.reject(sample.where, f"{sample.image}: {reason}")
        self.samples = readable

    def _unreadable(self, progress: bool) -> Iterator[str | None]:
        check = partial(unreadable, decode=self.skip_bad)
        images = [sample.image for sample in self.samples]
        bar = tqdm(total=len(images), desc="check", unit="image", delay=2, disable=not progress)
        with ThreadPoolExecutor() as threads, bar:
            for start in range(0, len(images), _CHECKED_AT_ONCE):
                block = images[start : start + _CHECKED_AT_ONCE]
                yield from threads.map(check, block)
                bar.update(len(block))

    def _raise(self) -> None:
        if self.skipped and not self.skip_bad:
            more = f"; {len(self.skipped) - 1} more bad rows" if len(self.skipped) > 1 else ""
            bad = self.skipped[0]
            raise ValueError(f"open_dataset: {bad['row']}: {bad['reason']}{more} (skip_bad leaves them out)")

    def _first(self) -> str:
        if not self.skipped:
            return ""
        return f" beside {len(self.skipped)} bad rows, first {self.skipped[0]['row']}: {self.skipped[0]['reason']}"

    def _unicode(self, where: str, text: str) -> str | None:
        try:
            text.encode()
        except UnicodeEncodeError:
            return self.reject(where, f"expected UTF-8, got {text!a}")
        return text


def open_text(path: Path) -> TextIO:
    """A file of UTF-8, with or without a mark at its start; `Rows` finds the rows that are not."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def beside(file: Path, names: list[Any]) -> Path:
    """The folder of `file` or the one in it that has one of the first images; without any, the file's own."""
    places = [file.parent, *sorted(each for each in file.parent.iterdir() if each.is_dir())]
    tried = [name for name in names[:20] if isinstance(name, str) and "\0" not in name]
    return next((place for place in places for name in tried if os.path.isfile(place / name)), file.parent)


def _within(root: Path, path: Path) -> bool:
    """By their names alone: links are their owner's, paths in a file are its writer's."""
    absolute = os.path.abspath(root)
    return os.path.commonpath([absolute, os.path.abspath(path)]) == absolute
