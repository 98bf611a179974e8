"""Operators of all pairs of N and M rows in torch code: what their references share.

What a pair has is the sum over D of what its coordinates have. A block of rows at a time is worked on: its tensors as
[R, 1, D], the others' as [M, D] or, for the chosen ones of every row, [R, k, D]. `numbers` is how many numbers the work
holds for a coordinate of a pair. What a block leaves behind goes into one result: a list of small tensors between large
temporary ones keeps the memory of all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastprob.ops._maths import add_rows, has_numbers

ELEMENTS = 2**22  # of all pairs of a block: 16 MB in float32
Tensors = Sequence[Tensor]


def check_sides(op: str, tensors: Mapping[str, Tensor], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Those named `rows` must be [N, D], those named `columns` [M, D]."""
    first, other = tensors[rows[0]], tensors[columns[0]]
    if first.dim() != 2:
        raise ValueError(f"{op}: {rows[0]} must be [N, D], got {list(first.shape)}")
    if other.dim() != 2 or other.shape[1] != first.shape[1]:
        raise ValueError(f"{op}: {columns[0]} must be [M, D] with D = {first.shape[1]}, got {list(other.shape)}")
    for names, shape, like in ((rows, "[N, D]", first), (columns, "[M, D]", other)):
        for name in names[1:]:
            if tensors[name].shape != like.shape:
                expected = f"{shape} = {list(like.shape)} as {names[0]} is"
                raise ValueError(f"{op}: {name} must be {expected}, got {list(tensors[name].shape)}")


def check_k(op: str, k: int, columns: Tensor) -> None:
    if not 1 <= k <= columns.shape[0]:
        raise ValueError(f"{op}: k must be in 1..M with M = {columns.shape[0]}, got {k}")


def pairwise(values: Callable[[Tensors, Tensors], Tensor], rows: Tensors, columns: Tensors, numbers: int = 1) -> Tensor:
    """[N, M], of which `values(rows, columns)` makes [R, M]."""
    result = rows[0].new_empty(rows[0].shape[0], columns[0].shape[0])
    for some, block in _values(values, rows, columns, numbers):
        result[some] = block
    return result


def nearest(
    values: Callable[[Tensors, Tensors], Tensor], rows: Tensors, columns: Tensors, k: int, numbers: int = 1
) -> tuple[Tensor, Tensor]:
    """The k least of every row, ascending, and their columns: equal ones in this order, NaN last."""
    shape = (rows[0].shape[0], k)
    least, indices = rows[0].new_empty(shape), rows[0].new_empty(shape, dtype=torch.int64)
    for some, block in _values(values, rows, columns, numbers):
        ordered = block.sort(dim=1, stable=True)
        least[some], indices[some] = ordered.values[:, :k], ordered.indices[:, :k]
    return least, indices


def gradients(
    slopes: Callable[[Tensors, Tensors], Tensors],
    rows: Tensors,
    columns: Tensors,
    grad: Tensor,
    indices: Tensor | None = None,
    numbers: int = 1,
) -> list[Tensor]:
    """Those of all rows and columns, by `slopes(rows, columns)`, a coordinate's for each of them.

    grad: [N, M], or [N, k] of the columns that `indices` chooses.
    """
    of_rows, of_columns = [torch.empty_like(t) for t in rows], [torch.zeros_like(t) for t in columns]
    for some in _blocks(rows[0], numbers * grad.shape[1]):
        chosen = None if indices is None else indices[some].flatten()
        others = columns if chosen is None else [_taken(t, chosen, grad.shape[1]) for t in columns]
        each = [grad[some, :, None] * slope for slope in slopes([t[some, None] for t in rows], others)]
        for total, g in zip(of_rows, each):
            total[some] = g.sum(1)
        for i, g in enumerate(each[len(rows) :]):
            total = of_columns[i]
            of_columns[i] = total + g.sum(0) if chosen is None else add_rows(total, chosen, g.flatten(0, 1))
    return [*of_rows, *of_columns]


def _values(values, rows: Tensors, columns: Tensors, numbers: int) -> Iterator[tuple[slice, Tensor]]:
    for some in _blocks(rows[0], numbers * columns[0].shape[0]):
        yield some, values([t[some, None] for t in rows], columns)


def _taken(t: Tensor, chosen: Tensor, k: int) -> Tensor:
    return t.index_select(0, chosen).unflatten(0, (-1, k))


def _blocks(x: Tensor, columns: int) -> Iterator[slice]:
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
