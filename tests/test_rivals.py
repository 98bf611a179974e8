"""Rivals of ProbVLM's uncertainty, each against its formula or a case whose answer is known."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from fastprob.adapters import PairedEmbeddings, ProbVLM, TrainConfig, fit, predict
from fastprob.adapters import rivals as module
from fastprob.adapters.heads import PCME, PFE, heads
from fastprob.adapters.rivals import Posterior, energies, ensemble, posterior, probvlm, similarities

DIM = 8
CONFIG = TrainConfig(epochs=2, batch_size=20, hidden=6)


def pairs(images=40, seed=0, noise=0.3):
    """Two texts an image; the first half of the images has texts ten times as far away as the second."""
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(images, DIM, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(2)
    far = torch.where(owner < images // 2, noise, noise / 10)[:, None]
    text = normalize(image[owner] + far * torch.randn(len(owner), DIM, generator=generator), dim=1)
    return PairedEmbeddings(image, text, owner)


def test_similarities_are_those_of_the_cosines():
    data = pairs()
    scorer = similarities(data, data)
    scores = scorer(data)
    cosine = data.text.double() @ data.image.double().T  # [M, N]
    first = cosine.topk(2, 1).values
    close = {"rel": 1e-4, "abs": 1e-6}
    assert scores["1 - max cosine"]["text"].tolist() == pytest.approx((1 - first[:, 0]).tolist(), **close)
    assert scores["margin"]["text"].tolist() == pytest.approx((first[:, 1] - first[:, 0]).tolist(), **close)
    p = (cosine / scorer.temperature).softmax(1)
    entropy = torch.special.entr(p).sum(1) / math.log(40)
    assert scores["entropy"]["text"].tolist() == pytest.approx(entropy.tolist(), rel=1e-3, abs=1e-5)
    assert {name: len(of["image"]) for name, of in scores.items()} == dict.fromkeys(scores, 40)
    assert not scores["random"]["text"].equal(similarities(data, data, seed=1)(data)["random"]["text"])


def test_an_adapter_s_scores_are_means_of_its_variances():
    data = pairs()
    scorer = probvlm(CONFIG)(data, data, seed=3)
    model = fit(data, config=replace(CONFIG, seed=3), progress=False).model
    expected = predict(model.text, data.text, passes=module.PASSES, seed=3)
    scores = scorer(data)
    for kind in ("total", "aleatoric", "epistemic"):
        torch.testing.assert_close(scores[kind]["text"], getattr(expected, kind).mean(1))


def test_an_ensemble_is_the_law_of_total_variance():
    """Of draws from a member that is drawn first, the variance over all."""
    data = pairs(6)
    scorer = ensemble(2, CONFIG)(data, data, seed=1)
    alone = [fit(data, config=replace(CONFIG, seed=seed), progress=False).model for seed in (2, 3)]
    assert all(one.image.mod[0].weight.equal(its.image.mod[0].weight) for one, its in zip(alone, scorer.models))
    each = [predict(model.image, data.image) for model in scorer.models]
    second = sum(one.aleatoric + one.mu**2 for one in each) / 2
    variance = (second - (sum(one.mu for one in each) / 2) ** 2).mean(1)
    torch.testing.assert_close(scorer(data)["total"]["image"], variance)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ProbVLM(DIM, hidden=6, power=2.0).eval()


@torch.no_grad()
def test_energies_are_those_of_gaussians_in_closed_form(model):
    data = pairs(15)
    found = energies(model, data, 0.1)
    of = {side: getattr(model, side)(getattr(data, side)) for side in ("image", "text")}
    for side, other in (("image", "text"), ("text", "image")):
        energy, items = found[side]
        (mu, inv_alpha, _), (its_mu, its_inv_alpha, _) = of[side], of[other]
        variance = 0.5 / (inv_alpha + 1e-4) ** 2
        its = 0.5 / (its_inv_alpha + 1e-4) ** 2
        both = variance[:, None] + its[items]
        expected = 0.5 * ((mu[:, None] - its_mu[items]) ** 2 / both + (2 * math.pi * both).log()).sum(-1)
        torch.testing.assert_close(energy, expected.double(), rtol=1e-4, atol=1e-4)


def test_equal_captions_have_the_energies_of_one(model):
    data = pairs(15)
    text = data.text.clone()
    text[20:] = text[:10]
    same = PairedEmbeddings(data.image, text, data.caption_image)
    captions = [str(i % 20) for i in range(30)]
    energy = energies(model, same, 0.1, captions)["text"][0]
    assert energy[20:].equal(energy[:10])
    torch.testing.assert_close(energy, energies(model, same, 0.1)["text"][0])
    assert energies(model, same, 0.1, captions)["image"][1].max() < 20


def test_a_posterior_of_equal_likelihoods_knows_nothing_and_of_one_great_one_all(model):
    energy = torch.zeros(3, 10, dtype=torch.float64)
    energy[1, 4], energy[2, 0] = -1000, -math.log(9)
    scores = Posterior(model, 0.1, {"image": 1.0, "text": 2.0}).scores(dict.fromkeys(("image", "text"), (energy, None)))
    assert scores["posterior entropy"]["image"].tolist() == pytest.approx(
        [math.log(10), 0, math.log(2) / 2 + math.log(18) / 2]
    )
    assert scores["posterior error"]["image"].tolist() == pytest.approx([0.9, 0, 0.5])
    assert scores["posterior error"]["text"].tolist() == pytest.approx([0.9, 0, 0.75])
    assert scores["posterior error of the first"]["image"].tolist() == pytest.approx([0.9, 1, 0.5])


def test_the_temperature_of_a_posterior_is_the_one_that_pairs_were_drawn_at():
    generator = torch.Generator().manual_seed(0)
    energy = 40 * torch.rand(4000, 10, generator=generator, dtype=torch.float64)
    chosen = (-energy / 8).softmax(1).multinomial(1, generator=generator)
    own = torch.zeros(4000, 10, dtype=torch.bool).scatter_(1, chosen, True)
    own[:50] = False  # theirs is not among the ten
    assert module._likeliest(energy, own) == 8
    with pytest.raises(ValueError, match="first ten items hold their own, got none"):
        module._likeliest(energy, own & False)


def test_a_posterior_of_round_gaussians_is_a_softmax_of_cosines(model):
    """-log of the integral is then |x - y|^2 / 4 s^2 but for a constant, and T the best of all its softmax's."""
    round = copy.deepcopy(model)
    for adapter in (round.image, round.text):
        adapter.mod, adapter.block_mu = Zero(), torch.nn.Identity()
        adapter.block_alpha = torch.nn.Sequential(Zero(), Plus(10 - 1e-4))  # 1/alpha = 10: s^2 = 1/200
    validation, data = pairs(60, seed=1), pairs(60, seed=2)
    fitted = posterior(round, validation)
    scores = fitted(data)
    p = (data.text @ data.image.T * 100 / fitted.temperature["text"]).topk(10, 1).values.softmax(1)
    expected = torch.special.entr(p).sum(1).double()
    torch.testing.assert_close(scores["posterior entropy"]["text"], expected, rtol=1e-3, atol=1e-4)
    assert expected[:60].mean() > 2 * expected[60:].mean()  # the far texts

    def own(temperature):
        logits = (validation.text @ validation.image.T * 100 / temperature).topk(10, 1)
        there = logits.indices == validation.caption_image[:, None]
        return float(logits.values.log_softmax(1)[there].mean())

    assert fitted.temperature["text"] == max(module.TEMPERATURES, key=own)


