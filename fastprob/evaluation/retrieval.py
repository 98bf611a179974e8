"""Retrieval by cosine similarity of frozen embeddings: where each query's first match stands."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Match = Tensor | tuple[Tensor, Tensor]
"""Ground truth: bool [Q, G], or ids of queries [Q] and of gallery items [G], which match where they are equal."""

_TIE = 1e-6
"""Cosine similarities closer than this tie: float32 sums of equal rows differ by less, from batch to batch."""

_SIMILARITIES = 1 << 23
"""Most similarities held at a time; with their masks about 100 MB."""

_WIDEST, _BLOCK = 1 << 15, 1 << 12
"""A wider gallery is worked on in blocks of so many items, twice, as its rows would leave few queries a product."""


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
    _check_retrieval(query, gallery, match)
    ranks = torch.empty(len(query), dtype=torch.int64)
    width = len(gallery) if len(gallery) <= _WIDEST else _BLOCK
    for rows in _slices(len(query), max(1, _SIMILARITIES // width)):
        where = query[rows], gallery, match, rows, width
        once = list(_similarities(*where)) if width == len(gallery) else None
        best = torch.full((len(where[0]),), -math.inf, device=gallery.device)
        for similarity, matches in once or _similarities(*where):
            best = torch.maximum(best, similarity.masked_fill(~matches, -math.inf).amax(1))
        if best.isinf().any():
            bare = rows.start + int(best.isinf().nonzero()[0])
            raise ValueError(f"match_rank: every query needs a match, query {bare} has none")
        before = torch.zeros_like(best, dtype=torch.int64)
        for similarity, matches in once or _similarities(*where):
            before += ((similarity > best[:, None] - _TIE) & ~matches).sum(1)
        ranks[rows] = before.cpu()
    return ranks


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _similarities(
    query: Tensor, gallery: Tensor, match: Match, rows: slice, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarities of some queries and `width` gallery items at a time, [B, width], and which ones match."""
    unit = F.normalize(query.to(gallery.device).float(), dim=1)
    for columns in _slices(len(gallery), width):
        matches = match[rows, columns] if isinstance(match, Tensor) else match[0][rows, None] == match[1][columns]
        yield unit @ F.normalize(gallery[columns].float(), dim=1).T, matches.to(gallery.device)


def _check_retrieval(query: Tensor, gallery: Tensor, match: Match) -> None:
    for name, rows in (("query", query), ("gallery", gallery)):
        if rows.dim() != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise ValueError(
                f"match_rank: {name} must be floating-point [rows >= 1, D], got {tuple(rows.shape)} {rows.dtype}"
            )
        if not all(rows[block].isfinite().all() for block in _slices(len(rows), _BLOCK)):
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
