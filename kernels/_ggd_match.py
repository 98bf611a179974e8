"""ggd_match_nll per element, by quadrature: the maths stands in fastprob/ops/ggd_match_nll.py.

A thread has one element, whose numbers fill its registers, and walks over the pieces and their nodes. Loops over pieces
that are alike keep the code small enough to compile in seconds. In float32 there are so many nodes, and so much is cut
off, that what is lost is of the size of its rounding. Where pieces lie, on which the integral does not depend, is found
by the GPU's instructions alone (FAST). Pieces of no length give NaN, which is not taken.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from fastprob.kernels import _maths
from fastprob.ops import ggd_match_nll as _reference

NODES, NODES_FLOAT64 = tl.constexpr(32), tl.constexpr(40)
COLUMNS = tl.constexpr(5)  # of their table
GROUP = tl.constexpr(32 if _maths.INTERPRETED else 1)  # nodes at a time; the interpreter takes its time for operations
LEAST_SCALE, LARGEST_SCALE = map(tl.constexpr, _reference.SCALES)
LEAST_SHAPE, LARGEST_SHAPE = map(tl.constexpr, _reference.SHAPES)
FARTHEST = tl.constexpr(_reference.FARTHEST)
NEWTON_STEPS, BISECTIONS = tl.constexpr(_reference.NEWTON_STEPS), tl.constexpr(_reference.BISECTIONS)
LOGIT_LIMIT, EXTENT_BITS = tl.constexpr(_reference.LOGIT_LIMIT), tl.constexpr(_reference.EXTENT_BITS)
DEPTH = tl.constexpr(_reference.DEPTH)


@functools.cache
def nodes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of every node y in (0, 1): log2 y, log2(1 - y), its weight, 1/y and 1/(y (1 - y))."""
    pairs = _reference.gauss_legendre((NODES_FLOAT64 if dtype == torch.float64 else NODES).value)
    rows = [(math.log2(y), math.log2(1 - y), weight, 1 / y, 1 / (y * (1 - y))) for y, weight in pairs]
    rows += [(0.0,) * len(rows[0])] * (-len(rows) % GROUP.value)  # of no weight
    return torch.tensor(rows, dtype=dtype, device=device)


def nodes_for(tensor: torch.Tensor) -> torch.Tensor:
    return nodes(torch.float64 if tensor.dtype == torch.float64 else torch.float32, tensor.device)


