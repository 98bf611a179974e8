// The generalised Gaussian per element: one source for the CPU and CUDA kernels. The maths stands in
// fastprob/ops/_ggd.py.
#pragma once

#include <string>
#include <type_traits>

#include "arguments.h"
#include "maths.h"

namespace fastprob {

// eps, and the bounds of the residual: at least the least normal number and at most 2^127.
template <typename T>
struct Bounds {
  T eps, lo, hi, log2_lo, log2_hi;

  Bounds(double eps_, double clamp_min, double clamp_max)
      : eps(T(eps_)),
        lo(T(std::max(clamp_min, double(kTiny<T>)))),
        hi(T(std::max(double(lo), std::min(clamp_max, double(std::numeric_limits<T>::max() / 2))))),
        log2_lo(std::log2(lo)),
        log2_hi(std::log2(hi)) {}
};

// The options that its operators share.
struct GgdOptions {
  bool paper;
  double eps, clamp_min, clamp_max;

  static GgdOptions read(Arguments& arguments) {
    const bool paper = arguments.next<std::string>() == "paper";
    const double eps = arguments.next<double>(), lo = arguments.next<double>(), hi = arguments.next<double>();
    return {paper, eps, lo, hi};
  }

  // Calls run(is_paper, bounds), the first a type.
  template <typename T, typename Run>
  void visit(const Run& run) const {
    const Bounds<T> bounds(eps, clamp_min, clamp_max);
    paper ? run(std::true_type(), bounds) : run(std::false_type(), bounds);
  }
};

// A distribution's part that no target enters. Normaliser: stirling - log p - log a.
template <typename T>
struct Shape {
  T a, b, inv_a;
  Split<T> split_a;
  T stirling, p, beta_gradient;  // beta_gradient: of lgamma(1 + 1/b) for b
};

template <typename T>
FASTPROB_INLINE Shape<T> shape_of(T inv_alpha, T beta, T eps) {
  const T sum_a = inv_alpha + eps, sum_b = beta + eps;
  const T a = select(sum_a >= 0, sum_a, T(kNaN<float>)), b = select(sum_b > 0, sum_b, T(kNaN<float>));
  const T y = inverse(b);
  const Gamma<T> gamma = gamma1p(y);
  return {a, b, inverse(a), split(a), gamma.stirling, gamma.p, -gamma.digamma * y * y};
}

// The clamped residual t of a difference d = mu - z, and its derivatives for d, a and b. As lo > 0, a tie is clamped.
template <typename T>
struct Residual {
  T t, d, a, b;
};

template <bool paper, typename T>
FASTPROB_INLINE Residual<T> residual(T d, const Shape<T>& shape, Bounds<T> bounds) {
  using std::fabs;
  const T r = fabs(d), a = shape.a, b = shape.b, inv_a = shape.inv_a, lo = bounds.lo, hi = bounds.hi;
  if constexpr (paper) {
    const Power<T> power = clamped_power(r, shape.split_a, b, lo, hi, bounds.log2_lo, bounds.log2_hi);
    const T slope = b * power.t;
    return {
        power.t, select(power.moves != 0, quotient(slope, d), T(0)), select(power.moves != 0, slope * inv_a, T(0)),
        select(power.moves != 0, power.t * power.log, T(0))};
  } else {
    const T u = flushed_product(r, a), t = u * b;
    const bool below = t<lo, above = t> hi, moves = !(below | above);
    return {
        select(below, lo, select(above, hi, t)), select(moves, a * b * sign(d), T(0)), select(moves, r * b, T(0)),
        select(moves, u, T(0))};
  }
}

}  // namespace fastprob
