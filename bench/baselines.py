"""What fastprob is measured against: the released code's arithmetic as it stands, and eager code at its best."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def released_term(mu: Tensor, inv_alpha: Tensor, beta: Tensor, target: Tensor, power: bool) -> Tensor:
    """The released GenGaussLoss with its four NaN checks; `power` puts the paper's power in the product's place."""
    a, b = inv_alpha + 1e-4, beta + 1e-4
    t = torch.abs(mu - target)
    t = (torch.pow(t * a, b) if power else t * a * b).clamp(min=1e-4, max=1e3)
    if torch.sum(t != t) > 0:
        raise FloatingPointError("resi has nans")
    log_a, log_b, lgamma = torch.log(a), torch.log(b), torch.lgamma(torch.pow(b, -1))
    for value in (log_a, lgamma, log_b):
        if torch.sum(value != value) > 0:
            raise FloatingPointError("nan")
    return (t - log_a + lgamma - log_b).mean()


def released_loss(image, text, image_target, text_target, power=False, cross_weight=1.0) -> Tensor:
    """The released training step's loss, T1 = 0 and T2 = 1: four separate terms."""
    own = released_term(*image, image_target, power) + released_term(*text, text_target, power)
    cross = released_term(*image, text_target, power) + released_term(*text, image_target, power)
    return own + cross_weight * cross


def best_loss(image, text, image_target, text_target, cross_weight=1.0) -> Tensor:
    """The paper's form without host syncs, with lgamma and the logarithm once per distribution and lgamma(1 + 1/b)."""
    loss = 0.0
    for (mu, inv_alpha, beta), own, other in ((image, image_target, text_target), (text, text_target, image_target)):
        a, b = inv_alpha + 1e-4, beta + 1e-4
        t_own = ((mu - own).abs() * a).pow(b).clamp(1e-4, 1e3)
        t_cross = ((mu - other).abs() * a).pow(b).clamp(1e-4, 1e3)
        loss = loss + (t_own + cross_weight * t_cross + (1 + cross_weight) * (torch.lgamma(1 + 1 / b) - a.log())).mean()
    return loss


def best_term(mu: Tensor, inv_alpha: Tensor, beta: Tensor, target: Tensor) -> Tensor:
    """One term of `best_loss`."""
    a, b = inv_alpha + 1e-4, beta + 1e-4
    return (((mu - target).abs() * a).pow(b).clamp(1e-4, 1e3) + torch.lgamma(1 + 1 / b) - a.log()).mean()


def best_variance(inv_alpha: Tensor, beta: Tensor) -> Tensor:
    """The variance without forming either Gamma."""
    return (torch.lgamma(3 / beta) - torch.lgamma(1 / beta)).exp() / inv_alpha.square()


def released_potential(x: Tensor) -> Tensor:
    """DAPT's inter-class dispersion as released, t = 2."""
    return torch.pdist(x).square().mul(-2).exp().mean()


def best_potential(x: Tensor) -> Tensor:
    """The same by one Gram product, of [4x, -2|x|^2, 1] and [x, 1, -2|x|^2]."""
    square, ones = x.square().sum(1, keepdim=True), torch.ones_like(x[:, :1])
    k = (torch.cat([4 * x, -2 * square, ones], 1) @ torch.cat([x, ones, -2 * square], 1).T).exp()
    return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))


def released_dispersion(x: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """DAPT's intra-class dispersion as released."""
    return F.mse_loss(x, prototypes[labels])


def best_match(mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta, nodes=64) -> Tensor:
    """The cross-modal likelihood by the trapezoidal rule on a grid over both distributions: some digits, not all."""
    a, b, c, d = inv_alpha + 1e-4, beta + 1e-4, other_inv_alpha + 1e-4, other_beta + 1e-4
    low = torch.minimum(mu - 4 / a, other_mu - 4 / c)
    step = (torch.maximum(mu + 4 / a, other_mu + 4 / c) - low) / (nodes - 1)
    total = torch.zeros_like(mu)
    for i in range(nodes):
        z = low + i * step
        total = total + (-((z - mu).abs() * a).pow(b) - ((z - other_mu).abs() * c).pow(d)).exp()
    logs = torch.lgamma(1 + 1 / b) + torch.lgamma(1 + 1 / d) - (a * c).log() + 2 * math.log(2)
    return (logs - (total * step).log()).mean()


# Operator -> name of a baseline -> the operator's tensors to its result, in the paper's form.
BASELINES = {
    "probvlm_loss": {
        "eager as released": lambda *t: released_loss(t[:3], t[3:6], *t[6:], power=True),
        "eager best": lambda *t: best_loss(t[:3], t[3:6], *t[6:]),
    },
    "ggd_nll": {
        "eager as released": lambda *t: released_term(*t, power=True),
        "eager best": best_term,
    },
    "ggd_match_nll": {"eager best": best_match},
    "ggd_variance": {"eager best": best_variance},
    "gaussian_potential": {"eager as released": released_potential, "eager best": best_potential},
    "prototype_dispersion": {"eager as released": released_dispersion},
}
