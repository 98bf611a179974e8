"""Retrieval by cosine similarity of frozen embeddings: where each query's first match stands."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Match = Tensor | tuple[Tensor, Tensor]
"""Ground truth: bool [Q, G], or ids of queries [Q] and of gallery items [G], which match where they are equal."""

_TIE = 1e-6
"""Cosine similarities closer than this tie: float32 sums of equal rows differ by less, from batch to batch."""

_SIMILARITIES = 1 << 23
"""Most similarities held at a time; with their masks about 100 MB."""


def recall_at_k(query: Tensor, gallery: Tensor, match: Match, k: int = 1) -> float:
    """Share of the queries with a match among their first k gallery items. Arguments as in `calibrate`."""
    if not 1 <= k <= len(gallery):
        raise ValueError(f"recall_at_k: k must be from 1 to the {len(gallery)} gallery items, got {k}")
    return float((match_rank(query, gallery, match) < k).double().mean())


def match_rank(query: Tensor, gallery: Tensor, match: Match) -> Tensor:
    """For each query, how many gallery items stand before its best match, [Q] int64 on the CPU.

    By cosine similarity; an item that ties with the best match without matching stands before it. Arguments
    and errors as in `calibrate`. Works through the queries in blocks, never holding [Q, G] similarities.
    """
    _check_retrieval(query, gallery, match)
    gallery_unit = F.normalize(gallery.float(), dim=1)  # [G, D]
    ranks = []
    block = max(1, _SIMILARITIES // len(gallery))
    for start in range(0, len(query), block):
        rows = slice(start, start + block)
        similarity = F.normalize(query[rows].to(gallery.device).float(), dim=1) @ gallery_unit.T  # [B, G]
        matches = _block(match, rows).to(gallery.device)  # [B, G]
        if not matches.any(1).all():
            bare = start + int((~matches.any(1)).nonzero()[0])
            raise ValueError(f"match_rank: every query needs a match, query {bare} has none")
        best = similarity.masked_fill(~matches, -math.inf).amax(1, keepdim=True)  # [B, 1]
        ranks.append(((similarity > best - _TIE) & ~matches).sum(1).cpu())
    return torch.cat(ranks)


def _block(match: Match, rows: slice) -> Tensor:
    """Which gallery items match these queries: bool [B, G]."""
    return match[rows] if isinstance(match, Tensor) else match[0][rows, None] == match[1]


def _check_retrieval(query: Tensor, gallery: Tensor, match: Match) -> None:
    for name, rows in (("query", query), ("gallery", gallery)):
        if rows.dim() != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise ValueError(
                f"match_rank: {name} must be floating-point [rows >= 1, D], got {tuple(rows.shape)} {rows.dtype}"
            )
        if not rows.isfinite().all():
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
