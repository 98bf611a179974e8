"""csd where the operators' general tests do not look: its definition, far from the origin, and its messages."""

import pytest
import torch

import fastprob


def distributions(rows, dim, offset=0.0, dtype=torch.float64):
    return (torch.randn(rows, dim, dtype=torch.float64) + offset).to(dtype), torch.rand(rows, dim, dtype=dtype)


def test_is_the_expected_squared_distance_of_draws():
    (mean, variance), (other, other_variance) = distributions(3, 4), distributions(2, 4)
    x = mean[:, None] + variance.sqrt()[:, None] * torch.randn(3, 200_000, 4, dtype=torch.float64)
    y = other[:, None] + other_variance.sqrt()[:, None] * torch.randn(2, 200_000, 4, dtype=torch.float64)
    squares = (x[:, None] - y).square().sum(-1)  # [3, 2, draws]
    error = (squares.mean(-1) - fastprob.csd(mean, variance, other, other_variance)).abs()
    assert (error < 4 * squares.std(-1) / 200_000**0.5).all()


def test_points_far_from_the_origin():
    """|x|^2 + |y|^2 - 2 x y alone would lose all: the squares are 1e8 times the differences'."""
    tensors = [*distributions(20, 16, 1e4, torch.float32), *distributions(30, 16, 1e4, torch.float32)]
    mean, variance, other, other_variance = (t.double() for t in tensors)
    expected = (mean[:, None] - other).square().sum(-1) + variance.sum(1)[:, None] + other_variance.sum(1)
    torch.testing.assert_close(fastprob.csd(*tensors).double(), expected, rtol=1e-6, atol=0)


def test_a_distance_is_never_negative():
    mean, variance = distributions(50, 64, dtype=torch.float32)
    assert (fastprob.csd(mean, 0 * variance, mean, 0 * variance) >= 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    tensors = [*distributions(5, 4), *distributions(6, 4)]
    expected = fastprob.csd(*tensors)
    tensors[0][2, 1] = tensors[2][3, 0] = bad
    actual = fastprob.csd(*tensors)
    assert actual[2].isnan().all() and actual[:, 3].isnan().all()
    others = torch.ones(5, 6, dtype=torch.bool)
    others[2], others[:, 3] = False, False
    torch.testing.assert_close(actual[others], expected[others])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3,), (3,), (2, 3), (2, 3)), r"mean must be \[N, D\], got \[3\]"),
        (((3, 4), (3, 1), (2, 4), (2, 4)), r"variance must be \[N, D\] = \[3, 4\] as mean is, got \[3, 1\]"),
        (((3, 4), (3, 4), (2, 5), (2, 5)), r"other_mean must be \[M, D\] with D = 4, got \[2, 5\]"),
        (((3, 4), (3, 4), (4,), (4,)), r"other_mean must be \[M, D\] with D = 4, got \[4\]"),
        (((3, 4), (3, 4), (2, 4), (2,)), r"other_variance must be \[M, D\] = \[2, 4\] as other_mean is, got \[2\]"),
    ],
)
def test_bad_shapes_are_named(shapes, message):
    with pytest.raises(ValueError, match=f"csd: {message}"):
        fastprob.csd(*[torch.ones(shape) for shape in shapes])
