"""Training of the ProbVLM adapter on cached embeddings, resumable bit for bit.

The loss of a batch of pairs (z_V, z_T), see `fastprob.probvlm_loss`:

    L = term(V, z_V) + term(T, z_T) + cross_weight * (term(V, z_T) + term(T, z_V))
    term(P, z) = l1_weight * mean|mu_P - z| + nll_weight * mean NLL(z | P)

or, where `cross` is "exact", with the likelihood that those two cross terms approximate, see `fastprob.ggd_match_nll`:

    L = term(V, z_V) + term(T, z_T) + cross_weight * nll_weight * mean -log integral G_V(z) G_T(z) dz

All means are over B x D. Each of the two terms is, but for the constant log 2, that logarithm with one distribution
narrowed to its embedding, so together they weigh more. Where spreads are equal and far wider than distances, as at the
start, they pull twice as hard on the scales, which an exact cross weight of 2 makes up for, and harder than that on mu.
The exact term has no target: its residuals are not clamped, and it has no L1.

Adam, with a learning rate that falls to zero along a cosine, updated every step. An epoch visits every
image once, each with one random caption of its own. A run directory holds

    last.pt           weights, optimiser, schedule, random states, history: what a run resumes from
    best.safetensors  the epoch of lowest validation NLL, by the run's own `cross` (without validation data: training
                      loss), for `ProbVLM.load`
    history.json      the loss of every step, the training loss and validation NLL of every epoch
    encoder.json      of a store, the encoder whose embeddings these are

each replaced in one step. Source: Upadhyay et al., ICCV 2023, equations 5 to 9.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

import fastprob
from fastprob._files import write_atomically
from fastprob._memory import giving_back
from fastprob._op import one_of
from fastprob.adapters.adapter import DEFAULT_POSITIVE, Parameters, ProbVLM, check_adapter
from fastprob.data.pairs import Paired, Pairs, check_paired
from fastprob.training import Run, cosine, own_random_state, seed_all

CHECKPOINT, ENCODER = "best.safetensors", "encoder.json"
_LOSS_OPTIONS = ("cross", "cross_weight", "l1_weight", "nll_weight", "form")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run, with the data and the device.

    `cross_weight` 1.0 and form "paper" are the paper's; the released code has "released", cross_weight=1e-4,
    l1_weight=1.0, nll_weight=5e-2. None of them is calibrated by every rule of what a match is (docs/uncertainty.md).
    `cross` "delta" is the two cross terms of both, "exact" the likelihood that they approximate, for form "paper" alone
    (the other's residual is of no density); the head of this module has both formulas and what a weight is in each.
    `hidden`, `dropout`, `positive` and `power` as in `GGDAdapter`.

    Raises:
        ValueError: a value out of its range.
    """

    epochs: int = 100
    batch_size: int = 256
    lr: float = 1e-3
    cross_weight: float = 1.0
    l1_weight: float = 0.0
    nll_weight: float = 1.0
    form: str = "paper"
    cross: str = "delta"
    hidden: int = 256
    dropout: float = 0.1
    positive: str = DEFAULT_POSITIVE
    power: float | None = None
    seed: int = 0

    def __post_init__(self):
        check_adapter("TrainConfig", 1, self.hidden, self.dropout, self.positive, self.power)
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"TrainConfig: {name} must be an integer >= {least}, got {value!r}")
        for name in ("cross_weight", "l1_weight", "nll_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"TrainConfig: {name} must be finite and >= 0, got {value!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"TrainConfig: lr must be finite and > 0, got {self.lr!r}")
        if self.form not in ("paper", "released"):
            raise ValueError(f"TrainConfig: form must be 'paper' or 'released', got {self.form!r}")
        _check_cross("TrainConfig", self.cross, self.form)


@dataclass(frozen=True)
class FitResult:
    """The model after the last epoch, in evaluation mode, and how it got there.

    `history` is the content of history.json: "step_loss" (a number a step), "train_loss" and "val_nll" (a
    number an epoch; "val_nll" is empty without validation data), "nll_before" and "nll_after". All three NLLs have the
    two cross terms of `cross` "delta" whatever the run was trained on, so that they compare; a run of "exact" has its
    own NLL in "val_nll_exact" too.
    """

    model: ProbVLM
    history: dict

    @property
    def nll_before(self) -> float:
        """`nll` of the untrained model on the validation data, else on the training data."""
        return self.history["nll_before"]

    @property
    def nll_after(self) -> float:
        """The same after training."""
        return self.history["nll_after"]


def fit(
    data: Paired,
    *,
    validation: Paired | None = None,
    config: TrainConfig | None = None,
    directory: str | os.PathLike | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a `ProbVLM` on paired embeddings.

    Args:
        data: an embedding store or `PairedEmbeddings`: image [N, D], text [M, D], caption_image [M].
        validation: the same, held out; scored after every epoch.
        config: defaults to `TrainConfig()`.
        directory: where checkpoints, history and, of a store, its encoder's name go, replacing an earlier run's; None
            writes nothing.
        resume: go on from `directory`/last.pt. The result equals an uninterrupted run's bit for bit.
        device: defaults to CUDA where there is one.
        progress: show a progress bar.

    Ctrl-C stops after the current step, leaving a last.pt to resume from; a second one stops at once. The
    caller's random state is left as it was.

    Raises:
        ValueError: unusable data, or a checkpoint of another config or other data; the field is named.
        FileNotFoundError: `resume` without a last.pt.
        FloatingPointError: the loss became NaN or infinite.
    """
    config = config or TrainConfig()
    check_paired("fit: data", data)
    if validation is not None:
        check_paired("fit: validation", validation)
        if validation.image.shape[1] != data.image.shape[1]:
            widths = f"{data.image.shape[1]}, got {validation.image.shape[1]}"
            raise ValueError(f"fit: validation must have the width of data, {widths}")
    if resume and directory is None:
        raise ValueError("fit: resume needs the directory of the run, got None")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    train = Pairs(data, device)
    held_out = None if validation is None else Pairs(validation, device)
    with own_random_state(device):
        run = _Run(config, train, held_out, directory, getattr(data, "encoder", None))
        run.train(resume=resume, progress=progress)
    return FitResult(run.model.eval(), run.history)


def nll(model: ProbVLM, data: Paired, *, cross_weight: float = 1.0, form: str = "paper", cross: str = "delta") -> float:
    """Mean negative log-likelihood per dimension, without dropout, over all captions with their images:

        NLL(z_V | V) + NLL(z_T | T) + cross_weight * (NLL(z_T | V) + NLL(z_V | T))      cross "delta"
        NLL(z_V | V) + NLL(z_T | T) + cross_weight * -log integral G_V(z) G_T(z) dz     cross "exact"

    in nats, constants as in `fastprob.ggd_nll` and `fastprob.ggd_match_nll`. Each term is a mean over the M pairs. The
    two are different measures of any model, whichever of them it was trained on: compare models by one. Raises
    ValueError for unusable data, and for "exact" with a form other than "paper".
    """
    check_paired("nll", data)
    _check_cross("nll", cross, form)
    return _nll(model, Pairs(data, next(model.parameters()).device), cross_weight, form, cross)


def _check_cross(name: str, cross: str, form: str) -> None:
    one_of(name, "cross", cross, ("delta", "exact"))
    if cross == "exact" and form != "paper":
        raise ValueError(f"{name}: form must be 'paper' where cross is 'exact', got {form!r}")


def _loss(of_image: Parameters, of_text: Parameters, image: Tensor, text: Tensor, *, cross: str, **options) -> Tensor:
    """The loss at the head of this module. All tensors [B, D]; options as `fastprob.probvlm_loss` takes them."""
    if cross == "delta":
        return fastprob.probvlm_loss(*of_image, *of_text, image, text, **options)
    own = fastprob.probvlm_loss(*of_image, *of_text, image, text, **options | {"cross_weight": 0.0})
    weight = options["cross_weight"] * options.get("nll_weight", 1.0)
    return own + weight * fastprob.ggd_match_nll(*of_image, *of_text)


_NLL_ROWS = 1024
"""Images of a block in `nll`; with five captions each, its tensors take about 80 MB at D = 512."""


@torch.no_grad()
def _nll(model: ProbVLM, pairs: Pairs, cross_weight: float, form: str, cross: str) -> float:
    training = model.training
    model.eval()
    values = torch.empty(math.ceil(pairs.images / _NLL_ROWS), dtype=torch.float64, device=pairs.device)
    weight = torch.empty(len(values), dtype=torch.float64)
    blocks = giving_back(tqdm(pairs.blocks(_NLL_ROWS), "nll", len(values), unit="block", delay=5, leave=False))
    for number, (image, text, owner) in enumerate(blocks):
        of_image, of_text = model(image, text)  # three of [B, D], three of [C, D]
        spread = tuple(parameter[owner] for parameter in of_image)  # three of [C, D]
        options = {"cross": cross, "cross_weight": cross_weight, "form": form}
        values[number], weight[number] = _loss(spread, of_text, image[owner], text, **options), len(text)
    model.train(training)
    return float(values.cpu() @ weight / weight.sum())


class _Run(Run):
    """Training of the two adapters on pairs."""

    identity_before: ClassVar = {"cross": "delta"}

    def __init__(
        self,
        config: TrainConfig,
        train: Pairs,
        held_out: Pairs | None,
        directory: str | os.PathLike | None,
        encoder: dict | None,
    ):
        seed_all(config.seed, train.device)
        shape = {"positive": config.positive, "power": config.power}
        model = ProbVLM(train.dim, config.hidden, config.dropout, **shape).to(train.device)
        steps = math.ceil(train.images / config.batch_size)
        super().__init__(
            format="fastprob.training/2",
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=config.lr, fused=True),
            rate=lambda step: cosine(step / (config.epochs * steps)),
            epochs=config.epochs,
            steps=steps,
            directory=directory,
        )
        self.config, self.train_pairs, self.held_out, self.encoder = config, train, held_out, encoder
        self.options = {name: getattr(config, name) for name in _LOSS_OPTIONS}
        self.history["val_nll"] = []
        if config.cross == "exact":
            self.history["val_nll_exact"] = []

    def start(self) -> None:
        self.history["nll_before"] = self.score_nll()
        if self.writes and self.encoder is not None:
            write_atomically(self.directory / ENCODER, json.dumps(self.encoder, indent=1) + "\n")
        super().start()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.train_pairs.epoch(self.config.seed, self.epoch, self.config.batch_size, self.step)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B, D], text [B, D]."""
        of_image, of_text = self.model(image, text)
        return _loss(of_image, of_text, image, text, **self.options)

    def epoch_ended(self, train_loss: float) -> None:
        score = train_loss if self.held_out is None else self.validate()
        if self.epoch == self.config.epochs:
            self.history["nll_after"] = self.score_nll() if self.held_out is None else self.history["val_nll"][-1]
        if score < self.best:
            self.best = score
            if self.writes:
                self.model.save(self.directory / CHECKPOINT)

    def validate(self) -> float:
        """Record the epoch's NLL; return the one by the run's own `cross`."""
        own = self.history["val_nll"]
        own.append(self.score_nll())
        if self.config.cross == "exact":
            own = self.history["val_nll_exact"]
            own.append(self.score_nll("exact"))
        return own[-1]

    def score_nll(self, cross: str = "delta") -> float:
        return _nll(self.model, self.held_out or self.train_pairs, self.config.cross_weight, self.config.form, cross)

    def identity(self) -> dict:
        held_out = None if self.held_out is None else _described(self.held_out)
        return {**asdict(self.config), "data": _described(self.train_pairs), "validation": held_out}


def _described(pairs: Pairs) -> dict:
    return {"images": pairs.images, "captions": pairs.captions, "dim": pairs.dim, "sha256": pairs.digest}
