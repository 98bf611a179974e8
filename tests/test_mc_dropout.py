"""mc_dropout where the tests of all operators do not look: whose mask it is, dead units, memory."""

import subprocess
import sys

import pytest
import torch
from conftest import leaves_of, maker

import fastprob
from fastprob._op import OPS
from fastprob.ops._random import kept


@pytest.mark.parametrize(("p", "seed"), [(0.1, 0), (0.5, 2**63 - 1), (0.9, -(2**63))])
def test_masks_are_philox_s_bit_for_bit(p, seed, served_by):
    """Units that are the hidden ones themselves: their mean over the first m passes counts what these keep."""
    units = 150
    eye, ones = torch.eye(units), torch.ones(1, units)
    before, expected = torch.zeros(units), kept(6, units, p=p, seed=seed, device="cpu")
    assert 0 < expected.sum() < expected.numel()
    for m in range(6):
        mean, _ = fastprob.mc_dropout(ones, 0 * ones, eye, eye, passes=m + 1, p=p, seed=seed)
        count = mean[0] * (1 - p) * (m + 1)
        torch.testing.assert_close(count - before, expected[m].float(), rtol=0, atol=1e-5)
        before = count


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_moments_of_passes_one_by_one(products, served_by):
    """More rows than one bfloat16 product takes, and one more; more passes than are kept, no whole number of tiles."""
    hidden, constant, fold, last = OPS["mc_dropout"].inputs(maker(torch.float32), 257, 30, 300, 35)
    keep = kept(61, 30, p=0.4, seed=3, device="cpu")
    y = torch.stack([torch.relu((hidden * k / 0.6) @ fold.T + constant) @ last.T for k in keep])
    mean, variance = fastprob.mc_dropout(hidden, constant, fold, last, passes=61, p=0.4, seed=3, products=products)
    torch.testing.assert_close(mean, y.mean(0), rtol=1e-5, atol=1e-4)
    tolerance = 1e-4 if products == "float32" else 0.02
    torch.testing.assert_close(variance, y.var(0, correction=0), rtol=tolerance, atol=tolerance / 10)
    exact = fastprob.mc_dropout(hidden, constant, fold, last, passes=61, p=0.4, seed=3)[1]
    assert variance.equal(exact) == (products == "float32")


@pytest.mark.parametrize("passes", [8, 61])
def test_gradients_of_passes_one_by_one(passes, served_by):
    """More rows than one sum of weights' gradients takes; whole tiles of passes, and more than are kept."""
    leaves = leaves_of(OPS["mc_dropout"].inputs(maker(), 150, 30, 300, 35))
    hidden, constant, fold, last = leaves
    keep = kept(passes, 30, p=0.45, seed=3, device="cpu")
    dropped = keep.logical_not().sum(1)
    assert (dropped > 15).any() and (dropped < 15).any()
    y = torch.stack([torch.relu((hidden * k / 0.55) @ fold.T + constant) @ last.T for k in keep])
    weights = torch.randn(2, 150, 35, dtype=torch.float64)
    expected = torch.autograd.grad((y.mean(0), y.var(0, correction=0)), leaves, [*weights])
    results = fastprob.mc_dropout(*leaves, passes=passes, p=0.45, seed=3)
    every = torch.autograd.grad(results, leaves, [*weights], retain_graph=True)
    torch.testing.assert_close(every, expected)
    for leaf, grad in zip(leaves, every):  # each one alone
        assert torch.autograd.grad(results, leaf, [*weights], retain_graph=True)[0].equal(grad)


def test_a_unit_that_every_pass_drops_has_no_gradient(served_by):
    hidden, constant, fold, last = leaves_of(OPS["mc_dropout"].inputs(maker(torch.float32), 20, 30, 70, 35))
    never = ~kept(3, 30, p=0.4, seed=0, device="cpu").any(0)
    assert never.any()
    results = fastprob.mc_dropout(hidden, constant, fold, last, passes=3, p=0.4)
    of_hidden, of_fold = torch.autograd.grad(results, (hidden, fold), [torch.ones(20, 35)] * 2)
    assert of_hidden[:, never].count_nonzero() == 0 and of_fold[:, never].count_nonzero() == 0


def test_units_that_no_pass_has(served_by):
    hidden, constant, fold, last = OPS["mc_dropout"].inputs(maker(torch.float32), 20, 30, 70, 35)
    constant[:, 1::2] = constant[3] = -1e3
    few = fastprob.mc_dropout(hidden, constant[:, ::2], fold[::2], last[:, ::2], passes=5)
    for result, expected in zip(fastprob.mc_dropout(hidden, constant, fold, last, passes=5), few):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        assert result[3].count_nonzero() == 0


def test_a_row_that_is_not_finite_is_nan_and_alone_in_it(served_by):
    tensors = OPS["mc_dropout"].inputs(maker(torch.float32), 20, 30, 70, 35)
    expected = fastprob.mc_dropout(*tensors, passes=5, p=0.7)
    tensors[0][4, 7], tensors[0][9, 0] = -torch.inf, torch.nan
    others = [i for i in range(20) if i not in (4, 9)]
    for result, clean in zip(fastprob.mc_dropout(*tensors, passes=5, p=0.7), expected):
        assert result[[4, 9]].isnan().all() and result[others].equal(clean[others])


def test_an_infinite_weight_is_nan_in_its_own_output(served_by):
    """It lies where products of the outputs before it, padded to whole panels, must not read on."""
    tensors = OPS["mc_dropout"].inputs(maker(torch.float32), 5, 30, 7, 70)
    expected = fastprob.mc_dropout(*tensors, passes=5)
    for output in range(1, 70):
        tensors[3][output], before = torch.inf, tensors[3][output].clone()
        others = [i for i in range(70) if i != output]
        for result, clean in zip(fastprob.mc_dropout(*tensors, passes=5), expected):
            assert not result[:, output].isfinite().any()
            torch.testing.assert_close(result[:, others], clean[:, others])
        tensors[3][output] = before


def test_an_infinite_weight_is_nan_where_its_unit_is_dropped(served_by):
    """One pass, which keeps the lesser part of the units; where it keeps that one, the ReLU makes 0 of it."""
    keep = kept(1, 30, p=0.75, seed=1, device="cpu")[0]
    hidden, constant, fold, last = OPS["mc_dropout"].inputs(maker(torch.float32), 5, 30, 7, 4)
    for unit in range(30):
        weights = fold.clone()
        weights[:, unit] = -torch.inf
        mean, _ = fastprob.mc_dropout(hidden.abs() + 1, constant, weights, last, passes=1, p=0.75, seed=1)
        assert not mean.any() if keep[unit] else mean.isnan().all()


PEAK = """
import pathlib, torch, fastprob
# in KB; ru_maxrss would begin at what the parent process has
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
tensors = [torch.rand(shape, requires_grad={gradients}) for shape in ((48, 32), (48, 512), (512, 32), (512, 512))]

def run(passes):
    results = fastprob.mc_dropout(*tensors, passes=passes)
    if {gradients}:
        torch.autograd.grad(results, tensors, [torch.ones(48, 512)] * 2)

with fastprob.backend({backend!r}):
    run(50)
    before = peak()
    run(1000)
    print(peak() - before)
"""


@pytest.mark.parametrize("gradients", [False, True])
def test_memory_does_not_grow_with_passes(served_by, gradients):
    """All outputs of 1000 passes would be 98 MB."""
    script = PEAK.format(backend=served_by, gradients=gradients)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 8_000  # KB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"hidden must be \[N, H\], got \[4\]"),
        ({"constant": torch.zeros(4, 7)}, r"constant must be \[N, C\] with N = 3, got \[4, 7\]"),
        ({"constant": torch.zeros(())}, r"constant must be \[N, C\] with N = 3, got \[\]"),
        ({"fold": torch.zeros(7, 4)}, r"fold must be \[C, H\] = \[7, 5\], got \[7, 4\]"),
        ({"last": torch.zeros(4, 6)}, r"last must be \[D, C\] with C = 7, got \[4, 6\]"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"p": 1.0}, r"p must be in \[0, 1\), got 1.0"),
        ({"p": float("nan")}, "p must be in .* got nan"),
        ({"products": "tf32"}, "products must be one of 'float32', 'bfloat16', got 'tf32'"),
    ],
)
def test_bad_arguments(change, message):
    names = ("hidden", "constant", "fold", "last")
    arguments = dict(zip(names, OPS["mc_dropout"].inputs(maker(torch.float32), 3, 5, 7, 4))) | change
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=f"mc_dropout: {message}"):
        fastprob.mc_dropout(*tensors, **arguments)
