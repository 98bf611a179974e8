"""Every operator through the same checks, from its own samples: values, gradients, all that torch may do with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import (
    as_tuple,
    assert_within_budget,
    cast,
    extreme_maker,
    leaves_of,
    maker,
    moving,
    overflows,
    weights_for,
)
from own_ops import OWN, noise
from torch.autograd import forward_ad

import fastprob
from fastprob import _backends
from fastprob._op import DTYPES, OPS
from fastprob._vmap import seed_of_row

EVERY = [*OPS.values(), *OWN.values()]
SAMPLES = [(op, i) for op in EVERY for i, _ in enumerate(op.samples(maker()))]
ELEMENTWISE = [op for op in EVERY if op.elementwise]
BOTH_PATHS = ["kernels", "reference"]


def name_of(value):
    return value.name if hasattr(value, "name") else str(value).removeprefix("torch.")


each_op = pytest.mark.parametrize("op", EVERY, ids=name_of)
each_elementwise = pytest.mark.parametrize("op", ELEMENTWISE, ids=name_of)


def sample(op, index, dtype=torch.float64):
    torch.manual_seed(100 + index)  # draws without ties, at which numerical derivatives fail
    tensors, options = list(op.samples(maker(dtype)))[index]
    return [t if t is None else t.clone() for t in tensors], options


def small_samples(op):
    """One sample whose first tensor has the shape (3, 5) for every set of options."""
    for index, (tensors, _) in enumerate(op.samples(maker())):
        if tensors[0].shape == (3, 5):
            yield sample(op, index)


def small_size(op):
    return next(size for size in op.sizes if op.inputs(maker(), *size)[0].shape == (3, 5))


def grad_places(op):
    return [i for i, a in enumerate(op.arguments) if a.kind.differentiable]


def values_and_grads(op, tensors, options, inputs=None):
    """The results, and the gradients of all tensors that have one."""
    inputs = leaves_of(tensors, op) if inputs is None else inputs
    results = as_tuple(op.function(*inputs, **options))
    leaves = [inputs[i] for i in grad_places(op) if inputs[i] is not None]
    grads = torch.autograd.grad(moving(results), leaves, weights_for(results)) if moving(results) else []
    return [*(r.detach() for r in results), *grads]


def floating_results(op, tensors, options):
    """The differentiable results alone, as gradcheck wants them."""
    results = as_tuple(op.function(*tensors, **options))
    return tuple(r for r, a in zip(results, op.results) if a.kind.differentiable)


def check_budget(op, tensors, options):
    """Results and gradients of the kernels against the reference in the same dtype, and both against float64."""
    with fastprob.backend("reference"):
        truth = values_and_grads(op, cast(tensors, torch.float64), options)
        reference = values_and_grads(op, tensors, options)
    actual = values_and_grads(op, tensors, options)
    exempt = overflows(truth[0], tensors[0].dtype)  # no gradient is asked of a value that overflows
    for i, (a, r, t) in enumerate(zip(actual, reference, truth, strict=True)):
        exempt_here = exempt if exempt.shape in ((), t.shape) else False
        assert_within_budget(a, r, t, f"{op.name} [{i}] {options}", exempt_here)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("op", "index"), SAMPLES, ids=name_of)
def test_within_the_error_budget(op, index, dtype):
    check_budget(op, *sample(op, index, dtype))


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.elementwise], ids=name_of)
def test_extreme_parameters_and_ties(op):
    for options in op.grid:
        tensors = op.inputs(extreme_maker(), 20_000)
        check_budget(op, tensors, options)
        for g in values_and_grads(op, cast(tensors, torch.float64), options)[1:]:
            assert not g.isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("op", OPS.values(), ids=name_of)
def test_nan_inf_and_outside_the_domain_as_the_reference(op, bad):
    for tensors, options in small_samples(op):
        for place, i in enumerate(grad_places(op)):
            inputs = cast(tensors, torch.float32)
            inputs[i][(1, 2) if inputs[i].dim() else ()] = bad
            check_budget(op, inputs, options)
            value, *rest = values_and_grads(op, inputs, options)
            if bad != bad:
                assert value.isnan().any()
                assert rest[len(op.results) - 1 + place].isnan().any() or is_linear(op, tensors, options, place)


def is_linear(op, tensors, options, place):
    """Whether the gradient of the place-th tensor with one is the same whatever it holds."""
    inputs, count = cast(tensors, torch.float64), len(op.results)
    other = [t * 2 if i == grad_places(op)[place] else t for i, t in enumerate(inputs)]
    first, second = (values_and_grads(op, t, options)[count + place] for t in (inputs, other))
    return first.equal(second)


def explicit(op, tensors):
    """Leaves of which numerical derivatives are the declared ones, and which have second ones."""
    leaves = leaves_of(tensors, op)
    return [t.detach() if name in op.implicit else t for name, t in zip(op.tensors, leaves)]


@each_op
def test_first_and_second_derivatives(op):
    for tensors, options in small_samples(op):
        leaves = explicit(op, tensors)
        assert torch.autograd.gradcheck(lambda *t: floating_results(op, t, options), leaves, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda *t: floating_results(op, t, options), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@each_op
def test_second_derivatives_in_other_types(op, dtype):
    for tensors, options in small_samples(op):
        seconds = []
        for kind in (torch.float64, dtype):
            leaves = explicit(op, cast(tensors, kind))
            results = floating_results(op, leaves, options)
            grads = torch.autograd.grad(results, moving(leaves), weights_for(results), create_graph=True)
            total = sum(g.double().sum() for g in grads if g.requires_grad)
            seconds.append(torch.autograd.grad(total, moving(leaves), allow_unused=True, materialize_grads=True))
        for s64, s in zip(*seconds):
            assert s.dtype == dtype
            scale = max(s64.abs().max().item(), 1)
            torch.testing.assert_close(s.double() / scale, s64 / scale, rtol=0, atol=64 * torch.finfo(dtype).eps)


OPCHECKED = [*((op, torch.float32) for op in EVERY), *((OPS[name], torch.bfloat16) for name in ("csd", "ggd_nll"))]


@pytest.mark.parametrize(("op", "dtype"), OPCHECKED, ids=name_of)
def test_opcheck(op, dtype):
    """The checks are of the mechanism: one operator with kernels and one without serve for other dtypes."""
    for tensors, options in small_samples(op):
        tensors = cast(tensors, dtype)
        torch.library.opcheck(op.overload(op.name), leaves_of(tensors, op), options)
        needs = {**options, "needs": sum(1 << i for i in grad_places(op)[1:])}
        results = as_tuple(op.function(*tensors, **options))
        grads = [torch.ones_like(r) for r, a in zip(results, op.results) if a.kind.differentiable]
        constants = [r for r, a in zip(results, op.results) if not a.kind.differentiable]
        torch.library.opcheck(op.overload(f"_{op.name}_backward"), (*grads, *tensors, *constants), needs)
        if op.is_scalar and op.is_scalar(**{**op.options, **options}):
            torch.library.opcheck(op.overload(f"_{op.name}_value_and_grad"), tensors, needs)


@pytest.mark.parametrize("dynamic", [False, True])
@each_op
def test_compile_fullgraph(op, dynamic):
    torch._dynamo.reset()  # it counts compilations of `step` together
    options = next(small_samples(op))[1]

    def step(*tensors):
        results = floating_results(op, [t * 1 if t.is_floating_point() else t for t in tensors], options)
        return sum(2 * r.sum() + i * r.square().sum() for i, r in enumerate(results, 1))

    # Inductor takes seconds; sizes that change are Dynamo's business.
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager" if dynamic else "inductor")
    for rows in (3, 7) if dynamic else (3,):
        inputs = leaves_of(op.inputs(maker(), rows, *small_size(op)[1:]), op)
        expected = torch.autograd.grad(step(*inputs), moving(inputs))
        for a, b in zip(torch.autograd.grad(compiled(*inputs), moving(inputs)), expected, strict=True):
            torch.testing.assert_close(a, b)


COLD = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import as_tuple, leaves_of, maker, moving
from fastprob._op import OPS

op = OPS[{name!r}]
tensors, options = list(op.samples(maker()))[-1]
inputs = leaves_of(tensors, op)
step = lambda *t: sum(r.sum() for r in as_tuple(op.function(*t, **options)) if r.is_floating_point())
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
actual = torch.autograd.grad(compiled(*inputs), moving(inputs))
expected = torch.autograd.grad(step(*inputs), moving(inputs))
torch.testing.assert_close(actual, expected)
"""


