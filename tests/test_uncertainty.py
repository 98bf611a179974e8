"""Uncertainty of an adapter: against naive dropout passes, exactly and statistically, and its invariances."""

import pytest
import torch
from scipy.stats import gennorm

import fastprob
from fastprob.adapters import GGDAdapter, predict
from fastprob.adapters.adapter import EPS
from fastprob.ops._random import kept


def make(dim=12, hidden=16, dropout=0.3, rows=9):
    torch.manual_seed(0)
    return GGDAdapter(dim, hidden, dropout, positive="softplus").double(), torch.randn(rows, dim, dtype=torch.float64)


class GivenMask(torch.nn.Module):
    """Stands in for the dropout layer."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def naive_mus(adapter, x, masks):
    """mu of the plain forward with each mask in the dropout's place, [M, N, D]."""
    dropout, mus = adapter.mod[4], []
    for mask in masks:
        adapter.mod[4] = GivenMask(mask)
        mus.append(adapter(x)[0].detach())
    adapter.mod[4] = dropout
    return torch.stack(mus)


def test_folded_passes_equal_naive_passes_for_the_same_masks():
    adapter, x = make()
    masks = kept(7, 16, p=0.3, seed=5, device="cpu").double() / 0.7
    expected = naive_mus(adapter, x, masks).var(0, correction=0)
    torch.testing.assert_close(predict(adapter, x, passes=7, seed=5).epistemic, expected, rtol=1e-10, atol=1e-14)


def test_bfloat16_products_where_torch_is_set_to_them():
    adapter, x = make()
    adapter, x = adapter.float(), x.float()
    exact = predict(adapter, x, passes=7).epistemic
    torch.set_float32_matmul_precision("medium")
    try:
        half = predict(adapter, x, passes=7).epistemic
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not half.equal(exact)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=1e-5)


def test_folded_passes_agree_with_torch_dropout_statistically():
    adapter, x = make()
    adapter.train()
    with torch.no_grad():
        mus = torch.stack([adapter(x)[0] for _ in range(4_000)])  # [M, N, D]
    ours = predict(adapter, x, passes=4_000).epistemic
    naive = mus.var(0, correction=0)
    fourth = (mus - mus.mean(0)).pow(4).mean(0)
    error = ((fourth - naive.square()) / 4_000).sqrt()  # standard error of a variance
    assert ((ours - naive).abs() / error).max() < 6 * 2**0.5


def test_parts_of_the_total():
    adapter, x = make()
    result = predict(adapter, x, passes=5)
    adapter.eval()
    mu, inv_alpha, beta = adapter(x)
    assert result.mu.equal(mu)
    variance = gennorm(beta.detach().numpy() + EPS, scale=1 / (inv_alpha.detach().numpy() + EPS)).var()
    torch.testing.assert_close(result.aleatoric, torch.as_tensor(variance), rtol=1e-9, atol=0)
    assert result.total.equal(result.aleatoric + result.epistemic) and not result.total.requires_grad
    assert (result.epistemic > 0).all()
    without = predict(adapter, x)
    assert without.epistemic.count_nonzero() == 0 and without.total.equal(result.aleatoric)


def test_no_dropout_means_no_epistemic_part():
    adapter, x = make(dropout=0.0)
    assert predict(adapter, x, passes=4).epistemic.abs().max() < 1e-28


def test_variance_is_stable_around_a_large_mean():
    """Naive one-pass variance, E[mu^2] - E[mu]^2, would lose every digit here in float32."""
    adapter, x = make()
    expected = predict(adapter, x, passes=50).epistemic
    with torch.no_grad():
        adapter.block_mu[2].bias += 1e4
    got = predict(adapter.float(), x.float(), passes=50)
    assert got.mu.abs().min() > 9e3
    torch.testing.assert_close(got.epistemic.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_module_and_random_state_stay_as_they_were(training):
    adapter, x = make()
    adapter.train(training)
    adapter.block_mu.train(not training)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    modes = [part.training for part in adapter.modules()]
    random = torch.get_rng_state()
    predict(adapter, x, passes=3)
    assert [part.training for part in adapter.modules()] == modes
    assert all(tensor.equal(before[name]) for name, tensor in adapter.state_dict().items())
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert torch.get_rng_state().equal(random)


def test_seed_decides_and_batching_does_not():
    adapter, x = make()
    result = predict(adapter, x, passes=6, seed=1).epistemic
    assert predict(adapter, x, passes=6, seed=1).epistemic.equal(result)
    assert not predict(adapter, x, passes=6, seed=2).epistemic.equal(result)
    for batch_size in (1, 4, 9, 100):
        got = predict(adapter, x, passes=6, seed=1, batch_size=batch_size).epistemic
        torch.testing.assert_close(got, result, rtol=1e-10, atol=1e-14)
    alone = predict(adapter, x[3:4], passes=6, seed=1).epistemic
    torch.testing.assert_close(alone, result[3:4], rtol=1e-10, atol=1e-14)


def test_edges():
    adapter, x = make()
    assert predict(adapter, x[:0], passes=3).total.shape == (0, 12)
    row = x.clone()
    row[2, 5] = torch.nan
    result = predict(adapter, row, passes=3)
    assert result.total[2].isnan().all() and result.total[[0, 1, 3]].isfinite().all()
    expanded = x[:1].expand(4, -1)
    torch.testing.assert_close(predict(adapter, expanded, passes=3).total[3], predict(adapter, x, passes=3).total[0])
    half = predict(adapter.float(), x.half(), passes=3)
    assert half.total.dtype == torch.float32


def test_reference_backend_agrees():
    adapter, x = make()
    with fastprob.backend("reference"):
        expected = predict(adapter.float(), x.float()).total
    torch.testing.assert_close(predict(adapter, x.float()).total, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x must be floating-point \[N, 12\], got \(3, 5\)"),
        ({"x": torch.zeros(12)}, r"x must be .* got \(12,\)"),
        ({"x": torch.zeros(3, 12, dtype=torch.int64)}, "x must be .* got .*int64"),
        ({"passes": 1}, "passes must be 0 or >= 2, got 1"),
        ({"passes": -2}, "passes must be 0 or >= 2, got -2"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    adapter, x = make()
    with pytest.raises(ValueError, match=f"predict: {message}"):
        predict(adapter, **{"x": x, **arguments})
