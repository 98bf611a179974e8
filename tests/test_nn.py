"""The losses as modules: the operators' values, and options that are refused early."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch

import fastprob
from fastprob._op import OPS
from fastprob.compat.probvlm import GenGaussLoss
from fastprob.nn import GGDNLLLoss, ProbVLMLoss

LOSSES = {GGDNLLLoss: "ggd_nll", ProbVLMLoss: "probvlm_loss"}
OTHER = {"form": "released", "eps": 0.01, "clamp_min": 0.1, "clamp_max": 2.0}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def tensors_for(loss, *shape):
    """Tensors that ask for gradients, by name."""
    positive = ("inv_alpha", "beta")
    made = {name: torch.randn(shape, dtype=torch.float64) for name in OPS[LOSSES[loss]].tensors}
    return {k: (t.abs() + 0.3 if k.endswith(positive) else t).requires_grad_() for k, t in made.items()}


def gradients(value, tensors):
    return torch.autograd.grad(value, list(tensors.values()))


@each_loss
@pytest.mark.parametrize("options", [{}, OTHER], ids=["defaults", "options"])
def test_values_and_gradients_are_the_operators(loss, options):
    tensors = tensors_for(loss, 3, 5)
    expected = getattr(fastprob, LOSSES[loss])(**tensors, **options)
    module = loss(**options)
    for value in (module(*tensors.values()), module(**tensors), copy.deepcopy(module)(*tensors.values())):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        torch.testing.assert_close(gradients(value, tensors), gradients(expected, tensors), rtol=0, atol=0)
        expected = getattr(fastprob, LOSSES[loss])(**tensors, **options)
    assert module.options == options and not module.state_dict()


def test_the_joint_loss_is_the_weighted_sum_of_single_ones():
    tensors = tensors_for(ProbVLMLoss, 4, 6)
    *adapters, image, text = tensors.values()
    single = GGDNLLLoss(**OTHER)

    def term(adapter, target):
        return 0.7 * single(*adapter, target) + 0.2 * (adapter[0] - target).abs().mean()

    own = term(adapters[:3], image) + term(adapters[3:], text)
    cross = term(adapters[:3], text) + term(adapters[3:], image)
    loss = ProbVLMLoss(cross_weight=0.3, l1_weight=0.2, nll_weight=0.7, **OTHER)(*tensors.values())
    torch.testing.assert_close(loss, own + 0.3 * cross)
    torch.testing.assert_close(gradients(loss, tensors), gradients(own + 0.3 * cross, tensors))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reduction(reduction):
    tensors = tensors_for(GGDNLLLoss, 3, 5)
    values = GGDNLLLoss(reduction=reduction)(**tensors)
    assert values.shape == ((3, 5) if reduction == "none" else ())
    torch.testing.assert_close(values.sum() / 15, GGDNLLLoss()(**tensors))


def paper_nll(mu, inv_alpha, beta, target):
    a, b = inv_alpha + 1e-4, beta + 1e-4
    return (((mu - target).abs() * a).pow(b).clamp(1e-4, 1e3) - a.log() + torch.lgamma(1 + 1 / b)).mean()


def test_defaults():
    """By results without options, against the formulas with their constants."""
    tensors = {k: t.detach() for k, t in tensors_for(ProbVLMLoss, 3, 5).items()}
    for side in ("image", "text"):
        mu, inv_alpha, target = (tensors[k] for k in (f"{side}_mu", f"{side}_inv_alpha", side))
        mu[0, 0], mu[0, 1], inv_alpha[1] = target[0, 0] + 1e-9, target[0, 1] + 1e7, 0.0  # bounds and eps in force
    *adapters, image, text = tensors.values()
    (image_own, text_other), (text_own, image_other) = (
        (paper_nll(*adapter, own), paper_nll(*adapter, other))
        for adapter, own, other in ((adapters[:3], image, text), (adapters[3:], text, image))
    )
    expected = image_own + text_own + 1.0 * (text_other + image_other)
    torch.testing.assert_close(ProbVLMLoss()(**tensors), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(GGDNLLLoss()(*adapters[:3], image), image_own, rtol=1e-12, atol=0)
    for loss, inputs in ((ProbVLMLoss, tensors.values()), (GGDNLLLoss, (*adapters[:3], image))):
        for name in ("eps", "clamp_min", "clamp_max"):
            other = {name: 2 * OPS[LOSSES[loss]].options[name]}
            assert (loss(**other)(*inputs) - loss()(*inputs)).abs() > 1e-7  # the data tells the default from another


@each_loss
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap_along_any_axis(loss, axis):
    tensors = [t.detach() for t in tensors_for(loss, 3, 4, 5).values()]
    module = loss(form="released")
    dims = [axis] * (len(tensors) - 1) + [None]
    tensors[-1] = tensors[-1].select(axis, 0)
    expected = torch.stack(
        [module(*(t.select(axis, i) for t in tensors[:-1]), tensors[-1]) for i in range(tensors[0].shape[axis])]
    )
    torch.testing.assert_close(torch.vmap(module, in_dims=tuple(dims))(*tensors), expected)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_autocast_widens_half_types_and_leaves_float64(loss, dtype):
    tensors = {k: t.detach().to(dtype).requires_grad_() for k, t in tensors_for(loss, 3, 5).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss()(**tensors)
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    expected = loss()(**{k: t.to(computed_in) for k, t in tensors.items()})
    assert value.dtype == computed_in
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert {g.dtype for g in gradients(value, tensors)} == {dtype}


COLD = """
import pickle, sys, torch
import fastprob
modules = pickle.load(sys.stdin.buffer)
for module, tensors in modules:
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    values = [compiled(*tensors), module(*tensors)]  # compiled first, before any eager call
    torch.testing.assert_close(*([v, *torch.autograd.grad(v.sum(), tensors)] for v in values))
