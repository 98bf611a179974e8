"""Does uncertainty choose? Wrong captions, what to label next, and which model to take, beside what costs nothing.

    python -m bench.real.selection [--cache DIRECTORY] [--out DIRECTORY]

Every run is a JSON file in the cache, written when it is done; the same command makes those that are missing, then
writes selection.json, selection.md and figures. A quarter of an hour of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from fastprob._files import write_atomically
from fastprob.adapters import PairedEmbeddings, ProbVLM, TrainConfig, fit
from fastprob.adapters.error import ErrorModels, fit_error
from fastprob.adapters.noisy import suspicion
from fastprob.adapters.selection import MEASURES, WAYS, Candidate, choose, rank_models
from fastprob.evaluation.retrieval import Match, find_matches

from .fetch import cache_directory, work_directory
from .parts import SETS, Part
from .study import EPOCHS
from .targets import RATE, TARGETS, Heads, Target, joined, some, tune
from .towers import Rows

SEEDS = range(3)
SWAPPED = 0.2  # of the captions
COUNTS = (100, 200, 400, 800)  # of chosen pictures
STEPS = 200
PLAIN, LABELS = "p_wrong, no adapter", "1 - recall on val"  # beside `MEASURES`
MODELS = {  # name: pictures of the pool, steps, share of swapped captions
    "100 pictures": (100, STEPS, 0.0),
    "400 pictures": (400, STEPS, 0.0),
    "1600 pictures": (1600, STEPS, 0.0),
    "400 pictures, few steps": (400, 30, 0.0),
    "1600 pictures, few steps": (1600, 30, 0.0),
    "1600 pictures, many steps": (1600, 2 * STEPS, 0.0),
    "1600 pictures, 25 % swapped": (1600, STEPS, 0.25),
    "1600 pictures, 50 % swapped": (1600, STEPS, 0.5),
    "1600 pictures, 80 % swapped": (1600, STEPS, 0.8),
    "400 pictures, 50 % swapped": (400, STEPS, 0.5),
    "400 pictures alike": (-400, STEPS, 0.0),
}


# ------------------------------------------------------------------------------------------- wrong captions


def swap(owner: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Which caption stands in the place of each, [M]: a share of them moved to other images, no caption twice.

    owner: [M] the image of each caption. The chosen ones, image by image, are rolled by as many as one image has.
    """
    chosen = torch.randperm(len(owner), generator=generator)[: round(share * len(owner))]
    chosen = chosen[owner[chosen].argsort(stable=True)]
    source = torch.arange(len(owner))
    source[chosen] = chosen.roll(int(torch.bincount(owner[chosen], minlength=1).max()))
    return source


