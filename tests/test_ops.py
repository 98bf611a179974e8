"""Every operator through the same checks, from its own samples: values, gradients, all that torch may do with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import assert_within_budget, cast, leaves_of, maker, overflows
from torch.autograd import forward_ad

import fastprob
from fastprob._op import OPS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAMPLES = [(op, i) for op in OPS.values() for i, _ in enumerate(op.samples(maker()))]
ELEMENTWISE = [op for op in OPS.values() if op.elementwise]


def name_of(value):
    return value.name if hasattr(value, "name") else str(value).removeprefix("torch.")


def sample(op, index, dtype=torch.float64):
    torch.manual_seed(index)
    tensors, options = list(op.samples(maker(dtype)))[index]
    return [t.clone() for t in tensors], options


def small_samples(op):
    """One sample of shape (3, 5) for every set of options."""
    for index, (tensors, _) in enumerate(op.samples(maker())):
        if tensors[0].shape == (3, 5):
            yield sample(op, index)


def call(op, tensors, options):
    return getattr(fastprob, op.name)(*tensors, **options)


def value_and_grads(op, tensors, options, grad=None):
    """The value, and the gradients of all tensors that have one."""
    leaves = leaves_of(tensors)
    value = call(op, leaves, options)
    if value.requires_grad:
        value.backward(torch.ones_like(value) if grad is None else grad.to(value.dtype))
    return [value.detach(), *[leaf.grad for leaf in leaves[: len(op.differentiable)]]]


def check_budget(op, tensors, options):
    """Values and gradients of the kernels against the reference in the same dtype, and both against float64."""
    with fastprob.backend("reference"):
        truth = value_and_grads(op, cast(tensors, torch.float64), options)
        reference = value_and_grads(op, tensors, options)
    actual = value_and_grads(op, tensors, options)
    exempt = overflows(truth[0], tensors[0].dtype)  # no gradient is asked of a value that overflows
    for what, a, r, t in zip(["value", *op.differentiable], actual, reference, truth):
        assert_within_budget(a, r, t, f"{op.name} {what} {options}", exempt)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("op", "index"), SAMPLES, ids=name_of)
def test_within_the_error_budget(op, index, dtype):
    check_budget(op, *sample(op, index, dtype))


def extreme_inputs(op, count=20_000):
    """alpha in [1e-6, 1e6] and beta in [1e-4, 1e4], log-uniform; ties, tiny and huge differences."""
    for name in op.tensors:
        exponent = torch.empty(count).uniform_(-6, 6) if "inv_alpha" in name else torch.empty(count).uniform_(-4, 4)
        if "inv_alpha" in name or "beta" in name:
            yield 10**exponent
        else:
            values = torch.tensor([0.0, 0.0, 1e-30, -1e-3, 0.1, 1.0, -50.0, 1e6])
            yield values[torch.randint(len(values), (count,))]


@pytest.mark.parametrize("op", ELEMENTWISE, ids=name_of)
def test_extreme_parameters_and_ties(op):
    for _, options in small_samples(op):
        tensors = list(extreme_inputs(op))
        check_budget(op, tensors, options)
        for g in value_and_grads(op, [t.double() for t in tensors], options)[1:]:
            assert not g.isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_nan_inf_and_outside_the_domain_as_the_reference(op, bad):
    for tensors, options in small_samples(op):
        for i in range(len(op.differentiable)):
            inputs = cast(tensors, torch.float32)
            inputs[i][1, 2] = bad
            check_budget(op, inputs, options)
            value, *grads = value_and_grads(op, inputs, options)
            if bad != bad:
                assert value.isnan().any() and grads[i].isnan().any()


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_first_and_second_derivatives(op):
    for tensors, options in small_samples(op):
        leaves = leaves_of(tensors)
        assert torch.autograd.gradcheck(lambda *t: call(op, t, options), leaves, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda *t: call(op, t, options), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_opcheck(op, dtype):
    for tensors, options in small_samples(op):
        tensors = cast(tensors, dtype)
        torch.library.opcheck(getattr(torch.ops.fastprob, op.name).default, leaves_of(tensors), options)
        needs = {**options, "needs": 2 ** len(op.differentiable) - 2}
        grad = torch.ones_like(call(op, tensors, options))
        torch.library.opcheck(getattr(torch.ops.fastprob, f"_{op.name}_backward").default, (grad, *tensors), needs)
        if op.is_scalar and op.is_scalar(**{**op.options, **options}):
            name = f"_{op.name}_value_and_grad"
            torch.library.opcheck(getattr(torch.ops.fastprob, name).default, tensors, needs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_compile_fullgraph(op, dynamic):
    torch._dynamo.reset()  # it counts compilations of `step` together
    tensors, options = next(small_samples(op))

    def step(*tensors):
        return 2 * call(op, [t * 1 for t in tensors], options)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (3, 7) if dynamic else (3,):
        inputs = leaves_of([t[:1].expand(rows, *t.shape[1:]) for t in tensors])
        leaves = inputs[: len(op.differentiable)]
        expected = torch.autograd.grad(step(*inputs).sum(), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*inputs).sum(), leaves), expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_without_gradients(op):
    """Nothing to differentiate: eager, compiled, under no_grad, and on meta tensors."""
    tensors, options = next(small_samples(op))
    expected = call(op, tensors, options)
    assert not expected.requires_grad
    compiled = torch.compile(lambda *t: 2 * call(op, t, options), fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), 2 * expected)
    with torch.no_grad():
        torch.testing.assert_close(call(op, leaves_of(tensors), options), expected)
    assert call(op, [t.to("meta") for t in tensors], options).shape == expected.shape


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_autocast_computes_in_float32(op):
    for tensors, options in small_samples(op):
        mixed = [cast([t], torch.bfloat16 if i % 2 else torch.float32)[0] for i, t in enumerate(tensors)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = value_and_grads(op, mixed, options)
        expected = value_and_grads(op, cast(mixed, torch.float32), options)
        assert actual[0].dtype == torch.float32
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
        for a, e, t in zip(actual[1:], expected[1:], mixed):
            torch.testing.assert_close(a, e.to(t.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_func_grad_and_vmap(op):
    everything = tuple(range(len(op.differentiable)))
    for tensors, options in small_samples(op):
        expected = value_and_grads(op, tensors, options)
        grads = torch.func.grad(lambda *t: call(op, t, options).sum(), argnums=everything)
        torch.testing.assert_close(list(grads(*tensors)), expected[1:])
        batched = [torch.stack([t, t.flip(0), (t / 2).to(t.dtype)]) for t in tensors]
        for row, *by_row in zip(range(3), *torch.func.vmap(grads)(*batched)):
            torch.testing.assert_close(by_row, value_and_grads(op, [t[row] for t in batched], options)[1:])
        values = torch.func.vmap(lambda *t: call(op, t, options), in_dims=(*[None] * (len(tensors) - 1), 0))
        expected = [call(op, [*tensors[:-1], t], options) for t in batched[-1]]
        torch.testing.assert_close(values(*tensors[:-1], batched[-1]), torch.stack(expected))


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_forward_mode_raises_rather_than_being_wrong(op):
    tensors, options = next(small_samples(op))
    count = len(op.differentiable)
    floats, indices = tensors[:count], tensors[count:]
    ones = [torch.ones_like(t) for t in floats]
    with pytest.raises(RuntimeError, match=r"forward|jvp"):
        torch.func.jvp(lambda *t: call(op, [*t, *indices], options), tuple(floats), tuple(ones))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward|jvp"):
        call(op, [*map(forward_ad.make_dual, floats, ones), *indices], options)


LAYOUTS = {
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda t: torch.stack([t, t * 0], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_any_memory_layout(op, layout):
    for tensors, options in small_samples(op):
        laid = [LAYOUTS[layout](t) for t in tensors]
        expected = value_and_grads(op, [t.contiguous() for t in laid], options)
        inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in laid]
        leaves = inputs[: len(op.differentiable)]
        value = call(op, inputs, options)
        torch.testing.assert_close(value, expected[0], rtol=0, atol=0)
        grad = torch.ones_like(value)
        grads = torch.autograd.grad(value, leaves, grad.T.contiguous().T if grad.dim() else grad)
        torch.testing.assert_close(list(grads), expected[1:], rtol=0, atol=0)


@pytest.mark.parametrize("op", ELEMENTWISE, ids=name_of)
def test_broadcast_inputs_get_summed_gradients(op):
    for tensors, options in small_samples(op):
        row = tensors[1][0].clone()
        full = value_and_grads(op, [tensors[0], row.expand(3, 5), *tensors[2:]], options)
        actual = value_and_grads(op, [tensors[0], row, *tensors[2:]], options)
        torch.testing.assert_close(actual[0], full[0])
        torch.testing.assert_close(actual[2], full[2].sum(0))


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_only_what_asks_gets_a_gradient(op):
    for tensors, options in small_samples(op):
        expected = value_and_grads(op, tensors, options)[1:]
        for i in range(len(op.differentiable)):
            leaf = tensors[i].clone().requires_grad_()
            value = call(op, [*tensors[:i], leaf, *tensors[i + 1 :]], options)
            torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], expected[i])


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_backward_again_and_accumulated(op):
    for tensors, options in small_samples(op):
        expected = value_and_grads(op, tensors, options)[1:]
        inputs = leaves_of(tensors)
        leaves = inputs[: len(op.differentiable)]
        loss = 3 * call(op, inputs, options).sum()
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            torch.testing.assert_close([leaf.grad for leaf in leaves], [3 * times * g for g in expected])
        again = torch.utils.checkpoint.checkpoint(lambda *t: call(op, t, options).sum(), *inputs, use_reentrant=False)
        torch.testing.assert_close(list(torch.autograd.grad(again, leaves)), expected)


@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_same_bits_again_and_on_any_number_of_threads(op):
    threads = torch.get_num_threads()
    for tensors, options in small_samples(op):
        if op.elementwise:
            tensors = [t.float() for t in extreme_inputs(op, count=50_001)]
        else:
            tensors = [torch.randn(301, 67) if t.dim() == 2 else t.repeat(101)[:301] for t in tensors]
        runs = []
        try:
            for n in (1, 2, 2):
                torch.set_num_threads(n)
                runs.append(value_and_grads(op, tensors, options))
        finally:
            torch.set_num_threads(threads)
        for run in runs[1:]:
            for a, b in zip(runs[0], run):
                assert a.isnan().equal(b.isnan()) and a.nan_to_num().equal(b.nan_to_num())


# What is done to the last floating tensor, and what is said of it; of indices see test_bad_labels_are_named.
BAD_INPUT = {
    "shape": (lambda t: t[..., :2].flatten(), r"broadcast|must be \["),
    "integer": (lambda t: t.long(), "float64, float32"),
    "dtype": (lambda t: t.float(), "torch.float64 on cpu"),
    "device": (lambda t: t.to("meta"), "on meta"),
}


AMONG_SEVERAL = ("dtype", "device")  # bad only beside tensors that differ


@pytest.mark.parametrize(
    ("op", "kind"),
    [(op, kind) for op in OPS.values() for kind in BAD_INPUT if len(op.tensors) > 1 or kind not in AMONG_SEVERAL],
    ids=name_of,
)
def test_bad_tensors_are_named(op, kind):
    spoil, message = BAD_INPUT[kind]
    tensors, options = next(small_samples(op))
    last = len(op.differentiable) - 1
    tensors[last] = spoil(tensors[last])
    with pytest.raises(ValueError, match=f"{op.name}: .*{message}"):
        call(op, tensors, options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.float(), "must be int64, got torch.float32"),
        (lambda t: t.int(), "must be int64, got torch.int32"),
        (lambda t: t.to("meta"), "must be on cpu as x is, got meta"),
        (lambda t: t[:2], r"must be \[B\] with B = 3, got \[2\]"),
        (lambda t: t + 2, r"must be in 0\.\.2, got 4"),
        (lambda t: -t, r"must be in 0\.\.2, got -2"),
    ],
)
def test_bad_labels_are_named(spoil, message):
    x, prototypes, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1, 2, 2])
    with pytest.raises(ValueError, match=f"prototype_dispersion: labels {message}"):
        fastprob.prototype_dispersion(x, prototypes, spoil(labels))
    with torch.autocast("cpu"), pytest.raises(ValueError, match=f"prototype_dispersion: labels {message}"):
        fastprob.prototype_dispersion(x, prototypes, spoil(labels))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_reads_no_memory(label):
    """Where the wrapper does not look at the labels, the kernels do."""
    tensors = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1, 2, label])
    compiled = torch.compile(lambda *t: 2 * fastprob.prototype_dispersion(*t), fullgraph=True)
    with pytest.raises(RuntimeError, match=f"labels must be in 0..2, got {label}"):
        compiled(*tensors)
    with pytest.raises(RuntimeError, match=f"labels must be in 0..2, got {label}"):
        torch.ops.fastprob._prototype_dispersion_backward(torch.ones(()), *tensors, needs=3)


def test_prototype_dispersion_is_the_mean_squared_error():
    x, prototypes = torch.randn(50, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    labels = torch.randint(4, (50,))
    expected = torch.nn.functional.mse_loss(x, prototypes[labels])
    actual = fastprob.prototype_dispersion(x, prototypes, labels)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(3 * value, (x, prototypes)) for value in (actual, expected)]
    torch.testing.assert_close(*grads)
    assert fastprob.prototype_dispersion(x[:0], prototypes, labels[:0]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "papre"}, "form must be one of 'paper', 'released', got 'papre'"),
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"clamp_min": 2.0, "clamp_max": 1.0}, "0 <= min <= max, got 2.0, 1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastprob.ggd_nll(*[torch.ones(3)] * 4, **options)


def test_wrong_calls_raise_type_errors():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="missing a required argument: 'target'"):
        fastprob.ggd_nll(x, x, x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'shape'"):
        fastprob.ggd_nll(x, x, x, x, shape=1)
    with pytest.raises(TypeError, match="multiple values for argument 'mu'"):
        fastprob.ggd_nll(x, x, x, x, mu=x)
    with pytest.raises(TypeError, match="beta must be a tensor, got float"):
        fastprob.ggd_nll(x, x, 2.0, x)


def test_backend_chooses_and_restores():
    with pytest.raises(ValueError, match=r"name must be one of .* got 'gpu'"), fastprob.backend("gpu"):
        pass
    before = fastprob.info()
    with fastprob.backend("reference"):
        assert re.search("ggd_nll +reference", fastprob.info())
        with fastprob.backend("cpu") if "cpu " in before else fastprob.backend("reference"):
            assert fastprob.info() == before
        assert re.search("ggd_nll +reference", fastprob.info())
    assert fastprob.info() == before


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_cpu_builds(capability):
    """The kernels for lesser processors, in a process that believes to run on one."""
    selected = ["test_within_the_error_budget", "test_extreme_parameters_and_ties", "test_nan_inf"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", " or ".join(selected)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]
