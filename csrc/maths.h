// Scalar maths of all operators: one source for the CPU and CUDA kernels.
//
// float: branch-free, so that compilers vectorise the loops around it. A power u^b is split,
//     log2 u = e + log2 m, m in [1/sqrt 2, sqrt 2),   u^b = 2^(b e + b log2 m),
// and its integer part taken off before rounding, which keeps it as exact as libm's pow. lgamma and digamma of 1 + y
// come together from Stirling's series at X = y + 3, shifted down by the factors p = (1 + y)(2 + y). Subnormal
// arguments count as 0. On a GPU the special-function unit takes the reciprocals and the power's exponential; flushing
// subnormals spares it the scaling that they need.
// double: libm, and the series at X = y + 10.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda/ptx.cuh"

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

template <typename T>
FASTPROB_INLINE T sign(T d) {
  return select(d > 0, T(1), select(d < 0, T(-1), d));  // of NaN: NaN
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
  return ptx::mul_ftz(x, y);
#else
  return x * y;
#endif
}
FASTPROB_INLINE double flushed_product(double x, double y) { return x * y; }

// x / y; on a GPU within 2 ulp, the reciprocal flushed to 0 above 2^126 and infinite below 2^-126.
FASTPROB_INLINE float quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  return x * ptx::rcp_approx_ftz(y);
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

// On a GPU within 1 ulp.
FASTPROB_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return ptx::sqrt_approx_ftz(x);
#else
  return std::sqrt(x);
#endif
}
FASTPROB_INLINE double square_root(double x) { return std::sqrt(x); }

// ---- logarithm and power --------------------------------------------------------------------------------------------

// log2 of m in [1/sqrt 2, sqrt 2), relative error 3e-8. On a CPU even and odd powers apart: for one multiplication more
// half of the latency, on which the loops wait.
FASTPROB_INLINE float log2_polynomial(float m) {
  constexpr float c0 = 1.442695005e+00f, c1 = -7.213471993e-01f, c2 = 4.809102798e-01f, c3 = -3.607162641e-01f,
                  c4 = 2.879390950e-01f, c5 = -2.386756749e-01f, c6 = 2.152122427e-01f, c7 = -2.089338501e-01f,
                  c8 = 1.292643648e-01f;
  const float f = m - 1;
#if defined(__CUDA_ARCH__)
  return f * polynomial(f, c0, c1, c2, c3, c4, c5, c6, c7, c8);
#else
  const float f2 = f * f;
  return f * polynomial(f2, c0, c2, c4, c6, c8) + f2 * polynomial(f2, c1, c3, c5, c7);
#endif
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
  return ptx::lg2_approx_ftz(x);
#else
  return std::log2(x);
#endif
}
FASTPROB_INLINE float exp2_hardware(float x) {
#if defined(__CUDA_ARCH__)
  return ptx::ex2_approx_ftz(x);
#else
  return std::exp2(x);
#endif
}

// x = 2^exponent * mantissa.
template <typename T>
struct Split {
  T exponent, mantissa;
};

// The mantissa in [1/sqrt 2, sqrt 2), for positive normal x; finite nonsense for any other.
FASTPROB_INLINE Split<float> split_normal(float x) {
  const int32_t i = bit_cast<int32_t>(x);
  const int32_t e = (i - 0x3f3504f3) >> 23;
  return {static_cast<float>(e), bit_cast<float>(i - static_cast<int32_t>(static_cast<uint32_t>(e) << 23))};
}

// For x >= 0: the exponent of 0, infinity and NaN is what log2 x is.
FASTPROB_INLINE Split<float> split(float x) {
  const Split<float> s = split_normal(x);
#if defined(__CUDA_ARCH__)
  const float log2 = log2_hardware(x);
  return {select(fabsf(log2) < kInf<float>, s.exponent, log2), s.mantissa};
#else
  return {select(x < kTiny<float>, -kInf<float>, select(x < kInf<float>, s.exponent, x)), s.mantissa};
#endif
}
FASTPROB_INLINE Split<double> split(double x) { return {0, x}; }

// log x for positive normal x. The polynomial on a GPU too: lgamma and digamma multiply its error by up to y^2.
FASTPROB_INLINE float log_positive(float x) {
  const Split<float> s = split_normal(x);
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
  const Split<float> s = split_normal(x);
  return {s.exponent * ln2_high, std::fma(log2_polynomial(s.mantissa), static_cast<float>(kLn2), s.exponent * ln2_low)};
}

