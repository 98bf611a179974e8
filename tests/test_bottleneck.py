"""bottleneck: against torch.distributions and Philox's words, the same for a problem wherever it stands, finite."""

import math

import pytest
import torch
from conftest import EPSILON, assert_within_budget, cast, leaves_of, maker

import fastprob
from fastprob import _backends
from fastprob._op import DTYPES, OPS
from fastprob.ops import _random
from fastprob.ops.bottleneck import STREAM


def problem(*shape, dtype=torch.float64):
    return OPS["bottleneck"].inputs(maker(dtype), *shape)


def results_and_grads(x, logits, grads=None, **options):
    """t, kl and the gradients for x and logits, of numbers that differ from element to element."""
    leaves = leaves_of((x, logits))
    results = fastprob.bottleneck(*leaves, **options)
    if grads is None:
        grads = [torch.linspace(-1, 2, max(r.numel(), 1), dtype=r.dtype)[: r.numel()].view_as(r) for r in results]
    return *(r.detach() for r in results), *torch.autograd.grad(results, leaves, grads)


def noise_by_hand(count, draw, seed):
    """[count] by the docstring, a number at a time."""
    groups = torch.arange((count + 3) // 4)
    words = torch.stack(_random.words(groups, seed=seed, stream=STREAM, draw=draw), 1).tolist()
    numbers = []
    for e in range(count):
        of_radius, of_angle = words[e // 4][2:] if e & 2 else words[e // 4][:2]
        radius = math.sqrt(-2 * math.log(((of_radius >> 8) + 1) / 2**24))
        numbers.append(radius * (math.sin if e & 1 else math.cos)(2 * math.pi * of_angle / 2**32))
    return torch.tensor(numbers, dtype=torch.float64)


def test_formula(served_by):
    """Of a batch of four problems of 5 x 9: t from the noise, kl by torch.distributions, gradients by autograd."""
    x, logits = leaves_of(problem(4, 5, 9))
    options = {"seed": 2**62 + 3, "samples": 3, "sigma": 0.7, "batch_dims": 1}
    kept = 1 / (1 + (-logits).exp())
    noise = torch.stack([noise_by_hand(45, draw, options["seed"]).view(5, 9) for draw in range(3)])
    t = kept * x + (1 - kept) * 0.7 * noise[:, None]
    normal, sigma = torch.distributions.Normal, torch.full_like(x, 0.7)
    kl = torch.distributions.kl_divergence(normal(kept * x, (1 - kept) * sigma), normal(0 * sigma, sigma))
    grads = [torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view_as(r) for r in (t, kl)]
    expected = t, kl, *torch.autograd.grad((t, kl), (x, logits), grads)
    torch.testing.assert_close(results_and_grads(x, logits, grads, **options), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_problem_does_not_depend_on_those_beside_it(dtype, served_by):
    """Bit for bit by a kernel: alone, in another place, beside more than a task takes, or with rows behind it."""
    exact = ("bottleneck", "CPU") in _backends._native and served_by == "cpu"
    rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * EPSILON[dtype]}
    x, logits = problem(21, 13, 7, dtype=dtype)
    grads = [torch.linspace(-1, 2, 4 * x.numel()).to(dtype).view(4, *x.shape), torch.ones_like(x)]
    options = {"seed": 9, "samples": 4, "batch_dims": 1}
    t, kl, *of = results_and_grads(x, logits, grads, **options)
    for i in (0, 5, 20):
        alone = results_and_grads(x[i], logits[i], [grads[0][:, i], grads[1][i]], seed=9, samples=4)
        torch.testing.assert_close(alone, (t[:, i], kl[i], *(g[i] for g in of)), **rounding)
    for rows in (1, 3, 12):
        shorter = results_and_grads(x[:, :rows], logits[:, :rows], [g[..., :rows, :] for g in grads], **options)
        torch.testing.assert_close(shorter, (t[:, :, :rows], kl[:, :rows], *(g[:, :rows] for g in of)), **rounding)


def test_stacked_problems_and_draws(served_by):
    """All axes may stack problems, of one element then; the first draws are the same whatever their number."""
    x, logits = problem(3, 4)
    single = fastprob.bottleneck(0 * x, logits, seed=1, samples=2, batch_dims=2)[0] / logits.neg().sigmoid()
    torch.testing.assert_close(single[0], single[0, :1, :1].expand(3, 4))
    t, kl = fastprob.bottleneck(x, logits, seed=1, samples=70)
    first, same_kl = fastprob.bottleneck(x, logits, seed=1, samples=5)
    torch.testing.assert_close((first, same_kl), (t[:5], kl), rtol=0, atol=1e-14)
    assert t.flatten(1).unique(dim=0).shape[0] == 70
    other = fastprob.bottleneck(x, logits, seed=1 - 2**63, samples=70)[0]
    assert not t.isclose(other, rtol=0, atol=1e-9).any()
    scalar = fastprob.bottleneck(x[0, 0], logits[0, 0], seed=1, samples=2)
    torch.testing.assert_close(scalar, (t[:2, 0, 0], kl[0, 0]), rtol=0, atol=1e-14)


def test_no_draws(served_by):
    x, logits = problem(3, 4, dtype=torch.float32)
    t, kl, *grads = results_and_grads(x, logits, seed=1, samples=0)
    assert t.shape == (0, 3, 4) and kl.equal(fastprob.bottleneck(x, logits, seed=8)[1])
    drawn = results_and_grads(x, logits, [torch.zeros(1, 3, 4), torch.linspace(-1, 2, 12).view(3, 4)], seed=1)
    torch.testing.assert_close(grads, list(drawn[2:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_finite_for_any_finite_logit(dtype, served_by):
    """And what the limits are: all of x and none of the noise, or the other way round."""
    largest = torch.finfo(dtype).max
    logits = torch.tensor([20.0, 1000, largest, -20, -1000, -largest], dtype=torch.float64).to(dtype)
    x = torch.full_like(logits, 2)
    t, kl, grad_x, grad_logits = results_and_grads(x, logits, [torch.ones_like(x)[None], torch.ones_like(x)], seed=3)
    noise = noise_by_hand(6, 0, 3).to(dtype)
    bound = max(torch.finfo(dtype).eps, 1e-6)
    close = lambda a, b: torch.testing.assert_close(a, b.to(dtype), rtol=bound, atol=bound)  # noqa: E731
    close(t[0], torch.where(logits > 0, x, noise))
    close(kl, torch.where(logits > 0, logits.double() + 1.5, 0))
    close(grad_x, torch.where(logits > 0, x + 1, 0))
    close(grad_logits, (logits > 0).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "samples"), [((2, 3000), 5), ((37, 261), 2), ((1, 6), 1500)])
def test_many_blocks(shape, samples, dtype):
    """More of everything than a block has: elements, problems, draws."""
    tensors, options = problem(*shape, dtype=dtype), {"seed": 6, "samples": samples, "batch_dims": 1, "sigma": 2.0}
    with fastprob.backend("reference"):
        truth = results_and_grads(*cast(tensors, torch.float64), **options)
        reference = results_and_grads(*tensors, **options)
    for a, r, t in zip(results_and_grads(*tensors, **options), reference, truth, strict=True):
        assert_within_budget(a, r, t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"sigma": math.nan}, "sigma must be positive and finite, got nan"),
        ({"sigma": math.inf}, "sigma must be positive and finite, got inf"),
        ({"batch_dims": -1}, r"batch_dims must be in 0\.\.2, the number of axes, got -1"),
        ({"batch_dims": 3}, r"batch_dims must be in 0\.\.2, the number of axes, got 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"bottleneck: {message}"):
        fastprob.bottleneck(torch.ones(3, 5), torch.ones(5), seed=1, **options)


def test_a_seed_has_to_be_given():
    with pytest.raises(TypeError, match="missing a required argument: 'seed'"):
        fastprob.bottleneck(torch.ones(3), torch.ones(3))
