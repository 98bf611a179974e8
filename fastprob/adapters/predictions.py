"""What an adapter says of all images and texts of a store, as files; and of one query's matches there."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

import fastprob
from fastprob._files import replaced
from fastprob._memory import giving_back
from fastprob.adapters.adapter import GGDAdapter, ProbVLM
from fastprob.adapters.error import ErrorModels
from fastprob.adapters.pages import SHOWN, check_shown, write_predictions_page
from fastprob.adapters.uncertainty import ROWS, predict
from fastprob.data.store import EmbeddingStore
from fastprob.evaluation.calibration import uncertainty_levels
from fastprob.evaluation.examples import Pictures

FORMATS = ("csv", "parquet", "npy")
SIDES = ("image", "text")


def write_predictions(
    model: ProbVLM,
    store: EmbeddingStore,
    directory: str | os.PathLike,
    *,
    format: str = "csv",
    passes: int = 20,
    levels: int = 10,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    shown: int = SHOWN,
    pictures: Pictures | None = None,
    checkpoint: str | os.PathLike | None = None,
    error: ErrorModels | None = None,
) -> list[Path]:
    """Write the predictions of every image and text of a store into `directory`; return the files.

    images.csv   id (row, where the store has none), aleatoric, epistemic, total, level, and with `error` p_wrong
    texts.csv    image (its id), caption, and the same
    image_mean.npy, text_mean.npy   the predicted means, [N, D] and [M, D] float32
    index.html   the most and the least certain images and texts, for people

    Uncertainties are variances, means over D; level is 1 for the most certain of `levels` groups of equal count among
    the images or texts, infinite variances in the last. Rows are in the store's order. Embeddings are streamed.

    Args:
        format: of the tables: "csv", "parquet" (with pyarrow), or "npy", a structured array of the numbers alone.
        passes, seed: dropout passes, see `predict`.
        overwrite: replace these files where they exist; no others are touched.
        error: fitted for this adapter: the probability that the first match within the store is wrong, a column; the
            page goes by it then, and by the total variance otherwise.
        shown, pictures, checkpoint: of the page, see `write_report_page`.

    Raises:
        ValueError: an option out of its range, fewer rows than levels, a file that exists, or as `predict`.
        ImportError: for "parquet" without pyarrow.
    """
    if format not in FORMATS:
        raise ValueError(f"write_predictions: format must be one of {FORMATS}, got {format!r}")
    if format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError("write_predictions: parquet needs pyarrow: pip install 'fastprob[parquet]'")
    directory = Path(directory)
    check_shown("write_predictions", shown)
    files = {side: (directory / f"{side}s.{format}", directory / f"{side}_mean.npy") for side in SIDES}
    page = directory / "index.html"
    written = [*(path for both in files.values() for path in both), page]
    for path in written:
        if path.exists() and not overwrite:
            raise ValueError(f"write_predictions: {path} exists already; overwrite it or choose another directory")
    for side, rows in (("image", store.image), ("text", store.text)):
        if not 1 <= levels <= len(rows):
            raise ValueError(f"write_predictions: levels must be from 1 to the {len(rows)} {side}s, got {levels}")
    wrong = error and error(store, captions=store.captions, adapter=model, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    names = store.ids or [str(row) for row in range(len(store.image))]
    ordered_by = {}
    with tqdm(total=len(store.image) + len(store.text), desc="predict", unit="row", disable=not progress) as bar:
        for side, (table, mean) in files.items():
            numbers = _predict_side(getattr(model, side), getattr(store, side), mean, passes, seed, bar)
            ordered_by[side] = torch.from_numpy(numbers["total"])
            numbers["level"] = 1 + uncertainty_levels(ordered_by[side], levels).numpy()
            if wrong:
                numbers["p_wrong"], ordered_by[side] = wrong[side].numpy().astype(np.float32), wrong[side]
            texts = {"id": names} if side == "image" else {"image": _of(names, store), "caption": store.captions}
            with replaced(table) as path:
                _WRITERS[format](path, texts, numbers)
    of_page = {"shown": shown, "pictures": pictures, "checkpoint": checkpoint}
    of_page["is_probability"] = error is not None
    write_predictions_page(store, ordered_by, page, passes=passes, levels=levels, seed=seed, **of_page)
    return written


def _of(names: list[str], store: EmbeddingStore) -> list[str]:
    return [names[image] for image in store.caption_image.tolist()]


def _predict_side(
    adapter: GGDAdapter, rows: Tensor, mean: Path, passes: int, seed: int, bar: tqdm
) -> dict[str, np.ndarray]:
    """Write the means, [R, D]; return the uncertainties, [R] each."""
    numbers = {name: np.empty(len(rows), np.float32) for name in ("aleatoric", "epistemic", "total")}
    with replaced(mean) as path, open(path, "wb") as file:  # mapped, the means would count as memory
        kind = {"descr": "<f4", "fortran_order": False, "shape": tuple(rows.shape)}
        np.lib.format.write_array_header_1_0(file, kind)
        for start in giving_back(range(0, len(rows), ROWS)):
            some = slice(start, start + ROWS)
            predicted = predict(adapter, rows[some], passes=passes, seed=seed)
            file.write(predicted.mu.numpy(force=True).astype("<f4").tobytes())
            for name, values in numbers.items():
                values[some] = getattr(predicted, name).mean(1).numpy(force=True)
            bar.update(len(predicted.mu))
    return numbers


def _write_csv(path: Path, texts: dict[str, list[str]], numbers: dict[str, np.ndarray]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*texts, *numbers])
        writer.writerows(zip(*texts.values(), *(values.astype(str) for values in numbers.values())))


def _write_parquet(path: Path, texts: dict[str, list[str]], numbers: dict[str, np.ndarray]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({**texts, **numbers}), path)


def _write_npy(path: Path, texts: dict[str, list[str]], numbers: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.save(file, np.rec.fromarrays(list(numbers.values()), names=list(numbers)))


_WRITERS = {"csv": _write_csv, "parquet": _write_parquet, "npy": _write_npy}


# -------------------------------------------------------------------------------------------------- ranking


@dataclass(frozen=True)
class Ranking:
    """A query's matches, best first; `rows` are the gallery's, the other three of as many numbers.

    uncertainty: total, mean over D, of the query; uncertainties: of the matches; cosine: of the frozen embeddings;
    log_likelihood: of a match's frozen embedding under the query's distribution, in nats per dimension, with all
    constants.
    """

    uncertainty: float
    rows: list[int]
    cosine: list[float]
    log_likelihood: list[float]
    uncertainties: list[float]


def rank(
    of_query: GGDAdapter,
    query: Tensor,
    of_gallery: GGDAdapter,
    gallery: Tensor,
    *,
    top: int = 10,
    by: str = "cosine",
    passes: int = 20,
    seed: int = 0,
) -> Ranking:
    """The `top` items of a gallery [G, D] that match a query [D] best.

    Args:
        of_query: the query's adapter, `ProbVLM().text` or `.image`.
        of_gallery: the gallery's.
        by: "cosine", as retrieval by the frozen encoder has it, or "likelihood", under the query's distribution.
        passes, seed: dropout passes of the uncertainties, see `predict`.

    Raises:
        ValueError: an option out of its range.
    """
    if not 1 <= top <= len(gallery):
        raise ValueError(f"rank: top must be from 1 to the {len(gallery)} items, got {top}")
    if by not in ("cosine", "likelihood"):
        raise ValueError(f"rank: by must be 'cosine' or 'likelihood', got {by!r}")
    device = next(of_query.parameters()).device
    query = query.to(device)
    with torch.no_grad():
        distribution = of_query(query[None])  # three of [1, D]
        cosine = torch.cat([cosine_similarity(query, block.to(device)) for block in gallery.split(ROWS)])
        nll = torch.cat([_nll(distribution, block.to(device)) for block in gallery.split(ROWS)])
    rows = (cosine if by == "cosine" else -nll).argsort(descending=True, stable=True)[:top]
    matches = predict(of_gallery, gallery[rows.cpu()], passes=passes, seed=seed).total.mean(1)
    return Ranking(
        uncertainty=float(predict(of_query, query[None], passes=passes, seed=seed).total.mean()),
        rows=rows.tolist(),
        cosine=cosine[rows].tolist(),
        log_likelihood=(-nll[rows]).tolist(),
        uncertainties=matches.tolist(),
    )


def _nll(distribution: Any, block: Tensor) -> Tensor:
    """[B] nats per dimension: `ggd_pairwise_nll` leaves out log 2."""
    return fastprob.ggd_pairwise_nll(*distribution, block)[0] / block.shape[1] + math.log(2)


def lines(store: EmbeddingStore, side: str, ranking: Ranking, wrong: float | None = None) -> Iterator[str]:
    """The ranking as a table of text: of images their names and first captions, of texts the captions.

    wrong: probability that the first match is wrong, where it is known.
    """
    yield f"uncertainty of the query {ranking.uncertainty:.4g}"
    if wrong is not None:
        yield f"the first match by cosine is wrong with probability {wrong:.2f}"
    yield "rank  cosine  log-likelihood  uncertainty  " + side
    numbers = zip(ranking.rows, ranking.cosine, ranking.log_likelihood, ranking.uncertainties)
    for place, (row, cosine, likelihood, uncertainty) in enumerate(numbers, start=1):
        name = store.captions[row] if side == "text" else image_name(store, row)
        yield f"{place:4d}  {cosine:6.3f}  {likelihood:14.4f}  {uncertainty:11.4g}  {name}"


def image_name(store: EmbeddingStore, row: int) -> str:
    """What the image of a row is called, and its first caption."""
    first = store.captions[int(torch.searchsorted(store.caption_image, row))]
    return f"{store.ids[row] if store.ids else row}: {first}"
