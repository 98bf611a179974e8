"""Pairs of distributions and targets: against ggd_nll, at edges of tiles and ranges, and the order of the nearest."""

import subprocess
import sys

import pytest
import torch
from conftest import as_tuple, assert_within_budget, cast, leaves_of, maker, moving, weights_for

import fastprob
from fastprob import _backends
from fastprob._op import OPS
from fastprob.ops import _ggd

SHAPES = [(1, 1, 1), (33, 65, 3), (2, 70, 513), (35, 2, 1030), (0, 3, 4), (3, 0, 4), (3, 2, 0)]  # N, M, D


def problem(rows, columns, dim, dtype=torch.float32):
    return OPS["ggd_pairwise_nll"].inputs(maker(dtype), rows, columns, dim)


def by_element(mu, inv_alpha, beta, target, **options):
    """[N, M] by ggd_nll, element by element."""
    rows = (t[:, None] for t in (mu, inv_alpha, beta))
    return fastprob.ggd_nll(*rows, target, reduction="none", **options).sum(-1)


def values_and_grads(function, tensors):
    leaves = leaves_of(tensors)
    results = as_tuple(function(*leaves))
    grads = torch.autograd.grad(moving(results), leaves, weights_for(results))
    return [*(r.detach() for r in results), *grads]


def check(function, tensors, reference=None):
    """Values and gradients within the budget of the reference, or of another function of the same values."""
    with fastprob.backend("reference"):
        truth = values_and_grads(reference or function, cast(tensors, torch.float64))
        same = values_and_grads(reference or function, tensors)
    for i, (a, s, t) in enumerate(zip(values_and_grads(function, tensors), same, truth, strict=True)):
        assert_within_budget(a, s, t, f"[{i}]")


@pytest.mark.parametrize("form", _ggd.FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_ggd_nll(shape, form, served_by):
    check(
        lambda *t: fastprob.ggd_pairwise_nll(*t, form=form),
        problem(*shape, torch.float64),
        lambda *t: by_element(*t, form=form),
    )
    check(lambda *t: fastprob.ggd_pairwise_nll(*t, form=form), problem(*shape))


OUTSIDE = {
    "bounds beyond those of bounded_power": {"clamp_max": 1e6},
    "no lower bound": {"clamp_min": 0.0},
    "all clamped": {"clamp_min": 3.0, "clamp_max": 3.0},
    "nothing": {"clamp_min": 0.0, "clamp_max": 0.0},
}


@pytest.mark.parametrize("options", OUTSIDE.values(), ids=OUTSIDE)
def test_bounds(options):
    check(lambda *t: fastprob.ggd_pairwise_nll(*t, **options), problem(5, 9, 17))


EXTREMES = {
    "tie": lambda mu, a, b, z: z[0].copy_(mu[0]),
    "tie in a flat distribution": lambda mu, a, b, z: (z[0].copy_(mu[0]), b[0].fill_(0.05)),
    "far from a flat distribution": lambda mu, a, b, z: (z[0].fill_(torch.inf), b[0].fill_(0.05)),
    "infinite target": lambda mu, a, b, z: z[0].fill_(-torch.inf),
    "target near the largest number": lambda mu, a, b, z: z[0].fill_(3e38),
    "wide scale": lambda mu, a, b, z: a[0].fill_(1e-30),
    "narrow scale": lambda mu, a, b, z: a[0].fill_(1e30),
    "flat": lambda mu, a, b, z: b[0].fill_(1e-3),
    "steep": lambda mu, a, b, z: b[0].fill_(1e4),
    "infinite exponent": lambda mu, a, b, z: b[0, ::2].fill_(torch.inf),
    "scale of zero": lambda mu, a, b, z: a[0].zero_(),
}


@pytest.mark.parametrize("spoil", EXTREMES.values(), ids=EXTREMES)
def test_extremes(spoil):
    """In one row and column; the other pairs have the bits that they have without it."""
    tensors = problem(3, 5, 9)
    others = fastprob.ggd_pairwise_nll(*tensors)[1:, 1:]
    spoil(*tensors)
    check(lambda *t: fastprob.ggd_pairwise_nll(*t, eps=0.0), tensors)
    assert fastprob.ggd_pairwise_nll(*tensors)[1:, 1:].equal(others)


@pytest.mark.parametrize("at", [0, 515])
@pytest.mark.parametrize("column", [0, 1])
def test_a_nan_in_one_block_of_coordinates_and_one_of_two_columns(column, at):
    """Columns are taken two at a time where both are alike, a whole tile of them here."""
    tensors = problem(2, 32, 520)
    tensors[3][column, at] = torch.nan
    check(fastprob.ggd_pairwise_nll, tensors)


@pytest.mark.parametrize("far", [torch.inf, 2e38])
def test_far_from_a_flat_distribution_whose_lower_bound_is_high(far):
    mu, inv_alpha, beta, target = problem(3, 32, 9)
    target[0], beta[0] = far, 0.05
    check(lambda *t: fastprob.ggd_pairwise_nll(*t, eps=0.0, clamp_min=0.5), (mu, inv_alpha, beta, target))


@pytest.mark.parametrize(("largest", "most"), [(3, 1e3), (12, 1e35)])
def test_a_single_residual_is_exact_up_to_its_bound(largest, most):
    """One coordinate, where no sum hides an error."""
    u = torch.logspace(-4, largest, 2000, dtype=torch.float64).float()
    one = torch.ones(1, 1)
    for beta in (0.3, 1.0, 2.5):
        t = fastprob.ggd_pairwise_nll(0 * one, one, beta * one, u[:, None], eps=0.0, clamp_max=most)[0]
        lgamma = torch.lgamma(1 + 1 / torch.tensor(beta).double())
        truth = u.double().pow(torch.tensor(beta).double()).clamp(1e-4, most) + lgamma
        assert ((t - truth).abs() / truth.abs().clamp_min(1)).max() < 6e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 31, 69, 70])
