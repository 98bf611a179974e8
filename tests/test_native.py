"""The C++ kernels where the operators' own samples do not look: unwritten results, bounds met exactly, huge products.

`make emulate` runs them over the CUDA kernels too.
"""

import pytest
import torch
from conftest import as_tuple, assert_within_budget, cast, leaves_of, maker, moving, weights_for

import fastprob
from fastprob._op import OPS

FORMS = ("paper", "released")


def results_of(op, tensors, options):
    """Results and gradients."""
    leaves = leaves_of(tensors, op)
    results = as_tuple(op.function(*leaves, **options))
    return [r.detach() for r in results] + list(
        torch.autograd.grad(moving(results), moving(leaves), weights_for(results), allow_unused=True)
    )


def check(name, tensors, **options):
    """Results and gradients within the budget, against the reference in the same dtype and in float64."""
    op = OPS[name]
    with fastprob.backend("reference"):
        truth, reference = results_of(op, cast(tensors, torch.float64), options), results_of(op, tensors, options)
    for i, (a, r, t) in enumerate(zip(results_of(op, tensors, options), reference, truth, strict=True)):
        assert_within_budget(a, r, t, f"{name} {options}: {i}")


@pytest.fixture
def poisoned():
    """What is allocated and not written is NaN: torch does it, and so for what its stable ABI allocates."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ops.aten.empty_like(torch.ones(3)).isnan().all()
    assert torch.ops.aten.new_empty(torch.ones(3), [3]).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_element_of_every_result_is_written(op, dtype, poisoned):
    for tensors, options in op.samples(maker(dtype)):
        with fastprob.backend("reference"):
            expected = results_of(op, tensors, options)
        value = as_tuple(op.function(*tensors, **options))
        for a, e in zip([*value, *results_of(op, tensors, options)], [*expected[: len(value)], *expected], strict=True):
            assert torch.equal(a.isnan(), e.isnan()), options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_bounds_met_exactly_and_a_scale_of_zero(form, dtype):
    """A residual at a bound still moves; without eps, inv_alpha = 0 is infinitely wide and not outside the domain."""
    mu = torch.tensor([0.125, 0.25, 0.5, 1.0, 4.0, 8.0, 0.0, 3.0], dtype=dtype)
    inv_alpha, ones = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0], dtype=dtype), torch.ones(8, dtype=dtype)
    tensors = mu, inv_alpha, ones, 0 * ones
    options = {"form": form, "eps": 0.0, "clamp_min": 0.25, "clamp_max": 4.0, "reduction": "none"}
    check("ggd_nll", tensors, **options)
    value, grad_mu, *_ = results_of(OPS["ggd_nll"], tensors, options)
    assert (grad_mu != 0).tolist() == [False, True, True, True, True, False, False, False]
    assert value[7] == torch.inf


@pytest.mark.parametrize("weights", [(0.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.5, 0.25, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("form", FORMS)
def test_every_term_of_probvlm_loss_is_weighted_apart(form, weights):
    cross, l1, nll = weights
    tensors = OPS["probvlm_loss"].inputs(maker(torch.float32), 3, 5)
    check("probvlm_loss", tensors, form=form, cross_weight=cross, l1_weight=l1, nll_weight=nll)


@pytest.mark.parametrize(("size", "value"), [(1e30, 294.1), (1e-30, 433.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_power_whose_base_overflows_or_underflows(size, value, dtype):
    """(r a)^beta is finite where r a is not; a true zero stays a tie."""
    ones = torch.ones(4, dtype=dtype)
    mu = size * torch.tensor([1, -1, 0, 1], dtype=dtype)
    tensors = (mu, size * ones, 0.01 * ones, 0 * ones)
    options = {"eps": 0.0 if size < 1 else 1e-4, "reduction": "none"}
    with fastprob.backend("reference"):
        truth = results_of(OPS["ggd_nll"], cast(tensors, torch.float64), options)
    actual = results_of(OPS["ggd_nll"], tensors, options)
    for a, t in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=0)
    assert abs(actual[0][0] - value) < value / 100
    assert actual[1][2] == 0
