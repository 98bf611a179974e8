"""Laws of the generalised Gaussian's operators, against mpmath and scipy."""

from __future__ import annotations

import math

import mpmath
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastprob

BETAS = [1e-4, 1e-3, 0.02, 0.3, 0.5, 0.99, 1.0, 1.5, 2.0, 2.1662, 5.0, 40.0, 1e3, 1e4]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_lgamma_and_digamma_against_mpmath(dtype, tolerance):
    """At a tie only the normaliser is left: lgamma(1 + 1/b), and -digamma(1 + 1/b) / b^2 as its derivative."""
    beta = torch.tensor(BETAS, dtype=dtype).requires_grad_()
    zero, one = torch.zeros_like(beta), torch.ones_like(beta)
    value = fastprob.ggd_nll(zero, one, beta, zero, eps=0.0, clamp_min=0.0, reduction="none")
    (grad,) = torch.autograd.grad(value.sum(), beta)
    exact = [mpmath.mpf(b) for b in beta.tolist()]
    lgamma = torch.tensor([float(mpmath.loggamma(1 + 1 / b)) for b in exact], dtype=torch.float64)
    slope = torch.tensor([float(-mpmath.digamma(1 + 1 / b) / b**2) for b in exact], dtype=torch.float64)
    torch.testing.assert_close(value.detach().double(), lgamma, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), slope, rtol=tolerance, atol=tolerance)


def test_density_against_scipy():
    generator = torch.Generator().manual_seed(0)
    mu, target = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    alpha, beta = 0.2 + 3 * torch.rand(2, 500, generator=generator, dtype=torch.float64)
    options = {"eps": 0.0, "clamp_min": 0.0, "clamp_max": 1e30, "reduction": "none"}
    nll = fastprob.ggd_nll(mu, 1 / alpha, beta, target, **options)
    expected = -scipy.stats.gennorm.logpdf(target, beta, loc=mu, scale=alpha)
    torch.testing.assert_close(nll + math.log(2), torch.from_numpy(expected))


def test_variance_against_scipy_and_its_limits():
    beta = torch.logspace(-0.5, 2, 40, dtype=torch.float64)
    expected = torch.from_numpy(scipy.stats.gennorm.var(beta.numpy(), scale=0.25))
    torch.testing.assert_close(fastprob.ggd_variance(torch.full_like(beta, 4), beta), expected)
    uniform = fastprob.ggd_variance(torch.tensor(0.5), torch.tensor(1e8))
    torch.testing.assert_close(uniform, torch.tensor(4.0 / 3))
    tiny = fastprob.ggd_variance(torch.tensor(1e30), torch.tensor(0.04))  # both Gammas overflow, the variance does not
    expected = mpmath.gamma(75) / mpmath.gamma(25) / mpmath.mpf(10) ** 60
    assert float(tiny) == pytest.approx(float(expected), rel=1e-4)


