"""What decides the sign of the calibration: adapters by data set, loss, cross weight, seed and kind of training.

    python -m bench.real.study [--cache DIRECTORY] [--first N] [--minutes M]

Every run is a JSON file in the cache, written when it is done; the same command makes those that are missing, the most
telling first, and says how many are left. `python -m bench.real.report` turns them into tables and figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprob._files import write_atomically
from fastprob.adapters import GGDAdapter, PairedEmbeddings, TrainConfig, fit, predict
from fastprob.demo.study import each_on_a_thread

from .fetch import cache_directory, work_directory
from .parts import SETS, Part

FORMS = {
    "paper": {"form": "paper", "positive": "softplus", "l1_weight": 0.0, "nll_weight": 1.0},
    "released": {"form": "released", "positive": "relu", "l1_weight": 1.0, "nll_weight": 0.05},
    "exact": {"cross": "exact"},  # otherwise the paper's
}
APPROXIMATE = ("paper", "released")
CROSS_WEIGHTS = (1e-4, 0.1, 1.0)  # the released default first
ENDS = (1e-4, 1.0)
SEEDS = range(5)
EPOCHS = {"digitscenes": 60, "openclipart": 120}  # of 16 and 6 steps; the report has the figures by epochs
PASSES = 20


@dataclass(frozen=True)
class Way:
    """How training data is made of the training part, as `training_data` and `training_part` say."""

    balanced: bool = False
    moved: str = ""  # to the "specific" or the "general" captions


WAYS = {
    "plain": Way(),
    "balanced": Way(balanced=True),
    "specific": Way(moved="specific"),
    "general": Way(moved="general"),
    "both": Way(balanced=True, moved="specific"),
}


@dataclass(frozen=True)
class Setting:
    """A run. way: how its training data is made, a key of `WAYS`."""

    dataset: str
    form: str
    cross_weight: float
    seed: int
    way: str = "plain"
    epochs: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        parts = self.dataset, self.form, f"{self.cross_weight:g}", self.way, f"{self.epochs}epochs", f"seed{self.seed}"
        return "-".join(parts)


def settings() -> Iterator[Setting]:
    """All runs, the most telling first."""
    yield from _grid(0, APPROXIMATE, CROSS_WEIGHTS, "plain")
    yield from _grid(0, ("paper",), CROSS_WEIGHTS, "balanced")
    for way in ("general", "specific", "both"):
        yield from _grid(0, ("paper",), ENDS, way)
    for seed in (1, 2):
        yield from _grid(seed, APPROXIMATE, CROSS_WEIGHTS, "plain")
        yield from _grid(seed, ("paper",), CROSS_WEIGHTS, "balanced")
    for share in (0.25, 3):
        yield from (_with_epochs(each, share) for each in _grid(0, ("paper",), ENDS, "plain"))
    for seed in SEEDS[3:]:
        yield from _grid(seed, APPROXIMATE, CROSS_WEIGHTS, "plain")


def _grid(seed: int, forms: Iterable[str], weights: Iterable[float], way: str) -> Iterator[Setting]:
    for form in forms:
        for weight in weights:
            for dataset in SETS:
                yield Setting(dataset, form, weight, seed, way, EPOCHS[dataset])


def _with_epochs(setting: Setting, share: float) -> Setting:
    return Setting(**asdict(setting) | {"epochs": round(share * setting.epochs)})


def run(setting: Setting, parts: dict[str, Part]) -> dict:
    """Train an adapter, and predict the uncertainty of the pictures and captions that it is judged by: JSON types."""
    start = time.perf_counter()
    train = parts["train"]
    data = training_data(train, setting.way)
    epochs = round(setting.epochs * len(train.data.image) / len(data.image))  # for as many steps, whatever the way
    options = FORMS[setting.form] | {"cross_weight": setting.cross_weight, "epochs": epochs, "seed": setting.seed}
    result = fit(data, config=TrainConfig(**options), progress=False)
    image, text = result.model.image, result.model.text
    if WAYS[setting.way].balanced:
        image, text = text, image
    judged = {name: parts[name] for name in ("train", "test")}
    return {
        "setting": asdict(setting),
        "image": {name: uncertainty(image, part.data.image) for name, part in judged.items()},
        "text": {name: uncertainty(text, part.data.text[part.distinct]) for name, part in judged.items()},
        "train_loss": [float(f"{loss:.6g}") for loss in result.history["train_loss"]],
        "seconds": round(time.perf_counter() - start, 1),
    }


def uncertainty(adapter: GGDAdapter, rows: Tensor) -> list[float]:
    """Total uncertainty of each row [R, D], the mean over D, to six digits."""
    return [float(f"{value:.6g}") for value in predict(adapter, rows, passes=PASSES).total.mean(1).tolist()]


def training_part(part: Part, way: str) -> Part:
    """The training part as it is, or with every picture moved half way to one of its captions.

    To the least ambiguous one, so that the general captions are far from their pictures, or to the most ambiguous one.
    """
    cost = {"specific": part.ambiguity, "general": -part.ambiguity}.get(WAYS[way].moved)  # [M]
    return part if cost is None else replace(part, data=_moved(part.data, cost))


def training_data(part: Part, way: str) -> PairedEmbeddings:
    """What an adapter is trained on: an epoch has every picture once, with one random caption of its own.

    Balanced it has every distinct caption once, with one random picture that it was written for: captions and pictures
    have changed places, and so have the adapters.
    """
    data = training_part(part, way).data
    if not WAYS[way].balanced:
        return data
    return PairedEmbeddings(data.text[part.distinct], data.image[data.caption_image], part.which)


def _moved(data: PairedEmbeddings, cost: Tensor) -> PairedEmbeddings:
    """Every picture moved half way to the one of its captions whose `cost` [M] is least."""
    order = cost.argsort(stable=True)
    order = order[data.caption_image[order].argsort(stable=True)]  # picture by picture, the least cost first
    count = torch.bincount(data.caption_image)
    chosen = order[count.cumsum(0) - count]
    return PairedEmbeddings(F.normalize(data.image + data.text[chosen], dim=1), data.text, data.caption_image)


def runs_directory(cache: Path) -> Path:
    """Where the runs are kept."""
    return work_directory(cache) / "runs"


@functools.cache
def _parts(dataset: str, cache: Path) -> dict[str, Part]:
    return SETS[dataset](cache)


def _make(cache: Path, end: float, setting: Setting) -> None:
    """A run's file, unless it is too late."""
    if time.time() < end:
        found = run(setting, _parts(setting.dataset, cache))
        write_atomically(runs_directory(cache) / f"{setting.name}.json", json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where what was fetched and the runs are kept")
    parser.add_argument("--first", type=int, help="only the first so many runs (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    args = parser.parse_args()
    cache, end = cache_directory(args.cache), time.time() + 60 * args.minutes
    for dataset in SETS:
        _parts(dataset, cache)  # made once, here
    files = {each: runs_directory(cache) / f"{each.name}.json" for each in islice(settings(), args.first)}
    missing = [each for each, file in files.items() if not file.exists()]
    each_on_a_thread(functools.partial(_make, cache, end), missing, "study")
    left = sum(not file.exists() for file in files.values())
    print(f"{len(files) - left} of {len(files)} runs are there, {left} are missing")


if __name__ == "__main__":
    main()
