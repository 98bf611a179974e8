"""Pairs of rows in torch code: what the references of operators of [N, D] and [M, D] share."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fastprob.ops._maths import has_numbers

ELEMENTS = 2**22  # of all pairs of a block: 16 MB in float32


def blocks(x: Tensor, columns: int) -> Iterator[slice]:
    """Slices of the rows of x [N, D], of few enough that [rows, columns, D] is small; at least one slice.

    Without numbers to compute with there is one slice: a shape function must not depend on sizes.
    """
    count = x.shape[0]
    if not has_numbers(x):
        yield slice(None)
        return
    rows = max(ELEMENTS // max(columns * x.shape[1], 1), 1)
    for start in range(0, max(count, 1), rows):
        yield slice(start, start + rows)
