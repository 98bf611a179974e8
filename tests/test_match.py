"""The cross-modal likelihood against quadrature, closed forms, symmetries and limits."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import fastprob

pytestmark = pytest.mark.usefixtures("served_by")


def match(*parameters, dtype=torch.float64):
    return fastprob.ggd_match_nll(*[torch.as_tensor(p, dtype=dtype) for p in parameters], eps=0.0, reduction="none")


def value_and_grads(*parameters, dtype=torch.float64):
    leaves = [torch.tensor(p, dtype=dtype, requires_grad=True) for p in parameters]
    value = fastprob.ggd_match_nll(*leaves, eps=0.0, reduction="none")
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def drawn(n, seed=0, shapes=(0.5, 3.0)):
    """mu, inv_alpha and beta of two distributions."""
    make = np.random.default_rng(seed)
    low, high = np.log(shapes)
    one, other = [(make.uniform(-2, 2, n), make.uniform(0.2, 3, n), np.exp(make.uniform(low, high, n))) for _ in "ab"]
    return *one, *other


def by_quad(a, b, c, d, delta):
    """Minus the integral's logarithm, in intervals that grow from the cusps and from the least phi."""

    def phi(z):
        return (a * abs(z)) ** b + (c * abs(z - delta)) ** d

    grid = delta * np.logspace(-12, 0, 4001)
    grid = np.concatenate([grid, delta - grid, [0.0, delta]])
    at = grid[np.argmin(phi(grid))]
    for width in (1e-2, 1e-4, 1e-6):
        near = at * (1 + width * np.linspace(-1, 1, 801))
        at = near[np.argmin(phi(near))]
    least, scale = phi(at), max(1 / a, 1 / c)
    steps = scale * np.logspace(-11, 12, 70)
    ends = np.unique(np.concatenate([[p, *(p + steps), *(p - steps)] for p in (0.0, delta, at)]))
    counts = np.pad(phi(ends) < least + 40, 1)
    ends = ends[counts[:-2] | counts[1:-1] | counts[2:]]
    weight = lambda z: math.exp(min(least - phi(z), 5))  # noqa: E731
    total = sum(quad(weight, x, y, epsabs=0, epsrel=1e-9)[0] for x, y in itertools.pairwise(ends))
    logs = sum(math.log(2 * math.gamma(1 + 1 / beta) / scale) for scale, beta in ((a, b), (c, d)))
    return least - math.log(total) + logs


@pytest.mark.parametrize("ratio", [1e-4, 0.3, 1.0, 1e4])
def test_quadrature_over_the_domain(ratio):
    """Every pair of shapes, edges of the domain among them, at distances from a tie to 1e3 scales."""
    shapes = [
        (0.2, 0.2),
        (0.2, 10.0),
        (10.0, 0.5),
        (0.7, 1.0),
        (1.0, 1.0),
        (1.1, 1.2),
        (10.0, 10.0),
        (3.0, 0.9),
        (2.0, 1.5),
    ]
    cases = [
        (1.0, b, ratio, d, distance / min(1.0, ratio))
        for i, (b, d) in enumerate(shapes)
        for distance in (0.0, (1e-3, 0.1, 1.0)[i % 3], (4.0, 30.0, 1e3)[i % 3])
    ]
    check_by_quad(cases)


def test_quadrature_where_one_cusp_lies_near_a_much_wider_one():
    """Without a valley between them, and with a tail that the other's cusp, as sharp, begins just before."""
    check_by_quad([(1.0, 4.485, 7600.0, 0.455, 0.439), (1.0, 0.77, 9700.0, 0.2555, 2.6e-4)])


def check_by_quad(cases):
    a, b, c, d, delta = np.array(cases).T
    truth = np.array([by_quad(*case) for case in cases])
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 5e-6)):
        actual = match(0 * delta, a, b, delta, c, d, dtype=dtype).double().numpy()
        close = np.abs(actual - truth) <= tolerance * np.maximum(1, np.abs(truth))
        assert (close | np.isinf(actual) & (truth > 3e38)).all(), np.array(cases)[~close]