@triton.jit
def _bounded(x, low, high):
    """x between two numbers of float32; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """log2 x for positive normal x; far below 0 at 0."""
    if x.dtype == tl.float64:
        result = tl.log2(x)
    elif FAST:
        result = _maths.log2_approximate(x)
    else:
        exponent, mantissa = _maths.split_normal(x)
        result = exponent + _maths.log2_mantissa(mantissa)
    return result


@triton.jit
def _power(d, a, b, FAST: tl.constexpr):
    """t = (a d)^b and log2(a d), both finite."""
    if d.dtype == tl.float64:
        lowest, highest = 1e-290, 4e307
    else:
        lowest, highest = 1e-37, 8e37
    d = tl.where(d < lowest, lowest, d)
    if d.dtype == tl.float64 or FAST:
        log2_u = _log2(d, FAST) + _log2(a, FAST)
        t = tl.exp2(b * log2_u)
    else:
        exponent, mantissa = _maths.split_normal(a)
        e, m = _maths.split_normal(d * mantissa)
        e += exponent
        log2_m = _maths.log2_mantissa(m)
        t, log2_u = _maths.power_of_parts(e, log2_m, b, 0.0), e + log2_m
    return tl.where(t > highest, highest, t), log2_u


@triton.jit
def _cut(b):
    if b.dtype == tl.float64:
        cut, slope = 35.0, 2.8
    else:
        cut, slope = 19.0, 2.2
    return cut + slope * tl.where(b < 1, _maths.reciprocal(b) - 1, 0.0)


@triton.jit
def _clustering(b, t):
    """The power that draws nodes to a cusp of shape b whose t reaches so far on a piece."""
    share = 4 * t / _cut(b)
    power = 1.4 / b * tl.where(share > 1, 1.0, share)
    return tl.ceil(tl.where(power < 2, 2.0, power))


# ---- where pieces lie -----------------------------------------------------------------------------------------------


@triton.jit
def _softplus(w):
    """log(1 + e^w) and its derivative."""
    e = _maths.exponential(-tl.abs(w), True)
    return tl.where(w < 0, 0.0, w) + _maths.log_normal(1 + e, True), tl.where(w > 0, 1.0, e) / (1 + e)


@triton.jit
def _newton(w, c, p1, p2, rising):
    value, share = _softplus(w)
    slope = p1 + (p2 - p1) * share
    moves = rising * slope > 0
    moved = w - (c + p1 * w + (p2 - p1) * value) / tl.where(moves, slope, 1.0)
    return tl.where(moves, _bounded(moved, -LOGIT_LIMIT, LOGIT_LIMIT), w)


@triton.jit
def _turns(delta, a1, b1, a2, b2):
    """Logits of d_1 / delta at the valley and at the peak between the cusps."""
    p1, p2 = b1 - 1, b2 - 1
    log_delta = _maths.log_normal(tl.where(delta < 1e-30, 1e-30, delta), True)
    c1 = _maths.log_normal(b1, True) + b1 * _maths.log_normal(a1, True) + p1 * log_delta
    c = c1 - (_maths.log_normal(b2, True) + b2 * _maths.log_normal(a2, True) + p2 * log_delta)
    w1, w2 = -c / tl.where(p1 == 0, 1.0, p1), -c / tl.where(p2 == 0, 1.0, p2)
    flat = tl.where((p1 == 0) & (c > 0), -LOGIT_LIMIT, LOGIT_LIMIT)
    peak1, peak2 = tl.where(p1 > 0, w1, LOGIT_LIMIT), tl.where(p2 > 0, w2, flat)
    valley1, valley2 = tl.where(p1 < 0, w1, -LOGIT_LIMIT), tl.where(p2 < 0, w2, -LOGIT_LIMIT)
    peak = _bounded(tl.where(peak2 < peak1, peak2, peak1), -LOGIT_LIMIT, LOGIT_LIMIT)
    valley = _bounded(tl.where(valley2 > valley1, valley2, valley1), -LOGIT_LIMIT, LOGIT_LIMIT)
    for _ in range(NEWTON_STEPS):
        peak, valley = _newton(peak, c, p1, p2, 1), _newton(valley, c, p1, p2, -1)
    inside, both = (p1 < 0) & (p2 > 0), (p1 < 0) & (p2 >= 0)
    lowest = _maths.log_normal(tl.where(inside, -p1 / p2, 1.0), True)
    lowest = tl.where(inside, _bounded(lowest, -LOGIT_LIMIT, LOGIT_LIMIT), LOGIT_LIMIT)
    value, _ = _softplus(lowest)
    none = both & (c + p1 * lowest + (p2 - p1) * value >= 0)
    peak = tl.where(none, 0.0, tl.where(p2 < 0, valley, peak))
    valley = tl.where(none, 0.0, tl.where(p1 >= 0, -LOGIT_LIMIT, valley))
    return tl.where(valley < peak, valley, peak), peak


@triton.jit
def _phi(d1, d2, log2_a1, b1, log2_a2, b2):
    # No distance is negative by more than its rounding.
    return tl.exp2(b1 * (_log2(tl.abs(d1), True) + log2_a1)) + tl.exp2(b2 * (_log2(tl.abs(d2), True) + log2_a2))


@triton.jit
def _reach(d1, d2, length, a1, b1, a2, b2, most):
    """How far phi stays below `most` on the way from a point between the cusps."""
    log2_a1, log2_a2 = _log2(a1, True), _log2(a2, True)
    low, high = d1 * 0 - EXTENT_BITS, d1 * 0
    for _ in range(BISECTIONS):
        middle = (low + high) * 0.5
        step = length * tl.exp2(middle)
        beyond = _phi(d1 + step, d2 - step, log2_a1, b1, log2_a2, b2) > most
        low, high = tl.where(beyond, low, middle), tl.where(beyond, middle, high)
    beyond = _phi(d1 + length, d2 - length, log2_a1, b1, log2_a2, b2) > most
    return tl.abs(length) * tl.where(beyond, tl.exp2(high), 1.0)


@triton.jit
def _alone(a, b):
    """How far a tail reaches from a tie."""
    return tl.exp2(_log2(_cut(b), True) / b - _log2(a, True))


@triton.jit
def _beyond(delta, own_a, own_b, other_a, other_b, nearest):
    """How far a tail reaches from its cusp, at which the other's t is `nearest`."""
    ratio = _cut(other_b) / tl.where(nearest < 1e-10, 1e-10, nearest)
    grown = tl.exp2(_log2(1 + ratio, True) / other_b) - 1
    extent = delta * tl.where(ratio < 1e-3, ratio / other_b, grown)
    extent = tl.where(nearest < 1e-10, _alone(other_a, other_b), extent)
    alone = _alone(own_a, own_b)
    return tl.where(extent < alone, extent, alone)


