"""The k least of every row of values that are computed a block of rows at a time."""

import torch

from fastprob.kernels._pairwise import HEIGHT

ELEMENTS = 2**24  # of a block of rows: 64 MB in float32


def nearest(values, mu, columns, k):
    """The least [N, k], ascending, in the type of mu [N, D], and their columns.

    `values(first, out)` fills `out` [rows, columns], float64 or float32, with those of the rows from `first` on.
    """
    out, indices = mu.new_empty(mu.shape[0], k), torch.empty(mu.shape[0], k, dtype=torch.int64, device=mu.device)
    height = max(ELEMENTS // columns // HEIGHT, 1) * HEIGHT
    compute = torch.float64 if mu.dtype == torch.float64 else torch.float32
    block = torch.empty(min(height, mu.shape[0]), columns, dtype=compute, device=mu.device)
    for first in range(0, mu.shape[0], height):
        some = values(first, block[: mu.shape[0] - first])
        rows = slice(first, first + height)
        indices[rows] = least(some, k)
        out[rows] = some.gather(1, indices[rows])
    return out, indices


def least(values, k):
    """The columns of the k least of every row, ascending: the lower one of equal values first, NaN last.

    A float32 and its column make one int64 that is ordered as they are, for topk, which breaks ties in no order.
    """
    if values.dtype == torch.float64:
        return values.sort(dim=1, stable=True).indices[:, :k]
    values = values.masked_fill(values.isnan(), torch.nan) + 0.0  # one NaN, above infinity, and no -0
    bits = values.view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (bits.long() << 32) | torch.arange(values.shape[1], device=values.device)
    return keys.topk(k, dim=1, largest=False).values & 0xFFFFFFFF
