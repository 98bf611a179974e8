"""Every operator, forward alone and with its backward pass: each backend, its reference and what users had before."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from measure import Case, Implementation, Result, measure
from verify import all_backends, require_within_budget

import fastprob
from fastprob._op import OPS
from fastprob.demo.eager import BASELINES

SECONDS = {"cpu": 8.0, "cuda": 2.0}  # of all implementations of a case together
DIRECTIONS = ("forward", "forward+backward")
FROZEN = {"image", "text", "target", "prototypes", "labels"}  # tensors that ask for no gradient: embeddings
L2_SETS = 4  # inputs and results of all sets together: so many times the L2 cache, where 16 sets reach that
AUTOTUNED = ("probvlm_loss", (8192, 512))  # max-autotune takes its time
GPU_INPUTS = [
    ((64, 512), "float32"),
    ((8192, 512), "float32"),
    ((65536, 512), "float32"),
    ((8192, 512), "bfloat16"),
    ((65536, 512), "bfloat16"),
]


POTENTIAL = {"cpu": [(1000, 512)], "cuda": [(1000, 512), (21000, 512)]}  # ImageNet's classes, ImageNet-21k's
PDIST_LIMIT = 1448  # points that pdist's backward pass takes on a GPU
CLASSES = 100  # of prototype_dispersion


def cases():
    for direction in DIRECTIONS:
        for device, shapes in POTENTIAL.items():
            for shape in shapes:
                yield Case("gaussian_potential", shape, "float32", direction, device)
            yield Case("prototype_dispersion", (1024, 512), "float32", direction, device)
    for op in [op for op in OPS if OPS[op].elementwise]:
        for direction in DIRECTIONS:
            yield Case(op, (1024, 512), "float32", direction, "cpu")
            for shape, dtype in GPU_INPUTS:
                if op in ("probvlm_loss", "ggd_nll") or shape[0] == 8192:
                    yield Case(op, shape, dtype, direction, "cuda")


def names(case: Case) -> list[str]:
    """The implementations of a case; the backends that this machine lacks are not among them."""
    ours = [f"fastprob {backend}" for backend in all_backends(case.op, case.device)]
    theirs = [*BASELINES.get(case.op, {})]
    if case.op == "gaussian_potential" and case.device == "cuda" and case.shape[0] > PDIST_LIMIT:
        theirs.remove("eager as released")
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


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Of the operator's tensors: the case's, as a rule."""
    if case.op == "prototype_dispersion":
        return [case.shape, (CLASSES, case.shape[1]), case.shape[:1]]
    return [case.shape] * len(OPS[case.op].tensors)


def inputs(case: Case) -> list[torch.Tensor]:
    """The tensors of the operator's first sample, in the case's shapes."""
    remaining = iter(shapes(case))

    def make(*_, low=-2.0, high=2.0):
        values = torch.empty(next(remaining), device=case.device).uniform_(low, high)
        values = values if op.elementwise else torch.nn.functional.normalize(values, dim=1)
        return values.to(getattr(torch, case.dtype))

    op = OPS[case.op]
    tensors, _ = next(op.samples(make))
    return [t.requires_grad_(name not in FROZEN) for name, t in zip(op.tensors, tensors)]


def least_bytes(case: Case) -> int:
    """Bytes of every input read and every result written once, and again where a backward pass has to come back."""
    op = OPS[case.op]
    itemsize = getattr(torch, case.dtype).itemsize
    sizes = {
        name: math.prod(shape) * (torch.int64.itemsize if name in op.indices else itemsize)
        for name, shape in zip(op.tensors, shapes(case))
    }
    read, grads = sum(sizes.values()), sum(size for name, size in sizes.items() if name not in FROZEN)
    written = 0 if op.is_scalar and op.is_scalar(**op.options) else math.prod(case.shape) * itemsize
    if case.direction == "forward":
        return read + written
    return read + written + grads + (0 if written == 0 else read + written)


def implementation(case: Case, name: str) -> Implementation:
    modes = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}
    if name in modes:
        function = torch.compile(BASELINES[case.op]["eager best"], fullgraph=True, dynamic=False, mode=modes[name])
    else:
        function = BASELINES.get(case.op, {}).get(name, getattr(fastprob, case.op))
    ones = torch.ones(case.shape, dtype=getattr(torch, case.dtype), device=case.device)

    def forward(tensors):
        with torch.no_grad():
            return function(*tensors)

    def forward_and_backward(tensors):
        value = function(*tensors)
        return torch.autograd.grad(value, [t for t in tensors if t.requires_grad], ones if value.dim() else None)

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
        sets = min(max(math.ceil(L2_SETS * l2 / least_bytes(case)), 2), 16)
    every = [first, *(inputs(case) for _ in range(sets - 1))]
    return measure({n: implementation(case, n) for n in names(case)}, every, case.device, SECONDS[case.device])


@pytest.mark.parametrize(("case", "name"), PARAMETERS)
def test_op(case, name, report):
    report(case, name, measured(case)[name], least_bytes(case))
