"""The scores of a store's queries by name, and how well each of them tells queries that have no match there.

A score is larger for a query that is less certain: an adapter's variances, what the similarities of the frozen
embeddings tell, and the probability of error that was fitted to these.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastprob.adapters.adapter import ProbVLM
from fastprob.adapters.error import SIDES, ErrorModels, Variances, variances
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.comparison import DRAWS, with_random
from fastprob.evaluation.retrieval import Found, nearest
from fastprob.evaluation.selective import Bootstrap, Estimate, Ranked, estimates, same

DIRECTIONS = {"image": "image -> text", "text": "text -> image"}  # by who asks
TOTAL, COSINE, P_WRONG = "total uncertainty", "1 - max cosine", "p(wrong)"
_GREATEST = torch.finfo(torch.float32).max  # of an outsider's variance, which may be infinite

ABOUT_OUTSIDE = """\
The queries of this store and those from outside, which have no match here, all ask for the items of this store. AUROC
is the probability that a score is larger of a query from outside than of one from here: 0.5 says nothing, below that
the score is inverted. Queries from here without a clear match, and texts that stand in both, keep it below 1."""


def plain_scores(known: Mapping[str, Tensor], first: Tensor) -> dict[str, Tensor]:
    """What is a score as it stands, by name: of queries with these variances, whose first items have these cosines."""
    return {TOTAL: torch.stack(list(known.values())).sum(0), **known, COSINE: 1 - first}


def fitted_scores(error: ErrorModels, side: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The probability of error of queries with these signals, beside those of its signals that are scores, by name."""
    return {"margin": values["margin_2"], "entropy": values["entropy_1"], P_WRONG: getattr(error, side)(values)}


def outside_aurocs(
    model: ProbVLM,
    store: EmbeddingStore,
    outside: EmbeddingStore,
    *,
    known: Variances,
    found: tuple[Found, Found],
    error: ErrorModels | None,
    passes: int,
    seed: int,
) -> dict[str, dict[str, Estimate]]:
    """Direction -> score -> AUROC with which it tells the queries of `outside` from those of the store.

    All ask for the items of the store. Texts of the two are never one, whatever their words: arrays call theirs alike.

    known: variances of the store's queries; found: what these find.
    passes, seed: of the variances of the others, as of `known`.
    """
    theirs, result = variances(model, outside, passes, seed), {}
    captions = [(number, caption) for number, each in enumerate((store, outside)) for caption in each.captions]
    group = {"image": torch.arange(len(store.image) + len(outside.image)), "text": same(captions)}
    signals = error and error.signals_beside(store, outside, captions=captions, adapter=model, seed=seed)
    for side, place, gallery in zip(SIDES, found, (store.text, store.image)):
        rows, here = getattr(outside, side), len(place.first)
        both = {
            kind: torch.cat([of, theirs[side][kind]]).double().clamp(max=_GREATEST) for kind, of in known[side].items()
        }
        if signals is None:
            scores = plain_scores(both, torch.cat([place.first, nearest(rows, gallery, 1)[0][:, 0]]))
        else:
            values = signals[side].values
            scores = plain_scores(both, 1 - values["distance"]) | fitted_scores(error, side, values)
        stranger = torch.arange(here + len(rows)) >= here
        result[DIRECTIONS[side]] = estimates(
            {name: Ranked(score, stranger).auroc for name, score in with_random(scores, len(stranger)).items()},
            Bootstrap(group[side], DRAWS),
        )
    return result
