"""One whole training step on cached embeddings: adapter, loss, backward pass, Adam."""

from __future__ import annotations

import functools

import pytest
import torch
from baselines import BASELINES
from measure import Case, Implementation, Result, measure
from verify import require_within_budget

import fastprob

SECONDS = {"cpu": 15.0, "cuda": 5.0}  # of all implementations together
DIM, HIDDEN = 512, 256  # of the released ViT-B/32 configuration
CASES = [
    Case("training step", (1024, DIM), "float32", "step", "cpu"),
    Case("training step", (64, DIM), "float32", "step", "cuda"),
    Case("training step", (1024, DIM), "float32", "step", "cuda"),
]
LOSSES = {"fastprob": fastprob.probvlm_loss, **BASELINES["probvlm_loss"]}
COMPILED = {"fastprob, torch.compile": "fastprob", "torch.compile": "eager best"}  # adapter and loss in one graph
NAMES = [*LOSSES, *COMPILED]


def implementation(case: Case, name: str) -> Implementation:
    from fastprob.adapters import ProbVLM

    torch.manual_seed(0)
    model = ProbVLM(DIM, HIDDEN, positive="softplus").to(case.device)
    # `capturable` keeps the step count on the GPU, for a CUDA graph: for every implementation alike.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=case.device == "cuda")
    loss = LOSSES[COMPILED.get(name, name)]

    def objective(image, text):
        image_parameters, text_parameters = model(image, text)
        return loss(*image_parameters, *text_parameters, image, text)

    if name in COMPILED:
        objective = torch.compile(objective, fullgraph=True, dynamic=False)

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        value = objective(*batch)
        value.backward()
        optimizer.step()
        return value.detach()

    return Implementation(step)


@functools.lru_cache(maxsize=1)
def measured(case: Case) -> dict[str, Result]:
    torch.manual_seed(0)
    batch = [torch.nn.functional.normalize(torch.randn(case.shape, device=case.device), dim=-1) for _ in range(2)]
    parameters = [torch.rand(case.shape, device=case.device) + (0, 0.5, 0.5)[i % 3] for i in range(6)]
    require_within_budget("probvlm_loss", [*(p.requires_grad_() for p in parameters), *batch])
    return measure({n: implementation(case, n) for n in NAMES}, [batch], case.device, SECONDS[case.device])


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.gpu] if case.device == "cuda" else [])
        for case in CASES
        for name in NAMES
    ],
)
def test_training_step(case, name, report):
    report(case, name, measured(case)[name])
