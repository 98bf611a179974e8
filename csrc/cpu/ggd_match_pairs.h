// ggd_match_nll of all pairs of N and M distributions, summed over D: pairwise.h's operators. A pair's coordinates lie
// side by side in both rows, so that they are a block of lanes as they are; nothing of a row alone would save time.
#pragma once

#include "ggd_match.h"
#include "pairwise.h"

namespace fastprob {

// The sum over D of a row's and a column's values; `use` gets every block's derivatives times `grad`, [6][kDepth].
template <bool has_gradients, typename T, typename S, typename Use>
T match_pair(
    const Match<T>& pair, const Side<S, 3>& rows, const Side<S, 3>& columns, int64_t i, int64_t j, T grad, Use use) {
  alignas(64) T scratch[6][kDepth];
  std::array<T*, 6> out;
  for (size_t k = 0; k < 6; ++k) out[k] = scratch[k];
  double sum = 0;
  for (int64_t at = 0; at < rows.blocks(); ++at)
    rows.template with<T>(i, at, [&](const auto& own, int64_t n) {
      columns.template with<T>(j, at, [&](const auto& other, int64_t) {
        const std::array<const T*, 6> in = {own[0], own[1], own[2], other[0], other[1], other[2]};
        sum += block<has_gradients>(pair, in, out, n, grad);
        use(at, n, scratch);
      });
    });
  return T(sum);
}

template <typename T, typename S, typename Take>
void for_pairs(const Match<T>& pair, const Side<S, 3>& rows, const Side<S, 3>& columns, const Take& take) {
  torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t column = 0; column < columns.count; column += kOthers) {
        T values[kOthers];
        const int64_t n = std::min(kOthers, columns.count - column);
        for (int64_t j = 0; j < n; ++j)
          values[j] = match_pair<false>(pair, rows, columns, i, column + j, T(1), [](auto&&...) {});
        take(i, column, values, n);
      }
  });
}

// The gradients of a side. Slopes of tens cancel in their sums, of which float's rounding of a slope would be much: for
// float they are computed in double.
template <int side, typename Computed, typename S>
void sweep(
    const Match<Computed>& op,
    const Side<S, 3>& from,
    const Side<S, 3>& with,
    const S* grad,
    int64_t stride,
    int64_t other_stride,
    const std::array<S*, 3>& out) {
  using T = std::conditional_t<std::is_same_v<S, float>, double, Computed>;
  const Match<T> pair{op.eps};
  torch::stable::parallel_for(0, from.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(3 * from.dim);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sums.begin(), sums.end(), 0.);
      for (int64_t j = 0; j < with.count; ++j) {
        const T g = static_cast<T>(grad[i * stride + j * other_stride]);
        const auto add = [&](int64_t at, int64_t n, const T(&slopes)[6][kDepth]) {
          for (size_t k = 0; k < 3; ++k)
            for (int64_t d = 0; d < n; ++d) sums[k * from.dim + at * kDepth + d] += slopes[3 * side + k][d];
        };
        side == 0 ? match_pair<true>(pair, from, with, i, j, g, add) : match_pair<true>(pair, with, from, j, i, g, add);
      }
      for (size_t k = 0; k < 3; ++k)
        for (int64_t d = 0; out[k] && d < from.dim; ++d)
          out[k][i * from.dim + d] = static_cast<S>(Computed(sums[k * from.dim + d]));
    }
  });
}

struct GgdMatchPairs {
  static constexpr size_t kInputs[2] = {3, 3};
  double eps;

  static GgdMatchPairs read(Arguments& arguments) { return {arguments.next<double>()}; }

  template <typename T, typename Run>
  void visit(const Run& run) const {
    run(Match<T>{T(eps)});
  }
};

}  // namespace fastprob
