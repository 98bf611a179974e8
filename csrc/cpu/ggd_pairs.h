// ggd_nll of a coordinate of a distribution and a target, for pairwise.h: the maths stands in fastprob/ops/_ggd.py.
#pragma once

#include "../ggd.h"
#include "pairwise.h"

namespace fastprob {

template <bool paper, typename T>
struct GgdPair {
  using Type = T;
  static constexpr size_t kInputs[2] = {3, 1}, kTables[2] = {8, 1};
  static constexpr T kFar = T(1e37);  // no product with a mantissa overflows below it
  Bounds<T> bounds;

  // A distribution's tables; a target is its own. least, most: the bounds of log2 u, as bounded_power takes them.
  enum { mu, a, b, inv_a, exponent, mantissa, least, most };

  // Writes a coordinate's tables and returns its normaliser. A function, so that the loop around it is vectorised.
  static FASTPROB_INLINE T tables_of(T mean, T inv_alpha, T beta, T* out, Bounds<T> bounds) {
    const Shape<T> shape = shape_of(inv_alpha, beta, bounds.eps);
    out[mu * kDepth] = mean;
    out[a * kDepth] = shape.a;
    out[b * kDepth] = shape.b;
    out[inv_a * kDepth] = shape.inv_a;
    out[exponent * kDepth] = shape.split_a.exponent;
    out[mantissa * kDepth] = shape.split_a.mantissa;
    out[least * kDepth] = bounds.log2_lo / shape.b;
    out[most * kDepth] = bounds.log2_hi / shape.b;
    return shape.stirling - log_product(shape.split_a, shape.p);
  }

  template <int side>
  bool tables(const std::array<const T*, kInputs[side]>& in, T* out, int64_t n, double& constant) const {
    using std::fabs;
    int far = !(std::is_same_v<T, float> && paper && bounds.hi <= kBoundedPower);
    if constexpr (side == 1) {
      std::copy_n(in[0], n, out);
    } else {
      const Bounds<T> to = bounds;
      const T *mus = in[0], *inv_alphas = in[1], *betas = in[2];
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < n; ++d) sum += tables_of(mus[d], inv_alphas[d], betas[d], out + d, to);
      constant += sum;
#pragma omp simd reduction(| : far)
      for (int64_t d = 0; d < n; ++d)
        far |= !(out[b * kDepth + d] < kFar) | !(out[least * kDepth + d] > out[exponent * kDepth + d] - 125);
    }
#pragma omp simd reduction(| : far)
    for (int64_t d = 0; d < n; ++d) far |= !(fabs(out[d]) < kFar);
    return !far;
  }

  FASTPROB_INLINE Residual<T> residual_of(const T* row, const T* target) const {
    const Split<T> split_a = {row[exponent * kDepth], row[mantissa * kDepth]};
    const Shape<T> shape = {row[a * kDepth], row[b * kDepth], row[inv_a * kDepth], split_a, 0, 0, 0};
    return residual<paper>(row[mu * kDepth] - *target, shape, bounds);
  }

  template <bool is_plain>
  FASTPROB_INLINE T value(const T* row, const T* target) const {
    using std::fabs;
    if constexpr (is_plain && std::is_same_v<T, float>) {
      const Split<T> split_a = {row[exponent * kDepth], row[mantissa * kDepth]};
      return bounded_power(
          fabs(row[mu * kDepth] - *target), split_a, row[b * kDepth], row[least * kDepth], row[most * kDepth]);
    } else {
      return residual_of(row, target).t;
    }
  }

  template <int side>
  FASTPROB_INLINE Slopes<T, kInputs[side]> slopes(const T* row, const T* target) const {
    const Residual<T> t = residual_of(row, target);
    if constexpr (side == 0)
      return {{t.d, t.a, t.b}};
    else
      return {{-t.d}};
  }

  template <int side>
  void finish(const std::array<const T*, kInputs[side]>& in, double total, double* sums, int64_t n) const {
    if constexpr (side == 0) {
      for (int64_t d = 0; d < n; ++d) {
        const Shape<T> shape = shape_of(in[1][d], in[2][d], bounds.eps);
        sums[kDepth + d] -= total * shape.inv_a;
        sums[2 * kDepth + d] += total * shape.beta_gradient;
      }
    }
  }
};

struct GgdPairs {
  static constexpr size_t kInputs[2] = {3, 1};
  GgdOptions options;

  static GgdPairs read(Arguments& arguments) { return {GgdOptions::read(arguments)}; }

  template <typename T, typename Run>
  void visit(const Run& run) const {
    options.visit<T>([&](auto paper, const Bounds<T>& bounds) { run(GgdPair<decltype(paper)::value, T>{bounds}); });
  }
};

}  // namespace fastprob
