"""Seeds and random states of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`, and, unlike torch.manual_seed, of no other."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def seed_of(*words: int) -> int:
    """A seed that depends on all of several non-negative numbers, as (seed, epoch)."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Give the caller's random state back at the end of the block, whatever was drawn or seeded in it."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, state)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators of the CPU and of `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:  # not in a run that began on the CPU
        torch.cuda.set_rng_state(state["cuda"], device)
