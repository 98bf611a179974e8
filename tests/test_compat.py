"""The released names of ProbVLM and terms of DAPT: values, gradients and checkpoints against the released formulas."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastprob.compat import dapt
from fastprob.compat.probvlm import (
    BayesCap_for_CLIP,
    BayesCap_MLP,
    GenGaussLoss,
    TempCombLoss,
    get_GGuncer,
    multi_fwpass_ProbVLM,
)

LAYERS = ["mod.0", "mod.2", "mod.5"] + [f"block_{head}.{i}" for head in ("mu", "alpha", "beta") for i in (0, 2)]
LOSS_OPTIONS = {
    "defaults": {},
    "sum": {"reduction": "sum"},
    "two eps": {"alpha_eps": 0.03, "beta_eps": 0.2},
    "bounds": {"resi_min": 0.2, "resi_max": 1.5},
}


def inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, inv_alpha, beta, target = torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    inv_alpha, beta = inv_alpha.relu(), beta.abs() + 0.05  # half of the released 1/alpha are exactly 0
    target.view(-1)[:2] = mean.view(-1)[:2]  # ties
    return [t.requires_grad_() for t in (mean, inv_alpha, beta, target)]


def released_nll(mean, inv_alpha, beta, target, *, reduction="mean", alpha_eps=1e-4, beta_eps=1e-4, resi_min=1e-4,
                 resi_max=1e3):  # fmt: skip
    a, b = inv_alpha + alpha_eps, beta + beta_eps
    residual = torch.clamp((mean - target).abs() * a * b, resi_min, resi_max)
    return getattr(residual - a.log() + torch.lgamma(1 / b) - b.log(), reduction)()


def assert_same(actual, expected, tensors):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value, tensors) for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(), (1, 1), (3, 5), (65, 129)], ids=str)
@pytest.mark.parametrize("options", LOSS_OPTIONS.values(), ids=LOSS_OPTIONS)
def test_losses_have_the_released_values_and_gradients(options, shape):
    tensors = inputs(*(shape or (1, 2)))
    if shape == ():
        tensors = [t[0, 1].detach().requires_grad_() for t in tensors]
    expected = released_nll(*tensors, **options)
    assert_same(GenGaussLoss(**options)(*tensors), expected, tensors)
    l1 = getattr((tensors[0] - tensors[3]).abs(), options.get("reduction", "mean"))()
    assert_same(
        TempCombLoss(**options)(*tensors, T1=0.9, T2=5e-2), 0.9 * l1 + 5e-2 * released_nll(*tensors, **options), tensors
    )


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 1000), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.floats(1e-6, 0.1), st.floats(0.2, 1e4),
    st.sampled_from(["mean", "sum"]),
)  # fmt: skip
def test_losses_at_any_constants(seed, alpha_eps, beta_eps, resi_min, resi_max, reduction):
    tensors = inputs(2, 7, seed=seed)
    options = (reduction, alpha_eps, beta_eps, resi_min, resi_max)
    names = ("reduction", "alpha_eps", "beta_eps", "resi_min", "resi_max")
    assert_same(GenGaussLoss(*options)(*tensors), released_nll(*tensors, **dict(zip(names, options))), tensors)


def test_losses_have_the_released_attributes():
    loss = TempCombLoss("sum", 0.1, 0.2, 0.3, 0.4)
    for part in (loss, loss.L_GenGauss):
        values = (part.reduction, part.alpha_eps, part.beta_eps, part.resi_min, part.resi_max)
        assert values == ("sum", 0.1, 0.2, 0.3, 0.4)
    assert isinstance(loss.L_l1, nn.L1Loss) and loss.L_l1.reduction == "sum" and not loss.state_dict()
    assert type(loss.L_GenGauss) is GenGaussLoss


def test_unsupported_options_are_refused():
    with pytest.raises(ValueError, match="TempCombLoss: reduction must be one of 'mean', 'sum', got 'none'"):
        TempCombLoss(reduction="none")
    with pytest.raises(ValueError, match="inp_dim and out_dim must be equal, got 8 and 4"):
        BayesCap_MLP(8, 4, num_layers=3)
    with pytest.raises(ValueError, match="num_layers must be at least 3, got 1"):
        BayesCap_MLP(8, 8)
    with pytest.raises(ValueError, match="release must be one of 'current', 'first', got '2024'"):
        get_GGuncer(torch.ones(2), torch.ones(2), release="2024")


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


@pytest.mark.parametrize("scalar", [None, *range(4)])
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_promote_as_released(dtype, other, scalar):
    """Each tensor in turn is of another dtype; 0-dimensional ones give way, as in PyTorch's arithmetic."""
    for i in range(4):
        tensors = [(t.detach() * 2 + 1).to(other if i == k else dtype) for k, t in enumerate(inputs(3, 5))]
        if scalar is not None:
            tensors[scalar] = tensors[scalar][0, 1]
        expected, actual = released_nll(*tensors), GenGaussLoss()(*tensors)
        assert actual.dtype == expected.dtype
        eps = (
            0.02 if {torch.bfloat16, torch.float16} & {dtype, other} else 1e-6
        )  # of what the released code computes in
        torch.testing.assert_close(actual.double(), expected.double(), rtol=eps, atol=eps)


