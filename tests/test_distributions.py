"""GeneralizedNormal against scipy.stats.gennorm, torch's Normal and Laplace, and numerical integrals."""

import contextlib
import copy
import math
import pickle
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Laplace, Normal, kl_divergence

import fastprob
from fastprob.distributions import GeneralizedNormal

POWERS = (0.2, 0.5, 0.9, 1.0, 1.3, 2.0, 3.7, 8.0, 30.0)
each_power = pytest.mark.parametrize("power", POWERS)


def double(*values, grad=False):
    return [torch.tensor(v, dtype=torch.float64, requires_grad=grad) for v in values]


def pair(power, loc=0.7, scale=1.9):
    """Ours and scipy's."""
    return GeneralizedNormal(*double(loc, scale, power)), scipy.stats.gennorm(power, loc, scale)


def assert_close(actual, expected, rtol=1e-11, atol=0.0):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@each_power
def test_values_against_scipy(power):
    ours, scipys = pair(power)
    probability = np.r_[1e-200, 1e-30, 1e-9, np.linspace(0.001, 0.999, 99), 1 - 1e-9]
    x = scipys.ppf(probability)
    assert_close(ours.log_prob(torch.tensor(x)), scipys.logpdf(x), atol=1e-12)
    assert_close(ours.cdf(torch.tensor(x)), scipys.cdf(x))
    assert_close(ours.entropy(), scipys.entropy())
    assert_close(ours.variance, scipys.var())
    assert_close(ours.stddev, scipys.std())
    assert ours.mean == ours.mode == 0.7


