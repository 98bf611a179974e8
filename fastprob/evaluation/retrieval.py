"""Retrieval by cosine similarity of frozen embeddings: where each query's first match stands."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastprob._arguments import as_tensor

Match = Tensor | tuple[Tensor, Tensor]
"""Ground truth: bool [Q, G], or ids of queries [Q] and of gallery items [G], which match where they are equal."""

_TIE = 1e-6
"""Cosine similarities closer than this tie: float32 sums of equal rows differ by less, from batch to batch."""

_ROWS, _COLUMNS = 1 << 11, 1 << 12
"""Queries and gallery items of a block: two of them, of 33 MB each, are what is held at a time."""


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
    return _ranks(query, gallery, match)[0]


def match_ranks(query: Tensor, gallery: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """`match_rank` of the queries in the gallery [Q] and of the gallery items in the queries [G], for one's cost.

    Raises ValueError as `match_rank`, and for a gallery item without a match.
    """
    of_query, of_gallery, lonely = _ranks(query, gallery, match)
    if lonely is not None:
        raise ValueError(f"match_ranks: every gallery item needs a match, item {lonely} has none")
    return of_query, of_gallery


def _ranks(query: Tensor, gallery: Tensor, match: Match) -> tuple[Tensor, Tensor, int | None]:
    """Ranks of both directions, and the first gallery item without a match, if there is one."""
    blocks = _Blocks(*_checked(query, gallery, match))
    sizes, device = (len(query), len(gallery)), blocks.gallery.device
    best = [torch.full((size,), -math.inf, device=device) for size in sizes]
    for similarity, matches, places in blocks.products(every=False):
        similarity.masked_fill_(~matches, -math.inf)
        for here, of, along in zip(best, places, (1, 0)):
            here[of] = torch.maximum(here[of], similarity.amax(along))
    bare, lonely = ((each.isinf().nonzero()[:1, 0].tolist() or [None])[0] for each in best)
    if bare is not None:
        raise ValueError(f"match_rank: every query needs a match, query {bare} has none")
    before = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]
    above = torch.empty(0, device=device)
    for similarity, matches, places in blocks.products(every=True):
        if matches is not None:
            similarity.masked_fill_(matches, -math.inf)
        above.resize_(similarity.shape)
        for here, bar, of, along in zip(before, best, places, (1, 0)):
            torch.gt(similarity, (bar[of] - _TIE).unsqueeze(along), out=above)
            here[of] += above.sum(along).long()  # sums of 0 and 1, exact up to 2^24; faster than those of bool
    return before[0].cpu(), before[1].cpu(), lonely


class _Blocks:
    """Similarities of all queries and gallery items, block by block, in an order that brings matches together."""

    def __init__(self, query: Tensor, gallery: Tensor, match: Match):
        self.query, self.gallery, self.match = query, gallery, match
        if isinstance(match, tuple):  # equal ids stand side by side: few blocks have a match
            orders = [ids.argsort(stable=True) for ids in match]
        else:
            orders = [torch.arange(len(rows)) for rows in (query, gallery)]
        self.rows, self.columns = orders[0].split(_ROWS), orders[1].split(_COLUMNS)

    def products(self, every: bool) -> Iterator[tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]]:
        """Yield cosine similarities [B, C], which of them match (None where none does), and whose they are, [B], [C].

        Unless `every`, blocks without a match are left out. A block is overwritten by the next.
        """
        product = torch.empty(0, device=self.gallery.device)
        for rows in tqdm(self.rows, "ranks" if every else "matches", unit="block", delay=5, leave=False):
            unit = self._unit(self.query, rows)
            for columns in self.columns:
                matches = self._matches(rows, columns)
                if every or matches is not None:
                    product.resize_(len(rows), len(columns))
                    torch.mm(unit, self._unit(self.gallery, columns).T, out=product)
                    yield product, matches, (rows, columns)

    def _unit(self, rows: Tensor, which: Tensor) -> Tensor:
        return F.normalize(rows[which].to(self.gallery.device).float(), dim=1)

    def _matches(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        if isinstance(self.match, Tensor):
            matches = self.match[rows[:, None], columns]
            return matches.to(self.gallery.device) if matches.any() else None
        ids, others = self.match[0][rows], self.match[1][columns]  # both sorted
        if ids[-1] < others[0] or others[-1] < ids[0]:
            return None
        return (ids[:, None] == others).to(self.gallery.device)


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
