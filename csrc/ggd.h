// The generalised Gaussian per element: one source for the CPU and CUDA kernels. The maths stands in
// fastprob/ops/_ggd.py; what is said here is how it is computed.
//
// float: branch-free, so that compilers vectorise the loops around it. A power u^b is split,
//     log2 u = e + log2 m, m in [1/sqrt 2, sqrt 2),   u^b = 2^(b e + b log2 m),
// and its integer part taken off before rounding, which keeps it as exact as libm's pow. lgamma and digamma of 1 + y
// come together from Stirling's series at X = y + 3, shifted down by the factors p = (1 + y)(2 + y). Subnormal
// residuals and scales count as 0. On a GPU the special-function unit takes the reciprocals and the power's
// exponential; flushing subnormals spares it the scaling that they need.
// double: libm, and the series at X = y + 10.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define FASTPROB_INLINE __host__ __device__ __forceinline__
#else
#define FASTPROB_INLINE inline __attribute__((always_inline))
#endif

namespace fastprob {

template <typename T>
FASTPROB_INLINE T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

template <typename To, typename From>
FASTPROB_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <typename T>
constexpr T kTiny = std::numeric_limits<T>::min();  // the least normal number
constexpr double kLn2 = 0.693147180559945309417;
constexpr double kHalfLog2Pi = 0.918938533204672741780;

// c0 + c1 x + c2 x^2 + ... by Horner's rule. A loop in its place would keep the loops around it from vectorising.
template <typename T>
FASTPROB_INLINE T polynomial(T, T c0) {
  return c0;
}
template <typename T, typename... Rest>
FASTPROB_INLINE T polynomial(T x, T c0, Rest... rest) {
  return c0 + x * polynomial(x, T(rest)...);
}

// x y; on a GPU 0 where x or y is subnormal, so that what divides by one of them is not used.
FASTPROB_INLINE float flushed_product(float x, float y) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
#else
  return x * y;
#endif
}
FASTPROB_INLINE double flushed_product(double x, double y) { return x * y; }

// x / y; on a GPU within 2 ulp, the reciprocal flushed to 0 above 2^126 and infinite below 2^-126.
FASTPROB_INLINE float quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(y));
  return x * reciprocal;
#else
  return x / y;
#endif
}
FASTPROB_INLINE double quotient(double x, double y) { return x / y; }

// 1 / x for what the rest hangs on; on a GPU within 1 ulp of it, by a Newton step.
FASTPROB_INLINE float inverse(float x) {
#if defined(__CUDA_ARCH__)
  const float y = quotient(1.f, x), rest = fmaf(-x, y, 1.f);
  return select(fabsf(rest) < 1, fmaf(y, rest, y), y);
#else
  return 1 / x;
#endif
}
FASTPROB_INLINE double inverse(double x) { return 1 / x; }

// ---- float: logarithm and power -------------------------------------------------------------------------------------

// log2 of m in [1/sqrt 2, sqrt 2), relative error 3e-8.
FASTPROB_INLINE float log2_polynomial(float m) {
  const float f = m - 1;
  return f * polynomial(
                 f, 1.442695005e+00f, -7.213471993e-01f, 4.809102798e-01f, -3.607162641e-01f, 2.879390950e-01f,
                 -2.386756749e-01f, 2.152122427e-01f, -2.089338501e-01f, 1.292643648e-01f);
}

// 2^f for |f| <= 1/2, relative error 2e-9 before rounding.
FASTPROB_INLINE float exp2_polynomial(float f) {
  return polynomial(
      f, 1.f, 6.931472062e-01f, 2.402265135e-01f, 5.550327909e-02f, 9.618003978e-03f, 1.340023526e-03f,
      1.547627946e-04f);
}