@each_power
def test_quantiles_against_scipy(power):
    ours, scipys = pair(power)
    away = np.r_[1e-300, 1e-30, 1e-9, np.linspace(0.001, 0.45, 50)]  # near 1/2 scipy's inverse loses digits
    assert_close(ours.icdf(torch.tensor(away)), scipys.ppf(away), rtol=1e-9)
    assert_close(ours.icdf(torch.tensor(1 - away[2:])), scipys.ppf(1 - away[2:]), rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.01, 1e4), st.floats(1e-300, 0.5) | st.floats(0.0, 0.5, exclude_min=True).map(lambda p: 10 ** (-600 * p))
)
@example(0.125, 0.49999999999999994)
@example(0.01, 0.0625)
def test_quantile_inverts_the_distribution_function(power, probability):
    probability, power = double(min(probability, 0.5), power)
    d = GeneralizedNormal(torch.zeros_like(power), torch.ones_like(power), power)
    x = d.icdf(probability)
    # what an error of a few units in the last place of x does to its probability
    slack = 1e-14 + 20 * 2.3e-16 * float(x.abs() * d.log_prob(x).exp() / probability)
    torchs = 1e-10 if power < 0.05 else 0.0  # its gammaincc is off by 1e-9 for a > 20, and not smooth
    assert_close(d.cdf(x), probability, rtol=1e-12 + slack + torchs)
    upper = d.icdf(1 - probability)
    assert upper >= 0 >= x
    if probability > 1e-3 and 1 - (1 - probability) == probability:  # 1 - p may be 0.5 by rounding
        assert_close(upper, -x, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("power", [0.05, 300.0, 1046.0, 1e4])
def test_extreme_powers_against_mpmath(power):
    """scipy's and a plain formula's |z|^b underflows for large powers."""
    z = torch.tensor([1e-5, 0.1, 0.4, 0.9, 0.999, 1.0, 1.0001], dtype=torch.float64)
    with mpmath.workdps(40):
        b, tail, rest = mpmath.mpf(power), [], []
        for r in map(mpmath.mpf, z.tolist()):
            series = sum((-1) ** k * r ** (b * k + 1) / (mpmath.factorial(k) * (b * k + 1)) for k in range(80))
            half = series / mpmath.gamma(1 + 1 / b) / 2  # of exp(-r^b), integrated term by term
            tail.append(float(0.5 - half))
            rest.append(float(0.5 + half))
    tail, rest = double(tail, rest)
    d = GeneralizedNormal(*double(0.0, 1.0, power))
    assert_close(d.cdf(-z), tail)
    assert_close(d.cdf(z), rest)
    known = tail < 0.45
    assert_close(d.icdf(tail)[known], -z[known], rtol=1e-10)


def test_quantiles_at_the_edges():
    d = GeneralizedNormal(1.0, 2.0, torch.tensor([0.3, 1.0, 2.0, 50.0]))
    for probability, expected in ((0.0, -math.inf), (0.5, 1.0), (1.0, math.inf)):
        assert (d.icdf(torch.tensor(probability)) == expected).all()
    for probability in (-0.1, 1.1, math.nan):
        assert d.icdf(torch.tensor(probability)).isnan().all()
    assert (d.cdf(torch.tensor([[-math.inf], [1.0], [math.inf]])) == torch.tensor([[0.0], [0.5], [1.0]])).all()
    assert d.icdf(torch.tensor(0.3)).dtype == torch.float32


@pytest.mark.parametrize("power", [1e-310, 1e-10, 1e-3, 3e-3, 5e-3])
def test_quantiles_that_overflow_are_infinite(power):
    """P <= z / Gamma(1 + 1/b), so that z overflows for every P that float64 has."""
    probability = torch.tensor([0.0, 1e-300, 0.2, 0.5 - 2**-54, 0.5, 0.7, 1.0], dtype=torch.float64)
    quantiles = GeneralizedNormal(*double(3.0, 1.0, power)).icdf(probability)
    assert quantiles.tolist() == [-math.inf] * 4 + [3.0] + [math.inf] * 2


@pytest.mark.parametrize("power", [0.0054, 0.0058, 0.0062, 0.0066, 0.007, 0.008])
def test_quantiles_where_they_begin_to_overflow(power):
    probability = 0.5 + np.r_[2.0**-52, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.95] / 2
    with np.errstate(over="ignore"):
        expected = scipy.special.gammaincinv(1 / power, 2 * probability - 1) ** (1 / power)
    quantiles = GeneralizedNormal(*double(0.0, 1.0, power)).icdf(torch.tensor(probability))
    assert_close(quantiles, expected, rtol=1e-8)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_laplace_and_normal_are_special_cases(power):
    loc, scale = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.2
    ours = GeneralizedNormal(loc, scale * (2**0.5 if power == 2 else 1), power)
    theirs = (Normal if power == 2 else Laplace)(loc, scale)
    x = torch.randn(7, 5, dtype=torch.float64) * 3
    for name in ("log_prob", "cdf"):
        assert_close(getattr(ours, name)(x), getattr(theirs, name)(x), atol=1e-15)
    probability = torch.rand(7, 5, dtype=torch.float64)
    assert_close(ours.icdf(probability), theirs.icdf(probability), rtol=1e-10, atol=1e-12)
    for name in ("mean", "mode", "variance", "stddev", "batch_shape", "event_shape"):
        assert_close(torch.as_tensor(getattr(ours, name)), getattr(theirs, name))
    assert_close(ours.entropy(), theirs.entropy())


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 30), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_moves_and_scales(power, scale, loc):
    standard = GeneralizedNormal(*double(0.0, 1.0, power))
    moved = GeneralizedNormal(*double(loc, scale, power))
    z = torch.linspace(-3, 3, 10, dtype=torch.float64)  # not 0, where rounding of loc + scale z is everything
    x = loc + scale * z
    noise = 1e-15 * power * (1 + abs(loc) / scale)
    assert_close(moved.log_prob(x), standard.log_prob(z) - math.log(scale), rtol=1e-9 + 1e3 * noise, atol=1e-9)
    assert_close(moved.cdf(x), 1 - moved.cdf(2 * loc - x), rtol=1e-9, atol=1e-9 + 1e3 * noise)
    assert_close(moved.variance, scale**2 * standard.variance)


