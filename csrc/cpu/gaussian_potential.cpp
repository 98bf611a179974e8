// gaussian_potential: value, or value and gradient, tile by tile. See fastprob/ops/gaussian_potential.py.
//
// Points are cut into tiles. A pair of tiles (I, J) takes one product for its potentials, which stay in cache, and two
// more that read them: each potential is computed once and serves the rows of I and of J. Pairs run in rounds, as of a
// tournament in which everyone plays once a round: no tile is written by two threads at a time, and each gets its sums
// in the same order on any number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "../arguments.h"
#include "../ggd.h"
#include "blocks.h"
#include "tiles.h"

namespace fastprob {
namespace {

constexpr int64_t kTile = 64;    // points: its potentials take 16 KB of L1
constexpr int64_t kDepth = 128;  // coordinates at a time: as much of J's panels as stays in L1 for all rows of I
static_assert(kTile % kColumns<float> == 0 && kTile % kRows == 0);

// Points [C, D] as the products read them, in tiles of kTile points padded with zeros, D padded to whole panels.
template <typename T>
struct Points {
  static constexpr int64_t kPanel = kColumns<T>;
  int64_t count, dim, tiles, width;
  Tensor scratch;
  T *by_point, *by_dim;  // of a tile: panels [kTile, kPanel] over D (for gradients); [D, kPanel] over its points
  T* gradients;          // of a tile: [kTile, width] of sum k_mn x_n
  T *squares, *lengths;  // of a point: squared norm; the norm that it was divided by, or 1
  T* sums;               // of a point: sum k_mn

  template <typename S>
  Points(const Tensor& like, const S* x, bool normalize, bool with_gradients)
      : count(like.size(0)),
        dim(like.size(1)),
        tiles((count + kTile - 1) / kTile),
        width((dim + kPanel - 1) / kPanel * kPanel),
        scratch(
            torch::stable::new_empty(
                like,
                {3 * tiles * kTile * width + 3 * tiles * kTile + tiles * width},
                sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float)) {
    const int64_t points = tiles * kTile;
    by_point = static_cast<T*>(scratch.data_ptr());
    by_dim = by_point + points * width;
    gradients = by_dim + points * width;
    squares = gradients + points * width;
    lengths = squares + points;
    sums = lengths + points;
    T* means = sums + points;  // of a tile: the sum of its points
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) {
        T* mean = std::fill_n(means + tile * width, width, T(0)) - width;
        for (int64_t i = tile * kTile; i < std::min((tile + 1) * kTile, count); ++i) {
          lengths[i] = normalize ? std::max(std::sqrt(square(x + i * dim, dim)), T(1e-12)) : T(1);
          for (int64_t d = 0; d < dim; ++d) mean[d] += static_cast<T>(x[i * dim + d]) / lengths[i];
        }
      }
    });
    std::vector<T> mean(width);
    for (int64_t i = 0; i < tiles; ++i)
      for (int64_t d = 0; d < width; ++d) mean[d] += means[i * width + d] / T(count);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      std::vector<T> rows(kPanel * width);  // the points of a panel over points
      if (with_gradients) std::fill(gradients + first * kTile * width, gradients + last * kTile * width, T(0));
      std::fill(sums + first * kTile, sums + last * kTile, T(0));
      for (int64_t at = first * kTile; at < last * kTile; at += kPanel) {
        for (int64_t c = 0; c < kPanel; ++c) {
          const int64_t i = at + c;
          T* row = &rows[c * width];
          if (i < count) {
            for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(x[i * dim + d]) / lengths[i] - mean[d];
            squares[i] = square(row, dim);
          } else {
            std::fill_n(row, width, T(0));
            squares[i] = kInf<T>;  // potentials with padding vanish
          }
          for (int64_t p = 0; with_gradients && p < width; p += kPanel) std::copy_n(row + p, kPanel, panel_row(i, p));
        }
        for (int64_t d = 0; d < dim; ++d)
          for (int64_t c = 0; c < kPanel; ++c) by_dim[at * dim + d * kPanel + c] = rows[c * width + d];
      }
    });
  }

  // kPanel coordinates of point i from p on, their mean taken off.
  T* panel_row(int64_t i, int64_t p) const {
    return by_point + i / kTile * kTile * width + p * kTile + i % kTile * kPanel;
  }

  template <typename S>
  static T square(const S* x, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) sum += static_cast<T>(x[d]) * static_cast<T>(x[d]);
    return sum;
  }
};

// The potentials of tiles I and J, and what they add to both.
template <bool with_gradients, typename T>
void pair(Points<T>& p, int64_t I, int64_t J, T t) {
  alignas(64) T k[kTile][kTile] = {};
  const int64_t panel = p.dim * kColumns<T>, tile = kTile * p.width;
  const T *x_i = p.by_dim + I * kTile * p.dim, *x_j = p.by_dim + J * kTile * p.dim;
  for (int64_t d = 0; d < p.dim; d += kDepth)
    for (int64_t i = 0; i < kTile; i += kColumns<T>) {  // of I's panels, each row of which lies together
      const T* rows = x_i + i * p.dim + d * kColumns<T>;
      const int64_t depth = std::min(kDepth, p.dim - d);
      add_product(Left<T>{rows, 1, kColumns<T>}, x_j + d * kColumns<T>, panel, depth, k[i], kTile, kColumns<T>, kTile);
    }
  const T *square_i = p.squares + I * kTile, *square_j = p.squares + J * kTile;
  T *sums_i = p.sums + I * kTile, *sums_j = p.sums + J * kTile;
  alignas(64) T to_j[kTile] = {};
  for (int64_t m = 0; m < kTile; ++m) {
#pragma omp simd
    for (int64_t n = 0; n < kTile; ++n) {
      const T distance = square_i[m] + square_j[n] - 2 * k[m][n];
      k[m][n] = exponential(-t * select(distance < 0, T(0), distance));
    }
    if (I == J) k[m][m] = 0;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < kTile; ++n) {
      sum += k[m][n];
      to_j[n] += k[m][n];
    }
    sums_i[m] += sum;
  }
  if (I != J)
    for (int64_t n = 0; n < kTile; ++n) sums_j[n] += to_j[n];
  if constexpr (with_gradients) {
    const int64_t points_panel = kTile * kColumns<T>;
    T *g_i = p.gradients + I * tile, *g_j = p.gradients + J * tile;
    const T *y_i = p.by_point + I * tile, *y_j = p.by_point + J * tile;
    add_product(Left<T>{k[0], kTile, 1}, y_j, points_panel, kTile, g_i, p.width, kTile, p.width);
    if (I != J) add_product(Left<T>{k[0], 1, kTile}, y_i, points_panel, kTile, g_j, p.width, kTile, p.width);
  }
}

