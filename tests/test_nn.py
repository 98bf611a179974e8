"""The losses as modules: the operators' values, and options that are refused early."""

import copy
import inspect
import pickle

import pytest
import torch

import fastprob
from fastprob._op import OPS
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
