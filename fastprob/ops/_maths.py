"""Scalar maths in torch code that the operators' references share."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half types widened to float32, in which every operator computes."""
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def sign(x: Tensor) -> Tensor:
    """As torch.sign, and NaN for NaN."""
    return torch.where(x.isnan(), x, x.sign())


def power_of_product(x: Tensor, y: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """(x y)^exponent and log(x y) for x, y >= 0, for a product out of the type's range too, where factors are in it.

    There it is the product of two powers: both factors lie on one side of 1, so neither power is 0 where the other is
    infinite. What a number is not for is computed from 1 in its place, whose derivatives are 0, not NaN.
    """
    product, kind = x * y, torch.finfo(x.dtype)
    larger, smaller = torch.maximum(x, y), torch.minimum(x, y)
    over = (product > kind.max) & (larger <= kind.max)
    apart = over | (product < kind.tiny) & (smaller > 0) & (larger <= 1)
    product = torch.where(apart, 1, product)
    x, y = torch.where(apart, x, 1), torch.where(apart, y, 1)
    power = torch.where(apart, x.pow(exponent) * y.pow(exponent), product.pow(exponent))
    return power, torch.where(apart, x.log() + y.log(), product.log())


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """total with values added to its `rows`, those of one row always in the same order."""
    if total.is_cuda:  # where index_add adds in any order
        return total.index_put((rows,), values, accumulate=True)
    return total.index_add(0, rows, values)


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is no fake, of which only the shape is asked."""
    return type(tensor) is Tensor and tensor.device.type != "meta"


def readable(tensor: Tensor) -> bool:
    """Whether a tensor has numbers that can be looked at, and without waiting for a device."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" and type(tensor) is Tensor  # a subclass may be a fake
