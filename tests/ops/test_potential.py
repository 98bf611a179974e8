"""What only gaussian_potential promises: extremes, large problems, dynamic sizes, and the Triton kernel's tiles."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import assert_within_budget, overflows
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastprob
from fastprob import gaussian_potential

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # the file runs itself a second time: see test_triton_kernel
REDUCTIONS = ("mean", "sum", "logmean")
BACKENDS = ("triton",) if INTERPRETING else ("cpu", "reference")
DTYPES = (torch.float32,) if INTERPRETING else (torch.float64, torch.float32)  # the interpreter takes its time
EVERY = [(reduction, normalize) for reduction in REDUCTIONS for normalize in (False, True)]
every = pytest.mark.parametrize(("reduction", "normalize"), EVERY)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy in the interpreter


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu" and "not built" in fastprob.info().splitlines()[1]:
        pytest.skip("no C++ kernels")
    with fastprob.backend(request.param):
        yield request.param


def by_differences(x, *, t, reduction, normalize=False):
    """The truth in float64, of which no term cancels or underflows."""
    x = F.normalize(x, dim=1) if normalize else x
    others = ~torch.eye(len(x), dtype=torch.bool)
    exponents = -t * (x[:, None] - x).square().sum(-1)[others]
    if reduction == "logmean":  # logsumexp's own gradient loses log 2 beside exponents of 1e40
        largest = exponents.detach().max()
        return (exponents - largest).exp().mean().log() + largest
    return exponents.exp().sum() / (1 if reduction == "sum" else len(exponents))


def value_and_grad(function, x, **options):
    x = x.detach().clone().requires_grad_()
    value = function(x, **options)
    return value.detach(), torch.autograd.grad(value, x)[0]


def check(x, weight=1, **options):
    """Value and gradient, the latter times a weight, of the backend within the error budget."""
    truth = value_and_grad(by_differences, x.double(), **options)
    actual = value_and_grad(gaussian_potential, x, **options)
    with fastprob.backend("reference"):
        reference = value_and_grad(gaussian_potential, x, **options)
        exact = value_and_grad(gaussian_potential, x.double(), **options)
    torch.testing.assert_close((exact[0], exact[1] * weight), (truth[0], truth[1] * weight), rtol=1e-6, atol=1e-9)
    exempt = overflows(truth[0], x.dtype)  # no gradient is asked of a value that overflows
    for what, a, r, t in zip(("value", "gradient"), actual, reference, truth):
        assert not r[~exempt.expand_as(r)].isnan().any(), what
        w = weight if what == "gradient" else 1
        assert_within_budget(a * w, r * w, t * w, f"{what} {options}", exempt)
    return actual


def cloud(count, dim, spread=1.0):
    """Points of about unit length, times `spread`."""
    return torch.randn(count, dim) * spread / dim**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "dim"), [(75, 5), (129, 37)] if INTERPRETING else [(129, 37), (200, 61), (301, 67)])
@every
def test_sizes_beyond_one_tile(backend, count, dim, reduction, normalize, dtype, monkeypatch):
    if count == 75:  # tiles of two blocks, the last of them in part
        small_tiles(monkeypatch)
    check(cloud(count, dim).to(dtype), t=1.5, reduction=reduction, normalize=normalize)


def small_tiles(monkeypatch):
    from fastprob.kernels import gaussian_potential as kernel

    for name, value in {"TILE": 32, "BLOCK": 16, "ROWS": 8}.items():
        monkeypatch.setattr(kernel, name, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [9] if INTERPRETING else [9, 150])
@every
def test_points_far_apart(backend, count, reduction, normalize, dtype):
    """exp(-100,000) underflows; its logarithm does not. The nearest pair is in any tile."""
    value, grad = check(cloud(count, 25, spread=200).to(dtype), t=2.0, reduction=reduction, normalize=normalize)
    if reduction == "logmean" and not normalize:
        assert value < -1000 and grad.abs().max() > 10


@pytest.mark.parametrize("t", [1e-40, 1e40] if INTERPRETING else [1e-40, 2.0, 1e40])
@pytest.mark.parametrize("norm", [1e-25, 1.0, 1e20])
@every
def test_extreme_norms_and_widths(backend, reduction, normalize, norm, t):
    check(cloud(7, 5, norm), t=t, reduction=reduction, normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES)
@every
def test_points_and_widths_scale_together(backend, reduction, normalize, dtype):
    """f(s x, t / s^2) = f(x, t), up to the ends of the type."""
    x, options = cloud(9, 5).to(dtype), {"reduction": reduction, "normalize": normalize}
    expected, rounding = value_and_grad(gaussian_potential, x, t=2.0, **options), 8 * torch.finfo(dtype).eps
    for exponent in (-120, -20, 60, 125):
        s = 2.0 ** (exponent * (4 if dtype == torch.float64 else 1))
        if normalize and s < 1:
            continue  # rows shorter than 1e-12
        value, grad = value_and_grad(gaussian_potential, x * s, t=2.0 if normalize else 2.0 / s / s, **options)
        torch.testing.assert_close(value, expected[0], rtol=rounding, atol=0)
        subnormal = torch.finfo(dtype).tiny  # where bits are lost
        torch.testing.assert_close(grad * s, expected[1], rtol=rounding, atol=max(subnormal * s, rounding))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [17] if INTERPRETING else [3, 17, 150])
@every
def test_equal_points_count_one_whatever_t(backend, count, reduction, normalize, dtype):
    x = cloud(count, 13).to(dtype)
    value, grad = value_and_grad(
        gaussian_potential, torch.cat([x, x]), t=1e40, reduction=reduction, normalize=normalize
    )
    mean = 2 * count / (2 * count * (2 * count - 1))
    expected = {"mean": mean, "sum": 2 * count, "logmean": math.log(mean)}[reduction]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=dtype))
    assert (grad == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_too_short_to_normalise(backend, reduction):
    """As F.normalize: zeros stay, and what is shorter than 1e-12 is divided by it. Gradients are times the length."""
    x = torch.cat([cloud(5, 7), torch.zeros(1, 7), cloud(2, 7, 1e-13)])
    length = x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    check(x, length, t=2.0, reduction=reduction, normalize=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every
def test_nan_and_infinity_are_nan(backend, reduction, normalize, bad):
    x = cloud(5, 4)
    x[2, 1] = bad
    value, grad = value_and_grad(gaussian_potential, x, reduction=reduction, normalize=normalize)
    assert value.isnan() and grad.isnan().all()


@pytest.mark.parametrize("count", [0, 1])
@every
def test_no_pair_is_zero(backend, reduction, normalize, count):
    value, grad = value_and_grad(gaussian_potential, torch.ones(count, 4), reduction=reduction, normalize=normalize)
    assert value == 0 and grad.shape == (count, 4) and (grad == 0).all()


def test_points_without_coordinates_are_equal(backend):
    assert gaussian_potential(torch.ones(3, 0)) == 1


def test_a_sum_that_half_types_do_not_hold_is_infinite(backend):
    assert gaussian_potential(torch.zeros(300, 4).half(), reduction="sum") == math.inf


@pytest.mark.skipif(INTERPRETING, reason="is the second run itself")
class TestOnce:
    """What no kernel decides."""

    @pytest.mark.parametrize("t", [0.0, -1.0, math.inf, math.nan])
    def test_bad_t_is_named(self, t):
        with pytest.raises(ValueError, match=f"gaussian_potential: t must be finite and above 0, got {t}"):
            gaussian_potential(torch.ones(3, 4), t=t)

    def test_one_compilation_for_all_sizes(self):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(self.step, backend=counter, dynamic=True, fullgraph=True)
        for count in range(3, 13):
            x = cloud(count, 5)
            torch.testing.assert_close(value_and_grad(compiled, x), value_and_grad(self.step, x))
        assert counter.frame_count == 1

    @pytest.mark.parametrize("strict", [True, False])
    def test_exported_for_all_sizes(self, strict):
        step = self.step

        class Module(torch.nn.Module):
            def forward(self, x):
                return step(x)

        shapes = {"x": {0: torch.export.Dim("C")}}
        exported = torch.export.export(Module(), (cloud(5, 4),), dynamic_shapes=shapes, strict=strict).module()
        for count in (2, 7, 129):
            x = cloud(count, 4)
            torch.testing.assert_close(exported(x), step(x))

    @staticmethod
    def step(x):
        return 2 * gaussian_potential(x * 1, reduction="logmean")

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("normalize", [False, True])
    def test_memory_of_the_triton_kernel(self, reduction, normalize, monkeypatch):
        """Of ImageNet-21k's classes: under 0.1 GB beside the points and their gradient; their k would take 1.8 GB."""
        from fastprob.kernels import gaussian_potential as kernel

        monkeypatch.setattr(kernel._Tiles, "launch", lambda *_: None)
        options = {"t": 2.0, "reduction": reduction, "normalize": normalize, "needs": 1}
        with FakeTensorMode(), Memory() as memory:
            kernel._gaussian_potential_value_and_grad(torch.empty(21_000, 512), **options)
        assert memory.peak - 2 * 21_000 * 512 * 4 < 0.1e9

    @pytest.mark.long
    def test_triton_kernel(self):
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


class Memory(TorchDispatchMode):
    """The bytes of all storages that live at once, at most."""

    def __init__(self):
        super().__init__()
        self.peak, self.storages = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result
