// Fast: a float whose special functions are the hardware's own. log2 r and log2 a are wrong by up to 2^-22 of
// themselves (or of 1, near 1), so (r a)^beta by beta 2^-22 (|log2 r| + |log2 a|): below what half types resolve for
// beta up to some hundreds. So near a bound, either side of it may count as clamped. That takes four tenths fewer
// instructions than float's: what moves half as many bytes has to compute twice as fast to be done with them. Overloads
// what maths.h is made of.
#pragma once

#include "../ggd.h"

namespace fastprob {

struct Fast {
  float value;

  Fast() = default;
  FASTPROB_INLINE Fast(float v) : value(v) {}
};

FASTPROB_INLINE Fast operator+(Fast x, Fast y) { return x.value + y.value; }
FASTPROB_INLINE Fast operator-(Fast x, Fast y) { return x.value - y.value; }
FASTPROB_INLINE Fast operator*(Fast x, Fast y) { return x.value * y.value; }
FASTPROB_INLINE Fast operator/(Fast x, Fast y) { return x.value / y.value; }
FASTPROB_INLINE Fast operator-(Fast x) { return -x.value; }
FASTPROB_INLINE Fast& operator+=(Fast& x, Fast y) { return x = x + y; }
FASTPROB_INLINE bool operator<(Fast x, Fast y) { return x.value < y.value; }
FASTPROB_INLINE bool operator>(Fast x, Fast y) { return x.value > y.value; }
FASTPROB_INLINE bool operator>=(Fast x, Fast y) { return x.value >= y.value; }
FASTPROB_INLINE bool operator==(Fast x, Fast y) { return x.value == y.value; }
FASTPROB_INLINE bool operator!=(Fast x, Fast y) { return x.value != y.value; }
FASTPROB_INLINE Fast fabs(Fast x) { return std::fabs(x.value); }
FASTPROB_INLINE Fast fma(Fast x, Fast y, Fast z) { return std::fma(x.value, y.value, z.value); }

// What a number is rounded from to be stored.
FASTPROB_INLINE float plain(Fast x) { return x.value; }
FASTPROB_INLINE float plain(float x) { return x; }
FASTPROB_INLINE double plain(double x) { return x; }

FASTPROB_INLINE Fast quotient(Fast x, Fast y) { return quotient(x.value, y.value); }
FASTPROB_INLINE Fast inverse(Fast x) { return quotient(1.f, x.value); }
FASTPROB_INLINE Fast flushed_product(Fast x, Fast y) { return flushed_product(x.value, y.value); }
FASTPROB_INLINE Fast log_positive(Fast x) { return log2_hardware(x.value) * static_cast<float>(kLn2); }
FASTPROB_INLINE Split<Fast> split(Fast x) { return {log2_hardware(x.value), 1}; }
FASTPROB_INLINE Fast log_product(Split<Fast> x, Fast y) {
  return (x.exponent.value + log2_hardware(x.mantissa.value * y.value)) * static_cast<float>(kLn2);
}
FASTPROB_INLINE Fast exponential(Fast x) { return exp2_hardware(x.value * 1.44269504f); }
FASTPROB_INLINE Gamma<Fast> gamma1p(Fast y) { return short_series(y); }

template <>
struct Bounds<Fast> {
  Fast eps, lo, hi, log2_lo, log2_hi;

  Bounds(double eps_, double clamp_min, double clamp_max) : Bounds(Bounds<float>(eps_, clamp_min, clamp_max)) {}
  explicit Bounds(const Bounds<float>& b) : eps(b.eps), lo(b.lo), hi(b.hi), log2_lo(b.log2_lo), log2_hi(b.log2_hi) {}
};

FASTPROB_INLINE Power<Fast> clamped_power(Fast r, Split<Fast> a, Fast b, Fast lo, Fast hi, Fast log2_lo, Fast log2_hi) {
  const Fast log2_u = log2_hardware(r.value * a.mantissa.value) + a.exponent.value, v = b * log2_u;
  const bool below = v<log2_lo, above = v> log2_hi;
  const Fast t = select(below, lo, select(above, hi, Fast(exp2_hardware(v.value))));
  return {t, log2_u * static_cast<float>(kLn2), select(below | above, Fast(0), Fast(1))};
}

}  // namespace fastprob
