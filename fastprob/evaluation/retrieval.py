"""Retrieval by cosine similarity of frozen embeddings: where each query's first match stands."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastprob._arguments import as_tensor

Match = Tensor | tuple[Tensor, Tensor]
"""Ground truth: bool [Q, G], or ids of queries [Q] and of gallery items [G], which match where they are equal."""

_TIE = 1e-6
"""Cosine similarities closer than this tie: float32 sums of equal rows differ by less, from batch to batch."""

_ROWS, _COLUMNS = 1 << 13, 1 << 10
"""Queries and gallery items of a block: two of them, of 33 MB each, are what is held at a time. Every block of queries
reads the whole gallery, which may not fit into memory, so that it has many of these."""


def recall_at_k(query: Tensor, gallery: Tensor, match: Match, k: int = 1) -> float:
    """Share of the queries with a match among their first k gallery items. Arguments as in `calibrate`."""
    if not 1 <= k <= len(gallery):
        raise ValueError(f"recall_at_k: k must be from 1 to the {len(gallery)} gallery items, got {k}")
    return float((match_rank(query, gallery, match) < k).double().mean())


def match_rank(query: Tensor, gallery: Tensor, match: Match) -> Tensor:
    """For each query, how many gallery items stand before its best match, [Q] int64 on the CPU.

    By cosine similarity; an item that ties with the best match without matching stands before it. Arguments
    and errors as in `calibrate`. Works through blocks of queries and gallery, which may be memory-mapped; what it
    holds depends on D alone.
    """
    return _found(query, gallery, match)[0].rank


@dataclass(frozen=True)
class Found:
    """What queries find: the rank of each one's best match, see `match_rank`, and the cosine of its first item."""

    rank: Tensor
    first: Tensor


def find_matches(query: Tensor, gallery: Tensor, match: Match) -> tuple[Found, Found]:
    """What the queries [Q] find in the gallery, and the gallery items [G] among the queries, for one's cost.

    Raises ValueError as `match_rank`, and for a gallery item without a match.
    """
    of_query, of_gallery, lonely = _found(query, gallery, match)
    if lonely is not None:
        raise ValueError(f"find_matches: every gallery item needs a match, item {lonely} has none")
    return of_query, of_gallery


def _found(query: Tensor, gallery: Tensor, match: Match) -> tuple[Found, Found, int | None]:
    """What both directions find, and the first gallery item without a match, if there is one."""
    query, gallery, match = _checked(query, gallery, match)
    truth, sizes, device = _Truth(match), (len(query), len(gallery)), gallery.device
    best = [torch.full((size,), -math.inf, device=device) for size in sizes]
    for similarity, places in products(query, gallery, "matches", truth.orders, truth.any):
        similarity.masked_fill_(~truth(*places).to(device), -math.inf)
        for here, of, along in zip(best, places, (1, 0)):
            here[of] = torch.maximum(here[of], similarity.amax(along))
    bare, lonely = ((each.isinf().nonzero()[:1, 0].tolist() or [None])[0] for each in best)
    if bare is not None:
        raise ValueError(f"match_rank: every query needs a match, query {bare} has none")
    before = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]
    first, above = [each.clone() for each in best], torch.empty(0, device=device)
    for similarity, places in products(query, gallery, "ranks", truth.orders):
        for here, of, along in zip(first, places, (1, 0)):
            here[of] = torch.maximum(here[of], similarity.amax(along))
        if truth.any(*places):
            similarity.masked_fill_(truth(*places).to(device), -math.inf)
        above.resize_(similarity.shape)
        for here, bar, of, along in zip(before, best, places, (1, 0)):
            torch.gt(similarity, (bar[of] - _TIE).unsqueeze(along), out=above)
            here[of] += above.sum(along).long()  # sums of 0 and 1, exact up to 2^24; faster than those of bool
    of_query, of_gallery = (Found(rank.cpu(), nearest.cpu()) for rank, nearest in zip(before, first))
    return of_query, of_gallery, lonely


