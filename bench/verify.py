"""Red results are not timed: kernels within the tests' error budget, baselines that compute what the reference does."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Callable

import pytest
import torch
from baselines import BASELINES

import fastprob
from fastprob import _backends
from fastprob._op import OPS

_spec = importlib.util.spec_from_file_location(
    "tests_conftest", pathlib.Path(__file__).parent.parent / "tests" / "conftest.py"
)
tests_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tests_conftest)


def all_backends(name: str, device: str) -> list[str]:
    """The backends that serve an operator with kernels of their own."""
    candidates = ("cpu",) if device == "cpu" else ("triton", "cuda")
    return [b for b in candidates if _backends._chosen(name, device.upper(), b) == b]


def timed(name: str) -> Callable:
    """An operator with the options that it is timed with."""
    op = OPS[name]
    return functools.partial(op.function, **op.bench_options)


def value_and_grads(function, tensors) -> list[torch.Tensor]:
    """The results, and the gradients of those tensors that ask for one."""
    leaves = [t if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    results = tests_conftest.as_tuple(function(*leaves))
    asking, moving = tests_conftest.moving(leaves), tests_conftest.moving(results)
    grads = torch.autograd.grad(sum(r.sum() for r in moving), asking) if asking else ()
    return [*(r.detach() for r in results), *grads]


def check(name: str, tensors) -> None:
    """Raises AssertionError unless every backend is within the tests' error budget, the reference being the truth."""
    op, function = OPS[name], timed(name)
    with fastprob.backend("reference"):
        truth = value_and_grads(function, tests_conftest.cast(tensors, torch.float64))
        reference = value_and_grads(function, tensors)
    outputs = [f"result {i}" for i, _ in enumerate(op.results)]
    outputs += [f"gradient of {n}" for n, t in zip(op.tensors, tensors) if t is not None and t.requires_grad]
    exempt = tests_conftest.overflows(truth[0], tensors[0].dtype)
    for backend in all_backends(name, tensors[0].device.type):
        with fastprob.backend(backend):
            actual = value_and_grads(function, tensors)
        for what, a, r, t in zip(outputs, actual, reference, truth):
            exempt_here = exempt if exempt.shape in ((), t.shape) else False
            if "seed" in op.options and what.startswith("gradient") and t.numel():
                exempt_here = exempt_here | at_a_kink(a, t)
            tests_conftest.assert_within_budget(a, r, t, f"{name} by {backend}, {what}", exempt_here)


def at_a_kink(actual: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The worst row in a hundred of networks with a ReLU, and no more: where it takes nearly 0, rounding decides."""
    error = (actual - truth).abs().reshape(len(truth), -1).amax(1)
    worst = torch.zeros_like(error, dtype=torch.bool)
    worst[error.argsort(descending=True)[: len(truth) // 100]] = True
    return worst.reshape(-1, *[1] * (truth.dim() - 1))


def means(draw) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The mean of every result over 200 draws, and its standard error."""
    results = zip(*(tests_conftest.as_tuple(draw(seed)) for seed in range(200)))
    return [(r.mean(0), r.std(0) / len(r) ** 0.5) for r in map(torch.stack, results)]


def check_draws(baseline: str, function, op, tensors) -> None:
    """A baseline that draws by torch's generator: its means are the reference's, within their standard errors."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = means(lambda seed: function(*tensors))
        ours = means(lambda seed: op.reference(*tensors, **{**op.bench_options, "seed": seed}))
    for (x, x_error), (y, y_error) in zip(theirs, ours):
        deviations = (x - y) / (x_error.square() + y_error.square() + 1e-20).sqrt()
        assert deviations.square().mean() < 3, f"{baseline} is not the reference"


@functools.cache
def check_samples(name: str, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong on the operator's samples, as it is timed, or that a baseline computes something else."""
    op = OPS[name]
    try:
        for size in op.sizes:
            check(name, tests_conftest.leaves_of(op.inputs(tests_conftest.maker(dtype, device), *size), op))
        of_sizes = (op.inputs(tests_conftest.maker(), *size) for size in reversed(op.sizes))
        whole = next(each for each in of_sizes if all(t is not None for t in each))  # with all that may be left out
        tensors = tests_conftest.leaves_of(whole, op)
        truth = value_and_grads(functools.partial(op.reference, **op.bench_options), tensors)
        for baseline, function in BASELINES.get(name, {}).items():
            if "seed" in op.options:
                check_draws(baseline, function, op, tensors)
                continue
            for actual, expected in zip(value_and_grads(function, tensors), truth):
                torch.testing.assert_close(  # plain autograd, of the reference too, is NaN where mu meets a target
                    actual, expected, rtol=1e-9, atol=1e-12, equal_nan=True, msg=f"{baseline} is not the reference"
                )
    except AssertionError as error:
        return str(error)
    return None


def require_within_budget(name: str, tensors) -> None:
    """Fails the test unless the operator passes on its samples and on these very inputs."""
    problem = check_samples(name, tensors[0].dtype, tensors[0].device.type)
    try:
        if problem is None:
            check(name, tensors)
    except AssertionError as error:
        problem = str(error)
    if problem:
        pytest.fail(f"{name} is not timed, its results are red: {problem}", pytrace=False)
