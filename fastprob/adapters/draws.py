"""Draws from the distribution that an adapter predicts for a query, and the images of a store nearest to them.

    x_q ~ GGD(mu, 1/alpha, beta) [D],    n_q = argmax_i cos(x_q, image_i),    q = 1..Q

Where the query's distribution is narrow the draws share few nearest images, where it is wide they have many. How many,
by how often each comes up, says the perplexity of their shares p_i = #{q: n_q = i} / Q:

    exp(-sum_i p_i log p_i)                               from 1, all the same, to Q, all different

It can't exceed Q: compare queries at equal Q. Source: Upadhyay et al., ProbVLM, ICCV 2023, whose draws are decoded by a
latent diffusion model (`fastprob.adapters.diffusion`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

import fastprob
from fastprob.adapters.adapter import GGDAdapter
from fastprob.adapters.diffusion import Decoder
from fastprob.adapters.predictions import image_name
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.retrieval import nearest

SHOWN = 22
"""Most pictures in a grid beside the query and the mean: four rows of six."""

_PIXELS = 512
"""Longest side of a neighbour's picture: twice a tile's."""

Tile = tuple[Image | str, str]
"""A picture, or the text in its place, and what is written below."""


@dataclass(frozen=True)
class Draws:
    """A distribution's mean [D] and draws from it [Q, D], both of unit norm, and the gallery's rows nearest to them."""

    mean: Tensor
    draws: Tensor
    nearest_to_mean: int
    nearest: list[int]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """The distinct rows in `nearest`, and how many draws each is nearest to, the most frequent first."""
        return Counter(self.nearest).most_common()

    @property
    def perplexity(self) -> float:
        """Of `counts`: from 1, where all draws have one row, to Q, where each has its own."""
        share = torch.tensor([count for _, count in self.counts], dtype=torch.float64) / len(self.nearest)
        return float((-share * share.log()).sum().exp())

    def __str__(self) -> str:
        images = "1 nearest image" if len(self.counts) == 1 else f"{len(self.counts)} different nearest images"
        return f"{len(self.nearest)} draws, {images}, perplexity {self.perplexity:.1f}"


@torch.no_grad()
def draw(adapter: GGDAdapter, query: Tensor, gallery: Tensor, *, draws: int = 16, seed: int = 0) -> Draws:
    """Draw embeddings from the distribution that `adapter` predicts for `query`, and find what is nearest to each.

    Args:
        adapter: of the query's side, `ProbVLM().image` or `.text`. Used without dropout, whatever its mode.
        query: embedding [D].
        gallery: embeddings [G, D] of images, which may be memory-mapped; compared by cosine, block by block.
        draws: their number Q, at least 1.
        seed: of `fastprob.ggd_sample`; the first draws are the same whatever their number.

    Raises:
        ValueError: no draws, a query of another shape, or one whose draws leave the range of floats.
    """
    if draws < 1:
        raise ValueError(f"draw: draws must be at least 1, got {draws}")
    if query.shape != (adapter.dim,):
        raise ValueError(f"draw: query must be [{adapter.dim}], got {tuple(query.shape)}")
    weight = adapter.after_dropout.weight
    query = query.to(weight.device, weight.dtype)
    mu, inv_alpha, beta = adapter.heads(adapter.after_dropout(adapter.before_dropout(query)) + query)  # each [D]
    drawn = torch.cat([mu[None], fastprob.ggd_sample(mu, inv_alpha, beta, n=draws, seed=seed)])  # [1 + Q, D]
    if not drawn.isfinite().all():
        raise ValueError("draw: the query's distribution must have finite draws, got infinite or NaN ones")
    unit = F.normalize(drawn.double(), dim=1).float().cpu()
    of_mean, *of_draws = nearest(unit, gallery, 1)[1][:, 0].tolist()
    return Draws(unit[0], unit[1:], of_mean, of_draws)


def lines(store: EmbeddingStore, found: Draws) -> Iterator[str]:
    """What was found, as a table of text: how many draws each image of the store is nearest to."""
    yield f"{found} (from 1, all the same, to {len(found.nearest)})"
    yield "draws  image"
    yield f" mean  {image_name(store, found.nearest_to_mean)}"
    for row, count in found.counts:
        yield f"{count:5d}  {image_name(store, row)}"


def neighbours(store: EmbeddingStore, found: Draws, pictures: Callable[[int], Image]) -> list[Tile]:
    """The pictures nearest to the mean and to the draws, the most frequent first, with how often each is.

    pictures: of the store's rows, see `fastprob.data.store.pictures_of`.
    """
    counts = found.counts[:SHOWN]
    said = ["nearest to the mean", *(f"nearest to {count} of {len(found.nearest)} draws" for _, count in counts)]
    rows = [found.nearest_to_mean, *(row for row, _ in counts)]
    return [(_small(pictures(row)), f"{text}\n{image_name(store, row)}") for text, row in zip(said, rows)]


def _small(picture: Image) -> Image:
    """All of a grid's are held at once."""
    small = picture.copy()
    small.thumbnail((_PIXELS, _PIXELS))
    return small


def decoded(found: Draws, decoder: Decoder, *, seed: int = 0, progress: bool = True) -> list[Tile]:
    """The mean and the first draws, decoded. seed: of the diffusion's noise, the same for all."""
    embeddings = torch.cat([found.mean[None], found.draws[:SHOWN]])
    said = ["mean", *(f"draw {number}" for number in range(1, len(embeddings)))]
    return list(zip(decoder(embeddings, seed=seed, progress=progress), said))
