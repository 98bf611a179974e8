"""Every operator, forward alone and with its backward pass: each backend, its reference and what users had before."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from baselines import BASELINES
from measure import Case, Implementation, Result, measure
from verify import all_backends, require_within_budget, timed

import fastprob
from fastprob._op import OPS

SECONDS = {"cpu": 8.0, "cuda": 2.0}  # of all implementations of a case together
DIRECTIONS = ("forward", "forward+backward")
L2_SETS = 4  # inputs and results of all sets together: so many times the L2 cache, where 16 sets reach that
AUTOTUNED = ("probvlm_loss", (8192, 512))  # max-autotune takes its time


def cases():
    """On the CPU each operator's first size, on a GPU all of them; elementwise ones also in bfloat16, but the first."""
    for name, op in OPS.items():
        for direction in DIRECTIONS:
            yield Case(name, op.bench_sizes[0], "float32", direction, "cpu")
            for size in op.bench_sizes:
                yield Case(name, size, "float32", direction, "cuda")
            for size in op.bench_sizes[1:] if op.elementwise else ():
                yield Case(name, size, "bfloat16", direction, "cuda")


def names(case: Case) -> list[str]:
    """The implementations of a case; the backends that this machine lacks are not among them."""
    ours = [f"fastprob {backend}" for backend in all_backends(case.op, case.device)]
    theirs = [*BASELINES.get(case.op, {})]
    if "eager best" in theirs:
        theirs.append("torch.compile")
    if case.device == "cuda" and (case.op, case.shape) == AUTOTUNED:
        theirs.append("torch.compile max-autotune")
    reference = ["reference"] if case.shape[0] in (1024, 8192) else []
    return ours + reference + theirs


PARAMETERS = [
    pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.gpu] if case.device == "cuda" else [])
    for case in cases()
    for name in names(case)
]


def inputs(case: Case) -> list[torch.Tensor]:
    """The tensors of a problem of the case's size."""
    op, dtype = OPS[case.op], getattr(torch, case.dtype)

    def make(*shape, low=-2.0, high=2.0, extreme=None):
        return torch.empty(shape, device=case.device).uniform_(low, high).to(dtype)

    tensors = op.inputs(make, *case.shape)
    return [
        t.requires_grad_(name in op.differentiable and name not in op.frozen) for name, t in zip(op.tensors, tensors)
    ]


def results(case: Case, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the operator returns, as far as shapes and types go."""
    results = timed(case.op)(*[t.to("meta") for t in tensors])
    return (results,) if isinstance(results, torch.Tensor) else results


def least_bytes(case: Case, tensors: list[torch.Tensor]) -> int:
    """Bytes of every input read and every result written once, and again where a backward pass has to come back."""
    read, grads = sum(t.nbytes for t in tensors), sum(t.nbytes for t in tensors if t.requires_grad)
    written = sum(r.nbytes for r in results(case, tensors) if r.dim())
    if case.direction == "forward":
        return read + written
    return read + written + grads + (0 if written == 0 else read + written)


def implementation(case: Case, name: str) -> Implementation:
    modes = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}
    if name in modes:
        function = torch.compile(BASELINES[case.op]["eager best"], fullgraph=True, dynamic=False, mode=modes[name])
    else:
        function = BASELINES.get(case.op, {}).get(name, timed(case.op))
    ones = [torch.ones(r.shape, dtype=r.dtype, device=case.device) for r in results(case, inputs(case))]

    def forward(tensors):
        with torch.no_grad():
            return function(*tensors)

    def forward_and_backward(tensors):
        values = function(*tensors)
        values = (values,) if isinstance(values, torch.Tensor) else values
        pairs = [(value, one) for value, one in zip(values, ones) if value.requires_grad]
        values, grads = zip(*pairs)
        return torch.autograd.grad(values, [t for t in tensors if t.requires_grad], grads)

    call = forward if case.direction == "forward" else forward_and_backward
    backend = name.removeprefix("fastprob ")
    if backend in ("reference", "cpu", "triton", "cuda"):
        return Implementation(call, lambda: fastprob.backend(backend))
    return Implementation(call)


@functools.lru_cache(maxsize=1)
def measured(case: Case) -> dict[str, Result]:
    """All implementations of a case, once the operator's results have passed on the inputs to be timed."""
    torch.manual_seed(0)
    first = inputs(case)
    require_within_budget(case.op, first)
    sets = 1
    if case.device == "cuda":
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        sets = min(max(math.ceil(L2_SETS * l2 / least_bytes(case, first)), 2), 16)
    every = [first, *(inputs(case) for _ in range(sets - 1))]
    return measure({n: implementation(case, n) for n in names(case)}, every, case.device, SECONDS[case.device])


@pytest.mark.parametrize(("case", "name"), PARAMETERS)
def test_op(case, name, report):
    result = measured(case)[name]
    if result.error and name in BASELINES[case.op]:
        pytest.skip(f"{name} cannot run this: {result.error}")
    report(case, name, result, least_bytes(case, inputs(case)))
