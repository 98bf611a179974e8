"""Every method of uncertainty on both data sets: what it says of the test part, a safetensors file in the cache a run.

    score|NAME|SIDE    of each image or text, larger for less certain
    top|NAME|SIDE      rank 1 of each query by a ranking: a row of the images, or which of the distinct captions
    pair|NAME          of each caption with the picture that it has in `noisy`: how little they seem to belong together

The quick methods come first, seed by seed. An ensemble is of the adapters that were trained for two of the seeds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import fastprob
from fastprob._files import read_tensors, write_tensors
from fastprob.adapters import ProbVLM, TrainConfig, fit, predict
from fastprob.adapters.error import SIDES, fit_error
from fastprob.adapters.heads import PCME, PFE, heads
from fastprob.adapters.rivals import Adapters, Scores, posterior, similarities

from .encoded import laplace, views
from .fetch import work_directory
from .parts import SETS, Part
from .study import FORMS

SEEDS = range(3)
EPOCHS = 60  # on the digits fewer turn the order of ProbVLM's paper loss over (report.md)
NOISE = 0.2  # share of the captions that `noisy` gives to another picture
HEADS = {"PFE head": PFE, "PCME++ head": PCME}
CONFIGS = {
    "ProbVLM, released": FORMS["released"] | {"cross_weight": 1e-4},
    "ProbVLM, paper": FORMS["paper"],
    "ProbVLM, exact": FORMS["exact"],
    "Gaussian adapter": {"power": 2.0},
    "Laplace adapter": {"power": 1.0},
}
FREE, ENSEMBLE, MEMBER = "frozen similarities", "ensemble of 2", "ProbVLM, paper"
LAPLACE, VIEWS = "Laplace projection", "test-time augmentation"
QUICK = (FREE, *HEADS, LAPLACE)
METHODS = (*QUICK, *CONFIGS, VIEWS, ENSEMBLE)

Found = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """A run."""

    dataset: str
    method: str
    seed: int

    def file(self, cache: Path, suffix: str = "safetensors") -> Path:
        """Where the run is kept; or, of another suffix, its adapter."""
        name = f"{self.dataset}-{self.method}-seed{self.seed}".replace(" ", "-").replace(",", "")
        return work_directory(cache) / "rivals" / f"{name}.{suffix}"


def trials(datasets: Iterable[str] = SETS) -> Iterator[Trial]:
    """All runs, seed by seed; ensembles come last, when their members are there."""
    for method in QUICK:
        seeds = SEEDS[:1] if method == LAPLACE else SEEDS  # nothing of it is random
        yield from (Trial(name, method, seed) for seed in seeds for name in datasets)
    for seed in SEEDS:
        yield from (Trial(name, method, seed) for method in (*CONFIGS, VIEWS) for name in datasets)
    yield from (Trial(name, ENSEMBLE, seed) for seed in SEEDS for name in datasets)


def load(trial: Trial, cache: Path) -> Found | None:
    """What the run found, if it is there."""
    file = trial.file(cache)
    return read_tensors("rivals", file)[0] if file.exists() else None


def make(cache: Path, datasets: Iterable[str] = SETS, minutes: float = float("inf")) -> None:
    """Make the runs that are missing; none starts after so many minutes."""
    end, parts = time.monotonic() + 60 * minutes, {name: SETS[name](cache) for name in datasets}
    every = list(trials(datasets))
    missing = [trial for trial in every if not trial.file(cache).exists()]
    bar = tqdm(missing, "rivals", len(every), initial=len(every) - len(missing), unit="run")
    for trial in bar:
        if time.monotonic() > end:
            break
        if trial.file(cache).exists():  # another process made it
            continue
        bar.set_postfix_str(trial.file(cache).stem)
        start = time.perf_counter()
        found = run(trial, parts[trial.dataset], cache)
        found = {name: of.float() if of.is_floating_point() else of.int() for name, of in found.items()}
        write_tensors(trial.file(cache), found, {"seconds": f"{time.perf_counter() - start:.1f}"})


def run(trial: Trial, parts: dict[str, Part], cache: Path) -> Found:
    """Fit the method on the training and validation parts, and look at the test part."""
    if trial.method == FREE:
        return _similarities(parts, trial.seed)
    if trial.method in HEADS:
        return _heads(trial, parts)
    if trial.method == LAPLACE:
        return laplace(trial.dataset, parts, cache)
    if trial.method == VIEWS:
        return views(trial.dataset, cache, trial.seed)
    if trial.method == ENSEMBLE:
        seeds = trial.seed, (trial.seed + 1) % len(SEEDS)
        files = [Trial(trial.dataset, MEMBER, seed).file(cache, "adapter") for seed in seeds]
        return _named(Adapters([ProbVLM.load(file) for file in files])(parts["test"].data))
    config = TrainConfig(**CONFIGS[trial.method], epochs=EPOCHS, seed=trial.seed)
    model = fit(parts["train"].data, config=config, progress=False).model
    model.save(trial.file(cache, "adapter"))
    return _adapter(model, parts, trial.seed)


def _named(scores: Scores) -> Found:
    return {f"score|{name}|{side}": of for name, by_side in scores.items() for side, of in by_side.items()}


# ------------------------------------------------------------------------------------------------ the methods


def _similarities(parts: dict[str, Part], seed: int) -> Found:
    val, test = parts["val"], parts["test"]
    scorer = similarities(parts["train"].data, val.data, seed, val.captions)
    found = _named(scorer(test.data, test.captions)) | _error(parts, seed)
    return found | _tops("cosine", test, _cosine(test)) | _cosine_pairs(test, scorer.temperature)


def _error(parts: dict[str, Part], seed: int, adapter: ProbVLM | None = None) -> Found:
    """p(wrong), fitted on the validation part: by either rule."""
    val, test = parts["val"], parts["test"]
    name = "p(wrong)" if adapter is None else "p(wrong) with it"
    scores = {}
    for rule, match in (("own", None), ("true", val.truth.T)):
        model = fit_error(val.data, captions=val.captions, adapter=adapter, match=match, seed=seed)
        scores[f"{name}, {rule}"] = model(test.data, captions=test.captions, adapter=adapter)
    return _named(scores)


def _heads(trial: Trial, parts: dict[str, Part]) -> Found:
    test, method = parts["test"], heads(HEADS[trial.method], epochs=EPOCHS)
    scorer = method(parts["train"].data, parts["val"].data, trial.seed)
    with torch.no_grad():
        of = {side: getattr(scorer.model, side)(getattr(test.data, side)) for side in SIDES}
    distance = fastprob.csd(*(rows[test.distinct] for rows in of["text"]), *of["image"])  # [U, N]
    owner = noisy(test)
    pair = (of["text"][0] - of["image"][0][owner]).square().sum(1) + (of["text"][1] + of["image"][1][owner]).sum(1)
    return _named(scorer(test.data)) | _tops("csd", test, distance) | {"pair|csd": pair}


def _adapter(model: ProbVLM, parts: dict[str, Part], seed: int) -> Found:
    val, test = parts["val"], parts["test"]
    found = _named(Adapters([model], seed)(test.data)) | _error(parts, seed, model)
    after = posterior(model, val.data, val.captions)
    of_items = after.energies(test.data, test.captions)
    found |= _named(after.scores(of_items))
    for side, (energy, items) in of_items.items():
        top = items.gather(1, energy.argmin(1, keepdim=True))[:, 0]
        found[f"top|match likelihood|{side}"] = test.which[top] if side == "image" else top
    return found | _likelihoods(model, test) | _csd(model, test)


@torch.no_grad()
def _likelihoods(model: ProbVLM, test: Part) -> Found:
    data, owner = test.data, noisy(test)
    image, text = model(data.image, data.text)
    distinct = [of[test.distinct] for of in text]
    paired = [of[owner] for of in image]
    nll = fastprob.ggd_nll(*paired, data.text, reduction="none") + fastprob.ggd_nll(
        *text, data.image[owner], reduction="none"
    )
    return {
        "top|likelihood|image": fastprob.ggd_nearest(*image, data.text[test.distinct])[1][:, 0],
        "top|likelihood|text": fastprob.ggd_nearest(*distinct, data.image)[1][:, 0][test.which],
        "pair|likelihood": nll.sum(1),
        "pair|match likelihood": fastprob.ggd_match_nll(*paired, *text, reduction="none").sum(1),
    }


def _csd(model: ProbVLM, test: Part) -> Found:
    image, text = (predict(getattr(model, side), getattr(test.data, side)) for side in SIDES)
    distance = fastprob.csd(text.mu[test.distinct], text.aleatoric[test.distinct], image.mu, image.aleatoric)
    return _tops("csd", test, distance)


def _tops(name: str, test: Part, distance: Tensor) -> Found:
    """Rank 1 by distances of distinct captions and pictures [U, N]."""
    return {f"top|{name}|image": distance.argmin(0), f"top|{name}|text": distance.argmin(1)[test.which]}


def _cosine(test: Part) -> Tensor:
    return 1 - test.data.text[test.distinct] @ test.data.image.T  # [U, N], of unit vectors


# ----------------------------------------------------------------------------------------------- noisy pairs


def noisy(part: Part, seed: int = 0) -> Tensor:
    """The picture of each caption [M], where a fifth of the captions is given to a random one that it is not true of.

    Captions that are true of every picture keep theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    owner, count = part.data.caption_image.clone(), len(part.captions)
    for caption in torch.randperm(count, generator=generator)[: round(NOISE * count)].tolist():
        wrong = (~part.truth[caption]).nonzero()[:, 0]
        if len(wrong):
            owner[caption] = wrong[torch.randint(len(wrong), (), generator=generator)]
    return owner


def _cosine_pairs(test: Part, temperature: float) -> Found:
    """1 - cosine, and how little each of a pair asks for the other: -log of both softmaxes over cosines."""
    owner = noisy(test)
    logits = (1 - _cosine(test)) / temperature  # [U, N]
    doubt = -(logits.log_softmax(1) + logits.log_softmax(0))
    cosine = (test.data.text * test.data.image[owner]).sum(1)
    return {"pair|1 - cosine": 1 - cosine, "pair|mutual doubt": doubt[test.which, owner]}