// log2 x and 2^x by a GPU's special-function unit: errors of 2^-22, for log2 absolute in [1/2, 2] and else relative.
FASTPROB_INLINE float log2_hardware(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::log2(x);
#endif
}
FASTPROB_INLINE float exp2_hardware(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

struct Split {
  float exponent, mantissa;
};

// x = 2^exponent * mantissa, the mantissa in [1/sqrt 2, sqrt 2), for positive normal x; finite nonsense for any other.
FASTPROB_INLINE Split split(float x) {
  const int32_t i = bit_cast<int32_t>(x);
  const int32_t e = (i - 0x3f3504f3) >> 23;
  return {static_cast<float>(e), bit_cast<float>(i - static_cast<int32_t>(static_cast<uint32_t>(e) << 23))};
}

// log x for positive normal x. The polynomial on a GPU too: lgamma and digamma multiply its error by up to y^2.
FASTPROB_INLINE float log_positive(float x) {
  const Split s = split(x);
  return (s.exponent + log2_polynomial(s.mantissa)) * static_cast<float>(kLn2);
}
FASTPROB_INLINE double log_positive(double x) { return std::log(x); }

// log x as the sum of a coarse part, from which 1 is subtracted exactly, and a fine one: Stirling's series multiplies
// its error by x.
template <typename T>
struct LogParts {
  T high, low;
};

template <typename T>
FASTPROB_INLINE LogParts<T> log_parts(T x) {
  return {log_positive(x), T(0)};
}
FASTPROB_INLINE LogParts<float> log_parts(float x) {
  constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860677e-6f;  // exponent * ln2_high is exact
  const Split s = split(x);
  return {s.exponent * ln2_high, std::fma(log2_polynomial(s.mantissa), static_cast<float>(kLn2), s.exponent * ln2_low)};
}

// What log x adds to finite nonsense where x is 0, infinite or NaN.
FASTPROB_INLINE float log_limit(float x) {
  return select(x < kTiny<float>, -kInf<float>, select(x < kInf<float>, 0.f, x));
}

// log(x y) for x, y >= 0: one logarithm for two, and no overflow of the product.
FASTPROB_INLINE float log_product(float x, float y) {
  const Split sx = split(x), sy = split(y), s = split(sx.mantissa * sy.mantissa);
  const float log2 = (sx.exponent + sy.exponent + s.exponent) + log2_polynomial(s.mantissa);
  return log2 * static_cast<float>(kLn2) + (log_limit(x) + log_limit(y));
}
FASTPROB_INLINE double log_product(double x, double y) { return std::log(x) + std::log(y); }

// eps, and the bounds of the residual: at least the least normal number and at most 2^127.
template <typename T>
struct Bounds {
  T eps, lo, hi, log2_lo, log2_hi;

  Bounds(double eps_, double clamp_min, double clamp_max)
      : eps(T(eps_)),
        lo(T(std::max(clamp_min, double(kTiny<T>)))),
        hi(T(std::min(clamp_max, double(std::numeric_limits<T>::max() / 2)))),
        log2_lo(std::log2(lo)),
        log2_hi(std::log2(hi)) {}
};

// t = clamp(u^b, lo, hi); log u; and 1 where t is u^b, 0 where it was clamped and log is of no use. No bool: it would
// keep the struct in memory and the loops around it from vectorising.
template <typename T>
struct Power {
  T t, log, moves;
};

// The integer n nearest to v, |v| < 2^22, and 2^n for -127 < n < 128.
struct Exponent {
  float n, scale;
};

FASTPROB_INLINE Exponent nearest(float v) {
  constexpr float rounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  const float rounded = v + rounder;
  return {rounded - rounder, bit_cast<float>((bit_cast<uint32_t>(rounded) << 23) + 0x3f800000u)};
}

FASTPROB_INLINE Power<float> clamped_power(float u, float b, float lo, float hi, float log2_lo, float log2_hi) {
  const Split s = split(u);
#if defined(__CUDA_ARCH__)
  // The hardware's logarithm of all of u knows 0, infinity and NaN, and where t is clamped; t comes from the parts.
  const float log2_m = log2_polynomial(s.mantissa), v = b * log2_hardware(u);
  const bool below = v<log2_lo, above = v> log2_hi;
  const Exponent e = nearest(v);
  const float exact = fmaf(b, log2_m, fmaf(b, s.exponent, -e.n));
  const float t = select(below, lo, select(above, hi, exp2_hardware(exact) * e.scale));
  return {t, (s.exponent + log2_m) * static_cast<float>(kLn2), select(below | above, 0.f, 1.f)};
#else
  const float exponent = select(u < kTiny<float>, -kInf<float>, select(u < kInf<float>, s.exponent, u));
  const float log2_m = log2_polynomial(s.mantissa), log2_u = exponent + log2_m, v = b * log2_u;
  const bool below = v<log2_lo, above = v> log2_hi, moves = !(below | above);
  const float cut = select(below, log2_lo, select(above, log2_hi, v));
  const Exponent e = nearest(cut);
  // b e - n is exact to one rounding, however large its parts.
  const float exact = std::fma(b, log2_m, std::fma(b, exponent, -e.n));
  const float t = exp2_polynomial(select(moves, exact, cut - e.n)) * e.scale;
  return {t, log2_u * static_cast<float>(kLn2), select(moves, 1.f, 0.f)};
#endif
}

FASTPROB_INLINE Power<double> clamped_power(double u, double b, double lo, double hi, double, double) {
  const double t = std::pow(u, b);
  return {select(t < lo, lo, select(t > hi, hi, t)), std::log(u), select((t < lo) | (t > hi), 0., 1.)};
}

// e^x; above 1e38 infinite, below 1e-38 zero.
FASTPROB_INLINE float exponential(float x) {
  constexpr float log2_e = 1.44269504f, log2_e_rest = 1.92596303e-8f;
  const bool below = x < -87.3f, above = x > 88.3f;
  const float cut = select(below, -87.3f, select(above, 88.3f, x));
  const Exponent e = nearest(cut * log2_e);
  const float value = exp2_polynomial(cut * log2_e_rest + std::fma(cut, log2_e, -e.n)) * e.scale;
  return select(below, 0.f, select(above, kInf<float>, value));
}
FASTPROB_INLINE double exponential(double x) { return std::exp(x); }

// ---- lgamma and digamma of 1 + y ------------------------------------------------------------------------------------

// lgamma(1 + y) = stirling - log p; digamma(1 + y).
template <typename T>
struct Gamma {
  T stirling, p, digamma;
};

template <typename T>
FASTPROB_INLINE Gamma<T> short_series(T y) {
  using std::fma;
  const T x = y + 3, p = (1 + y) * (2 + y);
  const LogParts<T> log_x = log_parts(x);
  const T reciprocal = quotient(T(1), x * p), r = reciprocal * p, r2 = r * r;
  const T stirling = fma(x - 0.5f, (log_x.high - 1) + log_x.low, T(kHalfLog2Pi - 0.5)) +
                     r * polynomial(r2, T(1.f / 12), -1.f / 360, 1.f / 1260, -1.f / 1680);
  const T rest = 0.5f * r + r2 * polynomial(r2, T(1.f / 12), -1.f / 120, 1.f / 252, -1.f / 240, 1.f / 132) +
                 (2 * y + 3) * (reciprocal * x);
  return {stirling, p, log_x.high + (log_x.low - rest)};
}

FASTPROB_INLINE Gamma<float> gamma1p(float y) { return short_series(y); }

FASTPROB_INLINE Gamma<double> gamma1p(double y) {
  double p = 1, reciprocals = 0;
  for (int k = 1; k <= 9; ++k) {
    p *= y + k;
    reciprocals += 1 / (y + k);
  }
  const double x = y + 10, log_x = std::log(x), r = 1 / x, r2 = r * r;
  const double stirling =
      (x - 0.5) * log_x - x + kHalfLog2Pi +
      r * polynomial(
              r2, 1. / 12, -1. / 360, 1. / 1260, -1. / 1680, 1. / 1188, -691. / 360360, 1. / 156, -3617. / 122400);
  return {
      stirling, p,
      log_x - 0.5 * r -
          r2 * polynomial(
                   r2, 1. / 12, -1. / 120, 1. / 252, -1. / 240, 1. / 132, -691. / 32760., 1. / 12, -3617. / 8160) -
          reciprocals};
}

// ---- the generalised Gaussian ---------------------------------------------------------------------------------------

// A distribution's part that no target enters. Normaliser: stirling - log p - log a.
template <typename T>
struct Shape {
  T a, b, inv_a, stirling, p, beta_gradient;  // beta_gradient: of lgamma(1 + 1/b) for b
};

template <typename T>
FASTPROB_INLINE Shape<T> shape_of(T inv_alpha, T beta, T eps) {
  const T sum_a = inv_alpha + eps, sum_b = beta + eps;
  const T a = select(sum_a >= 0, sum_a, T(kNaN<float>)), b = select(sum_b > 0, sum_b, T(kNaN<float>));
  const T y = inverse(b);
  const Gamma<T> gamma = gamma1p(y);
  return {a, b, quotient(T(1), a), gamma.stirling, gamma.p, -gamma.digamma * y * y};
}

template <typename T>
FASTPROB_INLINE T sign(T d) {
  return select(d > 0, T(1), select(d < 0, T(-1), d));  // of NaN: NaN
}

// The clamped residual t of a difference d = mu - z, and its derivatives for d, a and b. As lo > 0, a tie is clamped.
template <typename T>
struct Residual {
  T t, d, a, b;
};

template <bool paper, typename T>
FASTPROB_INLINE Residual<T> residual(T d, T a, T b, T inv_a, Bounds<T> bounds) {
  using std::fabs;
  const T r = fabs(d), u = flushed_product(r, a), lo = bounds.lo, hi = bounds.hi;
  if constexpr (paper) {
    const Power<T> power = clamped_power(u, b, lo, hi, bounds.log2_lo, bounds.log2_hi);
    const T slope = b * power.t;
    return {
        power.t, select(power.moves != 0, quotient(slope, d), T(0)), select(power.moves != 0, slope * inv_a, T(0)),
        select(power.moves != 0, power.t * power.log, T(0))};
  } else {
    const T t = u * b;
    const bool below = t<lo, above = t> hi, moves = !(below | above);
    return {
        select(below, lo, select(above, hi, t)), select(moves, a * b * sign(d), T(0)), select(moves, r * b, T(0)),
        select(moves, u, T(0))};
  }
}

// alpha^2 Gamma(3/beta) / Gamma(1/beta) and its derivatives for inv_alpha and beta.
template <typename T>
struct Variance {
  T value, inv_alpha, beta;
};

template <typename T>
FASTPROB_INLINE Variance<T> variance(T inv_alpha, T beta) {
  const T a = select(inv_alpha >= 0, inv_alpha, T(kNaN<float>)), y = inverse(select(beta > 0, beta, T(kNaN<float>)));
  const Gamma<T> g1 = gamma1p(y), g3 = gamma1p(3 * y);
  // lgamma(1 + 3y) - lgamma(1 + y) - log 3 - 2 log a, with one logarithm of p1 / (3 p3 a^2)
  const T logs = log_positive(quotient(g1.p, 3 * g3.p)) - 2 * log_product(a, T(1));
  const T value = exponential((g3.stirling - g1.stirling) + logs);
  return {value, -2 * quotient(value, a), value * y * y * (g1.digamma - 3 * g3.digamma)};
}

}  // namespace fastprob
