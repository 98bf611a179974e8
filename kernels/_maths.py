"""Scalar maths that the operators' kernels share, per element.

float32: a power u^b is split,

    log2 u = e + log2 m, m in [1/sqrt 2, sqrt 2),   u^b = 2^h (1 + l log 2),   h + l = b e + b log2 m,

h rounded and l what that lost, which keeps it as exact as a library's pow. The base is a product of two numbers whose
exponents are added: it neither overflows nor underflows. log2 m is a polynomial, not the GPU's lg2.approx: that one's
absolute error of 2^-22 is multiplied by b in the power and by x in Stirling's series. exp2 is the GPU's, good to two
units in the last place whatever h. lgamma and digamma of 1 + y come together from Stirling's series at X = y + 3,
shifted down by the factors p = (1 + y)(2 + y).
FAST, for the half types: the GPU's lg2.approx and exp2 alone, far below their rounding and half the instructions.
float64: log and exp, and the series at X = y + 10.

Every selection is written so that a NaN fails its comparison and stays; tl.minimum and tl.maximum would drop it.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(0.693147180559945309417)
LOG2_E = tl.constexpr(1.442695040888963407360)
HALF_LOG_2PI = tl.constexpr(0.918938533204672741780)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


@triton.jit
def parameter(x, dtype: tl.constexpr):
    """A kernel's float64 argument in the type of computation; the interpreter hands over Python's float."""
    return tl.full((), x, dtype)


@triton.jit
def load(pointer, at, mask):
    """Elements in the type of computation: float64 stays, all else is widened to float32."""
    x = tl.load(pointer + at, mask=mask, other=None if mask is None else 0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def store(pointer, at, x, mask):
    tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=mask)


# ---- reciprocal, logarithm and power --------------------------------------------------------------------------------


@triton.jit
def reciprocal(x):
    """1/x; in float32 by one instruction, good to a unit in the last place, where Triton's division takes seven.

    On a GPU subnormals count as 0: the division by d = mu - z, alone, has to do better.
    """
    if INTERPRETED or x.dtype == tl.float64:
        result = 1 / x
    else:
        asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        result = tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def log2_approximate(x):
    """log2 of a float32 by the GPU's instruction; tl.log2 is a library function of some thirty."""
    if INTERPRETED:
        result = tl.log2(x)
    else:
        asm: tl.constexpr = "lg2.approx.f32 $0, $1;"
        result = tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def split_normal(x):
    """x = 2^exponent * mantissa, mantissa in [1/sqrt 2, sqrt 2), for normal x > 0; finite nonsense for any other."""
    i = x.to(tl.int32, bitcast=True)
    e = (i - 0x3F3504F3) & -0x800000  # the exponent in its place
    return e.to(tl.float32) * 1.1920928955078125e-07, (i - e).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """As `split_normal`, for subnormal x too."""
    tiny = x < 1e-30
    exponent, mantissa = split_normal(tl.where(tiny, x * 16777216.0, x))
    return exponent - tl.where(tiny, 24.0, 0.0), mantissa


@triton.jit
def log2_mantissa(m):
    """log2 of m in [1/sqrt 2, sqrt 2); relative error 5e-9 (minimax) before rounding."""
    f = m - 1
    s = 1.878267010e-01 + f * -1.129748923e-01
    s = 2.042960157e-01 + f * (-1.906126422e-01 + f * s)
    s = 2.885852710e-01 + f * (-2.396365831e-01 + f * s)
    s = 4.808979006e-01 + f * (-3.606964244e-01 + f * s)
    return f * (1.442695042e00 + f * (-7.213473520e-01 + f * s))


@triton.jit
def log_parts(x, FAST: tl.constexpr):
    """log x for positive normal float32 x as a coarse part, from which 1 is subtracted exactly, and a fine one."""
    if FAST:
        high, low = log2_approximate(x) * LN2, tl.full(x.shape, -0.0, x.dtype)  # adding it costs nothing
    else:
        exponent, mantissa = split_normal(x)
        high, low = exponent * 0.693359375, log2_mantissa(mantissa) * LN2 - exponent * 2.12194440e-4
    return high, low


@triton.jit
def log_normal(x, FAST: tl.constexpr):
    """log x for positive normal x."""
    if x.dtype == tl.float64:
        result = tl.log(x)
    elif FAST:
        result = log2_approximate(x) * LN2
    else:
        exponent, mantissa = split_normal(x)
        result = (exponent + log2_mantissa(mantissa)) * LN2
    return result


@triton.jit
def log_limit(x):
    """What log x adds to finite nonsense where x is 0, infinite or NaN."""
    return tl.where(x == 0, -INF, tl.where(x > LARGEST, x, x * 0))


@triton.jit
def log_product(a, b, p, q, FAST: tl.constexpr):
    """log(a b p q) for a, b >= 0 and p, q >= 1: one logarithm for four.

    In float32 p q may overflow, where lgamma is so large that its logarithm does not count.
    """
    if a.dtype == tl.float64:
        result = ((tl.log2(a) + tl.log2(b)) + (tl.log2(p) + tl.log2(q))) * LN2
    elif FAST:
        result = ((log2_approximate(a) + log2_approximate(b)) + (log2_approximate(p) + log2_approximate(q))) * LN2
    else:
        ea, ma = split(a)
        eb, mb = split(b)
        e, m = split_normal((ma * mb) * (p * q))
        result = (ea + eb + e + log2_mantissa(m)) * LN2 + (log_limit(a) + log_limit(b))
    return result


@triton.jit
def factor(a, FAST: tl.constexpr):
    """What `power` needs of the second factor of its base, a >= 0: a exponent, a mantissa and `log_limit`.

    FAST and float64: all of log2 a in the exponent's place.
    """
    if a.dtype == tl.float64:
        exponent, mantissa, limit = tl.log2(a), a, a
    elif FAST:
        exponent, mantissa, limit = log2_approximate(a), a, a
    else:
        exponent, mantissa = split(a)
        exponent, mantissa, limit = exponent + 1, mantissa * 0.5, log_limit(a)  # below 1: no product overflows
    return exponent, mantissa, limit


@triton.jit
def power_of_parts(e, log2_m, b, limit):
    """2^(b (e + log2_m) + limit) in float32, for a `limit` of 0 or one that decides alone."""
    high = b * e + b * log2_m
    correction = 1 + LN2 * (tl.fma(b, e, -high) + b * log2_m)
    # so large an exponent that its rounding error is no small correction: the result is 0 or infinite anyway
    correction = tl.where(correction < 0.5, 0.5, correction)
    return tl.exp2(high + limit) * correction


@triton.jit
def power(r, a, b, FAST: tl.constexpr):
    """(r a)^b and log(r a) for r, a >= 0, a as its `factor`, and b > 0; also where r a is out of the type's range."""
    exponent, mantissa, limit = a
    b = tl.where(b > 1e30, 1e30, b)  # the same for every base, and no infinity times 0
    if r.dtype == tl.float64:
        log2_u = tl.log2(r) + exponent
        value = tl.exp2(b * log2_u)
    elif FAST:
        log2_u = log2_approximate(r) + exponent
        value = tl.exp2(b * log2_u)
    else:
        e, m = split(r * mantissa)
        e += exponent
        log2_m = log2_mantissa(m)
        limit += log_limit(r)
        value = power_of_parts(e, log2_m, b, limit)
        log2_u = (e + log2_m) + limit
    return value, log2_u * LN2


@triton.jit
def exponential(x, FAST: tl.constexpr):
    """e^x to a relative error that does not grow with x; tl.exp rounds x log2 e to float32 first."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    elif FAST:
        result = tl.exp2(x * LOG2_E)
    else:
        x = tl.where(x < -104.0, -104.0, tl.where(x > 90.0, 90.0, x))  # 0 and infinity
        n = (x * LOG2_E + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
        # x - n log 2 in two parts of log 2, the first with so few bits that its product is exact
        rest = (x - n * 0.693359375) + n * 2.12194440e-4
        result = (2 * tl.exp2(rest * LOG2_E)) * tl.exp2(n - 1)  # 2^n would overflow before the result does
    return result


# ---- lgamma and digamma of 1 + y ------------------------------------------------------------------------------------


@triton.jit
def gamma1p(y, FAST: tl.constexpr):
    """(stirling, p, digamma) with lgamma(1 + y) = stirling - log p and digamma = digamma(1 + y)."""
    if y.dtype == tl.float64:
        p = tl.full(y.shape, 1.0, y.dtype)
        reciprocals = tl.zeros(y.shape, y.dtype)
        for k in tl.static_range(1, 10):
            p *= tl.where(y > 1e30, 1e30, y) + k  # beyond it the product could overflow, and log p does not count
            reciprocals += 1 / (y + k)
        x = y + 10
        log_x = tl.log(x)
        r = 1 / x
        q = r * r
        s = 1 / 1188 + q * (-691 / 360360 + q * (1 / 156 + q * (-3617 / 122400)))
        s = r * (1 / 12 + q * (-1 / 360 + q * (1 / 1260 + q * (-1 / 1680 + q * s))))
        s += (x - 0.5) * log_x - x + HALF_LOG_2PI
        d = 1 / 132 + q * (-691 / 32760 + q * (1 / 12 + q * (-3617 / 8160)))
        d = q * (1 / 12 + q * (-1 / 120 + q * (1 / 252 + q * (-1 / 240 + q * d))))
        digamma = log_x - 0.5 * r - d - reciprocals
    else:
        x = y + 3
        p = (1 + y) * (2 + y)
        high, low = log_parts(x, FAST)
        r = reciprocal(x)
        q = r * r
        s = r * (1 / 12 + q * (-1 / 360 + q * (1 / 1260 + q * (-1 / 1680))))
        s += (x - 0.5) * ((high - 1) + low) + (HALF_LOG_2PI - 0.5)
        d = q * (1 / 12 + q * (-1 / 120 + q * (1 / 252 + q * (-1 / 240 + q * (1 / 132)))))
        digamma = high + (low - (0.5 * r + d + (reciprocal(1 + y) + reciprocal(2 + y))))
    return s, p, digamma


@triton.jit
def sign(d):
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
