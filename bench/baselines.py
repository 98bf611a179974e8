"""What fastprob is measured against: the released code's arithmetic as it stands, and eager code at its best."""

from __future__ import annotations

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


def eager_draw(mu: Tensor, inv_alpha: Tensor, beta: Tensor) -> Tensor:
    """A draw as torch.distributions takes it, by torch's generator and with its gradients."""
    a, b = inv_alpha + 1e-4, beta + 1e-4
    gamma = torch._standard_gamma(1 + 1 / b)
    return (mu + (2 * torch.rand_like(mu) - 1) * gamma.pow(1 / b) / a)[None]


def best_csd(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """PCME++'s distance without its [N, M, D]."""
    spread = variance.sum(1)[:, None] + other_variance.sum(1)
    return torch.cdist(mean, other_mean).square() + spread


def looped_dropout(hidden: Tensor, constant: Tensor, fold: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """20 passes of F.dropout one by one, their outputs stacked."""
    passes = [torch.relu(F.dropout(hidden, 0.1) @ fold.T + constant) @ last.T for _ in range(20)]
    variance, mean = torch.var_mean(torch.stack(passes), 0, correction=0)
    return mean, variance


def best_dropout(hidden: Tensor, constant: Tensor, fold: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The same, the outputs' differences from those without dropout summed up by blocks of 2048 rows of passes."""
    centre, some = torch.relu(hidden @ fold.T + constant), max(1, 2048 // len(hidden))
    masks = F.dropout(torch.ones(20, 1, hidden.shape[1], dtype=hidden.dtype, device=hidden.device), 0.1)
    sums, squares = 0.0, 0.0
    for block in masks.split(some):
        units = torch.relu((hidden * block).flatten(0, 1) @ fold.T + constant.repeat(len(block), 1))
        y = (units.unflatten(0, (len(block), -1)) - centre).flatten(0, 1) @ last.T
        y = y.unflatten(0, (len(block), -1))
        sums, squares = sums + y.sum(0), squares + y.square().sum(0)
    return centre @ last.T + sums / 20, (squares / 20 - (sums / 20).square()).clamp_min(0)


def best_pairwise(mu: Tensor, inv_alpha: Tensor, beta: Tensor, target: Tensor) -> Tensor:
    """All pairs by broadcasting, as many rows at a time as make 64 MB; the normalisers once per distribution."""
    a, b = inv_alpha + 1e-4, beta + 1e-4
    normaliser = (torch.lgamma(1 + 1 / b) - a.log()).sum(1, keepdim=True)
    rows = max(2**24 // target.numel(), 1)
    parts = [
        ((mu[i : i + rows, None] - target).abs() * a[i : i + rows, None])
        .pow(b[i : i + rows, None])
        .clamp(1e-4, 1e3)
        .sum(-1)
        for i in range(0, mu.shape[0], rows)
    ]
    return torch.cat(parts) + normaliser


def best_nearest(mu: Tensor, inv_alpha: Tensor, beta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same and then topk."""
    least = best_pairwise(mu, inv_alpha, beta, target).topk(1, largest=False)
    return least.values, least.indices


def released_bottleneck(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """M2IB's bottleneck as released, ten draws of every pair; log(1 - lambda) is infinite at logits above 17."""
    kept = torch.sigmoid(logits)
    mean, variance = x * kept, (1 - kept) ** 2
    t = mean + variance.sqrt() * torch.randn(10, *x.shape, dtype=x.dtype, device=x.device)
    return t, -0.5 * (1 + torch.log(variance) - mean**2 - variance)


def best_bottleneck(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same without roots and powers, and as the operator does it: finite, and all pairs of one noise."""
    kept, lost = torch.sigmoid(logits), torch.sigmoid(-logits)
    mean = kept * x
    t = torch.addcmul(mean, lost, torch.randn(10, 1, *x.shape[1:], dtype=x.dtype, device=x.device))
    return t, (mean.square() - kept * (1 + lost)) / 2 + F.softplus(logits)


def released_queue(queries, keys, ids, key_ids, temperature, teacher, warmer, alpha) -> Tensor:
    """ALBEF's image side as released, its targets uniform over the keys of an image."""
    with torch.no_grad():
        positives = torch.eq(ids.view(-1, 1), key_ids.view(1, -1)).to(queries.dtype)
        targets = positives / positives.sum(1, keepdim=True).clamp(min=1)
        targets = alpha * F.softmax(teacher @ keys.T / warmer, dim=1) + (1 - alpha) * targets
    return -torch.sum(F.log_softmax(queries @ keys.T / temperature, dim=1) * targets, dim=1).mean()


def best_queue(queries, keys, ids, key_ids, temperature, teacher, warmer, alpha) -> Tensor:
    """The same with the temperatures at the queries and no logarithm but a row's."""
    s, positives = queries / temperature @ keys.T, ids[:, None] == key_ids
    share = (1 - alpha) / positives.sum(1, keepdim=True).clamp(min=1)
    targets = torch.addcmul(alpha * (teacher / warmer @ keys.T).softmax(1), positives.to(s.dtype), share)
    return (targets.sum(1) * s.logsumexp(1) - torch.linalg.vecdot(targets, s)).mean()


# Operator -> name of a baseline -> the operator's tensors to its result, in the paper's form.
BASELINES = {
    "bottleneck": {"eager as released": released_bottleneck, "eager best": best_bottleneck},
    "csd": {"eager best": best_csd},
    "probvlm_loss": {
        "eager as released": lambda *t: released_loss(t[:3], t[3:6], *t[6:], power=True),
        "eager best": lambda *t: best_loss(t[:3], t[3:6], *t[6:]),
    },
    "ggd_nll": {
        "eager as released": lambda *t: released_term(*t, power=True),
        "eager best": best_term,
    },
    "ggd_sample": {"eager": eager_draw},
    "ggd_variance": {"eager best": best_variance},
    "gaussian_potential": {"eager as released": released_potential, "eager best": best_potential},
    "mc_dropout": {"eager loop": looped_dropout, "eager best": best_dropout},
    "prototype_dispersion": {"eager as released": released_dispersion},
    "queue_contrastive_loss": {"eager as released": released_queue, "eager best": best_queue},
    "ggd_pairwise_nll": {"eager best": best_pairwise},
    "ggd_nearest": {"eager best": best_nearest},
}