@given(
    st.floats(-5, 5), st.floats(0.01, 100), st.floats(0.05, 20), st.floats(-5, 5), st.floats(0.5, 4), st.floats(-3, 3)
)
def test_shift_and_scale(mu, inv_alpha, beta, target, factor, shift):
    """nll(mu + s, a, b, z + s) is unchanged, nll(c mu, a / c, b, c z) rises by log c."""

    def nll(*parameters):
        tensors = [torch.tensor(p, dtype=torch.float64) for p in parameters]
        return fastprob.ggd_nll(*tensors, eps=0.0, clamp_min=0.0, clamp_max=1e300)

    value = nll(mu, inv_alpha, beta, target)
    moved, scaled = (
        nll(mu + shift, inv_alpha, beta, target + shift),
        nll(factor * mu, inv_alpha / factor, beta, factor * target),
    )
    assert abs(mu - target) < 1e-6 or torch.allclose(moved, value, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(scaled, value + math.log(factor), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_probvlm_loss_is_its_four_terms(form):
    torch.manual_seed(0)
    image, text = ([torch.randn(7, 5), torch.rand(7, 5) + 0.2, torch.rand(7, 5) + 0.5] for _ in range(2))
    z_image, z_text = torch.randn(2, 7, 5)

    def term(adapter, target):
        return 0.5 * fastprob.ggd_nll(*adapter, target, form=form) + 0.25 * (adapter[0] - target).abs().mean()

    options = {"cross_weight": 0.3, "l1_weight": 0.25, "nll_weight": 0.5, "form": form}
    loss = fastprob.probvlm_loss(*image, *text, z_image, z_text, **options)
    cross = term(image, z_text) + term(text, z_image)
    torch.testing.assert_close(loss, term(image, z_image) + term(text, z_text) + 0.3 * cross)
    torch.testing.assert_close(fastprob.probvlm_loss(*text, *image, z_text, z_image, **options), loss)


# mu, inv_alpha and beta with a product r a that leaves float32 and a power (r a)^b that does not; ties; one in range.
OUT_OF_RANGE = [
    (1e30, 1e30, 0.01),
    (-1e30, 1e30, 0.005),
    (1e-30, 1e-30, 0.01),
    (1e-30, -0.0, 0.01),
    (0.0, 1e30, 0.5),
    (2e20, 1e20, 0.02),
    (1e-25, 1e-20, 0.02),
    (1e30, 1e-30, 0.5),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("clamp_min", [0.0, 1e-4])
def test_products_out_of_range(dtype, clamp_min):
    """The paper's t = (r a)^b where r a over- or underflows and t does not, and its derivatives; a tie stays a tie."""
    for mu, a, b in OUT_OF_RANGE:
        if dtype == torch.float64:
            mu, a, b = mu * (1e140 if abs(mu) > 1 else 1e-140), a * (1e140 if abs(a) > 1 else 1e-140), b / 10
        inputs = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (mu, a, b, 0.0)]
        options = {"eps": 0.0, "clamp_min": clamp_min, "reduction": "none"}
        with fastprob.backend("reference"):
            value = fastprob.ggd_nll(*inputs, **options)
            grads = torch.autograd.grad(value.sum(), inputs, create_graph=True)
            seconds = torch.autograd.grad(grads[2].sum(), inputs[2])
        mu, a, b = (mpmath.mpf(x.item()) for x in inputs[:3])
        tie, r = not (mu and a), abs(mu)
        t = 0 if tie else (r * a) ** b
        slopes = [0, 0, 0] if tie else [b * t / mu, b * t / a, t * mpmath.log(r * a)]
        y = 1 / b
        expected = max(t, clamp_min) + mpmath.loggamma(1 + y) - (mpmath.log(a) if a else -mpmath.inf)
        slopes[1] -= 1 / a if a else mpmath.inf
        slopes[2] -= mpmath.digamma(1 + y) * y**2
        assert value.item() == pytest.approx(float(expected), rel=1e-6)
        for grad, slope in zip(grads, [*slopes, -slopes[0]], strict=True):
            assert grad.item() == pytest.approx(float(slope), rel=1e-5, abs=0)
        assert seconds[0].isfinite()


DEFAULTS = {"form": "paper", "eps": 1e-4, "clamp_min": 1e-4, "clamp_max": 1e3}


@pytest.mark.parametrize(
    ("op", "defaults"),
    [
        ("ggd_nll", {**DEFAULTS, "reduction": "mean"}),
        ("probvlm_loss", {**DEFAULTS, "cross_weight": 1.0, "l1_weight": 0.0, "nll_weight": 1.0}),
    ],
)
def test_defaults(op, defaults):
    """Without options the result is that of these, and of no others: ties, large residuals and scales near 0 count."""
    function = getattr(fastprob, op)
    mu, inv_alpha = torch.tensor([0.0, 1.0, 1e5, -0.3]).double(), torch.tensor([1.0, 2.0, 3.0, 1e-3]).double()
    tensors = [mu, inv_alpha, torch.tensor([1.5, 2.0, 2.0, 0.7]).double(), 0 * mu]
    if op == "probvlm_loss":
        tensors = [*tensors[:3], -mu, 2 * inv_alpha, tensors[2], 0 * mu, 0 * mu + 0.1]
    value = function(*tensors)
    torch.testing.assert_close(value, function(*tensors, **defaults), rtol=0, atol=0)
    for name, default in defaults.items():
        others = {"form": "released", "reduction": "sum"}
        other = others.get(name, default * 10 if name != "l1_weight" else 1.0)
        assert (function(*tensors, **{name: other}) - value).abs() > 1e-6, name