@each_power
def test_gradients(power):
    loc, scale, shape = double(0.3, 1.4, power, grad=True)
    x = torch.tensor([-1.5, -0.2, 0.31, 1.1, 2.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *p: GeneralizedNormal(*p).log_prob(x), (x, loc, scale, shape))
    assert torch.autograd.gradcheck(lambda *p: GeneralizedNormal(*p).entropy(), (loc, scale, shape))
    assert torch.autograd.gradcheck(lambda x, *p: GeneralizedNormal(*p, power).cdf(x), (x, loc, scale))
    probability = torch.tensor([0.01, 0.2, 0.45, 0.7, 0.98], dtype=torch.float64, requires_grad=True)
    quantile = lambda q, *p: GeneralizedNormal(*p, power).icdf(q)  # noqa: E731
    assert torch.autograd.gradcheck(quantile, (probability, loc, scale), rtol=1e-2 if power < 0.5 else 1e-3)


@each_power
def test_gradients_at_loc_are_finite(power):
    loc, scale, shape = double(0.3, 1.4, power, grad=True)
    x = loc.detach().clone().requires_grad_()
    d = GeneralizedNormal(loc, scale, shape)
    slopes = torch.autograd.grad(d.cdf(x), (x, loc, scale))
    density = d.log_prob(x).exp()
    assert_close(torch.stack(slopes), torch.stack([density, -density, 0 * density]))
    gradients = torch.autograd.grad(d.log_prob(x), (x, loc, scale, shape))
    assert_close(gradients[2], -1 / scale)
    assert gradients[0] == gradients[1] == 0 and gradients[3].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["default", "reference"])
def test_far_outside_everything_is_finite(backend, dtype):
    x = torch.tensor([math.inf, -1e8, 1e12], dtype=dtype, requires_grad=True)
    power = torch.tensor([0.5, 30.0, 700.0], dtype=dtype, requires_grad=True)
    with contextlib.nullcontext() if backend == "default" else fastprob.backend(backend):
        value = GeneralizedNormal(0.0, 1.0, power).log_prob(x)
        gradients = torch.autograd.grad(value.sum(), (x, power))
    bound = -torch.finfo(dtype).max / 2
    assert_close(value, [bound, bound if dtype == torch.float32 else -1e240, bound], rtol=1e-6)
    assert (gradients[0][[0, 2]] == 0).all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ["cdf", "icdf"])
