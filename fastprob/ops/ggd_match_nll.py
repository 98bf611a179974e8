"""Exact cross-modal likelihood of two generalised Gaussians, by Gauss-Legendre quadrature.

With d_k the distance from mu_k, t_k = (a_k d_k)^b_k and delta = |mu_1 - mu_2|, the integral of exp(-phi),
phi = t_1 + t_2, over the line is cut at both cusps and in between into at most five pieces on which phi is monotone:
two tails, and up to three pieces between valleys and peaks. Each is cut off where exp(-phi) no longer counts and has
fixed nodes, which powers of the variable draw to the cusps. Distributions are exchanged so that b_1 <= b_2.

Between the cusps the slopes of t_1 and -t_2 are equal where C + p_1 w + (p_2 - p_1) log(1 + e^w) = 0, with p = b - 1
and w the logit of d_1/delta: a convex function above both of its asymptotes. Newton's steps from their zeros come down
on its own: the peak of exp(-phi), where it rises, and the valley, where it falls.

Where the nodes lie is not differentiated: the integral does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fastprob._op import one_of, operator
from fastprob.ops import _ggd, _maths
from fastprob.ops.ggd_nll import REDUCTIONS

SCALES, SHAPES = (1e-12, 1e12), (0.2, 10.0)  # what a may be, and what b is clamped to
FARTHEST = 1e30
FEW, GROUP = 2**14, 8  # up to so many elements all nodes are worked on at once, else so many
NEWTON_STEPS, BISECTIONS = 5, 8
LOGIT_LIMIT, EXTENT_BITS = 60.0, 50.0
# exp(-phi) is cut off at CUT + CUT_SLOPE max(1/b - 1, 0) above its least phi: below 1e-13 of the integral
CUT, CUT_SLOPE = 35.0, 2.8
DEPTH = 80.0  # below it nothing counts, however large t


def gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Nodes in (0, 1) and weights, by Newton's method on the Legendre polynomial."""
    pairs = []
    for i in range(count):
        x = math.cos(math.pi * (i + 0.75) / (count + 0.5))
        for _ in range(8):
            last, this = 1.0, x
            for k in range(2, count + 1):
                last, this = this, ((2 * k - 1) * x * this - (k - 1) * last) / k
            slope = count * (x * this - last) / (x * x - 1)
            x -= this / slope
        pairs.append(((1 - x) / 2, 1 / ((1 - x * x) * slope * slope)))
    return pairs


NODES = gauss_legendre(40)


class _Pair(NamedTuple):
    """Two distributions with b_1 <= b_2, their distance, and what of them is in the domain."""

    delta: Tensor
    a: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]
    swapped: Tensor
    valid: Tensor


class _Pieces(NamedTuple):
    """Pieces [n, ...] of either kind: the points whose distances are low + extent x from the distribution that has the
    cusp and, tails, delta + extent x or else far + extent (1 - x) from the other; x = y^power or
    y^power / (y^power + (1 - y)^power).
    """

    low: Tensor
    far: Tensor
    extent: Tensor
    power: Tensor


def _pair(tensors: Sequence[Tensor], eps: float) -> _Pair:
    mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta = tensors
    delta = (mu - other_mu).abs()
    a, b, valid = [], [], ~delta.isnan()
    for scale, shape in ((inv_alpha + eps, beta + eps), (other_inv_alpha + eps, other_beta + eps)):
        valid = valid & (scale >= SCALES[0]) & (scale <= SCALES[1]) & (shape > 0)
        a.append(scale)
        b.append(shape.clamp(*SHAPES))
    a, b = ([torch.where(valid, x, 1) for x in each] for each in (a, b))
    delta = torch.where(valid, delta, 0)
    swapped = b[0] > b[1]
    return _Pair(delta, _exchanged(swapped, a), _exchanged(swapped, b), swapped, valid)


def _exchanged(swapped: Tensor, pair) -> tuple[Tensor, Tensor]:
    return torch.where(swapped, pair[1], pair[0]), torch.where(swapped, pair[0], pair[1])


