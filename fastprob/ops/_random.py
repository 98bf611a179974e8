"""Random numbers by counter: Philox4x32-10, the same bits on every device and in every order.

A number belongs to a place, not to a turn: (seed, stream, draw, element) -> 32 bits. The key is the seed's two halves,
the counter (element >> 2 low, high, stream, draw), and element & 3 chooses one of the four words that come out. A
stream is a use of its own, a draw a repetition within it.

Source:
    Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS, _STEPS, _LOW = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def words(group: Tensor, *, seed: int, stream: int, draw: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of every group of four elements, int64 numbers in 0..2^32-1 of the shape of `group` (int64)."""
    c0, c1 = group & _LOW, (group >> 32) & _LOW
    c2, c3 = torch.full_like(group, stream), torch.full_like(group, draw)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64, as the bits of a product are
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _STEPS[0]) & _LOW, (k1 + _STEPS[1]) & _LOW
    return c0, c1, c2, c3


def numbers(first: int, last: int, *, seed: int, stream: int, draw: int = 0, device: torch.device) -> Tensor:
    """[last - first] numbers of the elements from the first on, int64 in 0..2^32-1."""
    group = torch.arange(first >> 2, (last + 3) >> 2, device=device)
    return torch.stack(words(group, seed=seed, stream=stream, draw=draw), 1).flatten()[first & 3 :][: last - first]


def kept(
    passes: int, units: int, *, p: float, seed: int, device: torch.device, stream: int = 0, first: int = 0
) -> Tensor:
    """[passes, units] bool: what dropout of probability p keeps in the passes from `first` on. Element
    pass * units + unit is dropped where its number is below floor(p 2^32).
    """
    drawn = numbers(first * units, (first + passes) * units, seed=seed, stream=stream, device=device)
    return (drawn >= int(p * 2**32)).view(passes, units)


def normals(count: int, *, seed: int, stream: int, draw: int = 0, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count] standard normal numbers, of the elements from 0 on, by Box and Muller: an even element and the next one
    are R cos and R sin of an angle; R is of the first one's bits and the angle of the second one's. None is above 5.8.
    """
    w = numbers(0, (count + 1) // 2 * 2, seed=seed, stream=stream, draw=draw, device=device).view(-1, 2)
    radius = (-2 * (((w[:, 0] >> 8) + 1).to(dtype) * 2**-24).log()).sqrt()
    angle = 2 * math.pi * (w[:, 1].to(dtype) * 2**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[:count]
