"""Draws from generalised Gaussians by a seed: a uniform number times a power of a gamma-distributed one.

    X = mu + U G^(1/b) / a,    U ~ Uniform(-1, 1),    G ~ Gamma(k),    k = 1 + 1/b

with a = inv_alpha + eps and b = beta + eps. G is d v by Marsaglia and Tsang's method, from a normal number x (Box and
Muller's) and a uniform one w:

    d = k - 1/3,    v = (1 + x / (3 sqrt d))^3,    taken if v > 0 and log w < x^2 / 2 + d (1 - v + log v)

As k is 1 or more, at most 0.049 of the proposals are not taken; after so many attempts that it happens to less than one
element in 1e20 the last one is. Element e of the result, e its index in [n, *shape], draws its attempt t from the four
words of Philox's group e, draw t, and U from those of attempt 0.

A rounding decides on what is drawn. So all is computed in float64, whatever the dtype: dtypes and devices draw alike.

U fixed, G follows k as its quantiles do: dG/dk = -(dF/dk) / p(G), with F and p the distribution function and density
of Gamma(k) (implicit reparameterisation). It is the gradient of expectations, and not of X at a fixed seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprob._op import operator
from fastprob.ops import _ggd, _maths
from fastprob.ops._random import words

STREAM = 1 << 31
ATTEMPTS = 16


def _check(*, n, eps, **_):
    if n < 0:
        raise ValueError(f"ggd_sample: n must be at least 0, got {n}")
    _ggd.check_eps("ggd_sample", eps)


def _inputs(make, *shape):
    inv_alpha = make(*shape, low=0.2, high=3, extreme=(1e-6, 1e6))
    return make(*shape), inv_alpha, make(*shape, low=0.5, high=3, extreme=(0.05, 1e4))  # below it most draws overflow


def parameters(inv_alpha: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """a and b, in float64."""
    return _ggd.shifted(inv_alpha.double(), beta.double(), eps)


def _proposal(b: Tensor, element: Tensor, seed: int, attempt: int) -> tuple[Tensor, Tensor, Tensor]:
    """The attempt's U; log G, that of d where v is no number to take the logarithm of; and whether G is taken."""
    of_radius, of_angle, w, u = (
        (word.double() + 0.5) * 2**-32 for word in words(element, seed=seed, stream=STREAM, draw=attempt)
    )
    x = (-2 * of_radius.log()).sqrt() * (2 * math.pi * of_angle).cos()
    d = 2 / 3 + 1 / b
    v = 1 + x / (3 * d.sqrt())
    v = v * v * v
    log_v = torch.where(v > 0, v, 1).log()
    return 2 * u - 1, d.log() + log_v, (v > 0) & (w.log() < x * x / 2 + d * (1 - v + log_v))


def draws(b: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """U and log G, each [n, *shape] for b of any shape."""
    shape, b = (n, *b.shape), b.expand(n, *b.shape).flatten()
    u, log_g, taken = _proposal(b, torch.arange(b.shape[0], device=b.device), seed, 0)
    if _maths.has_numbers(b):
        rest = (~taken).nonzero()[:, 0]
        for attempt in range(1, ATTEMPTS):
            _, others, taken = _proposal(b[rest], rest, seed, attempt)
            log_g = log_g.index_put((rest,), others)
            rest = rest[~taken]
    return u.view(shape), log_g.view(shape)


def gradient_of(grad: Tensor, a: Tensor, b: Tensor, u: Tensor, log_g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for mu, inv_alpha and beta, given what was drawn."""
    k, g = (1 + 1 / b).detach(), log_g.exp()
    slope = torch._standard_gamma_grad(k.expand_as(g), g) if _maths.has_numbers(g) else g
    spread = u * (log_g / b - a.log()).exp()
    grad_b = -spread * (log_g + slope / (g * b)) / b.square()
    return grad.sum(0), (-grad * spread / a).sum(0), (grad * grad_b).sum(0)


def _gradient(grad, mu, inv_alpha, beta, *, n, seed, eps):
    a, b = parameters(inv_alpha, beta, eps)
    return gradient_of(grad.double(), a, b, *draws(b.detach(), n, seed))


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    sizes=((), (0, 4), (1, 1), (3, 5), (9, 129)),
    grid=({"n": 2, "seed": 5}, {"n": 1, "seed": -(2**63), "eps": 0.0}),
    implicit=("beta",),
)
def ggd_sample(mu: Tensor, inv_alpha: Tensor, beta: Tensor, *, n: int = 1, seed: int = 0, eps: float = 1e-4) -> Tensor:
    """Draws from generalised Gaussians: mu + U G^(1/b) / a with U ~ Uniform(-1, 1) and G ~ Gamma(1 + 1/b).

    The same seed draws the same numbers in every dtype, on any number of threads and, but for an element in some 1e12
    of which a rounding decides, on every device; the first draws are the same whatever n. Under vmap every row draws
    for itself.

    Gradients are those of expectations, pathwise: E f(X) has the gradient E f'(X) dX. dX for mu and inv_alpha is exact
    and dX for beta, implicit, good to about 1e-3, as torch's gradient of a gamma distribution's draws is. Second
    derivatives for beta raise NotImplementedError.

    Args:
        mu, inv_alpha, beta: tensors of any one shape, or that broadcast to one; float64, float32, bfloat16 or float16.
            inv_alpha is 1/scale, in 1/units of mu; beta is the shape (2 normal, 1 Laplace), no unit. Where a =
            inv_alpha + eps < 0 or b = beta + eps <= 0 the result is NaN.
        n: how many to draw, at least 0.
        seed: any 64-bit number.
        eps: added to inv_alpha and beta.

    Returns:
        [n, *shape], in units of mu. What overflows the dtype is infinite; computed in float64, through logarithms.

    Raises:
        ValueError: for negative n or eps, or tensors that differ in dtype or device or do not broadcast.

    Source:
        Marsaglia and Tsang, A simple method for generating gamma variables, ACM TOMS 26 (2000); Figurnov, Mohamed and
        Mnih, Implicit reparameterization gradients, NeurIPS 2018.
    """
    a, b = parameters(inv_alpha, beta, eps)
    u, log_g = draws(b, n, seed)
    return (mu.double() + u * (log_g / b - a.log()).exp()).to(mu.dtype)
