"""How likely is it that the first match is wrong? A calibrated probability for every image and text of a store.

It is fitted on pairs whose matches are known, from all that is at hand: what the similarities of the frozen embeddings
tell (`fastprob.evaluation.signals`) and, where there is an adapter, the variances that it predicts for the query and
for its first match. Texts of the same words are one item of the gallery.

    model = fit_error(validation, captions=captions, adapter=adapter)
    p = model(store, captions=store.captions, adapter=adapter)   # p["image"] [N], p["text"] [M]
    model.save("run/error.safetensors")

The first match of a larger gallery is wrong more often: the model is fitted on parts of the validation data of several
sizes (`SHARES`), and the size is one of its signals. A query's probability depends on the other queries too: a text
that many images ask for is less likely to be one image's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastprob._files import read_tensors, write_tensors
from fastprob._memory import giving_back
from fastprob.adapters.adapter import GGDAdapter, ProbVLM
from fastprob.adapters.uncertainty import ROWS, predict
from fastprob.data.pairs import Paired, PairedEmbeddings, check_paired
from fastprob.evaluation.conformal import COVERAGES, conformal_threshold, fewest_pairs
from fastprob.evaluation.error import ErrorModel, fit_error_model
from fastprob.evaluation.retrieval import Match, find_matches
from fastprob.evaluation.selective import same
from fastprob.evaluation.signals import Signals, fit_temperature, signals

FILE = "error.safetensors"  # beside an adapter's checkpoint
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)  # of the images, for galleries of several sizes
SIDES = ("image", "text")
_OTHER = dict(zip(SIDES, SIDES[::-1]))
_VERSION = 1
_OTHERS = 4096  # queries that a single one is held against
_SAME = 1e-6  # rows that differ by less are the same query
_LEAST = 1e-30  # of a variance, before its logarithm; its inverse is the greatest


@dataclass(frozen=True)
class _Rows:
    image: Tensor
    text: Tensor


Variances = Mapping[str, Mapping[str, Tensor]]
"""Side -> "aleatoric" and "epistemic" -> mean over D, [N] or [M]."""


@dataclass(frozen=True)
class ErrorModels:
    """The fitted models of both directions: of an image that looks for its text, and of a text for its image."""

    image: ErrorModel
    text: ErrorModel
    temperature: float
    passes: int | None
    """Dropout passes of the adapter's variances; None where it was fitted without an adapter."""
    adapter: str | None = None
    """`digest` of the adapter that it was fitted with."""
    rule: str = "own"
    """What a match was: "own", an item's own; else a name for the `match` that was given."""
    conformal: Mapping[float, float] = field(default_factory=dict)
    """Promised coverage -> the least cosine of an item of a set, for those of `COVERAGES` that the pairs allowed. The
    promise is of the image that a text was written for, whatever the rule; see `fastprob.evaluation.conformal`."""

    def __call__(
        self, data: Paired, *, captions: Sequence[str] | None = None, adapter: ProbVLM | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """p(wrong) of each image [N] and each text [M], float64, by side.

        Args:
            data: the images and texts that look for each other; who belongs to whom is not looked at.
            captions: what the texts are, M of them, so that equal ones count once (default: all are different).
            adapter: the one that it was fitted with, if it was; seed: of its dropout passes.

        Raises:
            ValueError: without the adapter that it was fitted with.
        """
        found = self.signals(data, captions=captions, adapter=adapter, seed=seed)
        return {side: getattr(self, side)(found[side].values) for side in SIDES}

    def signals(
        self, data: Paired, *, captions: Sequence[str] | None = None, adapter: ProbVLM | None = None, seed: int = 0
    ) -> dict[str, Signals]:
        """What the probabilities are made of, by side. Arguments and errors as of a call."""
        return store_signals(data, self.temperature, captions, self._variances(data, adapter, seed))

    def signals_beside(
        self,
        data: Paired,
        outside: Paired,
        *,
        captions: Sequence[Hashable] | None = None,
        adapter: ProbVLM | None = None,
        seed: int = 0,
    ) -> dict[str, Signals]:
        """Signals of the queries of `data`, then of those of `outside`, that all look for items of `data`, by side.

        captions: what the texts of both are; the other arguments and errors as of a call.
        """
        here, there = (self._variances(each, adapter, seed) for each in (data, outside))
        texts, found = captions and captions[: len(data.text)], {}
        for side, other in _OTHER.items():
            rows = torch.cat([getattr(data, side), getattr(outside, side)])
            known = here and here | {
                side: {kind: torch.cat([of, there[side][kind]]) for kind, of in here[side].items()}
            }
            asked = _Rows(**{side: rows, other: getattr(data, other)})
            found[side] = store_signals(asked, self.temperature, texts if side == "image" else captions, known)[side]
        return found

    def of_query(
        self,
        query: Tensor,
        side: str,
        data: Paired,
        *,
        captions: Sequence[str] | None = None,
        adapter: ProbVLM | None = None,
        seed: int = 0,
    ) -> float:
        """p(wrong) of one query [D], an image or a text by `side`, that looks for its match in `data`.

        The other queries are the rows of its side, those like it apart, or 4,096 of them at even distances.
        """
        rows = getattr(data, side)
        which = torch.arange(0, len(rows), math.ceil(len(rows) / _OTHERS))
        others = rows[which]
        kept = which[(others - query).abs().amax(1) > _SAME]
        asked = torch.cat([rows[kept], query[None].to(rows)])
        texts = None
        if captions is not None:
            texts = captions if side == "image" else [*(captions[i] for i in kept.tolist()), object()]
        some = _Rows(**{side: asked, _OTHER[side]: getattr(data, _OTHER[side])})
        found = store_signals(some, self.temperature, texts, self._variances(some, adapter, seed))
        return float(getattr(self, side)(found[side].rows(torch.tensor([len(kept)])).values))

    def _variances(self, data: Paired, adapter: ProbVLM | None, seed: int) -> Variances | None:
        if self.passes is None:
            return None
        if adapter is None or digest(adapter) != self.adapter:
            got = "None" if adapter is None else "another"
            raise ValueError(f"ErrorModels: adapter must be the one that it was fitted with, got {got}")
        return variances(adapter, data, self.passes, seed)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file; equal models are equal bytes."""
        tensors, about = {}, {"version": _VERSION, "temperature": self.temperature, "passes": self.passes}
        about |= {"adapter": self.adapter, "rule": self.rule, "conformal": list(self.conformal.items())}
        for side in SIDES:
            model = getattr(self, side)
            about[side] = {"names": model.names, "bias": model.bias}
            tensors |= {f"{side}.{name}": getattr(model, name) for name in ("mean", "deviation", "weight")}
        write_tensors(path, tensors, {"error": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ErrorModels:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for another file."""
        tensors, metadata = read_tensors("ErrorModels.load", path)
        try:
            about = json.loads(metadata["error"])
            if about["version"] != _VERSION:
                raise ValueError(f"version {_VERSION} was expected, got {about['version']}")
            models = {side: _model(tensors, side, **about[side]) for side in SIDES}
            known = {name: about[name] for name in ("temperature", "passes", "adapter", "rule")}
            conformal = {float(coverage): float(least) for coverage, least in about.get("conformal", [])}
            return cls(**models, **known, conformal=conformal)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"ErrorModels.load: {path} must be what `save` writes: {error!r}") from error