// Every tile with itself in round 0, then every pair: in round r + 1 the tiles r + m and r - m (mod n - 1) meet, and r
// meets the last. Threads take the meetings in this order and wait only until both tiles have played their rounds
// before: who waits, waits for a meeting that another thread has begun.
template <bool with_gradients, typename T>
void all_pairs(Points<T>& p, T t) {
  const int64_t even = p.tiles + p.tiles % 2, others = even - 1, half = even / 2;
  std::vector<std::atomic<int64_t>> played(even);  // rounds of each tile, the odd one out among them
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, half, 1, [&](int64_t, int64_t) {
    for (int64_t at; (at = next.fetch_add(1)) < half * even;) {
      const int64_t round = at / half, m = at % half;
      const int64_t a = round == 0 ? 2 * m : m ? (round - 1 + m) % others : others;
      const int64_t b = round == 0 ? 2 * m + 1 : (round - 1 + others - m) % others;
      for (const int64_t tile : {a, b})
        while (played[tile].load(std::memory_order_acquire) < round) std::this_thread::yield();
      if (round == 0)
        for (int64_t tile = a; tile <= std::min(b, p.tiles - 1); ++tile) pair<with_gradients>(p, tile, tile, t);
      else if (a < p.tiles && b < p.tiles)
        pair<with_gradients>(p, std::min(a, b), std::max(a, b), t);
      for (const int64_t tile : {a, b}) played[tile].store(round + 1, std::memory_order_release);
    }
  });
}

template <Kind kind>
void gaussian_potential(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const double grad = kind == Kind::backward ? item(arguments.next<Tensor>()) : 1;
  const auto in = arguments.contiguous<1>();
  const double t = arguments.next<double>();
  const std::string reduction = arguments.next<std::string>();
  const bool normalize = arguments.next<bool>();
  const int64_t needs = kind == Kind::value ? 0 : arguments.next<int64_t>();

  const Tensor& x = in[0];
  const int64_t count = x.size(0), dim = x.size(1);
  const double pairs = static_cast<double>(count) * static_cast<double>(count - 1);
  const auto out = gradients_like(in, needs);
  double value = 0;
  for_type(x, [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    const S* from = static_cast<const S*>(x.data_ptr());
    Points<T> points(x, from, normalize, needs);
    needs ? all_pairs<true>(points, T(t)) : all_pairs<false>(points, T(t));
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += points.sums[i];
    const bool is_sum = reduction == "sum", is_log = reduction == "logmean" && pairs > 0;
    const double mean = total / std::max(pairs, 1.);
    value = is_sum ? total : is_log ? std::log(mean) : mean;
    if (!needs) return;
    const T scale = T(-4 * t * grad / (is_sum ? 1 : is_log ? total : std::max(pairs, 1.)));
    S* g = static_cast<S*>(out[0].data_ptr());
    torch::stable::parallel_for(0, points.tiles, 1, [&](int64_t first, int64_t last) {
      std::vector<T> row(points.width), w(points.width);
      for (int64_t i = first * kTile; i < std::min(last * kTile, count); ++i) {
        const T *gradient = points.gradients + i * points.width, sum = points.sums[i], length = points.lengths[i];
        for (int64_t p = 0; p < points.width; p += points.kPanel) {
          const T* point = points.panel_row(i, p);
          for (int64_t c = 0; c < points.kPanel; ++c) row[p + c] = scale * (point[c] * sum - gradient[p + c]);
        }
        if (normalize) {
          T along = 0;
          for (int64_t d = 0; d < dim; ++d) w[d] = static_cast<T>(from[i * dim + d]) / length;
#pragma omp simd reduction(+ : along)
          for (int64_t d = 0; d < dim; ++d) along += row[d] * w[d];
          for (int64_t d = 0; d < dim; ++d) row[d] = (row[d] - w[d] * along) / length;
        }
        for (int64_t d = 0; d < dim; ++d) g[i * dim + d] = static_cast<S>(row[d]);
      }
    });
  });

  if (kind != Kind::backward) *stack++ = torch::stable::detail::from(scalar_like(x, value));
  if (kind != Kind::value) *stack++ = torch::stable::detail::from(out[0]);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  using fastprob::Kind;
  m.impl("gaussian_potential", fastprob::gaussian_potential<Kind::value>);
  m.impl("_gaussian_potential_backward", fastprob::gaussian_potential<Kind::backward>);
  m.impl("_gaussian_potential_value_and_grad", fastprob::gaussian_potential<Kind::value_and_grad>);
}