def test_mixed_dtypes_give_gradients_of_the_tensors_own():
    tensors = [t.detach().to(d).requires_grad_() for t, d in zip(inputs(3, 5), (torch.float32, torch.float64) * 2)]
    gradients = torch.autograd.grad(GenGaussLoss()(*tensors), tensors)
    expected = torch.autograd.grad(released_nll(*tensors), tensors)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_released_defaults():
    """By results without options, against the values in the released files."""
    tensors = [t.detach() for t in inputs(3, 5)]
    tensors[0][0, 0] += 1e6  # beyond the largest residual, and ties below the smallest
    options = {"reduction": "mean", "alpha_eps": 1e-4, "beta_eps": 1e-4, "resi_min": 1e-4, "resi_max": 1e3}
    assert_close = torch.testing.assert_close
    assert_close(GenGaussLoss()(*tensors), released_nll(*tensors, **options), rtol=1e-12, atol=0)
    for name, other in {"reduction": "sum", **{k: 2 * v for k, v in options.items() if k != "reduction"}}.items():
        changed = GenGaussLoss(**{name: other})(*tensors)
        assert (changed - GenGaussLoss()(*tensors)).abs() > 1e-9  # the data tells each default from another
    l1 = (tensors[0] - tensors[3]).abs().mean()
    combined = TempCombLoss()(*tensors, T1=1.0, T2=5e-2)
    assert_close(combined, l1 + 5e-2 * GenGaussLoss()(*tensors), rtol=1e-12, atol=0)
    net, image, text = BayesCap_for_CLIP(4, 4), torch.randn(3, 4), torch.randn(3, 4)
    runs = []
    for arguments in ({}, {"n_fw": 15}, {"n_fw": 14}):
        torch.manual_seed(1)
        runs.append(multi_fwpass_ProbVLM(net, image, text, **arguments)[0][0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def shapes_of(prefix, dim, hidden):
    widths = {"mod.0": (hidden, dim), "mod.2": (hidden, hidden), "mod.5": (dim, hidden)}
    for layer in LAYERS:
        weight = widths.get(layer, (dim, dim))
        yield f"{prefix}.{layer}.weight", weight
        yield f"{prefix}.{layer}.bias", weight[:1]


def released_checkpoint(dim, hidden):
    shapes = [*shapes_of("img_BayesCap", dim, hidden), *shapes_of("txt_BayesCap", dim, hidden)]
    return {name: torch.randn(shape) * 0.5 for name, shape in shapes}


def released_forward(state, prefix, x, mask=1.0):
    """The released adapter by its weights; `mask` multiplies the last hidden layer."""

    def linear(layer, rows):
        return rows @ state[f"{prefix}.{layer}.weight"].T + state[f"{prefix}.{layer}.bias"]

    hidden = linear("mod.2", linear("mod.0", x).relu()).relu() * mask
    features = linear("mod.5", hidden) + x
    mu, alpha, beta = (linear(f"block_{h}.2", linear(f"block_{h}.0", features).relu()) for h in ("mu", "alpha", "beta"))
    return mu, alpha.relu(), beta.relu()


def test_released_checkpoints_load_and_give_the_released_outputs(tmp_path):
    torch.save(released_checkpoint(12, 7), tmp_path / "released.pth")
    state = torch.load(tmp_path / "released.pth", weights_only=True)
    net = BayesCap_for_CLIP(12, 12, hid_dim=7).eval()
    net.load_state_dict(state)
    image, text = torch.randn(2, 5, 12)
    outputs = net(image, text)
    torch.testing.assert_close(outputs[0], released_forward(state, "img_BayesCap", image))
    torch.testing.assert_close(outputs[1], released_forward(state, "txt_BayesCap", text))
    torch.save(net.state_dict(), tmp_path / "ours.pth")
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert list(ours) == list(state)
    for name, tensor in state.items():
        assert torch.equal(ours[name], tensor)


def test_default_widths_and_dropout_are_the_released_ones():
    net = BayesCap_for_CLIP()
    expected = dict([*shapes_of("img_BayesCap", 512, 256), *shapes_of("txt_BayesCap", 512, 256)])
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == expected
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.1, 0.1]
    for name, bias in net.named_parameters():
        if name.endswith("bias"):  # PyTorch's own start, not ours at 1
            assert bias.abs().max() <= net.get_parameter(name.replace("bias", "weight")).shape[1] ** -0.5


def released_weights(dim, hidden):
    """The released adapter's weights by name, in the order in which its constructor draws them."""
    layers = {"mod.0": (dim, hidden), "mod.2": (hidden, hidden), "mod.5": (hidden, dim)}  # as 3, 4 and 5 layers build
    layers |= {f"block_{head}.{i}": (dim, dim) for head in ("mu", "alpha", "beta") for i in (0, 2)}
    state = {}
    for prefix in ("img_BayesCap", "txt_BayesCap"):
        for name, widths in layers.items():
            linear = nn.Linear(*widths)
            state |= {f"{prefix}.{name}.weight": linear.weight, f"{prefix}.{name}.bias": linear.bias}
    return state


@pytest.mark.parametrize("num_layers", [3, 4, 5])
def test_initial_weights_are_the_released_ones(num_layers):
    torch.manual_seed(11)
    expected = released_weights(12, 7)
    torch.manual_seed(11)
    state = BayesCap_for_CLIP(12, 12, hid_dim=7, num_layers=num_layers, p_drop=0.3).state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("inv_alpha", "beta", "a", "b"),
    [(0.0, 0.0, 5.0, 0.1), (2.0, 1.5, 1 / 2.00001, 1.6), (1e6, 80.0, 1e-4, 5.0), (0.21, 4.95, 1 / 0.21001, 5.0)],
)
def test_released_aleatoric_uncertainty(inv_alpha, beta, a, b):
    inv_alpha, beta = torch.tensor([inv_alpha, beta], dtype=torch.float64)
    for options, c in (({}, 1), ({"release": "current"}, 1), ({"release": "first"}, 2.8)):
        expected = a**2 * math.gamma(3 / b) / math.gamma(c / b)
        assert get_GGuncer(inv_alpha, beta, **options).item() == pytest.approx(expected, rel=1e-9)
    assert get_GGuncer(inv_alpha, beta, c1=1, c2=2) == get_GGuncer(inv_alpha, beta)
    assert get_GGuncer(inv_alpha.float(), beta.float()).isfinite()


