"""Statistics that tables, figures and reports share."""

import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from fastprob._arguments import as_tensor


def mean_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation of one value or more; the deviation of a single one is 0. NaN of any NaN."""
    values = np.array(list(values), dtype=float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors [n], ties with their average rank; NaN if one is constant.

    Raises ValueError unless both are [n] with n >= 2 and free of NaN.
    """
    x, y = as_tensor("spearman: x", x), as_tensor("spearman: y", y)
    if x.dim() != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"spearman: x and y must both be [n >= 2], got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.isnan().any() or y.isnan().any():
        raise ValueError("spearman: x and y must be free of NaN")
    return pearson(_average_rank(x), _average_rank(y))


def _average_rank(x: Tensor) -> Tensor:
    """[n] -> [n] float64 ranks from 0, equal values sharing the mean of theirs."""
    _, group, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count + 1) / 2).double()[group]


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two vectors [n]; NaN if one is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan
