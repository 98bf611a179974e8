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

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprob._arguments import as_tensor
from fastprob.data.pairs import Paired, check_paired
from fastprob.evaluation.retrieval import Found, Match, find_matches, match_rank
from fastprob.evaluation.statistics import pearson, spearman


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

    @property
    def inverted(self) -> bool:
        """Whether uncertain queries are right more often: S above 0.5, which ten random levels seldom reach."""
        return self.spearman > 0.5

    @property
    def ordered(self) -> bool:
        """Whether uncertain queries are right less often: S below -0.5."""
        return self.spearman < -0.5

    def table(self) -> str:
        """A line a level, then the summary, as text."""
        rows = zip(self.uncertainty, self.recall, self.count, strict=True)
        lines = ["level   uncertainty   recall@1   queries"]
        lines += [f"{level:5d}   {u:11.4g}   {r:8.3f}   {n:7d}" for level, (u, r, n) in enumerate(rows, 1)]
        recalls = "   ".join(f"recall@{k} {value:.3f}" for k, value in self.recall_at.items())
        return "\n".join([*lines, recalls, f"S {self.spearman:.3f}   R2 {self.r2:.3f}   -S*R2 {self.score:.3f}"])


EXPLANATION = """\
Queries are put into levels of equal count, the most certain first. S is the Spearman correlation of level and
recall@1: -1 is right, 0 says nothing, +1 is inverted. R2 is how much of recall a straight line through the levels
explains, 0 to 1; -S*R2 has both, 1 is best. What counts as a match decides the sign."""


@dataclass(frozen=True)
class Evaluation:
    """Calibration in both directions of retrieval."""

    image_to_text: Calibration
    text_to_image: Calibration

    @property
    def directions(self) -> dict[str, Calibration]:
        """Name of a direction -> its calibration."""
        return {"image -> text": self.image_to_text, "text -> image": self.text_to_image}

    def table(self) -> str:
        """Both tables as text."""
        return "\n\n".join(f"{name}\n{calibration.table()}" for name, calibration in self.directions.items())


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
    given = (image_uncertainty, len(data.image)), (text_uncertainty, len(data.text))
    scores = [_checked(*each, levels) for each in given]
    return evaluation_of(find_matches(data.image, data.text, match), *scores, levels=levels)


def evaluation_of(
    found: tuple[Found, Found], image_uncertainty: Tensor, text_uncertainty: Tensor, *, levels: int
) -> Evaluation:
    """`evaluate`, where it is known what the images and what the texts find."""
    ranks, counts = [each.rank for each in found], [len(text_uncertainty), len(image_uncertainty)]
    scores = [_checked(score, len(rank), levels) for score, rank in zip((image_uncertainty, text_uncertainty), ranks)]
    return Evaluation(*(_calibration(*each, levels) for each in zip(ranks, scores, counts)))


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
    scores = _checked(uncertainty, len(query), levels)  # [Q]
    return _calibration(match_rank(query, gallery, match), scores, len(gallery), levels)


def _calibration(rank: Tensor, scores: Tensor, gallery: int, levels: int) -> Calibration:
    """Of queries with ranks [Q] and uncertainties [Q]."""
    level = uncertainty_levels(scores, levels)  # [Q]
    count = torch.bincount(level, minlength=levels)

    def mean_by_level(values: Tensor) -> Tensor:  # [Q] -> [K]
        return torch.zeros(levels, dtype=torch.float64).index_add_(0, level, values.double()) / count

    recall, steps = mean_by_level(rank == 0), torch.arange(levels)
    return Calibration(
        uncertainty=mean_by_level(scores).tolist(),
        recall=recall.tolist(),
        count=count.tolist(),
        spearman=spearman(steps, recall),
        r2=pearson(steps, recall) ** 2,
        recall_at={k: float((rank < k).double().mean()) for k in (1, 5, 10) if k <= gallery},
    )


def uncertainty_levels(uncertainty: Tensor, levels: int) -> Tensor:
    """Sort into levels 0..K-1 of equal count, to within one; ties keep their order: [Q] -> [Q] int64."""
    order = uncertainty.argsort(stable=True)
    level = torch.empty_like(order)
    level[order] = torch.arange(len(order), device=order.device) * levels // len(order)
    return level


def mean_uncertainty(uncertainty: Tensor) -> Tensor:
    """Take the mean over D where there is one: [N] or [N, D] -> [N] float64 on the CPU."""
    of_rows = uncertainty.cpu().double()
    return of_rows.mean(1) if of_rows.dim() == 2 else of_rows


def _checked(uncertainty: Tensor, queries: int, levels: int) -> Tensor:
    """Check the uncertainty of the queries: [Q] or [Q, D] -> [Q] float64 on the CPU."""
    if not 2 <= levels <= queries:
        raise ValueError(f"calibrate: levels must be from 2 to the {queries} queries, got {levels}")
    uncertainty = as_tensor("calibrate: uncertainty", uncertainty)
    if uncertainty.dim() not in (1, 2) or len(uncertainty) != queries:
        got = tuple(uncertainty.shape)
        raise ValueError(f"calibrate: uncertainty must be [{queries}] or [{queries}, D], got {got}")
    scores = mean_uncertainty(uncertainty)
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise ValueError(f"calibrate: uncertainty must be finite, {bad} of {queries} queries are not")
    return scores


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """How far confidence and accuracy are apart: of predictions with confidence [N] in [0, 1], right [N] or not.

        sum over equal bins of confidence: share of the bin |accuracy - mean confidence|

    A bin is open below and closed above. Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence = confidence.double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, right.double() - confidence)
    return float(gap.abs().sum() / len(confidence))
