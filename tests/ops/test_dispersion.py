"""What only prototype_dispersion promises: dynamic sizes, labels out of range and their order on a GPU, half types."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import assert_within_budget
from torch._dynamo.testing import CompileCounter

import fastprob
from fastprob import prototype_dispersion

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # the file runs itself a second time: see test_triton_kernel
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def problem(count, classes, dim, dtype=torch.float32):
    """Labels in no order; some classes get several points, some none."""
    x, prototypes = torch.randn(count, dim).to(dtype), torch.randn(classes, dim).to(dtype)
    return x, prototypes, (torch.arange(count) ** 2 + 1) % classes


def value_and_grads(x, prototypes, labels):
    leaves = x.detach().clone().requires_grad_(), prototypes.detach().clone().requires_grad_()
    value = prototype_dispersion(*leaves, labels)
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.skipif(INTERPRETING, reason="is the second run itself")
class TestOnce:
    @staticmethod
    def step(x, prototypes, labels):
        return 2 * prototype_dispersion(x * 1, prototypes, labels)

    def test_one_compilation_for_all_sizes(self):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(self.step, backend=counter, dynamic=True, fullgraph=True)
        for count in range(3, 13):
            x, prototypes, labels = problem(2 * count, count, 5)
            x.requires_grad_()
            values = [step(x, prototypes, labels) for step in (compiled, self.step)]
            torch.testing.assert_close(*values)
            torch.testing.assert_close(*[torch.autograd.grad(value, x)[0] for value in values])
        assert counter.frame_count == 1

    @pytest.mark.parametrize("strict", [True, False])
    def test_exported_for_all_sizes(self, strict):
        step = self.step

        class Module(torch.nn.Module):
            def forward(self, x, prototypes, labels):
                return step(x, prototypes, labels)

        count, classes = torch.export.Dim("B"), torch.export.Dim("C")
        shapes = {"x": {0: count}, "prototypes": {0: classes}, "labels": {0: count}}
        exported = torch.export.export(Module(), problem(8, 5, 4), dynamic_shapes=shapes, strict=strict).module()
        for sizes in ((2, 3), (12, 7), (300, 40)):
            inputs = problem(*sizes, 4)
            torch.testing.assert_close(exported(*inputs), step(*inputs))

    @pytest.mark.parametrize("dim", [1, 7, 8, 515, 1031])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lengths_that_are_no_multiple_of_a_vector(self, dim, dtype):
        inputs = problem(5, 3, dim, dtype)
        actual = value_and_grads(*inputs)
        with fastprob.backend("reference"):
            truth = value_and_grads(*[t.double() if t.is_floating_point() else t for t in inputs])
            reference = value_and_grads(*inputs)
        for what, a, r, t in zip(("value", "x", "prototypes"), actual, reference, truth):
            assert_within_budget(a, r, t, what)

    def test_half_types_keep_their_ends(self):
        """Subnormal, largest, infinite and NaN float16 through the conversions of eight at a time."""
        x = torch.tensor([[6e-8, 65504.0, 0.0, -6e-5, 1.0, 2.0, 3.0, 4.0, 6e-8, -65504.0]]).half()
        _, grad, _ = value_and_grads(x, torch.zeros_like(x), torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(grad, (x.double() / 5).half(), rtol=0, atol=0)
        for bad in (torch.inf, torch.nan):
            x[0, 2] = bad
            value, grad, _ = value_and_grads(x, torch.zeros_like(x), torch.zeros(1, dtype=torch.long))
            torch.testing.assert_close(grad[0, 2].double(), torch.tensor(bad).double(), equal_nan=True)
            torch.testing.assert_close(value.double(), torch.tensor(bad).double(), equal_nan=True)

    def test_reference_reads_no_label_out_of_range(self):
        x, prototypes, labels = problem(4, 3, 5)
        labels[1] = 3
        with fastprob.backend("reference"):
            with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, got 3"):
                prototype_dispersion(x, prototypes, labels)
            for bad in (3, -1):
                labels[1] = bad
                with pytest.raises((IndexError, RuntimeError), match="out of range"):
                    torch.ops.fastprob.prototype_dispersion(x, prototypes, labels)
                with pytest.raises((IndexError, RuntimeError), match="out of range"):
                    torch.ops.fastprob._prototype_dispersion_backward(torch.ones(()), x, prototypes, labels, needs=3)

    @pytest.mark.long
    def test_triton_kernel(self):
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETING, reason="Triton's interpreter runs these")
class TestTriton:
    @pytest.fixture(autouse=True)
    def triton(self):
        with fastprob.backend("triton"):
            yield

    @pytest.mark.parametrize("label", [-1, 3, 2**40])
    def test_a_label_out_of_range_is_nan(self, label):
        """For its point alone; no class takes it."""
        x, prototypes, labels = problem(6, 3, 5)
        good = value_and_grads(x, prototypes, labels)
        labels[1] = label
        call = torch.ops.fastprob._prototype_dispersion_value_and_grad.default
        value, grad_x, grad_prototypes, _ = call(x, prototypes, labels, needs=3)
        rest = [0, 2, 3, 4, 5]
        assert value.isnan() and grad_x[1].isnan().all()
        torch.testing.assert_close(grad_x[rest], good[1][rest])
        _, _, expected = value_and_grads(x[rest], prototypes, labels[rest])
        torch.testing.assert_close(grad_prototypes, expected * 5 / 6)  # a mean over 5 points

    def test_classes_take_their_points_in_order(self):
        """Sums of numbers of such sizes hang on the order even in float64: 1e20 + 1 - 1e20 is 0."""
        x, prototypes = torch.tensor([[1e20], [7.0], [1.0], [-1e20], [5.0]]).double(), torch.zeros(2, 1).double()
        labels = torch.tensor([1, 0, 1, 1, 0])
        order = [0, 1, 3, 2, 4]
        for batch, last in ((x, 0), (x[order], 1)):
            _, _, grad = value_and_grads(batch, prototypes, labels)
            assert grad.flatten().tolist() == pytest.approx([-12 * 2 / 5, -last * 2 / 5])
