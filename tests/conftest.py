"""Shared by the tests: the error budget that every kernel is held to, and tensors drawn for an operator's samples."""

from __future__ import annotations

import os

import pytest
import torch

# What a result may differ by from float64 truth, beyond twice the reference's own error, relative to max(1, |truth|).
EPSILON = {torch.float64: 2e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Twice the reference's own error; eight times where a GPU's every approximation is to be as wrong as its documentation
# allows, at parameters for which large terms cancel (`make emulate`).
FACTOR = 2 if os.environ.get("EMULATED_ERROR", "exact") == "exact" else 8


def pytest_collection_modifyitems(items):
    """Long tests first: at the end a worker would wait for the last of them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def maker(dtype=torch.float64, device="cpu"):
    """`make(*shape, low, high)` for an operator's samples: uniform, exactly representable in float16 and up."""

    def make(*shape, low=-2.0, high=2.0, extreme=None):
        values = torch.empty(shape, dtype=torch.float64).uniform_(low, high)
        return values.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).to(dtype).to(device)

    return make


def extreme_maker(dtype=torch.float32, device="cpu"):
    """`make` for a test of extremes: log-uniform between the numbers of `extreme`, else ties, tiny and huge numbers."""

    def make(*shape, low=None, high=None, extreme=None):
        if extreme:
            exponent = torch.empty(shape, dtype=torch.float64).uniform_(*torch.tensor(extreme).log10().tolist())
            return (10**exponent).to(dtype).to(device)
        values = torch.tensor([0.0, 0.0, 1e-30, -1e-3, 0.1, 1.0, -50.0, 1e6])
        return values[torch.randint(len(values), shape)].to(dtype).to(device)

    return make


def cast(tensors, dtype):
    """The tensors in another dtype; integers, masks and absent ones stay as they are."""
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def leaves_of(tensors, op=None, wanted=None):
    """Copies that ask for gradients: all floating ones, or those that have one in an operator, or the `wanted`."""
    asking = [t is not None and t.is_floating_point() for t in tensors]
    if op is not None:
        asking = [name in (op.differentiable if wanted is None else wanted) for name in op.tensors]
    return [t if t is None else t.detach().clone().requires_grad_(asks) for t, asks in zip(tensors, asking)]


def moving(tensors):
    """Those that ask for a gradient."""
    return [t for t in tensors if t is not None and t.requires_grad]


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def weights_for(results):
    """A gradient for every result that has one, other numbers for every element: 1 for a scalar, as losses get."""
    return [
        torch.linspace(0.5, 1.5, r.numel(), dtype=torch.float64, device=r.device).bfloat16().to(r.dtype).view(r.shape)
        if r.dim()
        else torch.ones_like(r)
        for r in moving(results)
    ]


def overflows(truth, dtype):
    """Where float64 truth is finite, but not (or hardly) in this dtype."""
    return truth.isfinite() & (truth.abs() > torch.finfo(dtype).max / 4)


def assert_within_budget(actual, reference, truth, what="", exempt=False):
    """|actual - truth| <= FACTOR max|reference - truth| + epsilon, relative to max(1, |truth|); NaN and inf alike."""
    assert actual.dtype == reference.dtype and actual.shape == truth.shape, what
    if not truth.numel():
        return
    if not truth.is_floating_point():
        assert actual.equal(truth), what
        return
    truth, scale = truth.double(), truth.double().abs().clamp_min(1)
    exempt = overflows(truth, actual.dtype) | exempt

    def error(value):
        value = value.double()
        same = (value == truth) | (value.isnan() & truth.isnan()) | exempt
        return torch.where(same, 0.0, (value - truth).abs() / scale)

    bound = FACTOR * error(reference).nan_to_num(0, 0).max() + EPSILON[actual.dtype]
    worst = error(actual)
    assert not worst.isnan().any(), f"{what}: NaN where the truth is {truth[worst.isnan()][:3]}, or not where it is NaN"
    assert worst.max() <= bound, (
        f"{what}: error {worst.max():.3g} at {truth.flatten()[worst.argmax()]:.6g}, bound {bound:.3g}"
    )


@pytest.fixture(params=["cpu", "reference"])
def served_by(request):
    """The CPU's kernels, then the reference; the name of `fastprob.backend`."""
    import fastprob
    from fastprob import _backends

    if request.param == "cpu" and _backends._reasons["cpu"] == "not built":
        pytest.skip("no C++ kernels")
    with fastprob.backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """Waking a second thread costs more than small products, far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def encoder():
    """The tiny CLIP, frozen."""
    from fastprob.encoders import load_encoder

    return load_encoder("tiny")


@pytest.fixture(scope="session")
def splits():
    """Thickened digits."""
    from fastprob.data.labelled import open_splits

    return open_splits("digits:thickened")