// log(x y) for x >= 0 and y >= 1: one logarithm for two, and no overflow of the product.
FASTPROB_INLINE float log_product(Split<float> x, float y) {
  const Split<float> s = split_normal(x.mantissa * y);
  return ((x.exponent + s.exponent) + log2_polynomial(s.mantissa)) * static_cast<float>(kLn2);
}
FASTPROB_INLINE double log_product(Split<double> x, double y) { return std::log(x.mantissa) + std::log(y); }

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

// For u = r a, 0 <= r < 2^127, though the product overflow or underflow. On a GPU t is good to the 2 ulp of its
// exponential, and so t log u, where it nearly cancels with the normaliser's derivative, to some twice of what a
// library's power leaves.
FASTPROB_INLINE Power<float> clamped_power(
    float r, Split<float> a, float b, float lo, float hi, float log2_lo, float log2_hi) {
  const Split<float> s = split(r * a.mantissa);
  const float exponent = s.exponent + a.exponent, log2_m = log2_polynomial(s.mantissa);
  const float log2_u = exponent + log2_m, v = b * log2_u;
  const bool below = v<log2_lo, above = v> log2_hi, moves = !(below | above);
#if defined(__CUDA_ARCH__)
  const Exponent e = nearest(v);
  const float exact = fmaf(b, log2_m, fmaf(b, exponent, -e.n));
  const float t = select(below, lo, select(above, hi, exp2_hardware(exact) * e.scale));
#else
  const float cut = select(below, log2_lo, select(above, log2_hi, v));
  const Exponent e = nearest(cut);
  // b e - n is exact to one rounding, however large its parts.
  const float exact = std::fma(b, log2_m, std::fma(b, exponent, -e.n));
  const float t = exp2_polynomial(select(moves, exact, cut - e.n)) * e.scale;
#endif
  return {t, log2_u * static_cast<float>(kLn2), select(moves, 1.f, 0.f)};
}

FASTPROB_INLINE Power<double> clamped_power(double r, Split<double> a, double b, double lo, double hi, double, double) {
  const double u = r * a.mantissa, t = std::pow(u, b);
  return {select(t < lo, lo, select(t > hi, hi, t)), std::log(u), select((t < lo) | (t > hi), 0., 1.)};
}

// The most that bounded_power gives: above it the rounding of log2 u shows.
constexpr float kBoundedPower = 1024;

// u^b for u = r a, its log2 u kept between least and most: t of clamped_power in two thirds of its instructions. r, a
// and b are finite, and least > a.exponent - 125, so that r = 0 gives what least does.
FASTPROB_INLINE float bounded_power(float r, Split<float> a, float b, float least, float most) {
  const float x = r * a.mantissa;
  const int32_t i = bit_cast<int32_t>(x), e = (i - 0x3f3504f3) & -0x800000;  // the exponent in its place
  const float exponent = std::fma(static_cast<float>(e), 1.1920928955078125e-07f, a.exponent);
  const float log2_u = exponent + log2_polynomial(bit_cast<float>(i - e));
  const float low = select(log2_u < most, log2_u, most), cut = select(low > least, low, least);
  constexpr float rounder = 12582912.f;  // as in `nearest`
  const float rounded = std::fma(b, cut, rounder), n = rounded - rounder;
  const float t = exp2_polynomial(std::fma(b, cut, -n));
  return bit_cast<float>(bit_cast<uint32_t>(t) + (bit_cast<uint32_t>(rounded) << 23));
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

// ---- factors of powers, in loops over many -------------------------------------------------------------------------

// log2 x for x > 0; what is less than the least normal number counts as that. 2^v, |v| cut off at 126 in float.
FASTPROB_INLINE float log2_positive(float x) {
  const Split<float> s = split_normal(select(x < kTiny<float>, kTiny<float>, x));
  return s.exponent + log2_polynomial(s.mantissa);
}
FASTPROB_INLINE double log2_positive(double x) { return std::log2(select(x < kTiny<double>, kTiny<double>, x)); }

FASTPROB_INLINE float exp2_bounded(float v) {
  const float cut = select(v < -126.f, -126.f, select(v > 126.f, 126.f, v));
  const Exponent e = nearest(cut);
  return exp2_polynomial(cut - e.n) * e.scale;
}
FASTPROB_INLINE double exp2_bounded(double v) { return std::exp2(v); }

}  // namespace fastprob
