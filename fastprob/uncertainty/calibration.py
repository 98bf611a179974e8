"""Is a query that the model calls uncertain really harder to retrieve with?

The measure. Gallery items are ranked by the cosine similarity of the *frozen* embeddings (not of the
adapter's mu, and without any use of the uncertainty), so that every adapter is judged on one and the same
ranking. A query is right at k if one of its matches is among the first k; an item that does not match but
ties with the best match, to within 1e-6, counts as ahead of it. Queries are sorted by total uncertainty
(mean over D) into K levels of equal count, every query in exactly one; ties stay in the order given. Then

    S     = Spearman rank correlation of the level with its recall@1
    R^2   = share of the variance of recall@1 that a straight line in the level explains
    score = -S R^2          1: recall falls along a line as uncertainty grows; negative: it rises

S and R^2 are NaN when recall@1 is the same in every level. The measure is that of Upadhyay et al., ProbVLM,
ICCV 2023, section 4.1, whose released code does not say how ties, levels and ranking were done.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprob.adapters.pairs import Paired, check_paired

Match = Tensor | tuple[Tensor, Tensor]
"""Ground truth: bool [Q, G], or ids of queries [Q] and of gallery items [G], which match where they are equal."""

_TIE = 1e-6
"""Cosine similarities closer than this tie: float32 sums of equal rows differ by less, from batch to batch."""

_SIMILARITIES = 1 << 23
"""Most similarities held at a time; with their masks about 100 MB."""


@dataclass(frozen=True)
class Calibration:
    """Recall@1 by level of uncertainty, from the most certain level to the least."""

    uncertainty: list[float]
    """Mean total uncertainty of each level."""
    recall: list[float]
    """Recall@1 of each level."""
    count: list[int]
    """Queries in each level."""
    spearman: float
    r2: float
    recall_at: dict[int, float]
    """k -> recall@k over all queries."""

    @property
    def score(self) -> float:
        """-S R^2."""
        return -self.spearman * self.r2

    def table(self) -> str:
        """A line a level, then the summary, as text."""
        rows = zip(self.uncertainty, self.recall, self.count, strict=True)
        lines = ["level   uncertainty   recall@1   queries"]
        lines += [f"{level:5d}   {u:11.4g}   {r:8.3f}   {n:7d}" for level, (u, r, n) in enumerate(rows, 1)]
        recalls = "   ".join(f"recall@{k} {value:.3f}" for k, value in self.recall_at.items())
        return "\n".join([*lines, recalls, f"S {self.spearman:.3f}   R2 {self.r2:.3f}   -S*R2 {self.score:.3f}"])


@dataclass(frozen=True)
class Evaluation:
    """Calibration in both directions of retrieval."""

    image_to_text: Calibration
    text_to_image: Calibration

    def table(self) -> str:
        """Both tables as text."""
        directions = {"image -> text": self.image_to_text, "text -> image": self.text_to_image}
        return "\n\n".join(f"{name}\n{result.table()}" for name, result in directions.items())


def evaluate(
    data: Paired,
    image_uncertainty: Tensor,
    text_uncertainty: Tensor,
    *,
    match: Match | None = None,
    levels: int = 10,
) -> Evaluation:
    """Calibration of image -> text and of text -> image retrieval.

    Args:
        data: frozen embeddings, image [N, D] and text [M, D].
        image_uncertainty: total uncertainty of the images, [N] or [N, D].
        text_uncertainty: of the texts, [M] or [M, D].
        match: ground truth, bool [N, M] or (image ids [N], text ids [M]), such as classes; by default a
            text matches the one image that it was written for, as in the paper. The choice decides what a
            good score means: by image, a caption that fits many images is hard, so uncertainty should follow
            ambiguity; by a matrix that knows all its images it is easy, and the sign turns over. By image, a
            caption that repeats another image's ties with it and so counts as wrong for image -> text.
        levels: K.

    Raises:
        ValueError: as `calibrate`.
    """
    check_paired("evaluate", data)
    if match is None:
        match = torch.arange(len(data.image)), data.caption_image
    reverse = match.T if isinstance(match, Tensor) else (match[1], match[0])
    return Evaluation(
        calibrate(data.image, data.text, image_uncertainty, match, levels=levels),
        calibrate(data.text, data.image, text_uncertainty, reverse, levels=levels),
    )


def calibrate(query: Tensor, gallery: Tensor, uncertainty: Tensor, match: Match, *, levels: int = 10) -> Calibration:
    """Recall@1 by level of uncertainty; the measure is defined at the top of this module.

    Args:
        query: frozen embeddings [Q, D] to retrieve with.
        gallery: frozen embeddings [G, D] to retrieve from.
        uncertainty: total uncertainty of the queries, [Q] or [Q, D] (then its mean over D counts).
        match: ground truth, bool [Q, G] or (query ids [Q], gallery ids [G]). Every query has a match.
        levels: K, from 2 to Q.

    Raises:
        ValueError: shapes that don't fit, an uncertainty or embedding that is not finite, a query without
            a match, fewer queries than levels.
    """
    scores = _per_query("calibrate", uncertainty, len(query))
    if not 2 <= levels <= len(query):
        raise ValueError(f"calibrate: levels must be from 2 to the {len(query)} queries, got {levels}")
    rank = match_rank(query, gallery, match)
    level = uncertainty_levels(scores, levels)  # [Q]
    count = torch.bincount(level, minlength=levels)
    right = (rank == 0).to(torch.float64)
    recall = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, right) / count
    mean = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, scores) / count
    steps = torch.arange(levels, dtype=torch.float64)
    return Calibration(
        uncertainty=mean.tolist(),
        recall=recall.tolist(),
        count=count.tolist(),
        spearman=spearman(steps, recall),
        r2=_pearson(steps, recall) ** 2,
        recall_at={k: float((rank < k).double().mean()) for k in (1, 5, 10) if k <= len(gallery)},
    )


def uncertainty_levels(uncertainty: Tensor, levels: int) -> Tensor:
    """[Q] -> [Q] int64, the level 0..K-1 of each: sizes differ by at most one, ties keep their order."""
    order = uncertainty.argsort(stable=True)
    level = torch.empty_like(order)
    level[order] = torch.arange(len(order), device=order.device) * levels // len(order)
    return level


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors [n], ties with their average rank; NaN if one is constant.

    Raises ValueError unless both are [n] with n >= 2 and free of NaN.
    """
    if x.dim() != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"spearman: x and y must both be [n >= 2], got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.isnan().any() or y.isnan().any():
        raise ValueError("spearman: x and y must be free of NaN")
    return _pearson(_average_rank(x), _average_rank(y))


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
    for start in range(0, len(query), max(1, _SIMILARITIES // len(gallery))):
        rows = slice(start, start + max(1, _SIMILARITIES // len(gallery)))
        similarity = F.normalize(query[rows].to(gallery.device).float(), dim=1) @ gallery_unit.T  # [B, G]
        matches = _block(match, rows).to(gallery.device)  # [B, G]
        if not matches.any(1).all():
            bare = start + int((~matches.any(1)).nonzero()[0])
            raise ValueError(f"match_rank: every query needs a match, query {bare} has none")
        best = similarity.masked_fill(~matches, -math.inf).amax(1, keepdim=True)  # [B, 1]
        ranks.append(((similarity > best - _TIE) & ~matches).sum(1).cpu())
    return torch.cat(ranks)


def _block(match: Match, rows: slice) -> Tensor:
    """bool [B, G]"""
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


def _per_query(name: str, uncertainty: Tensor, queries: int) -> Tensor:
    """[Q] or [Q, D] -> [Q] float64 on the CPU."""
    if uncertainty.dim() not in (1, 2) or len(uncertainty) != queries:
        raise ValueError(f"{name}: uncertainty must be [{queries}] or [{queries}, D], got {tuple(uncertainty.shape)}")
    scores = uncertainty.cpu().double()
    scores = scores.mean(1) if scores.dim() == 2 else scores
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise ValueError(f"{name}: uncertainty must be finite, {bad} of {queries} queries are not")
    return scores


def _average_rank(x: Tensor) -> Tensor:
    """[n] -> [n] float64 ranks from 0, equal values sharing the mean of theirs."""
    _, group, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count + 1) / 2).double()[group]


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan
