"""What only queue_contrastive_loss promises: the papers' loss, softmaxes far apart, a weight that ramps, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import assert_within_budget
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import fastprob
from fastprob import queue_contrastive_loss


def problem(count, queue, dim, dtype=torch.float64):
    """A batch of pairs, captions of one image among them, and a queue with some of the same images and empty places."""
    queries, own, teacher = (F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=1) for _ in range(3))
    keys = torch.cat([own, F.normalize(torch.randn(queue, dim, dtype=torch.float64), dim=1)])
    ids = torch.arange(count) // 3
    key_ids = torch.cat([ids, torch.where(torch.arange(queue) % 5 == 1, -100, torch.arange(queue) ** 2 % 97)])
    scalars = torch.tensor([0.07, 0.05, 0.4], dtype=torch.float64)
    queries, keys, teacher, temperature, warmer, alpha = (t.to(dtype) for t in (queries, keys, teacher, *scalars))
    return queries, keys, ids, key_ids, temperature, teacher, warmer, alpha


def value_and_grads(queries, keys, ids, key_ids, temperature, *teacher):
    leaves = queries.detach().clone().requires_grad_(), temperature.detach().clone().requires_grad_()
    value = queue_contrastive_loss(leaves[0], keys, ids, key_ids, leaves[1], *teacher)
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_is_albefs_image_side(served_by, alpha):
    """Its released code's lines, with the targets of its retrieval: all captions of an image share the weight."""
    queries, keys, ids, key_ids, temperature, teacher, *_ = problem(13, 2000, 40)
    image, temp = queries.clone().requires_grad_(), temperature.clone().requires_grad_()
    positives = torch.eq(ids.view(-1, 1), key_ids.view(1, -1)).double()
    targets = positives / positives.sum(1, keepdim=True)
    with torch.no_grad():
        sim_i2t_m = teacher @ keys.t() / temp
        sim_i2t_targets = alpha * F.softmax(sim_i2t_m, dim=1) + (1 - alpha) * targets
    sim_i2t = image @ keys.t() / temp
    expected = -torch.sum(F.log_softmax(sim_i2t, dim=1) * sim_i2t_targets, dim=1).mean()
    grads = torch.autograd.grad(expected, (image, temp))
    actual = value_and_grads(
        queries, keys, ids, key_ids, temperature, teacher, temperature, torch.tensor(alpha, dtype=torch.float64)
    )
    for a, e in zip(actual, (expected, *grads), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


def test_without_a_teacher_it_is_cross_entropy(served_by):
    queries, keys, _, _, temperature, *_ = problem(9, 140, 20)
    leaf, ids = queries.clone().requires_grad_(), torch.arange(9)
    expected = F.cross_entropy(leaf @ keys.T / temperature, ids)
    value, gradient, _ = value_and_grads(queries, keys, ids, torch.arange(149), temperature)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", ["ascending", "descending", "as they come"])
def test_softmaxes_far_apart(served_by, order):
    """Similarities from -2,000 to 2,000, whose greatest is met first, last or between, and elsewhere by the teacher."""
    tensors = list(problem(70, 1500, 24, torch.float32))
    if order != "as they come":
        tensors[1] = tensors[1][(tensors[1] @ tensors[0][0]).argsort(descending=order == "descending")]
    tensors[5] = tensors[5].flip(0)
    tensors[4], tensors[6] = torch.tensor(0.0005), torch.tensor(0.001)
    actual = value_and_grads(*tensors)
    with fastprob.backend("reference"):
        same = value_and_grads(*tensors)
        truth = value_and_grads(*(t.double() if t.is_floating_point() else t for t in tensors))
    assert all(t.isfinite().all() for t in truth)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_within_budget(a, s, t)


def test_a_query_none_of_whose_keys_has_its_id(served_by):
    """It has the teacher's targets alone; without a teacher nothing is asked of it."""
    queries, keys, ids, key_ids, temperature, teacher, warmer, alpha = problem(4, 90, 12)
    ids = torch.tensor([0, 0, -7, 1])
    soft = (teacher @ keys.T / warmer).softmax(1)
    log_p = (queries @ keys.T / temperature).log_softmax(1)
    alone = value_and_grads(queries[2:3], keys, ids[2:3], key_ids, temperature, teacher[2:3], warmer, alpha)[0]
    torch.testing.assert_close(alone, -alpha * (soft * log_p)[2].sum())
    value, gradient, slope = value_and_grads(queries[2:3], keys, ids[2:3], key_ids, temperature)
    assert value == slope == 0 and not gradient.any()


def test_a_weight_that_ramps_compiles_once():
    torch._dynamo.reset()
    *tensors, alpha = problem(5, 30, 8)
    counter = CompileCounter()
    step = torch.compile(lambda *t: 2 * queue_contrastive_loss(*t), backend=counter, fullgraph=True)
    for share in (0.0, 0.1, 1.0):
        torch.testing.assert_close(step(*tensors, alpha * share), 2 * queue_contrastive_loss(*tensors, alpha * share))
    assert counter.frame_count == 1


MEMORY = """
import pathlib, torch, fastprob
torch.set_num_threads(1)
peak = lambda: 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
def step(count, keys):
    queries, teacher = torch.rand(count, 16, requires_grad=True), torch.rand(count, 16)
    ids, tau = torch.arange(keys), torch.tensor(0.1, requires_grad=True)
    keys, alpha, before = torch.rand(keys, 16), torch.tensor(0.4), peak()
    fastprob.queue_contrastive_loss(queries, keys, ids[:count], ids, tau, teacher, tau.detach(), alpha).backward()
    return peak() - before
step(10, 100)
print(step(500, 40_000))
"""


def test_never_holds_the_matrix():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500 * 40_000 * 4 / 10  # bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(3)}, r"queries must be \[B, D\], got \[3\]"),
        ({"keys": torch.ones(7, 4)}, r"keys must be \[K, D\] with K at least 1 and D = 5, got \[7, 4\]"),
        ({"keys": torch.ones(0, 5)}, r"keys must be \[K, D\] with K at least 1 and D = 5, got \[0, 5\]"),
        ({"query_ids": torch.arange(2)}, r"query_ids must be \[B\] with B = 3, got \[2\]"),
        ({"key_ids": torch.arange(3)}, r"key_ids must be \[K\] with K = 7, got \[3\]"),
        ({"key_ids": torch.ones(7)}, "key_ids must be int64, got torch.float32"),
        ({"temperature": torch.ones(1)}, r"temperature must be a scalar, got \[1\]"),
        ({"teacher": torch.ones(3, 4)}, r"teacher must be \[3, 5\] as queries is, got \[3, 4\]"),
        ({"teacher_temperature": None}, "teacher, teacher_temperature and alpha must be given together, got 2 of 3"),
        ({"teacher": None, "alpha": None}, "teacher, teacher_temperature and alpha must be given together, got 1 of 3"),
        ({"alpha": torch.ones(1)}, r"alpha must be a scalar, got \[1\]"),
        ({"alpha": torch.tensor(1.125)}, r"alpha must be in 0\.\.1, got 1.125"),
        ({"alpha": torch.tensor(float("nan"))}, r"alpha must be in 0\.\.1, got nan"),
    ],
)
def test_bad_input_is_named(change, message):
    scalar = torch.tensor(0.1)
    tensors = {"queries": torch.ones(3, 5), "keys": torch.ones(7, 5), "query_ids": torch.arange(3)}
    tensors |= {"key_ids": torch.arange(7), "temperature": scalar, "teacher": torch.ones(3, 5)}
    with pytest.raises(ValueError, match=f"queue_contrastive_loss: {message}"):
        queue_contrastive_loss(**{**tensors, "teacher_temperature": scalar, "alpha": scalar, **change})
