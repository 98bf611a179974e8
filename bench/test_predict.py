"""Uncertainty of a batch of embeddings by 20 dropout passes: `predict`, and what users write in its place."""

from __future__ import annotations

import functools

import pytest
import torch
from baselines import best_dropout, best_variance
from measure import Case, Implementation, Result, measure
from torch.nn import functional as F
from verify import require_within_budget

from fastprob.adapters import GGDAdapter, predict

SECONDS = {"cpu": 20.0, "cuda": 5.0}  # of all implementations together
DIM, PASSES = 512, 20
CASES = [Case("predict", (1000, DIM), "float32", f"{PASSES} passes", device) for device in ("cpu", "cuda")]


def looped(adapter: GGDAdapter, x: torch.Tensor):
    """The adapter in training mode, call by call."""
    adapter.train()
    mus = torch.stack([adapter(x)[0] for _ in range(PASSES)])
    adapter.eval()
    mu, inv_alpha, beta = adapter(x)
    return mu, best_variance(inv_alpha + 1e-4, beta + 1e-4), mus.var(0, correction=0)


def batched(adapter: GGDAdapter, x: torch.Tensor):
    """What passes share computed once, and their products by blocks."""
    hidden, last = adapter.before_dropout(x), adapter.after_dropout
    mu, inv_alpha, beta = adapter.heads(last(hidden) + x)
    first, _, head = adapter.block_mu
    constant = F.linear(x + last.bias, first.weight, first.bias)
    epistemic = best_dropout(hidden, constant, first.weight @ last.weight, head.weight)[1]
    return mu, best_variance(inv_alpha + 1e-4, beta + 1e-4), epistemic


WAYS = {
    "fastprob": lambda adapter, x: predict(adapter, x, passes=PASSES),
    "eager loop": looped,
    "eager best": batched,
}


@functools.lru_cache(maxsize=1)
def measured(case: Case) -> dict[str, Result]:
    torch.manual_seed(0)
    adapter = GGDAdapter(DIM).to(case.device)
    x = F.normalize(torch.randn(case.shape, device=case.device), dim=-1)
    with torch.no_grad():
        first, _, last = adapter.block_mu
        constant = F.linear(x + adapter.after_dropout.bias, first.weight, first.bias)
        fold = first.weight @ adapter.after_dropout.weight
        tensors = [adapter.before_dropout(x), constant, fold, last.weight.detach()]
    require_within_budget("mc_dropout", tensors)
    ways = {name: Implementation(torch.no_grad()(functools.partial(way, adapter))) for name, way in WAYS.items()}
    return measure(ways, [x], case.device, SECONDS[case.device])


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.gpu] if case.device == "cuda" else [])
        for case in CASES
        for name in WAYS
    ],
)
def test_predict(case, name, report):
    report(case, name, measured(case)[name])
