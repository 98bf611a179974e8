"""The images and texts of a store of which a model is most and least certain, with what each retrieves, for a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.calibration import uncertainty_levels
from fastprob.evaluation.page import Item, Picture, Section, thumbnail
from fastprob.evaluation.retrieval import nearest
from fastprob.evaluation.selective import same

Pictures = Callable[[int], Image]
"""The picture of a row of a store's images, see `fastprob.data.store.pictures_of`."""

_MATCHES = 3
"""What is shown of what each retrieves."""

_CAPTIONS = 5
"""Most captions shown of an image."""

_SHOWN = "With each are the three nearest by cosine of the frozen embeddings. Equal captions are shown once."

_NO_PICTURES = """\
A store keeps no pictures: --data, with the data set and the options that fastprob embed had, shows them."""


def examples(
    store: EmbeddingStore,
    uncertainty: Mapping[str, Tensor],
    *,
    levels: int,
    shown: int,
    pictures: Pictures | None = None,
    key: Tensor | None = None,
    said: Sequence[str] = (),
) -> list[Section]:
    """Sections of the texts and of the images: `shown` of the most and of the least certain, no row in both.

    Only their embeddings are compared with the others', which may be memory-mapped, block by block.

    Args:
        uncertainty: of each "image" [N] and of each "text" [M].
        levels: of equal count, of which each is in one.
        key: of each image, [N]. A text is right for an image if one that has this caption has the image's key. Without
            it nothing is called right or wrong.
        said: paragraphs that the first section has besides.
    """
    of = _Examples(store, uncertainty, levels, pictures, key)
    text = [_SHOWN, *said, *([] if pictures else [_NO_PICTURES])]
    return [
        Section("Texts", text, groups=of.ends("text", shown)),
        Section("Images", groups=of.ends("image", shown)),
    ]


class _Examples:
    """Rows of a side, "image" or "text", as items. Texts of one caption are one: the first row stands for all."""

    def __init__(
        self,
        store: EmbeddingStore,
        uncertainty: Mapping[str, Tensor],
        levels: int,
        pictures: Pictures | None,
        key: Tensor | None,
    ):
        self.store, self.uncertainty, self.levels, self.pictures, self.key = store, uncertainty, levels, pictures, key
        self.level = {side: 1 + uncertainty_levels(values, levels) for side, values in uncertainty.items()}  # [R]
        self.caption = same(store.captions)  # [M] which of the different ones each is
        first = torch.zeros(int(self.caption.max()) + 1, dtype=torch.int64)  # [U]
        first.scatter_reduce_(0, self.caption, torch.arange(len(self.caption)), "amin", include_self=False)
        self.rows = {"image": torch.arange(len(store.image)), "text": first}

    def ends(self, side: str, shown: int) -> list[tuple[str, list[Item]]]:
        """The most and the least certain, from the outermost on."""
        rows = self.rows[side]
        order = rows[self.uncertainty[side][rows].argsort(stable=True)]
        most = order[: min(shown, (len(order) + 1) // 2)]
        least = order[max(len(most), len(order) - shown) :].flip(0)
        ends = [(f"The most certain {side}s", most), (f"The least certain {side}s", least)]
        return [(title, self._queries(side, rows)) for title, rows in ends if len(rows)]

    def _queries(self, side: str, rows: Tensor) -> list[Item]:
        other = "image" if side == "text" else "text"
        query, gallery, among = getattr(self.store, side), getattr(self.store, other), self.rows[other]
        cosine, found = nearest(query[rows], gallery, min(_MATCHES, len(among)), among=among)
        items = []
        for row, matches, cosines in zip(rows.tolist(), found.tolist(), cosine.tolist()):
            keys = self._keys(side, row)
            items.append(self._query(side, row, [self._match(other, *each, keys) for each in zip(matches, cosines)]))
        return items

    def _query(self, side: str, row: int, matches: list[Item]) -> Item:
        images = self._images(side, row)
        numbers = [
            ("uncertainty", self._uncertainty(side, row)),
            ("level", f"{self.level[side][row]} of {self.levels}"),
        ]
        shown = {"numbers": numbers, "picture": self._picture(images[0]), "matches": matches}
        if side == "image":
            return Item(self._name(row), self._captions(row)[:_CAPTIONS], **shown)
        more = f" and {len(images) - 1:,} more" if len(images) > 1 else ""
        return Item(self.store.captions[row], [f"written for {self._name(images[0])}{more}"], **shown)

    def _match(self, side: str, row: int, cosine: float, wanted: set[int]) -> Item:
        numbers = [("cosine", f"{cosine:.3f}"), ("uncertainty", self._uncertainty(side, row))]
        right = None if self.key is None else not wanted.isdisjoint(self._keys(side, row))
        if side == "text":
            return Item(self.store.captions[row], numbers=numbers, right=right)
        return Item(self._name(row), self._captions(row)[:1], numbers, self._picture(row), right)

    def _images(self, side: str, row: int) -> list[int]:
        """The images that a row stands for: itself, or all that have the caption."""
        if side == "image":
            return [row]
        return self.store.caption_image[self.caption == self.caption[row]].unique().tolist()

    def _keys(self, side: str, row: int) -> set[int]:
        return set() if self.key is None else set(self.key[self._images(side, row)].tolist())

    def _uncertainty(self, side: str, row: int) -> str:
        return f"{self.uncertainty[side][row]:#.3g}"

    def _name(self, image: int) -> str:
        return self.store.ids[image] if self.store.ids else f"image {image}"

    def _captions(self, image: int) -> list[str]:
        start, stop = torch.searchsorted(self.store.caption_image, torch.tensor([image, image + 1])).tolist()
        return self.store.captions[start:stop]

    def _picture(self, image: int) -> Picture | None:
        if self.pictures is None:
            return None
        return thumbnail(self.pictures(image), (self._captions(image) or [self._name(image)])[0])
