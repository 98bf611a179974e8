"""ggd_sample: draws against scipy's distribution, gradients of expectations against closed forms, seeds."""

import pytest
import torch
from conftest import maker

import fastprob
from fastprob._op import OPS
from fastprob.ops import ggd_sample as reference

stats = pytest.importorskip("scipy.stats")
SHAPES = (0.1, 0.5, 1.0, 2.0, 8.0)


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def draw(mu, inv_alpha, beta, n, seed=1, eps=0.0, dtype=torch.float64):
    """Of one distribution, [n]."""
    return fastprob.ggd_sample(*[tensor(v, dtype=dtype) for v in (mu, inv_alpha, beta)], n=n, seed=seed, eps=eps)[:, 0]


@pytest.mark.parametrize("beta", SHAPES)
def test_distribution(beta):
    x = draw(0.5, 4.0, beta, 200_000)
    assert stats.kstest(x.numpy(), stats.gennorm(beta, 0.5, 0.25).cdf).pvalue > 0.01
    half = len(x) // 2  # neighbours are independent, and so are the sign and the size
    signs = (
        (x[:half] > 0.5).double(),
        (x[half:] > 0.5).double(),
        ((x - 0.5).abs() > (x - 0.5).abs().median())[:half].double(),
    )
    for a, b in (signs[0][1:], signs[0][:-1]), (signs[0], signs[1]), (signs[0], signs[2]):
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(correlation) < 4 / half**0.5


@pytest.mark.parametrize("beta", [1e4, torch.inf])
def test_towards_the_uniform_distribution(beta):
    x = draw(0.0, 1.0, beta, 100_000)
    assert stats.kstest(x.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01


def test_many_small_distributions_at_once():
    """Two draws each, of float32: every element of an output has its own numbers."""
    ones = torch.ones(300, 500)
    x = fastprob.ggd_sample(0 * ones, ones, 2 * ones, n=2, seed=3, eps=0.0)
    assert stats.kstest(x.flatten().numpy(), stats.gennorm(2).cdf).pvalue > 0.01
    assert abs(torch.corrcoef(x.flatten(1))[0, 1]) < 4 / 150_000**0.5
    assert x.unique().numel() > 0.9 * x.numel()


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 8.0])
def test_moments(beta):
    """Mean and variance within four standard errors."""
    n = 400_000
    x, eps = draw(1.5, 2.0, beta, n, seed=2, eps=1e-4), 1e-4
    variance = fastprob.ggd_variance(tensor(2.0 + eps), tensor(beta + eps)).item()
    fourth = stats.gennorm(beta + eps, scale=1 / (2 + eps)).moment(4)
    assert abs(x.mean() - 1.5) < 4 * (variance / n) ** 0.5
    assert abs((x - 1.5).square().mean() - variance) < 4 * ((fourth - variance**2) / n) ** 0.5


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 6.0])
def test_gradients_of_expectations(beta):
    """Of E X = mu and of E X^2 = mu^2 + variance, within four standard errors and the gradient's own 1e-3."""
    n, parameters = 200_000, [tensor(v).requires_grad_() for v in (0.3, 1.5, beta)]
    leaves = [p.detach().expand(n).clone().requires_grad_() for p in parameters]  # a gradient for every draw
    x = fastprob.ggd_sample(*leaves, seed=5)
    square = parameters[0].square() + fastprob.ggd_variance(parameters[1] + 1e-4, parameters[2] + 1e-4)
    for of_draws, expectation in (x, parameters[0]), (x.square(), square):
        expected = torch.autograd.grad(expectation.sum(), parameters, allow_unused=True, materialize_grads=True)
        for each, e in zip(torch.autograd.grad(of_draws.sum(), leaves, retain_graph=True), expected):
            allowed = 4 * each.std() / n**0.5 + 1e-3 * each.abs().mean() + 1e-12
            assert abs(each.mean() - e) < allowed, (each.mean(), e, allowed)


