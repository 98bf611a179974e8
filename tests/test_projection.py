"""The Laplace approximation of a projection: against autograd, draws, and the limits of its prior."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from fastprob.adapters import projection
from fastprob.adapters.projection import cosine_moments, fit_laplace

SCALE = 3.0


def problem(n=30, width=4, dim=3, others=7):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(dim, width, generator=generator, dtype=torch.float64)
    return features, weight, torch.randn(others, dim, generator=generator, dtype=torch.float64)


def test_the_curvature_is_the_generalised_gauss_newton_matrix():
    """J^T H J with J and H by autograd."""
    features, weight, other = problem()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for g in features @ weight.T:
        jacobian = torch.autograd.functional.jacobian(lambda g: normalize(g, dim=0), g)

        def loss(u):
            return -(SCALE * normalize(other, dim=1) @ u).log_softmax(0)[2]

        expected += jacobian.T @ torch.autograd.functional.hessian(loss, normalize(g, dim=0)) @ jacobian
    torch.testing.assert_close(projection._curvature(features @ weight.T, normalize(other, dim=1), SCALE), expected)


def test_the_embedding_has_the_moments_of_drawn_weights():
    features, weight, other = problem()
    fitted = fit_laplace(features, weight, other, SCALE)
    covariance = torch.kron(fitted.inverse_a, fitted.inverse_b)  # of vec(P), column by column
    torch.manual_seed(0)
    drawn = torch.distributions.MultivariateNormal(weight.T.reshape(-1), covariance).sample((200_000,))
    embedding = drawn.reshape(-1, 4, 3).transpose(1, 2) @ features[0]  # [draws, D]
    mean, variance = (rows[0] for rows in fitted(features[:1]))
    assert embedding.mean(0).tolist() == pytest.approx(mean.tolist(), abs=0.01)
    assert embedding.var(0).tolist() == pytest.approx(variance.tolist(), rel=0.02)


def test_the_factors_are_those_of_the_formula_and_the_precision_the_likeliest():
    features, weight, other = problem()
    curvature = projection._curvature(features @ weight.T, normalize(other, dim=1), SCALE)

    def factors(precision):
        a = math.sqrt(30) * features.T @ features / 30 + math.sqrt(precision) * torch.eye(4)
        b = math.sqrt(30) * curvature / 30 + math.sqrt(precision) * torch.eye(3)
        return a, b

    def marginal(precision):
        prior = torch.distributions.Normal(0.0, precision**-0.5).log_prob(weight).sum()
        return float(prior - torch.kron(*factors(precision)).logdet() / 2)

    factors_alone = [math.sqrt(30) * factor / 30 for factor in (features.T @ features, curvature)]
    ours = [projection._marginal(weight, *factors_alone, precision) for precision in (0.1, 10.0)]
    assert ours[1] - ours[0] == pytest.approx(marginal(10.0) - marginal(0.1))
    fitted = fit_laplace(features, weight, other, SCALE)
    assert fitted.precision == max(projection.PRECISIONS, key=marginal) and 1e-3 < fitted.precision < 1e6
    a, b = factors(fitted.precision)
    torch.testing.assert_close(fitted.inverse_a @ a, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(fitted.inverse_b @ b, torch.eye(3, dtype=torch.float64))


def test_unusual_features_and_few_of_them_are_less_certain():
    features, weight, other = problem(n=300)
    features[:, 0] *= 0.01
    fitted, few = fit_laplace(features, weight, other, SCALE), fit_laplace(features[:20], weight, other, SCALE)
    usual, unusual = torch.eye(4)[1:2], torch.eye(4)[:1]
    assert fitted(unusual)[1].sum() > 3 * fitted(usual)[1].sum()
    assert few(usual)[1].sum() > fitted(usual)[1].sum()


def test_moments_of_a_cosine():
    mean, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    expectation, variance = cosine_moments(mean, torch.zeros(1, 2), other, torch.zeros(2, 2))
    assert expectation.tolist() == [pytest.approx([0.6, 0.8])] and variance.tolist() == [[0, 0]]
    torch.manual_seed(0)
    one = mean + torch.tensor([0.3, 0.5]) * torch.randn(400_000, 2)
    two = other[1] + torch.tensor([0.2, 0.4]) * torch.randn(400_000, 2)
    squares = torch.tensor([[0.09, 0.25]]), torch.tensor([[0.0, 0.0], [0.04, 0.16]])
    expectation, variance = cosine_moments(mean, squares[0], other, squares[1])
    norms = one.square().sum(1).mean() * two.square().sum(1).mean()
    dot = (one * two).sum(1)
    assert float(expectation[0, 1]) == pytest.approx(float(dot.mean() / norms.sqrt()), rel=0.01)
    assert float(variance[0, 1]) == pytest.approx(float(dot.var() / norms), rel=0.02)


def test_shapes_that_do_not_fit():
    features, weight, other = problem()
    for wrong in ((features[:, 1:], weight, other), (features, weight, other[:, 1:]), (features[:0], weight, other)):
        with pytest.raises(ValueError, match=r"must be \[n, W\], \[D, W\], \[C, D\], got"):
            fit_laplace(*wrong, SCALE)
