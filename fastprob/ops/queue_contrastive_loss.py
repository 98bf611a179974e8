"""Contrast of B queries with K keys, a momentum batch and a queue, under soft targets, without the B x K matrix.

    s_ij = q_i k_j / tau,   p_i = softmax of s_i;   r_i = softmax over j of u_i k_j / tau', u the teacher's queries
    h_ij = 1 / n_i where key j has query i's id, n_i the number of such keys; else 0
    y_ij = alpha r_ij + (1 - alpha) h_ij,   loss = mean over i of sum over j of y_ij (-log p_ij)

With w_i the sum of y_i, which is 1, or alpha for a query without a key of its id, the slope of s_ij is
g_ij = (w_i p_ij - y_ij) / B, and so the gradients are

    of q_i: sum over j of g_ij k_j / tau;    of tau: -sum over i, j of g_ij s_ij / tau

One sweep over the keys can make all of it: besides the sums of both softmaxes it keeps, for each query, the sum of the
keys under each of them. Both are held relative to the largest exponent so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprob._op import Detached, Indices, operator
from fastprob.ops._maths import readable, wide


def _check(*, queries, keys, query_ids, key_ids, temperature, teacher, teacher_temperature, alpha):
    who = "queue_contrastive_loss"
    if queries.dim() != 2:
        raise ValueError(f"{who}: queries must be [B, D], got {list(queries.shape)}")
    count, dim = queries.shape
    if keys.dim() != 2 or keys.shape[1] != dim or keys.shape[0] == 0:
        raise ValueError(f"{who}: keys must be [K, D] with K at least 1 and D = {dim}, got {list(keys.shape)}")
    of = {"query_ids": (query_ids, "B", count), "key_ids": (key_ids, "K", keys.shape[0])}
    for name, (ids, axis, length) in of.items():
        if ids.shape != (length,):
            raise ValueError(f"{who}: {name} must be [{axis}] with {axis} = {length}, got {list(ids.shape)}")
    given = [each is not None for each in (teacher, teacher_temperature, alpha)]
    if any(given) and not all(given):
        raise ValueError(f"{who}: teacher, teacher_temperature and alpha must be given together, got {sum(given)} of 3")
    if teacher is not None and teacher.shape != queries.shape:
        raise ValueError(f"{who}: teacher must be {list(queries.shape)} as queries is, got {list(teacher.shape)}")
    scalars = {"temperature": temperature, "teacher_temperature": teacher_temperature, "alpha": alpha}
    for name, scalar in scalars.items():
        if scalar is not None and scalar.dim():
            raise ValueError(f"{who}: {name} must be a scalar, got {list(scalar.shape)}")
    if alpha is not None and readable(alpha) and not 0 <= alpha.item() <= 1:
        raise ValueError(f"{who}: alpha must be in 0..1, got {alpha.item():g}")


def _inputs(make, count, keys, dim, teachers):
    """Rows of unit length, about; ids of which some keys have none and some queries have several keys, or none."""
    edge = min(math.sqrt(3 / dim), 1.0)
    queries, others = make(count, dim, low=-edge, high=edge), make(keys, dim, low=-edge, high=edge)
    query_ids = torch.arange(count, device=queries.device) // 2
    key_ids = torch.arange(keys, device=queries.device) ** 2 % 11 - 1
    teacher = make(count, dim, low=-edge, high=edge), make(low=0.1, high=0.4), make(low=0.2, high=0.8)
    temperature = make(low=0.2, high=0.5)
    return queries, others, query_ids, key_ids, temperature, *(teacher if teachers else (None, None, None))


def _parts(queries, keys, query_ids, key_ids, temperature, teacher, teacher_temperature, alpha):
    """s [B, K] relative to its rows' greatest, the logarithms of p, and y."""
    s = queries @ keys.T / temperature
    s = s - s.detach().amax(1, keepdim=True)
    equal = (query_ids[:, None] == key_ids).to(s.dtype)
    targets = equal / equal.sum(1, keepdim=True).clamp(min=1)
    if teacher is not None:
        teacher, teacher_temperature, alpha = wide(teacher, teacher_temperature, alpha)
        targets = (1 - alpha) * targets + alpha * (teacher @ keys.T / teacher_temperature).softmax(1)
    return s, s.log_softmax(1), targets


def _gradient(grad, queries, keys, query_ids, key_ids, temperature, *teacher):
    grad, queries, keys, temperature = wide(grad, queries, keys, temperature)
    s, log_p, y = _parts(queries, keys, query_ids, key_ids, temperature, *teacher)
    g = grad * (log_p.exp() * y.sum(1, keepdim=True) - y) / max(queries.shape[0], 1)
    return g @ keys / temperature, None, None, None, -(g * s).sum() / temperature, None, None, None


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    sizes=((0, 3, 4, 1), (1, 1, 1, 0), (3, 7, 5, 1), (67, 1100, 33, 1), (5, 150, 129, 0)),
    bench_sizes=((64, 57664, 256, 1), (256, 65792, 256, 1)),  # BLIP's batch of a GPU and its queue; more, and ALBEF's
    is_scalar=lambda **_: True,
    elementwise=False,
)
def queue_contrastive_loss(
    queries: Tensor,
    keys: Detached,
    query_ids: Indices,
    key_ids: Indices,
    temperature: Tensor,
    teacher: Detached | None = None,
    teacher_temperature: Detached | None = None,
    alpha: Detached | None = None,
) -> Tensor:
    """Cross-entropy of B queries' similarities to K keys with soft targets: ALBEF's and BLIP's momentum contrast.

        p_i = softmax over j of q_i k_j / tau,    r_i = softmax over j of u_i k_j / tau'
        loss = mean over i of sum over j of -(alpha r_ij + (1 - alpha) h_ij) log p_ij

    h_ij is uniform over the keys with query i's id. The kernels work through the keys in blocks and never hold [B, K];
    the reference does. Keys and targets are constants: gradients are of queries and temperature. ALBEF's and BLIP's
    loss is the mean of this one for images as queries and for texts. Half types are computed in float32.

    Args:
        queries: [B, D], features of the batch, of unit norm as a rule; float64, float32, bfloat16 or float16.
        keys: [K, D], the other side's momentum features of the batch and then of the queue.
        query_ids: [B] int64; key_ids: [K] int64. A key with a query's id is a positive, as its own and those of other
            captions of an image. A place of the queue that is still empty has an id that no query has.
        temperature: a scalar, tau, above 0.
        teacher: [B, D], the momentum encoder's queries, u; or None, and alpha is 0.
        teacher_temperature: a scalar, tau'; the temperature itself in ALBEF and BLIP.
        alpha: a scalar, weight of the teacher's softmax, in 0..1; ALBEF and BLIP raise it to 0.4 as training begins. It
            is a tensor so that compiled code and a captured graph serve all its values.

    Returns:
        A scalar in nats; 0 for no queries. A query none of whose keys has its id has targets alpha r alone.

    Raises:
        ValueError: for tensors of other shapes or dtypes, or some of the last three without the others; for alpha out
            of range where it can be read without waiting for a device: eagerly on the CPU.

    Source:
        ALBEF (Li et al., NeurIPS 2021), eq. 1, 2 and 6; BLIP (Li et al., ICML 2022), sec. 3.2; He et al., Momentum
        contrast, CVPR 2020.
    """
    dtype = queries.dtype
    queries, keys, temperature = wide(queries, keys, temperature)
    _, log_p, y = _parts(queries, keys, query_ids, key_ids, temperature, teacher, teacher_temperature, alpha)
    return (-(y * log_p).sum() / max(queries.shape[0], 1)).to(dtype)
