"""ProbVLM's training loss, all four terms over the eight tensors at once: the maths stands in `_ggd.py`."""

from __future__ import annotations

from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _ggd, _maths


def _check(*, form, eps, clamp_min, clamp_max, **_):
    _ggd.check_ggd("probvlm_loss", form=form, eps=eps, clamp_min=clamp_min, clamp_max=clamp_max)


WEIGHTS: tuple[dict, ...] = ({}, {"cross_weight": 0.1, "l1_weight": 1.0, "nll_weight": 0.05})
EDGES = {**_ggd.EDGES, "cross_weight": 0.0, "l1_weight": 1.0}


def _inputs(make, *shape):
    return *_ggd.distribution(make, *shape), *_ggd.distribution(make, *shape), make(*shape), make(*shape)


def _gradient(
    grad,
    image_mu, image_inv_alpha, image_beta, text_mu, text_inv_alpha, text_beta, image, text,
    *, cross_weight, l1_weight, nll_weight, form, eps, clamp_min, clamp_max,
):  # fmt: skip
    grad, *inputs = _maths.wide(
        grad, image_mu, image_inv_alpha, image_beta, text_mu, text_inv_alpha, text_beta, image, text
    )
    grad = grad / max(image.numel(), 1)
    *adapters, image, text = inputs
    grads, grad_targets = [], [0, 0]
    for (mu, inv_alpha, beta), own in ((adapters[:3], 0), (adapters[3:], 1)):
        a, b = _ggd.shifted(inv_alpha, beta, eps)
        norm_a, norm_b = _ggd.log_normaliser_gradient(a, b)
        norm = (1 + cross_weight) * nll_weight
        grad_mu, grad_a, grad_b = 0, norm * norm_a, norm * norm_b
        for target, weight in ((own, 1.0), (1 - own, cross_weight)):
            d = mu - (image, text)[target]
            nll_d, nll_a, nll_b = _ggd.residual_gradient(d, a, b, form, clamp_min, clamp_max)
            grad_d = weight * (nll_weight * nll_d + (l1_weight * _maths.sign(d) if l1_weight else 0))
            grad_mu = grad_mu + grad_d
            grad_a = grad_a + weight * nll_weight * nll_a
            grad_b = grad_b + weight * nll_weight * nll_b
            grad_targets[target] = grad_targets[target] - grad_d
        grads += [grad_mu, grad_a, grad_b]
    return tuple(grad * g for g in grads + grad_targets)


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    grid=[*({"form": form, **weights} for form in _ggd.FORMS for weights in WEIGHTS), EDGES],
    frozen=("image", "text"),
    is_scalar=lambda **_: True,
)
def probvlm_loss(
    image_mu: Tensor,
    image_inv_alpha: Tensor,
    image_beta: Tensor,
    text_mu: Tensor,
    text_inv_alpha: Tensor,
    text_beta: Tensor,
    image: Tensor,
    text: Tensor,
    *,
    cross_weight: float = 1.0,
    l1_weight: float = 0.0,
    nll_weight: float = 1.0,
    form: str = "paper",
    eps: float = 1e-4,
    clamp_min: float = 1e-4,
    clamp_max: float = 1e3,
) -> Tensor:
    """ProbVLM's loss: each adapter's distribution explains its own embedding and the other modality's.

        L = T(image | I) + T(text | T) + cross_weight * (T(text | I) + T(image | T))
        T(z | P) = mean over elements of  nll_weight * ggd_nll(z | P) + l1_weight * |mu_P - z|

    One pass over the eight tensors, or their gradients with it: lgamma, digamma and log of each distribution are
    computed once for its two terms.

    Args:
        image_mu, image_inv_alpha, image_beta: the image adapter's distribution; text_* the text adapter's.
        image, text: the frozen embeddings. All eight of one shape, [B, D] as a rule, or that broadcast to one;
            ranges and dtypes as in `ggd_nll`. The embeddings get a gradient if they ask for one.
        cross_weight: weight of the two cross-modal terms; 1e-4 in the released code.
        l1_weight, nll_weight: the released code's T1 and T2.
        form, eps, clamp_min, clamp_max: as in `ggd_nll`.

    Returns:
        A scalar, in nats where l1_weight is 0.

    Raises:
        ValueError: as `ggd_nll`.

    Source:
        ProbVLM (Upadhyay et al., ICCV 2023), eqs. 3 to 6; `train_ProbVLM` of the released code for the weights.
    """
    dtype = image_mu.dtype
    *adapters, image, text = _maths.wide(
        image_mu, image_inv_alpha, image_beta, text_mu, text_inv_alpha, text_beta, image, text
    )
    loss = image.new_zeros(())
    for (mu, inv_alpha, beta), own, other in ((adapters[:3], image, text), (adapters[3:], text, image)):
        a, b = _ggd.shifted(inv_alpha, beta, eps)
        loss = loss + (1 + cross_weight) * nll_weight * _ggd.log_normaliser(a, b).mean()
        for target, weight in ((own, 1.0), (other, cross_weight)):
            t = _ggd.residual(mu - target, a, b, form).clamp(clamp_min, clamp_max)
            l1 = l1_weight * (mu - target).abs().mean() if l1_weight else 0
            loss = loss + weight * (nll_weight * t.mean() + l1)
    return loss.to(dtype)