def test_nearest_are_the_first_of_a_stable_sort(k, dtype, served_by):
    tensors = cast(problem(37, 70, 4), dtype)
    tensors[3][40:60] = tensors[3][:20]  # every one of them twice
    tensors[3][[3, 65]] = torch.nan
    tensors[0][5] = torch.nan  # a row of nothing else
    values, indices = fastprob.ggd_nearest(*tensors, k=k)
    wide = cast(tensors, torch.float32) if dtype == torch.bfloat16 else tensors
    ordered = fastprob.ggd_pairwise_nll(*wide).sort(dim=1, stable=True)
    assert indices.equal(ordered.indices[:, :k])
    torch.testing.assert_close(values, ordered.values[:, :k].to(dtype), rtol=0, atol=0, equal_nan=True)
    assert indices[5].tolist() == list(range(k)) and values[5].isnan().all()


def test_equal_values_come_in_their_order(served_by):
    """Many more of them than are asked for, and a better one at last."""
    mu, scale = torch.zeros(2, 3), torch.ones(2, 3)
    target = torch.ones(500, 3)
    target[-1] = 0.5
    _, indices = fastprob.ggd_nearest(mu, scale, scale, target, k=4)
    assert indices.tolist() == [[499, 0, 1, 2]] * 2


def test_gradients_reach_the_nearest_alone(served_by):
    mu, inv_alpha, beta, target = leaves_of(problem(5, 9, 3, torch.float64))
    values, indices = fastprob.ggd_nearest(mu, inv_alpha, beta, target, k=2)
    assert not indices.requires_grad
    weights = torch.rand_like(values)
    every = fastprob.ggd_pairwise_nll(mu, inv_alpha, beta, target).gather(1, indices)
    leaves = mu, inv_alpha, beta, target
    grads = [torch.autograd.grad((weights * v).sum(), leaves) for v in (values, every)]
    torch.testing.assert_close(*grads)
    assert not grads[0][3][[j for j in range(9) if j not in indices]].any()


def test_columns_of_the_least_by_topk():
    """What the Triton launcher chooses by: one order of a float32 and its column."""
    least = pytest.importorskip("fastprob.kernels._nearest", reason="triton is not installed").least
    numbers = torch.tensor([0.0, -0.0, 1.5, -1.5, 1e-40, torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38, -2e-3])
    values = numbers[torch.randint(len(numbers), (7, 200))]
    for dtype in (torch.float32, torch.float64):
        for k in (1, 3, 200):
            assert least(values.to(dtype), k).equal(values.sort(dim=1, stable=True).indices[:, :k])


@pytest.mark.parametrize("name", ["ggd_pairwise_nll", "ggd_nearest"])
def test_same_bits_on_any_number_of_threads(name):
    """Of many blocks of coordinates, too."""
    if (name, "CPU") not in _backends._native:
        pytest.skip("no C++ kernel")
    threads, tensors = torch.get_num_threads(), problem(75, 40, 1100)
    runs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(values_and_grads(OPS[name].function, tensors))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


MEMORY = """
import pathlib, torch, fastprob
from fastprob.ops import _pairs
_pairs.ELEMENTS = 2**14
# ru_maxrss would begin at what the parent process has
peak = lambda: 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
make = lambda rows: torch.rand(rows, 1)
with fastprob.backend({backend!r}):
    fastprob.ggd_nearest(*[make(100)] * 4, k=3)
    tensors, before = [make({rows}) for _ in range(4)], peak()
    fastprob.ggd_nearest(*tensors, k=3)
print(peak() - before)
"""


def test_nearest_never_holds_the_matrix(served_by):
    rows = 6000 if served_by == "cpu" else 3000
    script = MEMORY.format(backend=served_by, rows=rows)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < rows * rows * 4 / 10  # bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": (5,)}, r"mu must be \[N, D\], got \[5\]"),
        ({"inv_alpha": (1, 5)}, r"inv_alpha must be \[N, D\] = \[3, 5\] as mu is, got \[1, 5\]"),
        ({"beta": (3, 4)}, r"beta must be \[N, D\] = \[3, 5\] as mu is, got \[3, 4\]"),
        ({"target": (7, 4)}, r"target must be \[M, D\] with D = 5, got \[7, 4\]"),
        ({"target": (5,)}, r"target must be \[M, D\] with D = 5, got \[5\]"),
        ({"form": "papre"}, "form must be one of 'paper', 'released', got 'papre'"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"clamp_min": 2.0, "clamp_max": 1.0}, "clamp_min and clamp_max must satisfy 0 <= min <= max, got 2.0, 1.0"),
    ],
)
@pytest.mark.parametrize("name", ["ggd_pairwise_nll", "ggd_nearest"])
def test_bad_input_is_named(name, change, message):
    shapes = {"mu": (3, 5), "inv_alpha": (3, 5), "beta": (3, 5), "target": (7, 5)}
    options = {k: v for k, v in change.items() if k not in shapes}
    tensors = [torch.ones(change.get(k, shape)) for k, shape in shapes.items()]
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        OPS[name].function(*tensors, **options)


@pytest.mark.parametrize(("k", "columns"), [(0, 7), (8, 7), (-1, 7), (1, 0)])
def test_k_out_of_range(k, columns):
    x = torch.ones(3, 5)
    with pytest.raises(ValueError, match=rf"ggd_nearest: k must be in 1\.\.M with M = {columns}, got {k}"):
        fastprob.ggd_nearest(x, x, x, torch.ones(columns, 5), k=k)