def _model(tensors: Mapping[str, Tensor], side: str, names: list[str], bias: float) -> ErrorModel:
    numbers = [tensors[f"{side}.{name}"] for name in ("mean", "deviation", "weight")]
    if any(each.shape != (len(names),) for each in numbers):
        raise ValueError(f"{side} has {len(names)} names, and numbers of {[tuple(each.shape) for each in numbers]}")
    return ErrorModel(tuple(names), *numbers, bias=float(bias))


def fit_error(
    data: Paired,
    *,
    captions: Sequence[str] | None = None,
    adapter: ProbVLM | None = None,
    match: Match | None = None,
    rule: str = "own",
    passes: int = 20,
    seed: int = 0,
) -> ErrorModels:
    """Fit the probability that the first match is wrong on pairs that no adapter was trained on, and conformal sets.

    Args:
        data: the pairs.
        captions: what the texts are, M of them, so that equal ones count once (default: all are different).
        adapter: whose variances are signals too (default: none, the similarities alone).
        match: ground truth, bool [N, M] or (image ids [N], text ids [M]), such as classes (default: a text matches the
            image that it was written for); rule: its name, which says by what a probability is to be judged.
        passes: dropout passes of the adapter's variances; seed: of these, and of the parts.

    Raises:
        ValueError: unusable pairs, or too few right or wrong ones, as `fit_error_model`.
        ImportError: without scikit-learn.
    """
    check_paired("fit_error", data)
    match = (torch.arange(len(data.image)), data.caption_image) if match is None else match
    temperature = fit_temperature(data)
    known = None if adapter is None else variances(adapter, data, passes, seed)
    group = {"image": torch.arange(len(data.image)), "text": _which(data, captions)}
    rows: dict[str, list] = {side: [] for side in SIDES}
    for number, share in enumerate(SHARES):
        images, texts = _part(data, share, seed + number)
        some, names = _some(data, images, texts), None if captions is None else [captions[i] for i in texts.tolist()]
        which = {"image": images, "text": texts}
        found = store_signals(some, temperature, names, _rows(known, which))
        for side, place in zip(SIDES, find_matches(some.image, some.text, _match_of(match, images, texts))):
            rows[side].append((found[side].values, place.rank > 0, group[side][which[side]]))
    models = {side: fit_error_model(*_joined(parts)) for side, parts in rows.items()}
    fitted = {"passes": None} if adapter is None else {"passes": passes, "adapter": digest(adapter)}
    promised = [coverage for coverage in COVERAGES if len(data.text) >= fewest_pairs(coverage)]
    conformal = {coverage: conformal_threshold(data, coverage) for coverage in promised}
    return ErrorModels(**models, temperature=temperature, rule=rule, conformal=conformal, **fitted)