# ---- sums over nodes ------------------------------------------------------------------------------------------------


@triton.jit
def _node(table, at):
    """A node's row, or those of GROUP nodes as columns."""
    if GROUP > 1:
        at += COLUMNS * tl.arange(0, GROUP)[:, None]
    table += at
    return tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3), tl.load(table + 4)


@triton.jit
def _over_nodes(x):
    return tl.sum(x, 0) if GROUP > 1 else x


@triton.jit
def _sums(
    own_b, own_t, own_low, other_b, other_t, other_low, power, least, table, TAIL: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Sums over a piece's nodes, weighted with exp(least - phi): of 1; t of the distribution that has the cusp and of
    the other; the same times log2 of the distance over the largest one; and, on tails, the other's t over that.

    t is what it is at the largest distance, `low` the least one over that.
    """
    zero = own_b * 0
    total, own_sum, other_sum, own_logs, other_logs, moved = zero, zero, zero, zero, zero, zero
    COUNT: tl.constexpr = NODES_FLOAT64 if own_b.dtype == tl.float64 else NODES
    for at in range(0, COUNT * COLUMNS, GROUP * COLUMNS):
        log2_y, log2_rest, weight, inverse, inverse_both = _node(table, at)
        near = tl.exp2(power * log2_y)
        if TAIL:
            log2_own, rest, slope = power * log2_y, near, power * near * inverse
        else:
            far = tl.exp2(power * log2_rest)
            share = _maths.reciprocal(near + far)
            x, rest = near * share, far * share
            log2_own, slope = _log2(own_low + (1 - own_low) * x, FAST), power * x * rest * inverse_both
        distance = other_low + (1 - other_low) * rest
        log2_other = _log2(distance, FAST)
        own, other = own_t * tl.exp2(own_b * log2_own), other_t * tl.exp2(other_b * log2_other)
        depth = least - (own + other)
        e = weight * slope * tl.exp2(_bounded(depth, -DEPTH, 10.0) * _maths.LOG2_E)  # least is rounded
        e = tl.where(depth > -DEPTH - 1e-4 * least, e, 0.0)
        own, other = e * own, e * other
        total += _over_nodes(e)
        own_sum += _over_nodes(own)
        other_sum += _over_nodes(other)
        own_logs += _over_nodes(own * log2_own)
        other_logs += _over_nodes(other * log2_other)
        if TAIL:
            moved += _over_nodes(other / distance)
    return total, own_sum, other_sum, own_logs, other_logs, moved


@triton.jit
def _plus(total, extent, x):
    return total + tl.where(extent > 0, extent * x, 0.0)


@triton.jit
def _piece(
    sums, low, high, far, wide, extent, delta, own_a, own_b, other_a, other_b, least, table, middle, second,
    TAIL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Adds a piece to the integral, the moments (t_1, t_2, t_1 log2 u_1, t_2 log2 u_2) and delta's derivative: where
    the own distance goes from `low` to `high`, the other one from `far` to `wide` or back.

    Whether it is in the `middle`, where no cusp is, and whether its own distribution is the `second`.
    """
    own_t, own_log = _power(high, own_a, own_b, FAST)
    other_t, other_log = _power(wide, other_a, other_b, FAST)
    nearest, _ = _power(far, other_a, other_b, FAST)
    other_low = far / wide
    # What rounding adds to phi, where the other distance is least, over what it was when the least phi was found.
    least += other_t * tl.exp2(other_b * _log2(other_low, FAST)) - nearest
    power = tl.where(middle, 2.0, _clustering(own_b, own_t))
    if TAIL:
        others = _clustering(other_b, other_t)
        power = tl.where(power < others, others, power)
    total, own, other, own_logs, other_logs, moved = _sums(
        own_b, own_t, low / high, other_b, other_t, other_low, power, least, table, TAIL, FAST
    )
    own_logs += own_log * own
    other_logs += other_log * other
    moved = -other_b * moved / wide if TAIL else (total - own_b * own - other_b * other) / delta
    integral, t1, t2, log1, log2, by_delta = sums
    return (
        _plus(integral, extent, total),
        _plus(t1, extent, tl.where(second, other, own)), _plus(t2, extent, tl.where(second, own, other)),
        _plus(log1, extent, tl.where(second, other_logs, own_logs)),
        _plus(log2, extent, tl.where(second, own_logs, other_logs)),
        _plus(by_delta, extent, moved),
    )  # fmt: skip


@triton.jit
def _integrate(delta, a1, b1, a2, b2, table, FAST: tl.constexpr):
    """The least phi; and the integral of exp(least - phi), moments and its derivative for delta: `_piece`'s sums."""
    valley, peak = _turns(delta, a1, b1, a2, b2)
    _, share = _softplus(peak)
    _, rest = _softplus(-peak)
    _, of_valley = _softplus(valley)
    z1, z2, v1 = delta * share, delta * rest, tl.where(b1 >= 1, 0.0, delta * of_valley)
    at_first, _ = _power(delta, a2, b2, FAST)
    at_second, _ = _power(delta, a1, b1, FAST)
    t1, _ = _power(z1, a1, b1, FAST)
    t2, _ = _power(z2, a2, b2, FAST)
    at_peak = t1 + t2
    from_cusp = at_second < at_peak
    least = tl.where(from_cusp, at_second, at_peak)
    least = tl.where(at_first < least, at_first, least)
    most = least + _cut(b1)
    zero = delta * 0
    sums = (zero, zero, zero, zero, zero, zero)
    for side in range(2):
        second = side == 1
        own_a, own_b = tl.where(second, a2, a1), tl.where(second, b2, b1)
        other_a, other_b = tl.where(second, a1, a2), tl.where(second, b1, b2)
        extent = _beyond(delta, own_a, own_b, other_a, other_b, tl.where(second, at_second, at_first))
        sums = _piece(
            sums, zero, extent, delta, delta + extent, extent, delta, own_a, own_b, other_a, other_b, least, table,
            False, second, True, FAST,
        )  # fmt: skip
    # From the first cusp up to the valley, from the peak down to it, and between the peak and the second cusp, from the
    # lower of the two.
    for side in range(3):
        middle, second = side == 1, side == 2
        d1 = tl.where(middle, z1, tl.where(second, tl.where(from_cusp, delta, z1), 0.0))
        d2 = tl.where(middle, z2, tl.where(second, tl.where(from_cusp, 0.0, z2), delta))
        length = tl.where(middle, v1 - z1, tl.where(second, tl.where(from_cusp, -z2, z2), v1))
        extent = _reach(d1, d2, length, a1, b1, a2, b2, most)
        own_a, own_b = tl.where(second, a2, a1), tl.where(second, b2, b1)
        other_a, other_b = tl.where(second, a1, a2), tl.where(second, b1, b2)
        own_d, other_d = tl.where(second, d2, d1), tl.where(second, d1, d2)
        outward, left = tl.where(second, length < 0, length > 0), own_d - extent
        low, high = tl.where(outward | (left < 0), 0.0, left), tl.where(outward, extent, own_d)
        far, wide = tl.where(outward, delta - extent, other_d), tl.where(outward, delta, other_d + extent)
        sums = _piece(
            sums, low, high, far, wide, extent, delta, own_a, own_b, other_a, other_b, least, table,
            middle, second, False, FAST,
        )  # fmt: skip
    return least, sums


@triton.jit
def match(mu, inv_alpha, beta, other_mu, other_inv_alpha, other_beta, eps, table, FAST: tl.constexpr):
    """An element's value, and its derivatives for all six."""
    d, a, b, c, e = mu - other_mu, inv_alpha + eps, beta + eps, other_inv_alpha + eps, other_beta + eps
    delta = tl.abs(d)
    valid = (a >= LEAST_SCALE) & (a <= LARGEST_SCALE) & (c >= LEAST_SCALE) & (c <= LARGEST_SCALE)
    valid = valid & (b > 0) & (e > 0) & (delta >= 0)
    a, c, delta = tl.where(valid, a, 1.0), tl.where(valid, c, 1.0), tl.where(valid & (delta <= FARTHEST), delta, 0.0)
    moves_b, moves_e = (b >= LEAST_SHAPE) & (b <= LARGEST_SHAPE), (e >= LEAST_SHAPE) & (e <= LARGEST_SHAPE)
    low = tl.full(b.shape, LEAST_SHAPE, b.dtype)
    b = tl.where(valid, tl.where(b < low, low, tl.where(b > LARGEST_SHAPE, LARGEST_SHAPE, b)), 1.0)
    e = tl.where(valid, tl.where(e < low, low, tl.where(e > LARGEST_SHAPE, LARGEST_SHAPE, e)), 1.0)
    swapped = b > e
    a1, a2, b1, b2 = tl.where(swapped, c, a), tl.where(swapped, a, c), tl.where(swapped, e, b), tl.where(swapped, b, e)
    least, sums = _integrate(delta, a1, b1, a2, b2, table, FAST)
    integral, t1, t2, log1, log2, moved = sums
    y1, y2 = _maths.reciprocal(b1), _maths.reciprocal(b2)
    stirling1, p1, digamma1 = _maths.gamma1p(y1, FAST)
    stirling2, p2, digamma2 = _maths.gamma1p(y2, FAST)
    logs = _maths.log_normal(integral, FAST) + _maths.log_normal(a1, FAST) + _maths.log_normal(a2, FAST)
    logs += _maths.log_normal(p1, FAST) + _maths.log_normal(p2, FAST)
    value = least + ((stirling1 + stirling2 + 2 * _maths.LN2) - logs)
    inside = (least < (2e307 if least.dtype == tl.float64 else 4e37)) & (tl.abs(d) <= FARTHEST)
    value = tl.where(valid, tl.where(inside, value, _maths.INF), _maths.NAN)

    inverse = 1 / integral
    by_d = -_maths.sign(d) * moved * inverse
    by_a1, by_a2 = (b1 * t1 * inverse - 1) / a1, (b2 * t2 * inverse - 1) / a2
    by_b1 = _maths.LN2 * log1 * inverse - digamma1 * y1 * y1
    by_b2 = _maths.LN2 * log2 * inverse - digamma2 * y2 * y2
    by_b = tl.where(moves_b, tl.where(swapped, by_b2, by_b1), 0.0)
    by_e = tl.where(moves_e, tl.where(swapped, by_b1, by_b2), 0.0)
    by_a, by_c = tl.where(swapped, by_a2, by_a1), tl.where(swapped, by_a1, by_a2)
    slopes = [tl.where(valid & inside, s, _maths.NAN) for s in (by_d, by_a, by_b, -by_d, by_c, by_e)]
    return value, slopes