def _power(a: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return (a * d) ** b


def _cut(b: Tensor) -> Tensor:
    return CUT + CUT_SLOPE * (1 / b - 1).clamp(min=0)


def _clustering(b: Tensor, t: Tensor) -> Tensor:
    """The power that draws nodes to a cusp of shape b whose t reaches so far on a piece."""
    return (1.4 / b * (4 * t / _cut(b)).clamp(max=1)).clamp(min=2).ceil()


def _tails(delta: Tensor, a: tuple, b: tuple) -> _Pieces:
    """Beyond the cusp of the first distribution and of the second."""
    own_a, other_a, own_b, other_b = torch.stack(a), torch.stack(a[::-1]), torch.stack(b), torch.stack(b[::-1])
    alone = (_cut(own_b).log() / own_b - own_a.log()).exp()
    t = _power(other_a, delta, other_b)
    ratio = _cut(other_b) / t.clamp(min=1e-10)
    beyond = delta * torch.expm1(torch.log1p(ratio) / other_b)
    extent = torch.minimum(alone, torch.where(t < 1e-10, alone.flip(0), beyond))
    power = _clustering(own_b, _power(own_a, extent, own_b))
    power = torch.maximum(power, _clustering(other_b, _power(other_a, delta + extent, other_b)))
    return _Pieces(torch.zeros_like(extent), torch.zeros_like(extent), extent, power)


def _turns(pair: _Pair) -> tuple[Tensor, Tensor]:
    """Logits of d_1 / delta at the valley and at the peak between the cusps; -LOGIT_LIMIT for no valley, and equal
    where phi has no least value between the cusps.
    """
    (a1, a2), (b1, b2) = pair.a, pair.b
    p1, p2, log_delta = b1 - 1, b2 - 1, pair.delta.clamp(min=1e-30).log()
    c = (b1.log() + b1 * a1.log() + p1 * log_delta) - (b2.log() + b2 * a2.log() + p2 * log_delta)
    end = torch.full_like(c, LOGIT_LIMIT)

    def limited(w):
        return w.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def value(w):
        return c + p1 * w + (p2 - p1) * torch.nn.functional.softplus(w)

    flat = torch.where((p1 == 0) & (c > 0), -end, end)  # two Laplaces: the peak is at the sharper one
    peak = torch.minimum(torch.where(p1 > 0, -c / p1, end), torch.where(p2 > 0, -c / p2, flat))
    valley = torch.maximum(torch.where(p1 < 0, -c / p1, -end), torch.where(p2 < 0, -c / p2, -end))
    turns = limited(torch.stack((peak, valley)))
    rising = torch.stack((torch.ones_like(c), -torch.ones_like(c)))
    for _ in range(NEWTON_STEPS):
        slope = p1 + (p2 - p1) * turns.sigmoid()
        moves = rising * slope > 0
        turns = torch.where(moves, limited(turns - value(turns) / torch.where(moves, slope, 1)), turns)
    peak, valley = turns
    lowest = limited(torch.where((p1 < 0) & (p2 > 0), (-p1 / p2).log(), end))
    both = (p1 < 0) & (p2 >= 0)
    apart = both & (value(lowest) < 0)
    peak = torch.where(both & ~apart, 0, torch.where(p2 < 0, valley, peak))
    valley = torch.where(both & ~apart, 0, torch.where(p1 >= 0, -end, valley))
    return valley, peak


def _plan(pair: _Pair) -> tuple[Tensor, _Pieces, _Pieces]:
    """The least phi, the tails, and between the cusps two pieces of the first distribution and one of the second."""
    delta, (a1, a2), (b1, b2) = pair.delta, pair.a, pair.b
    valley, peak = _turns(pair)
    v1, z1, z2 = delta * valley.sigmoid(), delta * peak.sigmoid(), delta * (-peak).sigmoid()

    def phi(d1, d2):
        return _power(a1, d1, b1) + _power(a2, d2, b2)

    zero = torch.zeros_like(delta)
    at_first, at_peak, at_second = phi(zero, delta), phi(z1, z2), phi(delta, zero)
    least = torch.minimum(torch.minimum(at_first, at_second), at_peak)
    cut = _cut(b1)

    # From the first cusp up to the valley, from the peak down to it, and between the peak and the second cusp, from the
    # lower of the two: how far phi stays below its cut.
    from_cusp = at_second < at_peak
    d1 = torch.stack((zero, z1, torch.where(from_cusp, delta, z1)))
    d2 = torch.stack((delta, z2, torch.where(from_cusp, 0, z2)))
    length = torch.stack((v1, v1 - z1, torch.where(from_cusp, -z2, z2)))

    def above(fraction):
        step = length * fraction
        return phi((d1 + step).clamp(min=0), (d2 - step).clamp(min=0)) - least > cut

    low, high = torch.full_like(d1, -EXTENT_BITS), torch.zeros_like(d1)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        beyond = above(middle.exp2())
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    first, middle, last = extent = length.abs() * high.exp2()
    low = torch.stack((zero, (z1 - middle).clamp(min=0), torch.where(from_cusp, 0, z2 - last)))
    far = torch.stack((delta - first, z2, torch.where(from_cusp, delta - last, z1)))
    power = torch.stack(
        (
            _clustering(b1, _power(a1, first, b1)),
            zero + 2,
            _clustering(b2, _power(a2, torch.where(from_cusp, last, z2), b2)),
        )
    )
    return least, _tails(delta, pair.a, pair.b), _Pieces(low, far, extent, power)


class _Moments(NamedTuple):
    """Sums over the nodes, weighted with exp(least phi - phi): of 1, t_k, t_k log(a_k d_k); and the derivative for
    delta.
    """

    integral: Tensor
    t: tuple[Tensor, Tensor]
    t_log: tuple[Tensor, Tensor]
    delta: Tensor


def _moments(pair: _Pair, least: Tensor, tails: _Pieces, between: _Pieces) -> _Moments:
    """Differentiable: on tails a node's distance from the cusp is fixed, between the cusps its share of delta."""
    (a1, a2), (b1, b2) = pair.a, pair.b
    outer = _sums(pair, least, tails, (a1, a2), (b1, b2), (a2, a1), (b2, b1), True)
    inner = _sums(pair, least, between, (a1, a1, a2), (b1, b1, b2), (a2, a2, a1), (b2, b2, b1), False)

    def of_first(own, other):
        return outer[own][0] + outer[other][1] + inner[own][:2].sum(0) + inner[other][2]

    integral, moved = [outer[i].sum(0) + inner[i].sum(0) for i in (0, 5)]
    return _Moments(integral, (of_first(1, 2), of_first(2, 1)), (of_first(3, 4), of_first(4, 3)), moved)


def _sums(pair: _Pair, least: Tensor, pieces: _Pieces, own_a, own_b, other_a, other_b, is_tail: bool) -> list[Tensor]:
    """Of every piece: 1; t and t log u of the distribution whose cusp it has, and of the other; delta's derivative."""
    ties = pair.delta == 0
    size, delta = torch.where(ties, 1, pair.delta.detach()), torch.where(ties, 1, pair.delta)
    own_a, own_b, other_a, other_b = map(torch.stack, (own_a, own_b, other_a, other_b))
    nodes = torch.tensor(NODES, dtype=delta.dtype, device=delta.device)
    tiny, group = torch.finfo(delta.dtype).tiny, len(NODES) if delta.numel() <= FEW else GROUP
    sums = [torch.zeros_like(own_a)] * 6
    for start in range(0, len(NODES), group):
        y, weight = nodes[start : start + group].view(-1, 2, *[1] * own_a.dim()).unbind(1)
        near = y**pieces.power
        if is_tail:
            own, weight = pieces.extent * near, weight * pieces.extent * (pieces.power * near / y)
            other = pair.delta + own
        else:
            x = near / (near + (1 - y) ** pieces.power)
            own = delta * ((pieces.low + pieces.extent * x) / size)
            other = delta * ((pieces.far + pieces.extent * (1 - x)) / size)
            weight = weight * torch.where(ties, 0, pieces.extent / size)
            weight = weight * (pieces.power * x * (1 - x) / (y * (1 - y)))
        own_u, other_u = (own_a * own).clamp(min=tiny), (other_a * other).clamp(min=tiny)
        counts = least - (own_u**own_b + other_u**other_b).detach() > -DEPTH - 1e-4 * least
        own_u, other_u = torch.where(counts, own_u, 1), torch.where(counts, other_u, 1)
        own_t, other_t = own_u**own_b, other_u**other_b
        e = torch.where(counts, weight, 0) * (least - (own_t + other_t)).clamp(-DEPTH, 10).exp()  # least is rounded
        if is_tail:
            moved = -e * other_b * other_t / other
        else:
            moved, e = e * (1 - own_b * own_t - other_b * other_t), e * delta
        terms = e, e * own_t, e * other_t, e * own_t * own_u.log(), e * other_t * other_u.log(), moved
        sums = [total + term.sum(0) for total, term in zip(sums, terms)]
    return sums


def _check(*, eps, reduction, **_):
    one_of("ggd_match_nll", "reduction", reduction, REDUCTIONS)
    _ggd.check_eps("ggd_match_nll", eps)


def _inputs(make, *shape):
    """Extremes within the domain, without its corners: there float32 derivatives are differences of large terms."""

    def distribution():
        inv_alpha = make(*shape, low=0.2, high=3, extreme=(1e-2, 1e1))
        return make(*shape, extreme=(1e-2, 3)), inv_alpha, make(*shape, low=0.5, high=3, extreme=(0.5, 4))

    (mu, *one), (other_mu, *other) = distribution(), distribution()
    return mu, *one, -other_mu, *other


def _detached(pair: _Pair) -> _Pair:
    (a1, a2), (b1, b2) = pair.a, pair.b
    return pair._replace(delta=pair.delta.detach(), a=(a1.detach(), a2.detach()), b=(b1.detach(), b2.detach()))


def slopes(tensors: Sequence[Tensor], eps: float) -> tuple[Tensor, ...]:
    """The elements' derivatives for all six tensors."""
    pair = _pair(tensors, eps)
    mu, _, beta, other_mu, _, other_beta = tensors
    least, tails, between = _plan(_detached(pair))
    m = _moments(pair, least, tails, between)
    valid = pair.valid & least.isfinite() & (pair.delta <= FARTHEST)
    size = torch.where(valid, m.integral, 1)
    of_a, of_b = [], []
    for a, b, t, t_log in zip(pair.a, pair.b, m.t, m.t_log):
        norm_a, norm_b = _ggd.log_normaliser_gradient(a, b)
        of_a.append(b * t / (a * size) + norm_a)
        of_b.append(t_log / size + norm_b)
    by_a = _exchanged(pair.swapped, of_a)
    moves = [(beta + eps).clamp(*SHAPES) == beta + eps for beta in (beta, other_beta)]
    by_b = [torch.where(move, g, 0) for move, g in zip(moves, _exchanged(pair.swapped, of_b))]
    by_mu = -_maths.sign(mu - other_mu) * m.delta / size
    all_six = by_mu, by_a[0], by_b[0], -by_mu, by_a[1], by_b[1]
    return tuple(torch.where(valid, g, torch.nan) for g in all_six)


def values(tensors: Sequence[Tensor], eps: float) -> Tensor:
    """The elements' values."""
    if not _maths.has_numbers(tensors[0]):  # their shape takes no quadrature
        return reduce(torch.add, tensors)
    pair = _pair(tensors, eps)
    least, tails, between = _plan(pair)
    nll = least - _moments(pair, least, tails, between).integral.log() + 2 * math.log(2)
    for a, b in zip(pair.a, pair.b):
        nll = nll + _ggd.log_normaliser(a, b)
    nll = torch.where(least.isfinite() & (pair.delta <= FARTHEST), nll, torch.inf)
    return torch.where(pair.valid, nll, torch.nan)


def _gradient(grad, mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta, *, eps, reduction):
    grad, *tensors = _maths.wide(grad, mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta)
    if reduction == "mean":
        grad = grad / max(mu.numel(), 1)
    return tuple(grad * slope for slope in slopes(tensors, eps))


@operator(
    gradient=_gradient,
    check=_check,
    inputs=_inputs,
    grid=({}, {"reduction": "none", "eps": 0.0}),
    bench_sizes=((64, 512), (8192, 512)),  # its reference takes milliseconds a coordinate
    is_scalar=lambda *, reduction, **_: reduction != "none",
)
def ggd_match_nll(
    mu: Tensor,
    inv_alpha: Tensor,
    beta: Tensor,
    other_mu: Tensor,
    other_inv_alpha: Tensor,
    other_beta: Tensor,
    *,
    eps: float = 1e-4,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood that draws from two generalised Gaussians are the same point: the exact cross-modal term.

        value = -log integral G_1(z) G_2(z) dz,    G_k(z) = a_k / (2 Gamma(1 + 1/b_k)) exp(-(a_k |z - mu_k|)^b_k)

    with a = inv_alpha + eps and b = beta + eps, and with all constants, the logarithms of 2 among them.

    Args:
        mu, inv_alpha, beta; other_*: the two distributions, as in `ggd_nll`: of any one shape, or that broadcast to
            one; float64, float32, bfloat16 or float16.
        eps: added to inv_alpha and beta.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the elements' values for "none"; in nats.

    Domain:
        b is clamped to [0.2, 10], beyond which its gradient is zero. For a_1/a_2 from 1e-4 to 1e4 and distances up to
        1e3 of the wider scale the error, relative to max(1, |value|), is at most 1e-6, and 5e-6 in float32. NaN where
        a is not in [1e-12, 1e12] or b <= 0. Infinite, and the gradients NaN, where the value is out of the type's
        range or the distance above 1e30. The gradient for mu is 0 at a tie; nearer to one than 1e-3 of the wider scale,
        where a b < 1 makes it diverge or vanish slowly, its error may be a tenth of inv_alpha.

    Raises:
        ValueError: for an unknown reduction, negative eps, or tensors that differ in dtype or device or do not
            broadcast.

    Source:
        ProbVLM (Upadhyay et al., ICCV 2023), eq. 5, which has it as Fox's H function and replaces it by the two halves
        of `probvlm_loss`.
    """
    tensors = _maths.wide(mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta)
    nll = values(tensors, eps)
    if reduction != "none":
        nll = nll.mean() if reduction == "mean" else nll.sum()
    return nll.to(mu.dtype)