"""


def test_first_call_is_compiled():
    """In a fresh process, unpickled: an eager call, as a constructor makes, hides what a trace cannot enter."""
    losses = [ProbVLMLoss(cross_weight=0.1), GGDNLLLoss(reduction="none"), GenGaussLoss(beta_eps=0.2)]
    tensors = [list(tensors_for(loss, 3, 5).values()) for loss in (ProbVLMLoss, GGDNLLLoss, GGDNLLLoss)]
    cases = pickle.dumps(list(zip(losses, tensors)))
    done = subprocess.run([sys.executable, "-c", COLD], input=cases, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@each_loss
def test_the_signature_shows_the_operators_options(loss):
    shown = {name: p.default for name, p in inspect.signature(loss).parameters.items()}
    assert shown == OPS[LOSSES[loss]].options and "form" in shown


def test_repr_shows_what_is_not_the_default():
    assert repr(GGDNLLLoss()) == "GGDNLLLoss()"
    assert repr(GGDNLLLoss(form="released", eps=1e-4)) == "GGDNLLLoss(form='released')"
    assert repr(ProbVLMLoss(cross_weight=0.1, clamp_max=5.0)) == "ProbVLMLoss(cross_weight=0.1, clamp_max=5.0)"


@each_loss
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": 1, "form": "paper"}, TypeError, "options are .*form, eps.* got shape"),
        ({"mu": torch.ones(3)}, TypeError, "got mu"),
        ({"form": "papre"}, ValueError, "form must be one of 'paper', 'released', got 'papre'"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"clamp_min": 2.0, "clamp_max": 1.0}, ValueError, "0 <= min <= max, got 2.0, 1.0"),
    ],
)
def test_bad_options_are_refused_on_construction(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(**options)


@each_loss
def test_bad_tensors_are_refused_by_name(loss):
    tensors = tensors_for(loss, 3, 5)
    with pytest.raises(TypeError, match="missing a required argument"):
        loss()(*list(tensors.values())[:-1])
    with pytest.raises(ValueError, match=f"{LOSSES[loss]}: inputs must broadcast"):
        loss()(*list(tensors.values())[:-1], torch.ones(4, dtype=torch.float64))


def test_compiles_and_survives_pickling():
    tensors, module = tensors_for(ProbVLMLoss, 3, 5), ProbVLMLoss(form="released")
    expected = module(**tensors)
    compiled = torch.compile(pickle.loads(pickle.dumps(module)), fullgraph=True, backend="aot_eager")
    value = compiled(*tensors.values())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, tensors), gradients(expected, tensors))
