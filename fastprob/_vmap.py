"""An operator under torch.func.vmap: call by call, as torch's own fallback does with a warning.

An operator that draws random numbers has an option `seed`. Under vmap each row is a draw of its own: row i draws with
`seed_of_row(seed, i)`, unless vmap is told randomness="same". No row's seed depends on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MASK = 2**64 - 1


def seed_of_row(seed: int, row: int) -> int:
    """The row-th number of the SplitMix64 generator that starts at `seed`, as a signed 64-bit integer.

    Source:
        Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def batched(call: Callable, defaults: dict, leading: int, info, in_dims: tuple, *tensors: Tensor | None, **options):
    """The torch operator `call` for every row, stacked; its first `leading` tensors are gradients of results.

    Gradients decide no draw: rows of gradients for one forward pass (as in jacrev) share the draw of that pass.
    """
    options = {**defaults, **options}  # the dispatcher drops those that are equal to their defaults
    draws = "seed" in options and info.randomness != "same" and any(dim is not None for dim in in_dims[leading:])
    calls = []
    for row in range(info.batch_size):
        of_row = (t if dim is None else t.select(dim, row) for t, dim in zip(tensors, in_dims))
        seed = {"seed": seed_of_row(options["seed"], row)} if draws else {}
        calls.append(call(*of_row, **{**options, **seed}))
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(results) for results in zip(*calls)), (0,) * len(calls[0])
