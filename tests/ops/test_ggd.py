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