def test_the_gradient_for_power_that_does_not_exist_is_refused(name):
    power, x = double(1.5, 0.3, grad=True)
    value = getattr(GeneralizedNormal(0.0, 1.0, power), name)(x)
    assert torch.autograd.grad(value, x, retain_graph=True)[0] > 0
    with pytest.raises(NotImplementedError, match="no gradient for power"):
        torch.autograd.grad(value, power, retain_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient for power"):
        value.backward()


@each_power
def test_samples_by_kolmogorov_and_smirnov(power):
    ours, scipys = pair(power)
    assert scipy.stats.kstest(ours.sample((20000,)).numpy(), scipys.cdf).pvalue > 1e-3
    single = GeneralizedNormal(0.7, 1.9, power).expand((2,)).sample((20000,))
    assert single.dtype == torch.float32
    for column in single.T:
        assert scipy.stats.kstest(column.numpy(), scipys.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(single.sign().T.numpy())[0, 1]) < 0.03  # four standard errors


def test_sample_shapes_seeds_and_half_types():
    d = GeneralizedNormal(torch.zeros(3, 1), torch.ones(4), 2.0)
    torch.manual_seed(5)
    first = d.rsample((2, 5))
    torch.manual_seed(5)
    assert first.shape == (2, 5, 3, 4) and torch.equal(d.sample((2, 5)), first)
    assert first.unique().numel() == first.numel()
    half = GeneralizedNormal(*(torch.tensor([v], dtype=torch.bfloat16) for v in (0.5, 2.0, 1.5)))
    single = GeneralizedNormal(0.5, 2.0, 1.5)
    x = half.sample((50,))
    probability = half.cdf(x)
    assert x.dtype == probability.dtype == half.log_prob(x).dtype == half.icdf(probability).dtype == torch.bfloat16
    torch.testing.assert_close(half.log_prob(x).float(), single.log_prob(x.float()), rtol=2**-8, atol=0)
    torch.testing.assert_close(probability.float(), single.cdf(x.float()), rtol=2**-7, atol=0)


def test_a_sample_is_not_nan_where_only_a_factor_overflows(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.full(shape, 0.5, **kwargs))
    samples = GeneralizedNormal(0.0, 1.0, 0.02).sample((50,))  # U would be 0, and G^50 is infinite
    assert not samples.isnan().any() and samples.isinf().any()


@each_power
def test_gradient_of_a_sample_is_the_implicit_one(power, monkeypatch):
    """With U = 1 a sample is w = G^(1/b), distributed as F = P(1 + 1/b, w^b); dw/db = -(dF/db) / (dF/dw)."""
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.ones(shape, **kwargs))
    loc, scale, shape = double([0.4] * 200, [1.7] * 200, [power] * 200, grad=True)
    x = GeneralizedNormal(loc, scale, shape).rsample()
    w = (x.detach() - 0.4) / 1.7
    slopes = torch.autograd.grad(x.sum(), (loc, scale, shape))
    assert_close(slopes[0], torch.ones(200))
    assert_close(slopes[1], w)

    def cdf(w, b):
        return scipy.special.gammainc(1 + 1 / b, w**b)

    w, step = w.numpy(), 1e-5
    by_power = (cdf(w, power * (1 + step)) - cdf(w, power * (1 - step))) / (2 * step * power)
    density = power * w**power * np.exp(-(w**power)) / math.gamma(1 + 1 / power)
    known = density > 1e-4 * density.max()  # elsewhere the numerical derivative has no digits
    assert known.sum() > 150
    torch.testing.assert_close(
        slopes[2].numpy()[known] / 1.7,
        -by_power[known] / density[known],
        rtol=2e-3,
        atol=2e-3 * float(w.mean()) / power,
    )


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0, 6.0])
def test_gradients_of_expectations(power):
    """d/db of E X^2, the variance, and of E cos X, by integration, within five standard errors of an average."""
    count = 100_000
    each = torch.full((count,), power, dtype=torch.float64, requires_grad=True)  # a gradient per sample
    x = GeneralizedNormal(*double(0.0, 1.3), each).rsample()

    def integral(b):
        density = lambda v: math.cos(v) * math.exp(-((v / 1.3) ** b)) / 1.3 / math.gamma(1 + 1 / b)  # noqa: E731
        return scipy.integrate.quad(density, 0, 80, limit=500)[0]

    (shape,) = double(power, grad=True)
    exact = {
        "square": float(torch.autograd.grad(GeneralizedNormal(*double(0.0, 1.3), shape).variance, shape)[0]),
        "cos": (integral(power * 1.001) - integral(power * 0.999)) / (0.002 * power),
    }
    for name, value in exact.items():
        (slopes,) = torch.autograd.grad(getattr(x, name)().sum(), each, retain_graph=True)
        error = float(slopes.std()) / count**0.5
        assert abs(float(slopes.mean()) - value) < 5 * error + 1e-3 * abs(value)
        assert error < 0.1 * abs(value)


def integrated_kl(p, q, p_loc):
    """Over the bulk of p, in two halves that meet in its peak."""
    log_ratio = lambda v: float(p.log_prob(torch.tensor(v, dtype=torch.float64)) - q.log_prob(  # noqa: E731
        torch.tensor(v, dtype=torch.float64)))  # fmt: skip
    integrand = lambda v: math.exp(float(p.log_prob(torch.tensor(v, dtype=torch.float64)))) * log_ratio(v)  # noqa: E731
    halves = [(p_loc - 40, p_loc), (p_loc, p_loc + 40)]
    return sum(scipy.integrate.quad(integrand, *half, epsabs=1e-10, limit=300)[0] for half in halves)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (GeneralizedNormal(*double(0.3, 0.8, 1.5)), GeneralizedNormal(*double(0.3, 1.1, 3.0))),
        (GeneralizedNormal(*double(0.3, 0.8, 5.0)), GeneralizedNormal(*double(0.3, 1.1, 0.7))),
        (GeneralizedNormal(*double(0.3, 0.8, 1.5)), GeneralizedNormal(*double(-0.6, 1.1, 2.0))),
        (GeneralizedNormal(*double(0.3, 0.8, 1.5)), Normal(*double(-0.6, 1.1))),
        (GeneralizedNormal(*double(0.3, 0.8, 1.5)), Laplace(*double(0.3, 1.1))),
        (Normal(*double(0.3, 0.8)), GeneralizedNormal(*double(0.3, 1.1, 2.6))),
        (Laplace(*double(0.3, 0.8)), GeneralizedNormal(*double(1.3, 1.1, 2.0))),
    ],
    ids=lambda d: f"{type(d).__name__}{float(getattr(d, 'power', 0)):g}",
)
def test_kl_against_integrals(p, q):
    assert float(kl_divergence(p, q)) == pytest.approx(integrated_kl(p, q, 0.3), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.2, 20), st.floats(0.2, 20), st.floats(0.1, 10))