def noisy(part: Part, dataset: str, seed: int) -> dict:
    """Average precision of every score on half of the training pictures, whose captions were swapped.

    A swapped caption that is true of its new picture all the same is not wrong. One adapter is trained on this half,
    wrong captions and all, one on the other half, which is clean.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randperm(len(part.data.image), generator=generator).chunk(2)
    (images, texts, pairs), (*_, clean) = (_half(part, half) for half in halves)
    source = swap(pairs.caption_image, SWAPPED, generator)
    pairs = PairedEmbeddings(pairs.image, pairs.text[source], pairs.caption_image)
    wrong = ~part.truth[texts[source], images[pairs.caption_image]]
    scores = {"random": torch.rand(len(wrong), generator=generator), **suspicion(pairs)}
    scores["siblings"] = scores["siblings"].nan_to_num(nan=-1)
    for name, data in {"itself": pairs, "clean data": clean}.items():
        adapter = _adapter(data, dataset, seed)
        under = suspicion(pairs, adapter=adapter)
        scores |= {f"{score}, adapter of {name}": under[score] for score in ("likelihood", "match")}
    for other in ("siblings", "likelihood, adapter of itself"):
        scores[f"doubt + {other}"] = _rank(scores["doubt"]) + _rank(scores[other])
    precision = {name: float(average_precision_score(wrong, score)) for name, score in scores.items()}
    return {"captions": len(wrong), "wrong": int(wrong.sum()), "precision": precision}


def _half(part: Part, images: Tensor) -> tuple[Tensor, Tensor, PairedEmbeddings]:
    """The images, the rows of their captions, and their pairs."""
    data = part.data
    chosen = some(Rows(data.image, data.text, data.caption_image), images)
    texts = torch.isin(data.caption_image, images).nonzero()[:, 0]
    return images, texts, PairedEmbeddings(chosen.image, chosen.text, chosen.caption_image)


def _rank(score: Tensor) -> Tensor:
    return score.argsort().argsort().double()


def _adapter(data: PairedEmbeddings, dataset: str, seed: int) -> ProbVLM:
    return fit(data, config=TrainConfig(epochs=EPOCHS[dataset], seed=seed), progress=False).model


# ---------------------------------------------------------------------------------------- what to label next


def active(target: Target, dataset: str, seed: int) -> dict:
    """Recall of heads that were tuned on the labelled pictures and on those that each way chose of the pool."""
    pool, labelled = target.rows["pool"], target.rows["labelled"]
    embedded = target.through(target.heads, "pool")
    adapter, errors = _uncertainty(target, target.heads, dataset, seed)

    def tuned(rows: Rows) -> dict[str, float]:
        return recall(target, tune(target.heads, rows, STEPS, RATE[dataset], seed))

    result: dict = {"first": recall(target, target.heads), "labelled alone": tuned(labelled)}
    options = {"adapter": adapter, "errors": errors, "captions": _names(pool), "seed": seed}
    for way in WAYS:
        rows = choose(embedded, max(COUNTS), by=way, **options)
        result[way] = [tuned(joined(labelled, some(pool, rows[:count]))) for count in COUNTS]
    return result


def recall(target: Target, heads: Heads) -> dict[str, float]:
    """recall@1 on the test part by the own picture or caption, and by any that is true."""
    data = target.through(heads, "test")
    return {"own": _recall(data), "true": _recall(data, target.truth.T)}


def _recall(data: PairedEmbeddings, match: Match | None = None) -> float:
    """recall@1, the mean of both directions; match: bool [N, M] (default: whose the captions are)."""
    own = torch.arange(len(data.image)), data.caption_image
    found = find_matches(data.image, data.text, own if match is None else match)
    return sum(float((each.rank == 0).double().mean()) for each in found) / 2


def _uncertainty(target: Target, heads: Heads, dataset: str, seed: int) -> tuple[ProbVLM, ErrorModels]:
    """An adapter of the labelled pictures' embeddings, and the probability of an error fitted on the val part's."""
    adapter = _adapter(target.through(heads, "labelled"), dataset, seed)
    errors = fit_error(target.through(heads, "val"), captions=_names(target.rows["val"]), adapter=adapter)
    return adapter, errors


def _names(rows: Rows) -> list[str]:
    """Equal captions have equal features."""
    return [row.tobytes().hex() for row in rows.text.numpy()]


# -------------------------------------------------------------------------------------- which model to take


def models(target: Target, dataset: str, seed: int) -> dict:
    """Of every candidate: recall on the test part, what `rank_models` says of it without labels, recall on val."""
    result = {}
    for name, (count, steps, share) in MODELS.items():
        rows = _training_rows(target, count, share, torch.Generator().manual_seed(seed))
        heads = tune(target.heads, joined(target.rows["labelled"], rows), steps, RATE[dataset], seed)
        adapter, errors = _uncertainty(target, heads, dataset, seed)
        candidate = Candidate(target.through(heads, "test"), _names(target.rows["test"]), adapter, errors)
        measured = {by: rank_models({name: candidate}, by=by)[0][1] for by in MEASURES}
        val = target.through(heads, "val")
        plain = fit_error(val, captions=_names(target.rows["val"]))
        measured[PLAIN] = rank_models({name: replace(candidate, adapter=None, errors=plain)}, by="p_wrong")[0][1]
        measured[LABELS] = 1 - _recall(val)
        result[name] = {"recall": recall(target, heads), "uncertainty": measured}
    return result


def _training_rows(target: Target, count: int, share: float, generator: torch.Generator) -> Rows:
    """Pictures of the pool, at random or, of a negative count, those closest to a random one; captions swapped."""
    pool = target.rows["pool"]
    order = torch.randperm(len(pool.image), generator=generator)
    if count < 0:
        unit = normalize(target.through(target.heads, "pool").image, dim=1)
        order = (unit @ unit[order[0]]).argsort(descending=True)
    rows = some(pool, order[: abs(count)])
    return Rows(rows.image, rows.text[swap(rows.caption_image, share, generator)], rows.caption_image)


# ------------------------------------------------------------------------------------------------- all runs

TASKS: dict[str, tuple[Callable, Callable]] = {
    "noisy": (noisy, lambda dataset, cache: SETS[dataset](cache)["train"]),
    "active": (active, lambda dataset, cache: TARGETS[dataset](cache)),
    "models": (models, lambda dataset, cache: TARGETS[dataset](cache)),
}


def results(cache: Path) -> dict:
    """Task -> data set -> what each seed gave; runs that are missing are made first."""
    found: dict = {task: {dataset: [] for dataset in SETS} for task in TASKS}
    data: dict = {}
    runs = [(task, dataset, seed) for seed in SEEDS for task in TASKS for dataset in SETS]
    for task, dataset, seed in tqdm(runs, "selection", unit="run"):
        file = work_directory(cache) / "selection" / f"{task}-{dataset}-seed{seed}.json"
        if not file.exists():
            run, load = TASKS[task]
            key = "parts" if task == "noisy" else "targets", dataset
            data[key] = data[key] if key in data else load(dataset, cache)
            write_atomically(file, json.dumps(run(data[key], dataset, seed)) + "\n")
        found[task][dataset].append(json.loads(file.read_text()))
    return found


def main() -> None:
    from .selection_report import OUT, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where what was fetched and the runs are kept")
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory of the report (default: {OUT})")
    args = parser.parse_args()
    write(results(cache_directory(args.cache)), args.out)


if __name__ == "__main__":
    main()