@pytest.mark.parametrize("options", [{}, {"release": "first"}], ids=["current", "first"])
def test_monte_carlo_passes_are_the_released_ones(options):
    state = released_checkpoint(6, 9)
    net = BayesCap_for_CLIP(6, 6, hid_dim=9)
    net.load_state_dict(state)
    image, text = torch.randn(2, 4, 6)
    torch.manual_seed(7)
    actual = multi_fwpass_ProbVLM(net, image, text, n_fw=11, **options)

    torch.manual_seed(7)
    passes = {"img_BayesCap": [], "txt_BayesCap": []}
    for _ in range(11):
        for prefix, x in (("img_BayesCap", image), ("txt_BayesCap", text)):
            mask = nn.functional.dropout(torch.ones(4, 9), 0.3)
            passes[prefix].append(released_forward(state, prefix, x, mask))
    for got, rows in zip(actual, passes.values()):
        mu, inv_alpha, beta = (torch.stack(part) for part in zip(*rows))
        every_u = torch.cat([get_GGuncer(a, b, **options) for a, b in zip(inv_alpha, beta)])  # [n_fw * B, D]
        spread = (every_u.var(0) * mu.var(0)).sqrt()
        torch.testing.assert_close(got, (mu.mean(0), inv_alpha.mean(0), beta.mean(0), spread))
        assert (spread > 0).any()


@pytest.mark.parametrize("training", [True, False])
def test_monte_carlo_passes_leave_the_module_alone(training):
    net = BayesCap_for_CLIP(6, 6, hid_dim=9).train(training)
    net.txt_BayesCap.mod[4].eval()
    before = copy.deepcopy(net)
    image, text = torch.randn(2, 4, 6)
    (mu, *_), _ = multi_fwpass_ProbVLM(net, image, text, n_fw=3)
    assert [(m.training, getattr(m, "p", None)) for m in net.modules()] == [
        (m.training, getattr(m, "p", None)) for m in before.modules()
    ]
    for name, tensor in before.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)
    mu.sum().backward()  # the weights are the module's own
    assert net.img_BayesCap.mod[0].weight.grad.abs().sum() > 0


# ---- DAPT -----------------------------------------------------------------------------------------------------------


def test_dapt_dispersion_terms_as_released():
    generator = torch.Generator().manual_seed(0)
    text, image, prototype = (torch.randn(n, 24, generator=generator).double() for n in (7, 9, 7))
    text, image = (torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in (text, image))
    label = torch.tensor([0, 6, 3, 3, 1, 2, 5, 5, 5])
    released_i = torch.nn.functional.mse_loss(image, prototype[label])
    assert_same(dapt.visual_dispersion(image, prototype, label), released_i, [image])
    released_t = torch.pdist(text.to(torch.float), p=2).pow(2.0).mul(-3.0).exp().mean()
    actual_t = dapt.text_dispersion(text, 3.0)
    torch.testing.assert_close(actual_t, released_t)
    gradients = [torch.autograd.grad(term, text)[0] for term in (actual_t, released_t)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    half = image.detach().half().requires_grad_()  # the trainer's dtype, with prototypes from a file
    torch.testing.assert_close(
        dapt.visual_dispersion(half, prototype, label), torch.nn.functional.mse_loss(half, prototype.half()[label])
    )
    assert dapt.text_dispersion(text[:1]) == 0