def _part(data: Paired, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of a random share of the images, and of their texts."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randperm(len(data.image), generator=generator)[: max(1, round(share * len(data.image)))]
    chosen = torch.zeros(len(data.image), dtype=torch.bool).index_fill_(0, images, True)
    return chosen.nonzero()[:, 0], chosen[data.caption_image].nonzero()[:, 0]


def _some(data: Paired, images: Tensor, texts: Tensor) -> PairedEmbeddings:
    place = torch.zeros(len(data.image), dtype=torch.int64).index_copy_(0, images, torch.arange(len(images)))
    return PairedEmbeddings(data.image[images], data.text[texts], place[data.caption_image[texts]])


def _match_of(match: Match, images: Tensor, texts: Tensor) -> Match:
    return (match[0][images], match[1][texts]) if isinstance(match, tuple) else match[images][:, texts]


def _rows(known: Variances | None, which: Mapping[str, Tensor]) -> Variances | None:
    return known and {side: {name: of[which[side]] for name, of in known[side].items()} for side in SIDES}


def _joined(parts: list[tuple[dict[str, Tensor], Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    values, wrong, group = zip(*parts)
    return {name: torch.cat([each[name] for each in values]) for name in values[0]}, torch.cat(wrong), torch.cat(group)


def store_signals(
    data: Paired, temperature: float, captions: Sequence[Hashable] | None = None, known: Variances | None = None
) -> dict[str, Signals]:
    """Signals of all images and texts by side; `items` are rows of the other side.

    known: variances of all rows; then there are also, for each kind, the logarithm of the query's and of its first
    match's: "aleatoric" and "match_aleatoric", "epistemic" and "match_epistemic".
    """
    which = _which(data, captions)
    distinct = torch.zeros(int(which.max()) + 1, dtype=torch.int64)
    distinct.scatter_reduce_(0, which, torch.arange(len(which)), "amin", include_self=False)  # [U] the first of each
    image, text = signals(data.image, data.text[distinct] if len(distinct) < len(which) else data.text, temperature)
    found = {"image": Signals(image.values, distinct[image.items]), "text": text.rows(which)}
    for side, other in _OTHER.items():
        for kind in known[side] if known else ():
            first = found[side].items[:, 0]
            found[side].values[kind] = _log(known[side][kind])
            found[side].values[f"match_{kind}"] = _log(known[other][kind][first])
    return found


def _log(variance: Tensor) -> Tensor:
    return variance.double().clamp(_LEAST, 1 / _LEAST).log()


def _which(data: Paired, captions: Sequence[Hashable] | None) -> Tensor:
    """[M] which of the different captions each text is."""
    return torch.arange(len(data.text)) if captions is None else same(captions)


def variances(adapter: ProbVLM, data: Paired, passes: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Aleatoric and epistemic variance of every row, means over D; see `Variances`."""
    return {side: _variances(getattr(adapter, side), getattr(data, side), passes, seed) for side in SIDES}


def _variances(adapter: GGDAdapter, rows: Tensor, passes: int, seed: int) -> dict[str, Tensor]:
    kinds = ("aleatoric", "epistemic") if passes else ("aleatoric",)
    found = {kind: torch.empty(len(rows)) for kind in kinds}
    blocks = torch.arange(len(rows)).split(ROWS)
    for some in giving_back(tqdm(blocks, "variances", unit="block", delay=5, leave=False)):
        predicted = predict(adapter, rows[some], passes=passes, seed=seed)
        for kind, values in found.items():
            values[some] = getattr(predicted, kind).mean(1).cpu()
    return found


def digest(adapter: ProbVLM) -> str:
    """SHA-256 of an adapter's weights."""
    state = adapter.state_dict()
    return hashlib.sha256(b"".join(state[name].cpu().numpy().tobytes() for name in sorted(state))).hexdigest()


def file_beside(checkpoint: str | os.PathLike) -> Path:
    """Where the models of an adapter are kept, by its file or its run's directory."""
    path = Path(checkpoint)
    return (path if path.is_dir() else path.parent) / FILE


def beside(checkpoint: str | os.PathLike) -> ErrorModels | None:
    """The models beside an adapter's file, or in its run's directory, if there are."""
    file = file_beside(checkpoint)
    return ErrorModels.load(file) if file.exists() else None