def test_an_image_s_own_texts_are_those_of_the_same_words(monkeypatch):
    data, seen = PairedEmbeddings(torch.randn(3, DIM), torch.randn(5, DIM), torch.tensor([0, 0, 1, 2, 2])), {}
    items = torch.tensor([[0, 1, 2, 3]] * 3)
    found = {"image": (torch.zeros(3, 4), items), "text": (torch.zeros(5, 3), torch.tensor([[0, 1, 2]] * 5))}
    monkeypatch.setattr(module, "energies", lambda *_: found)
    monkeypatch.setattr(module, "_likeliest", lambda energy, own: seen.update({tuple(energy.shape): own}))
    posterior(None, data, ["a", "b", "a", "b", "c"])
    assert seen[3, 4].tolist() == [[True] * 4, [True, False, True, False], [False, True, False, True]]
    assert seen[5, 3].tolist() == [[True, False, False]] * 2 + [[False, True, False]] + [[False, False, True]] * 2


class Zero(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


class Plus(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value), requires_grad=False)

    def forward(self, x):
        return x + self.value


# ------------------------------------------------------------------------------------------------------ heads


@torch.no_grad()
def test_the_loss_of_pfe_is_the_likelihood_of_two_gaussians_product():
    torch.manual_seed(0)
    model, (x, y) = PFE(DIM, 5), torch.randn(2, 7, DIM)
    (mean, one), (other, two) = model.image(x), model.text(y)
    assert mean.equal(x) and other.equal(y)
    both = torch.distributions.Normal(x, (one + two).sqrt())
    torch.testing.assert_close(model.loss(x, y), -both.log_prob(y).mean())


@torch.no_grad()
def test_the_loss_of_pcme_is_that_of_all_pairs_by_their_distances():
    torch.manual_seed(0)
    model, (x, y) = PCME(DIM, 5), normalize(torch.randn(2, 7, DIM), dim=-1)
    model.image.move[-1].weight.normal_()
    (mean, one), (other, two) = model.image(x), model.text(y)
    assert not torch.allclose(mean, x) and torch.allclose(other, y)
    expected = 0.0
    for i in range(7):
        for j in range(7):
            distance = ((mean[i] - other[j]) ** 2).sum() + (one[i] + two[j]).sum()
            match = torch.sigmoid(5 - 5 * distance)
            expected -= (match if i == j else 1 - match).log() / 49
    torch.testing.assert_close(model.loss(x, y), expected)


def by_half(seed):
    """`pairs` whose halves are those on the two sides of the plane x_1 = 0."""
    data = pairs(200, seed)
    image = data.image.clone()
    image[:, 0] = image[:, 0].abs() * torch.where(torch.arange(200) < 100, 1, -1)
    text = normalize(image[data.caption_image] + data.text - data.image[data.caption_image], dim=1)
    return PairedEmbeddings(image, text, data.caption_image)


OPTIONS = {"epochs": 40, "batch_size": 50, "lr": 1e-2, "hidden": 32}


def test_pfe_learns_which_pairs_are_far_apart():
    scores = heads(PFE, **OPTIONS)(by_half(0), by_half(1))(by_half(2))["variance"]
    for side, half in (("image", 100), ("text", 200)):
        assert scores[side][:half].mean() > 1.3 * scores[side][half:].mean()


@pytest.mark.parametrize("kind", [PFE, PCME])
def test_heads_learn_new_pairs_the_same_way_every_time(kind):
    train, new = by_half(0), by_half(2)
    one, again, other = (heads(kind, **OPTIONS)(train, train, seed).model for seed in (0, 0, 1))
    with torch.no_grad():
        losses = [model.loss(new.image, new.text[::2]) for model in (one, again, other, kind(DIM, 32))]
    assert losses[0] == losses[1] != losses[2] and losses[0] < losses[3]
