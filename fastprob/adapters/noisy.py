"""Which captions of a store are wrong for their images? Scores that need no labels, and a file of the most suspicious.

Every score is larger for a caption that is more likely to be wrong. With z_V, z_T the frozen embeddings of a caption
and of the image that it is said to describe, G_V and G_T an adapter's distributions for them:

    doubt        -log softmax_images(s / T) - log softmax_texts(s / T) of the own pair: another image is closer to the
                 caption, or another caption to the image (`fastprob.evaluation.signals.own_doubt`)
    cosine       1 - cos(z_V, z_T)
    siblings     1 - cosine to the mean of the image's other captions; NaN where it has no other
    likelihood   NLL(z_T | V) + NLL(z_V | T)                mean over D, with an adapter
    match        -log integral G_V(z) G_T(z) dz             mean over D, with an adapter

With a fifth of the captions swapped, doubt has an average precision of 0.82 on pictures and 0.98 on digit scenes, the
cosine 0.69 and 0.98; likelihood is better than the cosine on the pictures alone, match on neither. Where the captions
of an image say the same, as the pictures' keywords do, siblings add to doubt (bench/results/real/selection.md).

    scores = suspicion(store, adapter=adapter)
    worst = scores["doubt"].argsort(descending=True)[:100]       # rows of store.text
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import fastprob
from fastprob._arguments import one_of
from fastprob._files import replaced
from fastprob.adapters.adapter import ProbVLM
from fastprob.data.pairs import Paired, check_paired
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.conformal import own_similarity
from fastprob.evaluation.signals import own_doubt

SCORES = ("doubt", "cosine", "siblings", "likelihood", "match")
TEMPERATURE = 0.01
"""Of doubt: open_clip's models learn it. From 0.005 to 0.03 the average precision stays within 0.01 on both data sets;
a temperature fitted to the pairs is too high, because of the wrong ones among them."""
_ROWS = 1024  # captions at a time: 60 MB in the adapter's tensors at D = 512


def suspicion(data: Paired, *, adapter: ProbVLM | None = None, temperature: float = TEMPERATURE) -> dict[str, Tensor]:
    """How suspicious each caption is of being wrong for its image, by score: [M] float64 each, larger is more so.

    Args:
        data: a store or `PairedEmbeddings`.
        adapter: for "likelihood" and "match"; it may be trained on this data, wrong captions and all.
        temperature: T of "doubt".

    Raises:
        ValueError: unusable data, an adapter of another width, or a temperature that is not positive.
    """
    check_paired("suspicion", data)
    if not temperature > 0:
        raise ValueError(f"suspicion: temperature must be > 0, got {temperature!r}")
    if adapter is not None and adapter.config["dim"] != data.image.shape[1]:
        raise ValueError(f"suspicion: adapter must be of width {data.image.shape[1]}, got {adapter.config['dim']}")
    scores = {"doubt": own_doubt(data, temperature), "cosine": 1 - own_similarity(data), "siblings": _siblings(data)}
    if adapter is not None:
        scores |= _under(adapter, data)
    return {name: score.double() for name, score in scores.items()}


def _siblings(data: Paired) -> Tensor:
    owner, rows = data.caption_image, torch.arange(len(data.text)).split(_ROWS)
    total = torch.zeros(data.image.shape)  # [N, D] of an image's captions
    for some in rows:
        total.index_add_(0, owner[some], _unit(data.text[some]))
    distances = []
    for some in rows:
        unit = _unit(data.text[some])
        distances.append(1 - cosine_similarity(unit, total[owner[some]] - unit))
    return torch.cat(distances).masked_fill(torch.bincount(owner)[owner] == 1, torch.nan)


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows.float(), dim=1)


@torch.no_grad()
def _under(adapter: ProbVLM, data: Paired) -> dict[str, Tensor]:
    """likelihood and match, [M] each."""
    device, likelihood, match = next(adapter.parameters()).device, [], []
    for some in torch.arange(len(data.text)).split(_ROWS):
        text, image = data.text[some].to(device), data.image[data.caption_image[some]].to(device)  # [B, D] each
        of_image, of_text = adapter(image, text)
        likelihood.append(_nll(of_image, text) + _nll(of_text, image))
        match.append(fastprob.ggd_match_nll(*of_image, *of_text, reduction="none").mean(1))
    return {"likelihood": torch.cat(likelihood).cpu(), "match": torch.cat(match).cpu()}


def _nll(distribution: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> Tensor:
    return fastprob.ggd_nll(*distribution, rows, reduction="none").mean(1)


def write_suspects(
    store: EmbeddingStore,
    path: str | os.PathLike,
    *,
    adapter: ProbVLM | None = None,
    by: str = "doubt",
    temperature: float = TEMPERATURE,
) -> Path:
    """Write a store's captions, the most suspicious first, as CSV: image, caption, and a column for each score.

    image: its id, or its row where the store has none. A score that a caption does not have is an empty cell, and the
    caption stands behind those that have it.

    Args:
        by: the score that orders them, one of `SCORES`; the rest as `suspicion`.

    Raises:
        ValueError: a file at `path`, a score that needs an adapter without one, or as `suspicion`.
    """
    path = Path(path)
    one_of("write_suspects", "by", by, SCORES)
    if path.exists():
        raise ValueError(f"write_suspects: path must be a new file, {path} exists already")
    if adapter is None and by in ("likelihood", "match"):
        raise ValueError(f"write_suspects: adapter must be given to order by {by!r}, got None")
    scores = suspicion(store, adapter=adapter, temperature=temperature)
    order = scores[by].nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True).tolist()
    columns = {name: score.tolist() for name, score in scores.items()}
    owner, captions, ids = store.caption_image.tolist(), store.captions, store.ids
    with replaced(path) as file, open(file, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["image", "caption", *columns])
        for row in order:
            image = ids[owner[row]] if ids else owner[row]
            writer.writerow([image, captions[row], *(_cell(column[row]) for column in columns.values())])
    return path


def _cell(score: float) -> str:
    return "" if score != score else f"{score:.6g}"
