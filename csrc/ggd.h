// The generalised Gaussian per element: one source for the CPU and CUDA kernels. The maths stands in
// fastprob/ops/_ggd.py; what is said here is how it is computed.
//
// float: branch-free, so that compilers vectorise the loops around it. A power u^b is split,
//     log2 u = e + log2 m, m in [1/sqrt 2, sqrt 2),   u^b = 2^(b e + b log2 m),
// and its integer part taken off before rounding, which keeps it as exact as libm's pow. lgamma and digamma of 1 + y
// come together from Stirling's series at X = y + 3, shifted down by the factors p = (1 + y)(2 + y).
// double: libm, and the series at X = y + 10.
#pragma once

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
constexpr double kLn2 = 0.693147180559945309417;
constexpr double kHalfLog2Pi = 0.918938533204672741780;

// c[0] + c[1] x + ... by Horner's rule, unrolled by the compiler.
template <typename T, int N>
FASTPROB_INLINE T polynomial(T x, const T (&c)[N]) {
  T sum = c[N - 1];
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// ---- float: logarithm and power -------------------------------------------------------------------------------------

// log2 of m in [1/sqrt 2, sqrt 2); the polynomial's relative error is 5e-9 (minimax), lg2.approx's absolute error 2^-22.
FASTPROB_INLINE float log2_mantissa(float m) {
#if defined(__CUDA_ARCH__)
  return __log2f(m);
#else
  constexpr float c[] = {1.442695042e+00f,  -7.213473520e-01f, 4.808979006e-01f,  -3.606964244e-01f, 2.885852710e-01f,
                         -2.396365831e-01f, 2.042960157e-01f,  -1.906126422e-01f, 1.878267010e-01f,  -1.129748923e-01f};
  const float f = m - 1;
  return f * polynomial(f, c);
#endif
}

// 2^f for |f| <= 1/2; relative error 2e-9 before rounding.
FASTPROB_INLINE float exp2_fraction(float f) {
#if defined(__CUDA_ARCH__)
  return exp2f(f);
#else
  constexpr float c[] = {1.f,
                         6.931472062e-01f,
                         2.402265135e-01f,
                         5.550327909e-02f,
                         9.618003978e-03f,
                         1.340023526e-03f,
                         1.547627946e-04f};
  return polynomial(f, c);
#endif
}

struct Split {
  float exponent, mantissa;
};

// x = 2^exponent * mantissa for positive finite x, subnormals too; finite nonsense for any other.
FASTPROB_INLINE Split split(float x) {
  const bool tiny = x < std::numeric_limits<float>::min();
  const int32_t i = bit_cast<int32_t>(select(tiny, x * 16777216.f, x));
  const int32_t e = (i - 0x3f3504f3) >> 23;
  const float mantissa = bit_cast<float>(i - static_cast<int32_t>(static_cast<uint32_t>(e) << 23));
  return {static_cast<float>(e) - select(tiny, 24.f, 0.f), mantissa};
}

// What log x adds to nonsense where x is not positive and finite.
template <typename T>
FASTPROB_INLINE T log_limit(T x) {
  return select(x > 0 && x < kInf<T>, T(0), select(x == 0, -kInf<T>, select(x > 0, kInf<T>, kNaN<T>)));
}

// log x for positive finite x.
FASTPROB_INLINE float log_positive(float x) {
  const Split s = split(x);
  return (s.exponent + log2_mantissa(s.mantissa)) * static_cast<float>(kLn2);
}
FASTPROB_INLINE double log_positive(double x) { return std::log(x); }

// log(a b p q) for positive finite p, q and any a, b: one logarithm for four.
FASTPROB_INLINE float log_product(float a, float b, float p, float q) {
  const Split sa = split(a), sb = split(b), sp = split(p), sq = split(q);
  const Split s = split((sa.mantissa * sb.mantissa) * (sp.mantissa * sq.mantissa));
  const float exponent = (sa.exponent + sb.exponent) + (sp.exponent + sq.exponent) + s.exponent;
  return (exponent + log2_mantissa(s.mantissa)) * static_cast<float>(kLn2) + (log_limit(a) + log_limit(b));
}
FASTPROB_INLINE double log_product(double a, double b, double p, double q) {
  return std::log(a) + std::log(b) + std::log(p) + std::log(q);
}

template <typename T>
struct Power {
  T value, log;
};

// u^b and log u for u >= 0, b > 0. The log is finite nonsense where u is 0 or infinite: u^b log u is not used there.
FASTPROB_INLINE Power<float> power(float u, float b) {
  const Split s = split(u);
  const float log2_m = log2_mantissa(s.mantissa);
  constexpr float rounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  float v = b * s.exponent + b * log2_m;
  v = select(v < -126.f, -126.f, select(v > 127.4f, 127.4f, v));
  const float rounded = v + rounder;
  const float n = rounded - rounder;
  // b e - n is exact to one rounding, however large its parts; where v was cut, the cut stands in for it.
  float fraction = std::fma(b, log2_m, std::fma(b, s.exponent, -n));
  fraction = select(fraction < -0.5f, -0.5f, select(fraction > 0.5f, 0.5f, fraction));
  const uint32_t bits = (bit_cast<uint32_t>(rounded) + 127u) << 23;
  const float value = exp2_fraction(fraction) * bit_cast<float>(bits);
  return {select(u > 0 && u < kInf<float>, value, u), (s.exponent + log2_m) * static_cast<float>(kLn2)};
}
FASTPROB_INLINE Power<double> power(double u, double b) { return {std::pow(u, b), std::log(u)}; }

// ---- lgamma and digamma of 1 + y ------------------------------------------------------------------------------------

// lgamma(1 + y) = stirling - log p; digamma(1 + y).
template <typename T>
struct Gamma {
  T stirling, p, digamma;
};

FASTPROB_INLINE Gamma<float> gamma1p(float y) {
  constexpr float lgamma_series[] = {1.f / 12, -1.f / 360, 1.f / 1260, -1.f / 1680};
  constexpr float digamma_series[] = {1.f / 12, -1.f / 120, 1.f / 252, -1.f / 240, 1.f / 132};
  const float x = y + 3, p = (1 + y) * (2 + y);
  const float log_x = log_positive(x), r = 1 / x, r2 = r * r;
  const float stirling = (std::fma(x - 0.5f, log_x, static_cast<float>(kHalfLog2Pi) - x)) + r * polynomial(r2, lgamma_series);
  const float digamma = log_x - 0.5f * r - r2 * polynomial(r2, digamma_series) - (2 * y + 3) / p;
  return {stirling, p, digamma};
}

FASTPROB_INLINE Gamma<double> gamma1p(double y) {
  constexpr double lgamma_series[] = {1. / 12,      -1. / 360,           1. / 1260,  -1. / 1680,
                                      1. / 1188,    -691. / 360360,      1. / 156,   -3617. / 122400};
  constexpr double digamma_series[] = {1. / 12,  -1. / 120,       1. / 252, -1. / 240,
                                       1. / 132, -691. / 32760.,  1. / 12,  -3617. / 8160};
  double p = 1, reciprocals = 0;
  for (int k = 1; k <= 9; ++k) {
    p *= y + k;
    reciprocals += 1 / (y + k);
  }
  const double x = y + 10, log_x = std::log(x), r = 1 / x, r2 = r * r;
  const double stirling = (x - 0.5) * log_x - x + kHalfLog2Pi + r * polynomial(r2, lgamma_series);
  return {stirling, p, log_x - 0.5 * r - r2 * polynomial(r2, digamma_series) - reciprocals};
}

// ---- the generalised Gaussian ---------------------------------------------------------------------------------------

template <typename T>
struct Bounds {
  T eps, clamp_min, clamp_max;
};

// A distribution's part that no target enters. Normaliser: gamma.stirling - log gamma.p - log a.
template <typename T>
struct Shape {
  T a, b, inv_a, beta_gradient;  // beta_gradient: of lgamma(1 + 1/b) for b
  Gamma<T> gamma;

  FASTPROB_INLINE Shape(T inv_alpha, T beta, T eps) {
    const T sum_a = inv_alpha + eps, sum_b = beta + eps;
    a = select(sum_a >= 0, sum_a, kNaN<T>);
    b = select(sum_b > 0, sum_b, kNaN<T>);
    const T y = 1 / b;
    inv_a = 1 / a;
    gamma = gamma1p(y);
    beta_gradient = -gamma.digamma * y * y;
  }
};

// The clamped residual t of a difference d = mu - z, and its derivatives for d, a and b.
template <typename T>
struct Residual {
  T t, d, a, b;
};

template <bool paper, typename T>
FASTPROB_INLINE Residual<T> residual(T d, const Shape<T>& shape, const Bounds<T>& bounds) {
  const T r = std::fabs(d), u = r * shape.a;
  Residual<T> out;
  if constexpr (paper) {
    const Power<T> power_u = power(u, shape.b);
    const T t = power_u.value, bt = shape.b * t;
    const bool moves = !(t < bounds.clamp_min || t > bounds.clamp_max) && u != 0;
    out.d = select(moves, bt / d, T(0));
    out.a = select(moves, bt * shape.inv_a, T(0));
    out.b = select(moves, t * power_u.log, T(0));
    out.t = t;
  } else {
    const T t = u * shape.b;
    const bool moves = !(t < bounds.clamp_min || t > bounds.clamp_max);
    const T ab = shape.a * shape.b;
    out.d = select(moves, select(d < 0, -ab, select(d > 0, ab, d * ab)), T(0));
    out.a = select(moves, r * shape.b, T(0));
    out.b = select(moves, u, T(0));
    out.t = t;
  }
  out.t = select(out.t < bounds.clamp_min, bounds.clamp_min, select(out.t > bounds.clamp_max, bounds.clamp_max, out.t));
  return out;
}

// alpha^2 Gamma(3/beta) / Gamma(1/beta) and its derivatives for inv_alpha and beta.
template <typename T>
struct Variance {
  T value, inv_alpha, beta;
};

template <typename T>
FASTPROB_INLINE Variance<T> variance(T inv_alpha, T beta) {
  const T a = select(inv_alpha >= 0, inv_alpha, kNaN<T>), y = 1 / select(beta > 0, beta, kNaN<T>);
  const Gamma<T> g1 = gamma1p(y), g3 = gamma1p(3 * y);
  // lgamma(1 + 3y) - lgamma(1 + y) - log 3 - 2 log a, with one logarithm of p1 / (3 p3 a^2)
  const T logs = log_positive(g1.p / (3 * g3.p)) - 2 * log_product(a, T(1), T(1), T(1));
  const T value = std::exp((g3.stirling - g1.stirling) + logs);
  return {value, -2 * value / a, value * y * y * (g1.digamma - 3 * g3.digamma)};
}

template <typename T>
FASTPROB_INLINE T sign(T d) {
  return select(d > 0, T(1), select(d < 0, T(-1), d));
}

}  // namespace fastprob
