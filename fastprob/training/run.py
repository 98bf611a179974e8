"""A training run: its steps and epochs, how it is saved and restored, and how Ctrl-C stops it between two steps."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastprob._files import locked, read_pickle, write_atomically
from fastprob.training.distributed import average, on_any, rank
from fastprob.training.random import random_state, set_random_state

LAST = "last.pt"
"""What a run resumes from."""

_REPORT_EVERY = 50
"""Steps between reads of the loss from the device: for the progress bar, and to stop at a NaN soon."""


class Run:
    """Everything that changes while a model trains, and how that is saved and restored.

    A subclass says `batches`, `loss`, `identity` and, if something else is to happen, `start` and `epoch_ended`. Its
    directory (None: nothing is written) holds last.pt, what a run resumes from, and history.json: the loss of every
    step and epoch, and what the subclass adds; each is replaced in one step, by rank 0 alone.

    format: of last.pt; model, optimizer: what trains, at the optimiser's learning rate times rate(step); epochs, steps:
    of the run and of an epoch; scaler: of a loss in float16; extras: modules that change without a gradient, such as an
    average of the weights or a queue of embeddings, by name.
    """

    identity_before: ClassVar[Mapping[str, Any]] = {}
    """What runs had in common that were saved before `identity` named it."""

    def __init__(
        self,
        *,
        format: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        epochs: int,
        steps: int,
        directory: str | os.PathLike | None,
        scaler: torch.amp.GradScaler | None = None,
        extras: Mapping[str, nn.Module] | None = None,
    ):
        self.format, self.model, self.optimizer = format, model, optimizer
        self.directory = None if directory is None else Path(directory)
        self.extras = dict(extras or {})
        self.epochs, self.steps = epochs, steps
        self.device = next(model.parameters()).device
        self.lr = optimizer.param_groups[0]["lr"]
        self.rate = rate
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.epoch, self.step = 0, 0  # the step to take next
        self.losses = torch.zeros(steps, device=self.device)  # [S], of this epoch, on the device
        self.best = math.inf
        self.history: dict[str, Any] = {"step_loss": [], "train_loss": []}

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.directory is not None and rank() == 0

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of epoch `self.epoch` from step `self.step` on, this rank's `share` of each."""
        raise NotImplementedError

    def loss(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, a scalar that gradients flow from."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that resumes from it."""
        raise NotImplementedError

    def start(self) -> None:
        """Called before the first step."""
        self.save()

    def epoch_ended(self, train_loss: float) -> None:
        """Called after the last step of an epoch, before the run is saved."""

    def train(self, *, resume: bool, progress: bool) -> None:
        """Take all steps, or those that are left. Raises KeyboardInterrupt after Ctrl-C, between two of them, and
        ValueError where another process trains in the same directory.
        """
        lock = locked("fit", self.directory) if self.writes else nullcontext()
        with lock, interrupt_between_steps() as interrupted:
            if resume:
                self.load()
            else:
                self.start()
            done = self.epoch * self.steps + self.step
            options = {"desc": "fit", "unit": "step", "disable": not progress}
            with tqdm(total=self.epochs * self.steps, initial=done, **options) as bar:
                while self.epoch < self.epochs:
                    self.train_epoch(bar, interrupted)

    def train_epoch(self, bar: tqdm, interrupted: threading.Event) -> None:
        """Take the steps that are left of this epoch."""
        for batch in self.batches():
            self.losses[self.step] = self.update(*batch)
            self.step += 1
            bar.update()
            if self.step % _REPORT_EVERY == 0:
                bar.set_postfix(epoch=self.epoch, loss=f"{self.check_finite()[-1]:.4f}", refresh=False)
            if self.step < self.steps and on_any(interrupted.is_set(), self.device):
                self.check_finite()
                self.save()
                raise KeyboardInterrupt
        self.end_epoch()
        if on_any(interrupted.is_set(), self.device):
            raise KeyboardInterrupt

    def update(self, *batch: Tensor) -> Tensor:
        """Take one step of the optimiser on a batch; return its loss, which stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.rate(self.epoch * self.steps + self.step)
        loss = self.loss(*batch)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        average(parameter.grad for parameter in self.model.parameters() if parameter.grad is not None)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def end_epoch(self) -> None:
        """Record the epoch's losses and save the run."""
        losses = self.check_finite()
        mean = sum(losses) / len(losses)
        self.history["step_loss"] += losses
        self.history["train_loss"].append(mean)
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_ended(mean)
        self.save()

    def check_finite(self) -> list[float]:
        """Return the losses of this epoch so far. Raises FloatingPointError if one, or a weight, is not finite."""
        losses = self.losses[: self.step].clone()
        average([losses])
        losses = losses.tolist()
        bad = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
        what = "weights" if bad is None else f"loss ({losses[bad]})"
        if bad is not None or not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            step = self.step - 1 if bad is None else bad
            saved = "" if self.directory is None else f"; {self.directory / 'last.pt'} is from before"
            raise FloatingPointError(
                f"fit: the {what} stopped being finite at epoch {self.epoch}, step {step}; "
                f"try a lower lr than {self.lr}{saved}"
            )
        return losses

    def save(self) -> None:
        """Write last.pt and history.json, each in one step."""
        if not self.writes:
            return
        state = {
            "format": self.format,
            "identity": self.identity(),
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses,
            "best": self.best,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "extras": {name: module.state_dict() for name, module in self.extras.items()},
            "random": random_state(self.device),
        }
        buffer = io.BytesIO()  # on a full disk torch's own writer raises RuntimeError
        torch.save(state, buffer)
        write_atomically(self.directory / LAST, buffer.getvalue())
        history = json.dumps({"config": self.identity(), **self.history})
        write_atomically(self.directory / "history.json", history)

    def load(self) -> None:
        """Restore what `save` wrote. Raises FileNotFoundError, or ValueError naming what differs from this run."""
        path = self.directory / LAST
        state = read_pickle("fit", path)
        if not isinstance(state, dict) or state.get("format") != self.format:
            raise ValueError(f"fit: {path} must be a checkpoint of format {self.format!r}")
        if not isinstance(state.get("identity"), dict):
            raise ValueError(f"fit: {path} must be a checkpoint of a run, its state can't be used: it has no identity")
        for field, ours in self.identity().items():
            theirs = state["identity"].get(field, self.identity_before.get(field))
            if theirs != ours:
                raise ValueError(f"fit: {path} was trained with {field}={theirs!r}, got {field}={ours!r}")
        try:
            self._restore(state)
        except Exception as error:  # of many kinds, where parts are missing or of another form
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"fit: {path} must be a checkpoint of a run, its state can't be used: {what}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.history = {**self.history, **state["history"]}
        self.losses.copy_(state["losses"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, module in self.extras.items():
            module.load_state_dict(state["extras"][name])
        set_random_state(self.device, state["random"])


def cosine(share: float) -> float:
    """Half a cosine wave, from 1 to 0 as `share` goes from 0 to 1."""
    return (1 + math.cos(math.pi * share)) / 2


@contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """Let Ctrl-C set the event that is yielded, so that no step is cut in half; a second one raises as usual."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield interrupted
        return

    def note(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)
