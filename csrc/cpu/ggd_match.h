// ggd_match_nll of a row of coordinates, by blocks of lanes: its operators' kernels on the CPU.
#pragma once

#include "blocks.h"
#include "ggd_match_integral.h"

namespace fastprob {

template <typename T>
struct Match {
  T eps;
};

template <bool has_gradients, typename T, size_t I, size_t O>
double lanes(
    match::Pairs<T>& p, const std::array<const T*, I>& in, const std::array<T*, O>& out, int n, T eps, T scale) {
  match::prepare(p, {in[0], in[1], in[2], in[3], in[4], in[5]}, n, eps);
  match::integrate<has_gradients>(p, n);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < n; ++k) {
    const T difference = in[0][k] - in[3][k], largest = std::numeric_limits<T>::max() / 8;
    const bool valid = p.valid[k] != 0,
               inside = (p.least[k] < largest) & (std::fabs(difference) <= T(match::kFarthest));
    const T y1 = 1 / p.b1[k], y2 = 1 / p.b2[k];
    const Gamma<T> g1 = gamma1p(y1), g2 = gamma1p(y2);
    const T logs = log_positive(p.integral[k]) + log_positive(p.a1[k]) + log_positive(p.a2[k]);
    const T norm = (g1.stirling - log_positive(g1.p)) + (g2.stirling - log_positive(g2.p));
    const T finite = p.least[k] + ((norm + T(2 * kLn2)) - logs);
    const T value = select(valid, select(inside, finite, T(kInf<float>)), T(kNaN<float>));
    sum += value;
    if constexpr (has_gradients) {
      T g = scale;
      if constexpr (I > 6) g = in[6][k];
      g = select(valid & inside, g, T(kNaN<float>));
      const T inverse = 1 / p.integral[k], d = -sign(difference) * p.moved[k] * inverse;
      const T a1 = (p.b1[k] * p.t1[k] * inverse - 1) / p.a1[k], a2 = (p.b2[k] * p.t2[k] * inverse - 1) / p.a2[k];
      const T b1 = p.log1[k] * inverse - g1.digamma * y1 * y1, b2 = p.log2[k] * inverse - g2.digamma * y2 * y2;
      const T shape = in[2][k] + eps, other = in[5][k] + eps;
      const T low = T(match::kLeastShape), high = T(match::kLargestShape);
      const bool swapped = p.swapped[k] != 0;
      const T b = select((shape >= low) & (shape <= high), select(swapped, b2, b1), T(0));
      const T c = select((other >= low) & (other <= high), select(swapped, b1, b2), T(0));
      out[0][k] = g * d, out[1][k] = g * select(swapped, a2, a1), out[2][k] = g * b;
      out[3][k] = -(g * d), out[4][k] = g * select(swapped, a1, a2), out[5][k] = g * c;
    } else {
      out[0][k] = value;
    }
  }
  return sum;
}

template <bool has_gradients, typename T, size_t I, size_t O>
double block(
    const Match<T>& body, const std::array<const T*, I>& in, const std::array<T*, O>& out, int64_t n, T scale) {
  match::Pairs<T> pairs;
  double sum = 0;
  for (int64_t at = 0; at < n; at += match::kLanes) {
    auto from = in;
    auto to = out;
    for (auto& x : from) x += at;
    for (auto& x : to) x += at;
    sum += lanes<has_gradients>(pairs, from, to, int(std::min<int64_t>(match::kLanes, n - at)), body.eps, scale);
  }
  return sum;
}

}  // namespace fastprob