def nearest(query: Tensor, gallery: Tensor, k: int, *, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k gallery items most like each query, by cosine similarity: similarities and rows, [Q, k], the best first.

    Items that tie are in the order of `among`. What it holds depends on D, Q and k alone.

    Args:
        query: embeddings [Q, D].
        gallery: embeddings [G, D], which may be memory-mapped.
        k: from 1 to the rows in `among`.
        among: rows of the gallery to choose from, int64 [A]; None: all.

    Raises:
        ValueError: a k out of its range.
    """
    among = torch.arange(len(gallery)) if among is None else among
    if not 1 <= k <= len(among):
        raise ValueError(f"nearest: k must be from 1 to the {len(among)} gallery items, got {k}")
    best, items = torch.full((len(query), k), -math.inf), torch.zeros(len(query), k, dtype=torch.int64)
    for similarity, (rows, columns) in products(query, gallery, "nearest", (torch.arange(len(query)), among)):
        values = torch.cat([best[rows], similarity.cpu()], 1)  # what was found before stands first
        values, order = values.sort(dim=1, descending=True, stable=True)
        best[rows] = values[:, :k]
        items[rows] = torch.cat([items[rows], columns.expand(len(rows), -1)], 1).gather(1, order[:, :k])
    return best, items


def products(
    query: Tensor,
    gallery: Tensor,
    name: str,
    orders: tuple[Tensor, Tensor] | None = None,
    wanted: Callable[[Tensor, Tensor], bool] | None = None,
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Yield the cosine similarities of all queries and gallery items, block by block.

    A block is [B, C] float32, on the gallery's device and overwritten by the next, with whose it is: [B] and [C].

    Args:
        name: of the progress bar, which a quick run does not show.
        orders: in which the queries and the items are taken, [Q] and [G] (default: as they come).
        wanted: of whose block; blocks that are not are left out.
    """
    orders = orders or (torch.arange(len(query)), torch.arange(len(gallery)))
    product = torch.empty(0, device=gallery.device)
    for rows in tqdm(orders[0].split(_ROWS), name, unit="block", delay=5, leave=False):
        unit = _unit(query[rows].to(gallery.device))
        for columns in orders[1].split(_COLUMNS):
            if wanted is None or wanted(rows, columns):
                product.resize_(len(rows), len(columns))
                yield torch.mm(unit, _unit(gallery[columns]).T, out=product), (rows, columns)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=1)


class _Truth:
    """Which queries and gallery items match, and the orders of both that bring matches together in few blocks."""

    def __init__(self, match: Match):
        self.match = match
        if isinstance(match, tuple):
            self.orders = match[0].argsort(stable=True), match[1].argsort(stable=True)
        else:
            self.orders = torch.arange(match.shape[0]), torch.arange(match.shape[1])

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Of a block, [B, C] bool."""
        if isinstance(self.match, tuple):
            return self.match[0][rows, None] == self.match[1][columns]
        return self.match[rows[:, None], columns]

    def any(self, rows: Tensor, columns: Tensor) -> bool:
        """Whether a block has matches; of ids, whether it may have: both are sorted."""
        if isinstance(self.match, tuple):
            ids, others = self.match[0][rows], self.match[1][columns]
            return bool(ids[0] <= others[-1] and others[0] <= ids[-1])
        return bool(self(rows, columns).any())


def _checked(query: Tensor, gallery: Tensor, match: Match) -> tuple[Tensor, Tensor, Match]:
    """The arguments as tensors, once they are known to fit."""
    query, gallery = as_tensor("match_rank: query", query), as_tensor("match_rank: gallery", gallery)
    if isinstance(match, tuple):
        match = tuple(as_tensor("match_rank: ids", ids) for ids in match)
    else:
        match = as_tensor("match_rank: match", match)
    for name, rows in (("query", query), ("gallery", gallery)):
        if rows.dim() != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise ValueError(
                f"match_rank: {name} must be floating-point [rows >= 1, D], got {tuple(rows.shape)} {rows.dtype}"
            )
        if not all(block.isfinite().all() for block in rows.split(_COLUMNS)):
            raise ValueError(f"match_rank: {name} has a NaN or infinite value")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"match_rank: query and gallery must have one width, got {query.shape[1]} and {gallery.shape[1]}"
        )
    if isinstance(match, Tensor):
        if match.shape != (len(query), len(gallery)) or match.dtype != torch.bool:
            raise ValueError(
                f"match_rank: match must be bool [{len(query)}, {len(gallery)}], got {match.dtype} {tuple(match.shape)}"
            )
    elif match[0].shape != (len(query),) or match[1].shape != (len(gallery),):
        raise ValueError(
            f"match_rank: ids must be [{len(query)}] and [{len(gallery)}], "
            f"got {tuple(match[0].shape)} and {tuple(match[1].shape)}"
        )
    return query, gallery, match