def test_gradient_for_beta_is_that_of_quantiles():
    """G moves as its quantiles do, to the 1e-3 of torch's gradient."""
    gamma, step = stats.gamma, 1e-4
    beta = tensor(0.4, 1.0, 2.0, 5.0)
    b = beta + 1e-4
    u, log_g = reference.draws(b, 50, 3)
    g, k = log_g.exp().numpy(), (1 + 1 / b).numpy()
    rank = gamma.cdf(g, k)
    steps = [torch.from_numpy(gamma.ppf(rank, 1 + 1 / (b + s).numpy())).log() / (b + s) for s in (-step, step)]
    slope = (steps[1].exp() - steps[0].exp()) / (2 * step)
    one = torch.ones(4, dtype=torch.float64)
    for i in range(50):
        leaf = beta.clone().requires_grad_()
        x = fastprob.ggd_sample(0 * one, one, leaf, n=50, seed=3)[i]
        (actual,) = torch.autograd.grad(x.sum(), leaf)
        torch.testing.assert_close(actual, u[i] * slope[i] / (1 + 1e-4), rtol=5e-3, atol=1e-3)


def test_seeds(served_by):
    tensors = OPS["ggd_sample"].inputs(maker(), 3, 5)
    first, again = (fastprob.ggd_sample(*tensors, n=5, seed=2**62) for _ in range(2))
    assert first.equal(again)
    assert first[:3].equal(fastprob.ggd_sample(*tensors, n=3, seed=2**62))
    for other in (0, 1, -1, 2**62 + 1, 2**62 + 2**40):
        assert not torch.isclose(first, fastprob.ggd_sample(*tensors, n=5, seed=other)).any()
    assert first[0].isclose(first[1]).sum() == 0


def test_dtypes_draw_alike():
    """A rounding decides on a proposal, and all are of float64."""
    tensors = OPS["ggd_sample"].inputs(maker(torch.bfloat16), 20_000)
    wide = fastprob.ggd_sample(*[t.double() for t in tensors], n=2, seed=8)
    for dtype in (torch.float32, torch.bfloat16):
        x = fastprob.ggd_sample(*[t.to(dtype) for t in tensors], n=2, seed=8)
        assert ((x - wide).abs() <= wide.abs() * torch.finfo(dtype).eps).all()


def test_kernel_and_reference_decide_alike():
    beta = torch.logspace(-2, 4, 100_000, dtype=torch.float64)
    tensors = torch.zeros_like(beta), torch.ones_like(beta), beta
    actual = fastprob.ggd_sample(*tensors, n=2, seed=4)
    with fastprob.backend("reference"):
        expected = fastprob.ggd_sample(*tensors, n=2, seed=4)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_broadcast():
    mu, inv_alpha, beta = torch.randn(4, 1), torch.rand(3) + 1, torch.tensor(1.5)
    x = fastprob.ggd_sample(mu, inv_alpha, beta, n=2, seed=1)
    assert x.equal(fastprob.ggd_sample(*torch.broadcast_tensors(mu, inv_alpha, beta), n=2, seed=1))
    assert x.shape == (2, 4, 3)


def test_nothing_to_draw(served_by):
    for shape, n in ((3, 5), 0), ((0, 4), 2), ((0,), 0):
        leaves = [torch.ones(shape, requires_grad=True) for _ in range(3)]
        x = fastprob.ggd_sample(*leaves, n=n)
        assert x.shape == (n, *shape)
        for g in torch.autograd.grad(x.sum(), leaves):
            assert g.shape == shape and not g.any()


def test_overflow_and_underflow(served_by):
    """What is finite stays so, though a power on the way is not; what is not is infinite, and never NaN."""
    x = draw(0.0, 1.0, 1e-4, 1000)
    assert x.isinf().all() and 400 < (x > 0).sum() < 600
    assert draw(0.0, 1.0, 1e-320, 10).isinf().all()
    steep = draw(0.0, 1e300, 0.006, 1000)  # G^(1/b) is some 1e370
    assert steep.isfinite().all() and 1e50 < steep.abs().median() < 1e90
    half = draw(0.0, 1.0, 0.02, 1000, dtype=torch.float32)
    assert half.isinf().any() and not half.isnan().any()
    assert draw(0.0, 0.0, 2.0, 10).isinf().all()  # infinitely wide
    assert not draw(0.0, torch.inf, 2.0, 10).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": -1}, "n must be at least 0, got -1"), ({"eps": -1.0}, "eps must be at least 0, got -1.0")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"ggd_sample: {message}"):
        fastprob.ggd_sample(*[torch.ones(3)] * 3, **options)
