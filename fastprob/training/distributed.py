"""The processes that train together, as torchrun starts them; without torch.distributed one process, of rank 0.

Every rank has the same weights, draws the same random numbers and takes its share of each batch; gradients are averaged
before a step. So a run's steps, and what resumes from them, do not depend on the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


@contextmanager
def joined(device: str) -> Iterator[str]:
    """With the other processes, where torchrun started this one; yields this one's device, of this kind."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _together() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def share(rows: Tensor, *, run: int = 1) -> Tensor:
    """Deal a batch [B] out: this rank's rows. All get as many; where B does not divide, the first ones go twice.

    run: rows that stay together, which are dealt as one.
    """
    if ranks() == 1:
        return rows
    runs = rows.unflatten(0, (-1, run))
    each = -(-len(runs) // ranks())
    return runs[torch.arange(rank(), each * ranks(), ranks(), device=rows.device) % len(runs)].flatten(0, 1)


def gathered(rows: Tensor, *, run: int = 1) -> Tensor:
    """The batch that `share` dealt out, in its order. Gradients flow back to the rank that a row is of."""
    if ranks() == 1:
        return rows
    return torch.stack(all_gather(rows.unflatten(0, (-1, run)).contiguous()), 1).flatten(0, 2)


def mean_over_all(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """What, averaged over the ranks, is the mean of all ranks' values [C], of which each may have another number.

    counted: [C] bool, those that count; all if None. Of none the mean is 0.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
    count = counted.sum().to(values.dtype)
    average([count])
    return torch.where(counted, values, 0).sum() / count.clamp(min=1 / ranks())


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks."""
    if ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= ranks()


def on_any(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank."""
    if ranks() == 1:
        return flag
    share_of_ranks = torch.tensor(float(flag), device=device)
    average([share_of_ranks])
    return bool(share_of_ranks)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