def test_kl_is_positive_and_zero_for_itself(power, other, scale):
    p = GeneralizedNormal(*double(0.3, 1.0, power))
    assert abs(kl_divergence(p, p)) < 1e-11
    assert kl_divergence(p, GeneralizedNormal(*double(0.3, scale, other))) > -1e-9


def test_kl_gradients():
    parameters = double(0.3, 0.8, 1.5, 1.1, 3.0, grad=True)
    same_loc = lambda loc, s, b, t, c: kl_divergence(GeneralizedNormal(loc, s, b), GeneralizedNormal(loc, t, c))  # noqa: E731
    assert torch.autograd.gradcheck(same_loc, parameters)
    to_normal = lambda loc, s, b, t, other: kl_divergence(GeneralizedNormal(loc, s, b), Normal(other, t))  # noqa: E731
    assert torch.autograd.gradcheck(to_normal, parameters)


@pytest.mark.parametrize(("power", "other"), [(1.5, 2.0), (0.4, 2.0), (1.5, 3.0), (2.0, 1.3), (0.7, 0.6), (1.0, 1.0)])
def test_second_derivative_of_kl_for_loc_at_equal_locs(power, other):
    """d^2/dm^2 E |X + m|^s = s b E |X|^(s + b - 2) at 0, by integration by parts."""
    scale, other_scale = 0.8, 1.1
    density = lambda z: math.exp(-(z**power)) / math.gamma(1 + 1 / power)  # noqa: E731 (of |z|)
    moment = scipy.integrate.quad(lambda u: (u ** (other + power - 2)) * density(u), 0, 1)[0]
    moment += scipy.integrate.quad(lambda u: (u ** (other + power - 2)) * density(u), 1, math.inf)[0]
    expected = other * power * moment * scale ** (other - 2) / other_scale**other

    def kl(loc):
        q = GeneralizedNormal(*double(0.3, other_scale, other), validate_args=False)
        return kl_divergence(GeneralizedNormal(loc, *double(scale, power), validate_args=False), q)

    (loc,) = double(0.3)
    assert_close(torch.func.grad(kl)(loc), 0.0)
    assert float(torch.func.hessian(kl)(loc)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("power", [0.4, 0.5])
def test_kl_gradients_where_its_second_derivative_is_infinite(power):
    parameters = double(0.3, 0.8, power, 1.1, 0.5, grad=True)
    same_loc = lambda loc, s, b, t, c: kl_divergence(GeneralizedNormal(loc, s, b), GeneralizedNormal(loc, t, c))  # noqa: E731
    assert torch.autograd.gradcheck(same_loc, parameters)
    p, q = GeneralizedNormal(*double(0.3, 1e-300, 1.5)), GeneralizedNormal(*double(0.3, 1.0, 0.5))  # it overflows
    with mpmath.workdps(40):
        moment = mpmath.mpf(1e-300) ** 0.5 * mpmath.gamma(1) / mpmath.gamma(1 / mpmath.mpf(1.5))
        expected = moment + mpmath.log(4) - p.entropy().item()
    assert_close(kl_divergence(p, q), float(expected))


def test_kl_without_a_closed_form_is_refused():
    p = GeneralizedNormal(torch.zeros(2), 1.0, 1.5)
    both = GeneralizedNormal(torch.tensor([0.0, 1.0]), 1.0, torch.tensor([3.0, 2.0]))
    assert kl_divergence(p, both).shape == (2,)
    for q in (
        GeneralizedNormal(torch.tensor([0.0, 1.0]), 1.0, torch.tensor([2.0, 3.0])),
        Laplace(torch.tensor([0.0, 1.0]), 1.0),
        GeneralizedNormal(torch.tensor([0.0, 1.0]), 1.0, torch.tensor(2.0, requires_grad=True)),
    ):
        with pytest.raises(NotImplementedError, match="closed form for equal loc"):
            kl_divergence(p, q)


def kl_of(loc, power):
    """KL of GeneralizedNormal(0, 0.8, 1.5) to GeneralizedNormal(loc, 1.1, power)."""
    p, q = ((torch.zeros_like(loc), 0.8, 1.5), (loc, 1.1, power))
    return kl_divergence(GeneralizedNormal(*p, validate_args=False), GeneralizedNormal(*q, validate_args=False))


def compiled_kl(loc, power):
    torch._dynamo.reset()
    return torch.compile(kl_of, fullgraph=True, backend="aot_eager")(loc, power)


@pytest.mark.parametrize("form", [torch.vmap(kl_of), compiled_kl], ids=["vmap", "compile"])
def test_kl_that_cannot_look_at_values(form):
    """Elements: equal locs; power 2 apart; neither, which is refused elsewhere and NaN here."""
    loc, power = double([0.0, 0.0, 0.6, 0.6], [3.0, 2.0, 2.0, 3.0], grad=True)
    value = form(loc, power)
    expected = kl_of(loc[:2], power[:2])
    assert_close(value[:2], expected)
    apart = kl_of(loc[2], power[2].detach())
    assert_close(value[2], apart)
    assert value[3].isnan()
    slopes = torch.autograd.grad(value[:3].sum(), (loc, power))
    expected = torch.autograd.grad(expected.sum() + apart, (loc, power))
    assert_close(slopes[0][:3], expected[0][:3])
    assert_close(slopes[1][:2], expected[1][:2])
    assert slopes[1][2].isnan()  # E (X + m)^2 log |X + m| has no closed form


COLD = """
import math, torch
import fastprob
from fastprob.distributions import GeneralizedNormal
from torch.distributions import Laplace, Normal, kl_divergence

def log_prob(loc, scale, power, x): return GeneralizedNormal(loc, scale, power).log_prob(x)
def moments(loc, scale, power, x):
    d = GeneralizedNormal(loc, scale, power)
    return d.variance + d.entropy()
def quantile(loc, scale, power, x): return GeneralizedNormal(loc, scale, power.detach()).icdf(x.sigmoid())
def rsample(loc, scale, power, x): return GeneralizedNormal(loc, scale, power).rsample((2,))
def kl(loc, scale, power, x):
    return kl_divergence(GeneralizedNormal(loc, scale, power), GeneralizedNormal(loc, 1.1, 3.0))
def kl_normal(loc, scale, power, x): return kl_divergence(GeneralizedNormal(loc, scale, power), Normal(x, 1.1))
def kl_laplace(loc, scale, power, x): return kl_divergence(Laplace(loc, scale), GeneralizedNormal(loc, 1.1, power))

def run(f):
    torch.manual_seed(3)
    leaves = [torch.linspace(*ends, 5).requires_grad_() for ends in ((-1, 1), (0.5, 2), (0.7, 3), (-2, 2))]
    value = f(*leaves)
    return value, *torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)

for f in (log_prob, moments, quantile, rsample, kl, kl_normal, kl_laplace):
    compiled = run(torch.compile(f, fullgraph=True, backend="aot_eager"))  # first, before any eager call
    torch.testing.assert_close(compiled, run(f), msg=lambda text: f.__name__ + ": " + text)
    assert compiled[2].abs().sum() > 0, f.__name__
"""


def test_first_call_is_compiled():
    """In a fresh process: an eager call before it hides what a trace cannot enter."""
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_is_a_torch_distribution():
    d = GeneralizedNormal(torch.zeros(3, 1), torch.ones(4), 1.5)
    wide = d.expand((2, 3, 4))
    assert d.batch_shape == (3, 4) and wide.batch_shape == wide.mean.shape == (2, 3, 4) and d.event_shape == ()
    assert wide.log_prob(torch.zeros(2, 3, 4)).shape == wide.rsample().shape == (2, 3, 4)
    assert GeneralizedNormal(0, 1, 2).loc.dtype == torch.float32
    mixed = d.log_prob(torch.ones(4, dtype=torch.float64))
    assert mixed.dtype == torch.float64
    joint, other = Independent(d, 2), Independent(GeneralizedNormal(d.loc, 2.0, 3.0), 2)
    assert_close(joint.log_prob(torch.ones(3, 4)), d.log_prob(torch.ones(3, 4)).sum(), rtol=1e-6)
    assert_close(kl_divergence(joint, other), kl_divergence(d, other.base_dist).sum(), rtol=1e-6)
    for copied in (pickle.loads(pickle.dumps(wide)), copy.deepcopy(wide)):
        assert torch.equal(copied.log_prob(torch.ones(4)), wide.log_prob(torch.ones(4)))
    assert repr(GeneralizedNormal(0.0, 1.0, 2.0)) == "GeneralizedNormal(loc: 0.0, scale: 1.0, power: 2.0)"


@pytest.mark.parametrize("shape", [(), (0, 4), (1, 1), (3, 5)], ids=str)
def test_shapes(shape):
    d = GeneralizedNormal(torch.zeros(shape), torch.ones(shape), 1.5)
    x = d.sample((2,))
    assert x.shape == (2, *shape) and d.batch_shape == shape
    for method in ("log_prob", "cdf"):
        assert getattr(d, method)(x).shape == (2, *shape)
    assert d.icdf(d.cdf(x)).shape == (2, *shape)
    values = (d.mean, d.mode, d.variance, d.stddev, d.entropy(), d.perplexity(), kl_divergence(d, d))
    assert all(value.shape == shape and value.isfinite().all() for value in values)


@pytest.mark.parametrize("validate", [True, False])
def test_expanding_keeps_whether_arguments_are_validated(validate):
    wide = GeneralizedNormal(0.0, 1.0, 2.0, validate_args=validate).expand((3,)).expand((2, 3))
    with pytest.raises(ValueError, match="within the support") if validate else contextlib.nullcontext():
        assert wide.log_prob(torch.tensor(math.nan)).isnan().all()


def test_parameters_of_several_dtypes_are_of_their_common_one():
    narrow, wide = torch.full((2,), 3.0, dtype=torch.bfloat16), torch.full((2,), 3.0, dtype=torch.float64)
    expected = GeneralizedNormal(wide, wide, 0.7)
    for parameters in ((narrow, wide, 0.7), (wide, narrow, 0.7), (3, narrow, wide - 2.3)):
        d = GeneralizedNormal(*parameters)
        x = torch.tensor([1.0, 5.0])
        for ours, truth in (
            *((getattr(d, name), getattr(expected, name)) for name in ("mean", "mode", "variance", "stddev")),
            (d.log_prob(x), expected.log_prob(x)), (d.cdf(x), expected.cdf(x)), (d.icdf(x / 9), expected.icdf(x / 9)),
            (d.entropy(), expected.entropy()), (kl_divergence(d, expected), torch.zeros(2, dtype=torch.float64)),
        ):  # fmt: skip
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        assert d.sample().dtype == torch.float64


def test_whole_numbers():
    d = GeneralizedNormal(torch.tensor([0, 1]), torch.tensor(2), 1.5)  # torch.Normal makes 1.5 a 1 here
    expected = GeneralizedNormal(torch.tensor([0.0, 1.0]), 2.0, 1.5)
    assert d.sample().dtype == d.power.dtype == torch.float32 and (d.power == 1.5).all()
    assert torch.equal(d.variance, expected.variance)
    assert torch.equal(d.log_prob(torch.tensor([3, 4])), expected.log_prob(torch.tensor([3.0, 4.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_that_are_numbers(dtype):
    parameters = [torch.tensor([v, v + 1], dtype=dtype) for v in (0.0, 1.0, 2.0)]
    d = GeneralizedNormal(*parameters, validate_args=False)
    for method in ("log_prob", "cdf", "icdf"):
        for value in (0.3, 1, np.float64(0.3), np.float32(0.3)):
            expected = getattr(d, method)(torch.tensor(float(value), dtype=dtype))
            torch.testing.assert_close(getattr(d, method)(value), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="must be a Tensor"):
        GeneralizedNormal(*parameters, validate_args=True).log_prob(0.3)


def test_stddev_where_the_variance_leaves_the_dtype():
    scale = torch.tensor([1e-30, 1e30], requires_grad=True)
    stddev = GeneralizedNormal(0.0, scale, 2.0).stddev
    assert_close(stddev, scale.detach() / 2**0.5, rtol=1e-6)
    assert_close(torch.autograd.grad(stddev.sum(), scale)[0], [0.5**0.5] * 2, rtol=1e-6)


def test_nan_parameters_give_nan():
    for bad in range(3):
        parameters = [torch.tensor(math.nan) if i == bad else torch.tensor(v) for i, v in enumerate((0.0, 1.0, 3.0))]
        d, other = GeneralizedNormal(*parameters, validate_args=False), GeneralizedNormal(0.0, 1.0, 1.5)
        values = [
            d.log_prob(0.5),
            d.cdf(0.5),
            d.icdf(0.3),
            d.rsample(),
            kl_divergence(d, other),
            kl_divergence(other, d),
        ]
        values += [d.mean] if bad == 0 else [d.variance, d.stddev, d.entropy()]
        assert all(v.isnan() for v in values), (bad, values)


def test_half_types_are_rounded_once():
    parameters = [torch.tensor([v], dtype=torch.bfloat16) for v in (0.1, 3.0, 1.3)]
    half, single = (GeneralizedNormal(*(t.to(dtype) for t in parameters)) for dtype in (torch.bfloat16, torch.float32))
    for name in ("variance", "mean"):
        assert torch.equal(getattr(half, name), getattr(single, name).bfloat16())
    assert torch.equal(half.entropy(), single.entropy().bfloat16())
    normal = [Normal(d.loc, d.scale * 0.7) for d in (half, single)]
    torch.testing.assert_close(
        kl_divergence(half, normal[0]).float(), kl_divergence(single, normal[1]), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("method", ["log_prob", "cdf", "icdf"])
def test_vmap_along_any_axis(method, axis):
    loc, x = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 5, dtype=torch.float64)
    f = lambda loc, x: getattr(GeneralizedNormal(loc, 0.8, 1.5, validate_args=False), method)(x)  # noqa: E731
    expected = f(loc, x)
    assert_close(torch.vmap(f, in_dims=axis, out_dims=axis)(loc, x), expected)
    assert_close(torch.vmap(f, in_dims=(axis, 0), out_dims=axis)(loc, x.movedim(axis, 0)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiles(dtype):
    def every(value, *parameters):
        d = GeneralizedNormal(*parameters)
        return torch.stack([d.cdf(value), d.log_prob(value), d.icdf(value.sigmoid()), d.entropy().expand(5)])

    x = torch.linspace(-2, 2, 5, dtype=dtype, requires_grad=True)
    parameters = double(0.3, 1.2, 1.5)
    value, expected = torch.compile(every, fullgraph=True, backend="aot_eager")(x, *parameters), every(x, *parameters)
    assert_close(value, expected, rtol=1e-12)
    for row, expected_row in zip(value[:3], expected[:3]):
        slopes = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (row, expected_row)]
        assert_close(*slopes, rtol=1e-5)
        assert (slopes[0] != 0).any()


@pytest.mark.parametrize(
    ("arguments", "name"), [((0.0, -1.0, 2.0), "scale"), ((0.0, 1.0, 0.0), "power"), ((math.nan, 1.0, 2.0), "loc")]
)
def test_bad_parameters_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"parameter {name} "):
        GeneralizedNormal(*arguments, validate_args=True)  # torch.compile turns torch's default off
    GeneralizedNormal(*arguments, validate_args=False)
    for method in ("log_prob", "cdf"):
        with pytest.raises(ValueError, match="within the support"):
            getattr(GeneralizedNormal(0.0, 1.0, 2.0, validate_args=True), method)(torch.tensor(math.nan))
