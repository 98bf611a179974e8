"""A noisy bottleneck: how much of every activation passes, by a learned logit a, and what that tells of the activation.

    lambda = sigmoid(a),    t = lambda x + (1 - lambda) sigma eps,    eps ~ N(0, 1)
    kl = KL(N(lambda x, (1 - lambda)^2 sigma^2) || N(0, sigma^2))
       = ((lambda x / sigma)^2 + (1 - lambda)^2 - 1) / 2 - log(1 - lambda)

-log(1 - lambda) is log(1 + e^a), which is finite for any a, and (1 - lambda)^2 - 1 is -lambda (2 - lambda), in which
nothing cancels. With G and K the gradients of t and kl, S the sum of G over the draws and E that of G eps:

    for x:       lambda (S + K lambda x / sigma^2)
    for logits:  (1 - lambda) (lambda x S - lambda sigma E)
                     + K (lambda + (1 - lambda) ((lambda x / sigma)^2 - lambda (1 - lambda)))

The noise is drawn anew for the gradient. It depends on the seed, the draw and the element's place in its problem alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprob._op import operator
from fastprob.ops._maths import wide
from fastprob.ops._random import normals

STREAM = (1 << 31) + 1


def _check(*, x, logits, samples, sigma, batch_dims, **_):
    if samples < 0:
        raise ValueError(f"bottleneck: samples must be at least 0, got {samples}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"bottleneck: sigma must be positive and finite, got {sigma}")
    axes = max(x.dim(), logits.dim())
    if not 0 <= batch_dims <= axes:
        raise ValueError(f"bottleneck: batch_dims must be in 0..{axes}, the number of axes, got {batch_dims}")


def _inputs(make, *shape):
    return make(*shape), make(*shape, low=-6, high=6)


def _noise(like: Tensor, samples: int, seed: int, batch_dims: int) -> Tensor:
    """[samples, *1, *problem], where `like` is [*batch, *problem]."""
    batch, problem = like.shape[:batch_dims], like.shape[batch_dims:]
    draws = [
        normals(problem.numel(), seed=seed, stream=STREAM, draw=draw, dtype=like.dtype, device=like.device)
        for draw in range(samples)
    ]
    drawn = torch.stack(draws) if draws else like.new_empty(0, problem.numel())
    return drawn.view(samples, *[1] * len(batch), *problem)


def _parts(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lambda, 1 - lambda and lambda x."""
    kept = logits.sigmoid()
    return kept, (-logits).sigmoid(), kept * x


def _gradient(grad_t, grad_kl, x, logits, *, seed, samples, sigma, batch_dims):
    grad_t, grad_kl, x, logits = wide(grad_t, grad_kl, x, logits)
    kept, lost, mean = _parts(x, logits)
    total, along = grad_t.sum(0), (grad_t * _noise(x, samples, seed, batch_dims)).sum(0)
    through_t = lost * (mean * total - kept * (sigma * along))
    through_kl = kept + lost * ((mean / sigma).square() - kept * lost)
    return kept * (total + grad_kl * (mean / sigma / sigma)), through_t + grad_kl * through_kl


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    sizes=((0, 4), (1, 1), (3, 5), (9, 129)),
    grid=({"seed": 5, "samples": 3, "sigma": 1.5}, {"seed": -(2**63), "samples": 2, "batch_dims": 1}),
    bench_sizes=((16, 50, 768), (64, 197, 768)),
    bench_options={"seed": 0, "samples": 10, "batch_dims": 1},
    frozen=("x",),
)
def bottleneck(
    x: Tensor, logits: Tensor, *, seed: int, samples: int = 1, sigma: float = 1.0, batch_dims: int = 0
) -> tuple[Tensor, Tensor]:
    """Lets lambda = sigmoid(logits) of x pass, with noise in the place of the rest, and measures what passes:

        t = lambda x + (1 - lambda) sigma eps,    eps ~ N(0, 1), by draws
        kl = ((lambda x / sigma)^2 + (1 - lambda)^2 - 1) / 2 - log(1 - lambda)

    kl, in nats, is that of t's distribution to N(0, sigma^2), to which it falls where nothing passes: it is 0 there
    whatever sigma is. For sigma = 1 it is the released code's. Finite for every finite logit.

    The same seed draws the same noise on every device and on any number of threads, in every dtype but for rounding;
    the first draws are the same whatever `samples`. Problems that are stacked along the first `batch_dims` axes all
    draw the same noise: what comes of one does not depend on which others are beside it, nor on how far its own first
    axis goes on behind it. Under vmap every row draws for itself.

    Args:
        x, logits: tensors of any one shape, or that broadcast to one; float64, float32, bfloat16 or float16. logits
            have no unit.
        seed: any 64-bit number. Draw s of a problem's element e (its index there, by rows) is R cos or, for odd e, R
            sin of 2 pi w' / 2^32 with R = sqrt(-2 log(((w >> 8) + 1) / 2^24)), where w and w' are the first two, or for
            e & 2 the last two, words that Philox4x32-10 makes of group e >> 2 and draw s; see
            `fastprob/ops/_random.py`. No number is above 5.8.
        samples: how many draws, at least 0.
        sigma: the noise's standard deviation, positive; in units of x.
        batch_dims: how many leading axes stack problems.

    Returns:
        (t, kl): [samples, *shape], in units of x, and [*shape], in nats. kl does not depend on the draws.

    Raises:
        ValueError: for samples, sigma or batch_dims out of range, or tensors that differ in dtype or device or do not
            broadcast.

    Source:
        Wang, Rudner and Wilson, Visual explanations of image-text representations via multi-modal information
        bottleneck attribution (M2IB), NeurIPS 2023; Schulz et al., Restricting the flow, ICLR 2020, for N(0, sigma^2).
    """
    dtype = x.dtype
    x, logits = wide(x, logits)
    kept, lost, mean = _parts(x, logits)
    t = mean + lost * (sigma * _noise(x, samples, seed, batch_dims))
    kl = ((mean / sigma).square() - kept * (1 + lost)) / 2 - F.logsigmoid(-logits)
    return t.to(dtype), kl.to(dtype)