@pytest.mark.parametrize("name", OPS)
def test_compiles_before_anything_else_ran(name):
    """In a process of its own: an eager call may read first what Dynamo cannot trace."""
    script = COLD.format(tests=os.path.dirname(__file__), name=name)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@each_op
def test_without_gradients(op):
    """Nothing to differentiate: eager, compiled, under no_grad, and on meta tensors."""
    torch._dynamo.reset()
    tensors, options = next(small_samples(op))
    expected = as_tuple(op.function(*tensors, **options))
    assert not any(e.requires_grad for e in expected)
    step = lambda *t: [2 * r for r in as_tuple(op.function(*t, **options))]  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), [2 * e for e in expected])
    with torch.no_grad():
        torch.testing.assert_close(as_tuple(op.function(*leaves_of(tensors, op), **options)), expected)
    on_meta = as_tuple(op.function(*[t if t is None else t.to("meta") for t in tensors], **options))
    assert [(r.shape, r.dtype) for r in on_meta] == [(e.shape, e.dtype) for e in expected]


@each_op
def test_autocast_computes_in_float32(op):
    for tensors, options in small_samples(op):
        mixed = [cast([t], torch.bfloat16 if i % 2 else torch.float32)[0] for i, t in enumerate(tensors)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = values_and_grads(op, mixed, options)
        expected = values_and_grads(op, cast(mixed, torch.float32), options)
        assert actual[0].dtype == torch.float32
        count = len(op.results)
        torch.testing.assert_close(actual[:count], expected[:count], rtol=0, atol=0)
        leaves = [t for i, t in enumerate(mixed) if i in grad_places(op) and t is not None]
        for a, e, t in zip(actual[count:], expected[count:], leaves, strict=True):
            torch.testing.assert_close(a, e.to(t.dtype), rtol=0, atol=0)


@each_op
def test_second_derivatives_under_autocast(op):
    """Those of float32: no product is rounded to a half type."""
    tensors, options = next(small_samples(op))
    leaves = explicit(op, cast(tensors, torch.float32))
    results = floating_results(op, leaves, options)

    def second():
        grads = torch.autograd.grad(results, moving(leaves), weights_for(results), create_graph=True)
        total = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(total, moving(leaves), allow_unused=True, materialize_grads=True)

    expected = second()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(second(), expected, rtol=0, atol=0)


@each_op
def test_autocast_leaves_float64_alone(op):
    tensors, options = next(small_samples(op))
    expected = values_and_grads(op, tensors, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(values_and_grads(op, tensors, options), expected, rtol=0, atol=0)


def rows_of(op, tensors, options):
    """Three problems stacked along a new first axis; and the options of each: an operator that draws, draws anew."""
    problems = [tensors, [t.flip(0) if t.dim() else t for t in tensors], [(t / 2).to(t.dtype) for t in tensors]]
    stacked = [torch.stack(each) for each in zip(*problems)]
    seeds = [{"seed": seed_of_row(options["seed"], i)} if "seed" in options else {} for i in range(3)]
    return stacked, [{**options, **seed} for seed in seeds]


@each_op
def test_func_grad_and_vmap(op):
    places, count = grad_places(op), len(op.results)

    def total(*tensors):
        results = floating_results(op, tensors, options)
        return sum((r * w).sum() for r, w in zip(results, weights))

    for tensors, options in small_samples(op):
        results = floating_results(op, leaves_of(tensors, op), options)
        weights = [w.detach() for w in weights_for(results)]
        grads = torch.func.grad(total, argnums=tuple(places))
        torch.testing.assert_close(list(grads(*tensors)), values_and_grads(op, tensors, options)[count:])
        stacked, by_row = rows_of(op, tensors, options)
        expected = [values_and_grads(op, [t[i] for t in stacked], by_row[i])[count:] for i in range(3)]
        for axis in (0, 1, -1):
            in_dims = tuple(axis if t.dim() > 1 else 0 for t in stacked)
            laid = [t.movedim(0, axis) for t, axis in zip(stacked, in_dims)]
            actual = torch.func.vmap(grads, in_dims=in_dims)(*laid)
            torch.testing.assert_close(list(actual), [torch.stack(each) for each in zip(*expected)])
        last = [op.function(*tensors[:-1], t, **o) for t, o in zip(stacked[-1], by_row)]
        values = torch.func.vmap(lambda t: op.function(*tensors[:-1], t, **options), in_dims=2 if t_dim(tensors) else 0)
        laid = stacked[-1].movedim(0, 2) if t_dim(tensors) else stacked[-1]
        torch.testing.assert_close(as_tuple(values(laid)), tuple(map(torch.stack, zip(*map(as_tuple, last)))))


def t_dim(tensors):
    return tensors[-1].dim() == 2


def test_every_row_of_vmap_draws_for_itself():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    own_noisy = OWN["own_noisy"].function
    drawn = torch.func.vmap(lambda row: own_noisy(row, seed=5))(x)
    for i in range(4):
        expected = x[i] + 0.5 * noise(x[i], seed_of_row(5, i)) * x[i].square()
        torch.testing.assert_close(drawn[i], expected)
    same = torch.func.vmap(lambda row: own_noisy(row, seed=5), randomness="same")(x)
    torch.testing.assert_close(same, torch.stack([own_noisy(row, seed=5) for row in x]))
    default = torch.func.vmap(lambda row: own_noisy(row))(x)  # the dispatcher drops options that are defaults
    torch.testing.assert_close(default[2], own_noisy(x[2], seed=seed_of_row(1, 2)))
    # known answers of SplitMix64, which starts at 0 here
    assert [seed_of_row(0, i) % 2**64 for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_rows_of_gradients_share_one_draw():
    """jacrev takes one forward pass and a backward pass for every row of gradients: of one and the same draw."""
    x = torch.randn(3, 5, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: OWN["own_noisy"].function(x, seed=5))(x)
    diagonal = 1 + 0.5 * noise(x, 5) * 2 * x
    torch.testing.assert_close(jacobian.view(15, 15), torch.diag(diagonal.flatten()))
    batch = x[None].expand(2, -1, -1)
    grad = torch.func.grad(lambda x: OWN["own_noisy"].function(x, seed=5).sum())
    with pytest.raises(RuntimeError, match="own_noisy: second derivatives under vmap would draw other"):
        torch.func.vmap(torch.func.grad(lambda x: grad(x).sum()))(batch)


def test_optional_tensors_may_be_absent():
    own_moments, x = OWN["own_moments"].function, torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    for w in (None, weight):
        for mask in (None, x.detach() > 0):
            leaves = moving([x, w])
            results = lambda x, w=w, mask=mask: own_moments(x, w, mask)[:2]  # noqa: E731
            assert torch.autograd.gradcheck(results, (x,)) and torch.autograd.gradgradcheck(results, (x,))
            mean, square, sign = own_moments(x, w, mask)
            expected = x * (1 if w is None else w) * (1 if mask is None else mask)
            torch.testing.assert_close((mean, square), (expected, expected * x))
            assert sign.equal(expected.sign()) and not sign.requires_grad
            actual = torch.autograd.grad((3 * mean + square).sum(), leaves)
            torch.testing.assert_close(actual, torch.autograd.grad((3 * expected + expected * x).sum(), leaves))
            (alone,) = torch.autograd.grad(own_moments(x, w, mask)[1].sum(), x)  # the other gets no gradient
            torch.testing.assert_close(alone, 2 * expected)
    torch.testing.assert_close(own_moments(x, mask=weight > 2)[0], x * 0)
    compiled = torch.compile(lambda x: own_moments(x)[1] * 2, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], 4 * x)
    torch.testing.assert_close(torch.func.vmap(lambda x: own_moments(x)[0])(x), x)
    with pytest.raises(ValueError, match="mask must be bool, got torch"):
        own_moments(x, None, x)
    with pytest.raises(ValueError, match="weight must be a tensor or None, got float"):
        own_moments(x, 2.0)


def test_the_torch_operator_is_differentiable_by_itself():
    """As an exported graph calls it; without its optional tensors."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    _, square, sign = torch.ops.fastprob.own_moments(x, None, None)
    assert not sign.requires_grad
    torch.testing.assert_close(torch.autograd.grad(square.sum(), x)[0], 2 * x)


@each_op
def test_forward_mode_raises_rather_than_being_wrong(op):
    tensors, options = next(small_samples(op))
    places = grad_places(op)

    def with_tangents(wrap):
        return [wrap(t, torch.ones_like(t)) if i in places else t for i, t in enumerate(tensors)]

    def of_places(*floats):
        moved = dict(zip(places, floats))
        return floating_results(op, [moved.get(i, t) for i, t in enumerate(tensors)], options)

    floats = tuple(tensors[i] for i in places)
    with pytest.raises(RuntimeError, match=r"forward|jvp"):
        torch.func.jvp(of_places, floats, tuple(map(torch.ones_like, floats)))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward|jvp"):
        op.function(*with_tangents(forward_ad.make_dual), **options)


LAYOUTS = {
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("path", BOTH_PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_op
def test_any_memory_layout(op, layout, path):
    with fastprob.backend("reference" if path == "reference" else "cpu") if served(op) else contextlib.nullcontext():
        for tensors, options in small_samples(op):
            laid = [LAYOUTS[layout](t) for t in tensors]
            expected = values_and_grads(op, [t.contiguous() for t in laid], options)
            inputs = [t.detach().requires_grad_(i in grad_places(op)) for i, t in enumerate(laid)]
            results = as_tuple(op.function(*inputs, **options))
            torch.testing.assert_close([r.detach() for r in results], expected[: len(results)], rtol=0, atol=0)
            weights = [w.movedim(0, -1).contiguous().movedim(-1, 0) if w.dim() else w for w in weights_for(results)]
            grads = torch.autograd.grad(moving(results), moving(inputs), weights)
            torch.testing.assert_close(list(grads), expected[len(results) :], rtol=0, atol=0)
            assert all(t.is_contiguous() for t in (*results, *grads))


def served(op):
    """Whether there is a choice between kernels and the reference."""
    return (op.name, "CPU") in _backends._native


@each_elementwise
def test_broadcast_inputs_get_summed_gradients(op):
    count, places = len(op.results), grad_places(op)
    for tensors, options in small_samples(op):
        for i in places:
            row = tensors[i][0].clone()
            full = values_and_grads(op, [*tensors[:i], row.expand(3, 5), *tensors[i + 1 :]], options)
            if len(tensors) == 1:
                continue
            actual = values_and_grads(op, [*tensors[:i], row, *tensors[i + 1 :]], options)
            torch.testing.assert_close(actual[:count], full[:count])
            torch.testing.assert_close(actual[count + places.index(i)], full[count + places.index(i)].sum(0))


@pytest.mark.parametrize("op", [op for op in EVERY if op.implicit], ids=name_of)
def test_no_second_derivatives_of_implicit_gradients(op):
    tensors, options = next(small_samples(op))
    for name in op.implicit:
        leaves = leaves_of(tensors, op)
        at = leaves[op.tensors.index(name)]
        for first, second in (leaves, leaves[:1]), ([at], leaves[:1]), (leaves[1:2], [at]):
            results = floating_results(op, leaves, options)
            grads = torch.autograd.grad(results, first, weights_for(results), create_graph=True)
            with pytest.raises(NotImplementedError, match=f"{op.name}: {name} must be detached for second"):
                torch.autograd.grad(sum(g.sum() for g in grads), second)
        at = op.tensors.index(name)
        total = lambda *t: sum(r.sum() for r in floating_results(op, t, options))  # noqa: E731
        for first, second in (at, 0), (0, at):  # of one alone at each level
            slope = lambda *t, first=first: torch.func.grad(total, argnums=first)(*t).sum()  # noqa: E731
            with pytest.raises(NotImplementedError, match=f"{op.name}: {name} must be detached for second"):
                torch.func.grad(slope, argnums=second)(*tensors)


@each_op
def test_only_what_asks_gets_a_gradient(op):
    for tensors, options in small_samples(op):
        expected = values_and_grads(op, tensors, options)[len(op.results) :]
        for i, e in zip(grad_places(op), expected, strict=True):
            leaf = tensors[i].clone().requires_grad_()
            results = as_tuple(op.function(*tensors[:i], leaf, *tensors[i + 1 :], **options))
            (actual,) = torch.autograd.grad(moving(results), leaf, weights_for(results))
            torch.testing.assert_close(actual, e)


@each_op
def test_backward_again_and_accumulated(op):
    for tensors, options in small_samples(op):
        expected = values_and_grads(op, tensors, options)[len(op.results) :]
        inputs = leaves_of(tensors, op)

        def total(*tensors):
            results = floating_results(op, tensors, options)
            return sum((r * w).sum() for r, w in zip(results, weights_for(results)))

        loss = 3 * total(*inputs)
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            torch.testing.assert_close([leaf.grad for leaf in moving(inputs)], [3 * times * g for g in expected])
        again = torch.utils.checkpoint.checkpoint(total, *inputs, use_reentrant=False)
        torch.testing.assert_close(list(torch.autograd.grad(again, moving(inputs))), expected)


class Stopped(torch.autograd.Function):
    """Passes on no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_makes_none(reduction):
    leaves = leaves_of(OPS["ggd_nll"].inputs(maker(), 3, 5))
    stopped = Stopped.apply(fastprob.ggd_nll(*leaves, reduction=reduction)).sum()
    assert torch.autograd.grad(stopped, leaves, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("upstream", [0.5, 1.0])
@each_op
def test_empty_tensors_have_empty_gradients(op, upstream):
    index = next(i for i, (tensors, _) in enumerate(op.samples(maker())) if not tensors[0].numel())
    inputs = leaves_of(sample(op, index)[0], op)
    results = floating_results(op, inputs, sample(op, index)[1])
    grads = torch.autograd.grad(results, moving(inputs), [torch.full_like(r, upstream) for r in results])
    assert [g.shape for g in grads] == [t.shape for t in moving(inputs)]


@pytest.mark.parametrize("op", [op for op in OPS.values() if served(op)], ids=name_of)
def test_same_bits_again_and_on_any_number_of_threads(op):
    """Of the kernels. The reference's sums are torch's own, which are cut by the number of threads."""
    threads = torch.get_num_threads()
    tensors = op.inputs(extreme_maker(), 50_001) if op.elementwise else op.inputs(maker(torch.float32), *many(op))
    for options in op.grid:
        runs = []
        try:
            for n in (1, 2, 2):
                torch.set_num_threads(n)
                runs.append(values_and_grads(op, tensors, options))
        finally:
            torch.set_num_threads(threads)
        for run in runs[1:]:
            for a, b in zip(runs[0], run):
                assert a.isnan().equal(b.isnan()) and a.nan_to_num().equal(b.nan_to_num())


def many(op):
    """A problem of more than one block of every kernel: its largest sample, and more rows."""
    rows, *rest = max(op.sizes)
    return rows + 237, *rest


# What is done to the last floating tensor, and what is said of it; of indices see test_bad_labels_are_named.
BAD_INPUT = {
    "shape": (lambda t: t[..., :2].flatten() if t.dim() else t[None], r"broadcast|must be \[|must be a scalar"),
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
    last = grad_places(op)[-1]
    tensors[last] = spoil(tensors[last])
    with pytest.raises(ValueError, match=f"{op.name}: .*{message}"):
        op.function(*tensors, **options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.float(), "must be int64, got torch.float32"),
        (lambda t: t.int(), "must be int64, got torch.int32"),
        (lambda t: t.to("meta"), "must be torch.int64 on cpu as x is, got torch.int64 on meta"),
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
def test_prototype_dispersion_reads_no_memory_for_a_label_out_of_range(label):
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
    with pytest.raises(TypeError, match="too many positional arguments"):
        fastprob.ggd_nll(x, x, x, x, "paper")
    for beta, kind in ((2.0, "float"), (x.numpy(), "ndarray"), (x.tolist(), "list")):
        with pytest.raises(ValueError, match=f"ggd_nll: beta must be a tensor, got {kind}"):
            fastprob.ggd_nll(x, x, beta, x)


@pytest.mark.long
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_cpu_builds(capability):
    """The kernels for lesser processors, in a process that believes to run on one."""
    if torch.backends.cpu.get_cpu_capability() == capability.upper():
        pytest.skip("is this processor's own, which all other tests run on")
    selected = "(error_budget and (float32 or float16) or extreme_parameters or nan_inf) and not own_"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selected],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]
