"""Gradients of operators of pairs of rows, from the kernel of the operator of a coordinate. See fastprob/ops/_pairs.py.

Sums of float32 slopes of some tens that cancel are wrong by up to four times what the reference's are.
"""

import functools

import torch

from fastprob.ops import _pairs
from fastprob.ops._maths import wide

NUMBERS = 2  # a block of pairs is to occupy a GPU: its coordinates take 256 MB at most


def gradients(backward, rows, columns):
    """The launcher of _x_backward: `backward` is the one of an operator that takes `rows` numbers of a row and
    `columns` of another. Those of chosen pairs (k) take these last, as indices.
    """
    count = rows + columns

    def slopes(own, others, **options):
        tensors = [t.contiguous() for t in torch.broadcast_tensors(*own, *others)]
        return backward(torch.ones_like(tensors[0]), *tensors, reduction="none", needs=2**count - 1, **options)

    def launch(grad, *tensors, needs, k=None, **options):
        indices = None if k is None else tensors[count]
        grad, *inputs = wide(grad, *tensors[:count])
        of_pair = functools.partial(slopes, **options)
        grads = _pairs.gradients(of_pair, inputs[:rows], inputs[rows:], grad, indices, NUMBERS)
        return [g.to(t.dtype) if needs >> i & 1 else t.new_empty(0) for i, (g, t) in enumerate(zip(grads, tensors))]

    return launch