def test_normals_have_a_closed_form():
    mu, a, _, nu, c, _ = drawn(200)
    two = np.full(200, 2.0)
    variance = 0.5 / a**2 + 0.5 / c**2
    truth = 0.5 * (mu - nu) ** 2 / variance + 0.5 * np.log(2 * math.pi * variance)
    value, grads = value_and_grads(mu, a, two, nu, c, two)
    np.testing.assert_allclose(value, truth, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(grads[0], (mu - nu) / variance, rtol=1e-7, atol=1e-7)
    by_variance = 0.5 / variance - 0.5 * (mu - nu) ** 2 / variance**2
    np.testing.assert_allclose(grads[4], -by_variance / c**3, rtol=1e-7, atol=1e-7)


def test_laplaces_have_a_closed_form():
    mu, a, _, nu, c, _ = drawn(200)
    ones, d = np.ones(200), np.abs(mu - nu)
    truth = -np.log(a * c * (a * np.exp(-c * d) - c * np.exp(-a * d)) / (2 * (a * a - c * c)))
    np.testing.assert_allclose(match(mu, a, ones, nu, c, ones), truth, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(
        match(mu, a, ones, nu, a, ones), a * d - np.log(a * (1 + a * d) / 4), rtol=1e-8, atol=1e-8
    )


def test_neither_order_nor_direction_matters():
    mu, a, b, nu, c, d = drawn(500)
    value, grads = value_and_grads(mu, a, b, nu, c, d)
    exchanged, exchanged_grads = value_and_grads(nu, c, d, mu, a, b)
    reflected, reflected_grads = value_and_grads(-mu, a, b, -nu, c, d)
    torch.testing.assert_close(exchanged, value, rtol=0, atol=0)
    torch.testing.assert_close(reflected, value, rtol=0, atol=0)
    for i in range(6):
        torch.testing.assert_close(exchanged_grads[i - 3], grads[i], rtol=0, atol=0)
        torch.testing.assert_close(reflected_grads[i], (-1 if i in (0, 3) else 1) * grads[i], rtol=0, atol=0)


def test_a_point_has_the_density_of_the_other_distribution():
    mu, a, b, nu, _, _ = drawn(200)
    value = match(mu, a, b, nu, np.full(200, 1e6), np.full(200, 2.0))
    density = fastprob.ggd_nll(
        *map(torch.as_tensor, (mu, a, b, nu)), eps=0.0, clamp_min=0.0, clamp_max=1e9, reduction="none"
    )
    torch.testing.assert_close(value, density + math.log(2), rtol=1e-4, atol=1e-4)


def test_a_tie_is_finite_and_has_no_direction():
    _, a, b, _, c, d = drawn(300, shapes=(0.2, 10.0))
    zero, tiny = np.zeros(300), np.full(300, 1e-9)
    value, grads = value_and_grads(zero, a, b, zero, c, d)
    assert value.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert not grads[0].any() and not grads[3].any()
    np.testing.assert_allclose(match(zero, a, b, tiny, c, d)[b + d > 1.5], value[b + d > 1.5], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_far_apart(dtype):
    """exp(-value) underflows a hundred times over; the value is that of the point between the two that is likeliest."""
    delta, b = np.array([1e2, 1e3, 1e3, 1e4]), np.array([2.0, 2.0, 1.5, 1.0])
    value, grads = value_and_grads(0 * delta, 1 + 0 * delta, b, delta, 1 + 0 * delta, b, dtype=dtype)
    np.testing.assert_allclose(value, 2 * (delta / 2) ** b, rtol=5e-3)
    np.testing.assert_allclose(grads[3], b * (delta / 2) ** (b - 1), rtol=1e-3)
    np.testing.assert_allclose(grads[3], -grads[0])


def test_out_of_the_domain():
    value, grads = value_and_grads([0.0] * 5, [1.0, -1, 1, 0, 1], [2.0, 2, -1, 2, 50], [1.0] * 5, [1.0] * 5, [2.0] * 5)
    assert value.isnan().tolist() == grads[0].isnan().tolist() == [False, True, True, True, False]
    clamped, _ = value_and_grads([0.0], [1.0], [10.0], [1.0], [1.0], [2.0])
    assert grads[2][4] == 0 and value[4] == clamped[0]


def test_reductions():
    parameters = [torch.as_tensor(p) for p in drawn(77)]
    each = fastprob.ggd_match_nll(*parameters, reduction="none")
    torch.testing.assert_close(fastprob.ggd_match_nll(*parameters, reduction="sum"), each.sum())
    torch.testing.assert_close(fastprob.ggd_match_nll(*parameters), each.mean())


def test_derivatives_where_the_pieces_differ():
    """A peak between the cusps, one at each of them, a valley between two, and none but at the sharper one."""
    cases = [(2.0, 3.0, 1.0, 1.0, 2.0), (0.6, 0.7, 1.0, 0.8, 1.5), (0.6, 2.5, 4.0, 0.5, 3.0), (0.8, 1.5, 3.0, 0.2, 1.0)]
    b, d, a, c, delta = torch.tensor(cases, dtype=torch.float64).T.contiguous()
    leaves = [t.clone().requires_grad_() for t in (0 * delta, a, b, delta, c, d)]
    function = lambda *t: fastprob.ggd_match_nll(*t, reduction="sum")  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def rows_of(count, dim, dtype=torch.float64):
    span = torch.rand(3, count, dim, dtype=torch.float64)
    return [(4 * span[0] - 2).to(dtype), (0.2 + 2.8 * span[1]).to(dtype), (0.5 + 2.5 * span[2]).to(dtype)]


def test_all_pairs_are_the_sums_of_their_coordinates(served_by):
    """Of the kernels more columns than one tile, more coordinates than one block."""
    count, dim = (35, 600) if served_by == "cpu" else (7, 20)
    rows, columns = rows_of(2, dim), rows_of(count, dim)
    expected = fastprob.ggd_match_nll(*[t[:, None] for t in rows], *columns, reduction="none").sum(-1)
    pairs = fastprob.ggd_pairwise_match_nll(*rows, *columns)
    values, indices = fastprob.ggd_nearest_match(*rows, *columns, k=4)
    torch.testing.assert_close(pairs, expected, rtol=1e-12, atol=0)
    least = expected.sort(dim=1)
    torch.testing.assert_close(values, least.values[:, :4], rtol=1e-12, atol=0)
    assert indices.equal(least.indices[:, :4])


def test_equal_pairs_come_in_order_and_nan_last():
    rows, columns = rows_of(2, 3), [t.expand(5, -1).clone() for t in rows_of(1, 3)]
    columns[0][1, 0] = torch.nan
    values, indices = fastprob.ggd_nearest_match(*rows, *columns, k=5)
    assert indices.tolist() == [[0, 2, 3, 4, 1]] * 2 and values[:, 4].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4)}, r"mu must be \[N, D\], got \[4\]"),
        ({1: torch.ones(3, 4)}, r"inv_alpha must be \[N, D\] = \[2, 4\] as mu is, got \[3, 4\]"),
        ({3: torch.zeros(5, 3)}, r"other_mu must be \[M, D\] with D = 4, got \[5, 3\]"),
        ({5: torch.ones(5, 3)}, r"other_beta must be \[M, D\] = \[5, 4\] as other_mu is, got \[5, 3\]"),
    ],
)
def test_bad_pairs_are_named(change, message):
    tensors = [*rows_of(2, 4, torch.float32), *rows_of(5, 4, torch.float32)]
    for i, tensor in change.items():
        tensors[i] = tensor
    for function in (fastprob.ggd_pairwise_match_nll, fastprob.ggd_nearest_match):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(*tensors)


def test_bad_options_are_named():
    tensors = [*rows_of(2, 4), *rows_of(2, 4)]
    for function in (fastprob.ggd_match_nll, fastprob.ggd_pairwise_match_nll, fastprob.ggd_nearest_match):
        with pytest.raises(ValueError, match=f"{function.__name__}: eps must be at least 0, got nan"):
            function(*tensors, eps=math.nan)
    with pytest.raises(ValueError, match="ggd_match_nll: reduction must be one of 'mean', 'sum', 'none', got 'avg'"):
        fastprob.ggd_match_nll(*tensors, reduction="avg")


@pytest.mark.parametrize("k", [0, 6])
def test_k_is_of_the_columns(k):
    with pytest.raises(ValueError, match=f"k must be in 1..M with M = 5, got {k}"):
        fastprob.ggd_nearest_match(*rows_of(2, 4), *rows_of(5, 4), k=k)
