// gaussian_potential: value, or value and gradient, tile by tile. See fastprob/ops/gaussian_potential.py.
//
// Points are cut into tiles. A pair of tiles (I, J) takes one product for its potentials, which stay in cache, and two
// more that read them: each potential is computed once and serves the rows of I and of J. Pairs run in rounds, as of a
// tournament in which everyone plays once a round: no tile is written by two threads at a time, and each gets its sums
// in the same order on any number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
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

// x's largest power of two; of 0 and of infinity the least and the largest that have a reciprocal.
template <typename T>
T power_of_two(T x) {
  return std::clamp(std::exp2(std::floor(std::log2(x))), kTiny<T>, std::numeric_limits<T>::max() / 2);
}

// Points [C, D] as the products read them, in tiles of kTile points padded with zeros, D padded to whole panels. They
// are divided by lengths, so that no square overflows: by their norms, or all by a power of two.
template <typename T>
struct Points {
  static constexpr int64_t kPanel = kColumns<T>;
  static constexpr T kShortest = T(1e-12);  // the least norm that a point is divided by, as F.normalize's
  int64_t count, dim, tiles, width;
  Tensor scratch;
  T *by_point, *by_dim;   // of a tile: panels [kTile, kPanel] over D (for gradients); [D, kPanel] over its points
  T* gradients;           // of a tile: [kTile, width] of sum k_mn x_n
  T *squares, *inverses;  // of a point: squared norm, as its own Gram product has it; 1 / length
  T* sums;                // of a point: sum k_mn
  double unit = 1;        // the power of two

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
    inverses = squares + points;
    sums = inverses + points;
    T* means = sums + points;  // of a tile: the sum of its points
    measure(x, normalize);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) {
        T* mean = std::fill_n(means + tile * width, width, T(0)) - width;
        for (int64_t i = tile * kTile; i < std::min((tile + 1) * kTile, count); ++i)
          for (int64_t d = 0; d < dim; ++d) mean[d] += static_cast<T>(x[i * dim + d]) * inverses[i];
      }
    });
    std::vector<T> mean(width);
    for (int64_t i = 0; i < tiles; ++i)
      for (int64_t d = 0; d < width; ++d) mean[d] += means[i * width + d] / T(count);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      std::vector<T> rows(kPanel * width);  // the points of a panel over points
      for (int64_t at = first * kTile; at < last * kTile; at += kPanel) {
        for (int64_t c = 0; c < kPanel; ++c) {
          const int64_t i = at + c;
          T* row = &rows[c * width];
          if (i < count)
            for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(x[i * dim + d]) * inverses[i] - mean[d];
          else
            std::fill_n(row, width, T(0));
          for (int64_t p = 0; with_gradients && p < width; p += kPanel) std::copy_n(row + p, kPanel, panel_row(i, p));
        }
        for (int64_t d = 0; d < dim; ++d)
          for (int64_t c = 0; c < kPanel; ++c) by_dim[at * dim + d * kPanel + c] = rows[c * width + d];
      }
    });
  }

  // The points' lengths.
  template <typename S>
  void measure(const S* x, bool normalize) {
    torch::stable::parallel_for(0, count, kTile, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T size = largest(x + i * dim, dim);
        const T inverse = 1 / std::max(power_of_two(size), T(1));
        inverses[i] = normalize ? inverse / std::max(norm(x + i * dim, dim, inverse), kShortest) : size;
      }
    });
    if (normalize) return;
    unit = power_of_two(*std::max_element(inverses, inverses + count));
    std::fill_n(inverses, count, T(1 / unit));
  }

  // kPanel coordinates of point i from p on, their mean taken off.
  T* panel_row(int64_t i, int64_t p) const {
    return by_point + i / kTile * kTile * width + p * kTile + i % kTile * kPanel;
  }

  template <typename S>
  static T largest(const S* x, int64_t n) {
    T size = 0;
#pragma omp simd reduction(max : size)
    for (int64_t d = 0; d < n; ++d) size = std::max(size, std::fabs(static_cast<T>(x[d])));
    return size;
  }

  template <typename S>
  static T norm(const S* x, int64_t n, T factor) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) {
      const T value = static_cast<T>(x[d]) * factor;
      sum += value * value;
    }
    return std::sqrt(sum);
  }
};

// Every tile with itself in round 0, then every pair: in round r + 1 the tiles r + m and r - m (mod n - 1) meet, and r
// meets the last. Threads take the meetings in this order and wait only until both tiles have played their rounds
// before: who waits, waits for a meeting that another thread has begun.
template <typename Meet>
void all_pairs(int64_t tiles, const Meet& meet) {
  const int64_t even = tiles + tiles % 2, others = even - 1, half = even / 2;
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
        for (int64_t tile = a; tile <= std::min(b, tiles - 1); ++tile) meet(tile, tile);
      else if (a < tiles && b < tiles)
        meet(std::min(a, b), std::max(a, b));
      for (const int64_t tile : {a, b}) played[tile].store(round + 1, std::memory_order_release);
    }
  });
}

// The squared distances of tiles I and J, infinite with padding and on the diagonal. A tile meets itself first: squares
// are then its Gram products' diagonal, so that equal points are at a distance of exactly 0.
template <typename T>
void distances(Points<T>& p, int64_t I, int64_t J, T (&k)[kTile][kTile]) {
  const int64_t panel = p.dim * kColumns<T>;
  const T *x_i = p.by_dim + I * kTile * p.dim, *x_j = p.by_dim + J * kTile * p.dim;
  std::fill_n(k[0], kTile * kTile, T(0));
  for (int64_t d = 0; d < p.dim; d += kDepth)
    for (int64_t i = 0; i < kTile; i += kColumns<T>) {  // of I's panels, each row of which lies together
      const T* rows = x_i + i * p.dim + d * kColumns<T>;
      const int64_t depth = std::min(kDepth, p.dim - d);
      add_product(Left<T>{rows, 1, kColumns<T>}, x_j + d * kColumns<T>, panel, depth, k[i], kTile, kColumns<T>, kTile);
    }
  T *square_i = p.squares + I * kTile, *square_j = p.squares + J * kTile;
  for (int64_t m = 0; I == J && m < kTile; ++m) square_i[m] = I * kTile + m < p.count ? k[m][m] : kInf<T>;
  for (int64_t m = 0; m < kTile; ++m) {
    const T square = square_i[m];
#pragma omp simd
    for (int64_t n = 0; n < kTile; ++n) {
      const T distance = square + square_j[n] - 2 * k[m][n];
      k[m][n] = select(distance < 0, T(0), distance);
    }
    if (I == J) k[m][m] = kInf<T>;
  }
}

// The potentials exp(-width (distance - nearest)) of tiles I and J, and what they add to both.
template <bool with_gradients, typename T>
void add_potentials(Points<T>& p, int64_t I, int64_t J, T width, T nearest) {
  alignas(64) T k[kTile][kTile], to_j[kTile] = {};
  const int64_t tile = kTile * p.width;
  T *sums_i = p.sums + I * kTile, *sums_j = p.sums + J * kTile, *g_i = p.gradients + I * tile;
  if (I == J) {
    std::fill_n(sums_i, kTile, T(0));
    if (with_gradients) std::fill_n(g_i, tile, T(0));
  }
  distances(p, I, J, k);
  for (int64_t m = 0; m < kTile; ++m) {
    T sum = 0;
#pragma omp simd
    for (int64_t n = 0; n < kTile; ++n) k[m][n] = exponential(-width * (k[m][n] - nearest));
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
    T* g_j = p.gradients + J * tile;
    const T *y_i = p.by_point + I * tile, *y_j = p.by_point + J * tile;
    add_product(Left<T>{k[0], kTile, 1}, y_j, points_panel, kTile, g_i, p.width, kTile, p.width);
    if (I != J) add_product(Left<T>{k[0], 1, kTile}, y_i, points_panel, kTile, g_j, p.width, kTile, p.width);
  }
}

// Fills in the points' sums and, if wanted, gradients; returns the sum of all potentials.
template <typename T>
double potentials(Points<T>& p, bool with_gradients, T width, T nearest) {
  all_pairs(p.tiles, [&](int64_t I, int64_t J) {
    with_gradients ? add_potentials<true>(p, I, J, width, nearest) : add_potentials<false>(p, I, J, width, nearest);
  });
  return std::accumulate(p.sums, p.sums + p.count, 0.);
}

// The squared distance of the nearest pair.
template <typename T>
T nearest_pair(Points<T>& p) {
  all_pairs(p.tiles, [&](int64_t I, int64_t J) {
    alignas(64) T k[kTile][kTile];
    T* least = p.sums + I * kTile;  // of a point of the first tile
    if (I == J) std::fill_n(least, kTile, kInf<T>);
    distances(p, I, J, k);
    for (int64_t m = 0; m < kTile; ++m) least[m] = std::min(least[m], *std::min_element(k[m], k[m] + kTile));
  });
  return *std::min_element(p.sums, p.sums + p.count);
}

// Writes the gradients, of which `sums` and `gradients` are the two parts: (x_m sums_m - gradients_m) scale, and that
// of the division by the norm.
template <typename T, typename S>
void write_gradients(const Points<T>& p, const S* x, S* out, bool normalize, T scale) {
  torch::stable::parallel_for(0, p.tiles, 1, [&](int64_t first, int64_t last) {
    std::vector<T> row(p.width), w(p.width);
    for (int64_t i = first * kTile; i < std::min(last * kTile, p.count); ++i) {
      const T *gradient = p.gradients + i * p.width, sum = p.sums[i], inverse = p.inverses[i];
      for (int64_t at = 0; at < p.width; at += p.kPanel) {
        const T* point = p.panel_row(i, at);
        for (int64_t c = 0; c < p.kPanel; ++c) row[at + c] = point[c] * sum - gradient[at + c];
      }
      if (normalize) {
        T along = 0;
        for (int64_t d = 0; d < p.dim; ++d) w[d] = static_cast<T>(x[i * p.dim + d]) * inverse;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < p.dim; ++d) along += row[d] * w[d];
        if (inverse >= 1 / p.kShortest) along = 0;  // divided by a constant
        for (int64_t d = 0; d < p.dim; ++d) row[d] = (row[d] - w[d] * along) * inverse;
      }
      for (int64_t d = 0; d < p.dim; ++d) out[i * p.dim + d] = static_cast<S>(row[d] * scale);
    }
  });
}

// A factor in the range of its type: 0 times it is 0.
template <typename T>
T factor(double x) {
  constexpr double most = std::numeric_limits<T>::max();
  return static_cast<T>(std::clamp(x, -most, most));
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
  const double count = static_cast<double>(x.size(0)), pairs = count * (count - 1);
  const bool is_sum = reduction == "sum", is_log = reduction == "logmean";
  const auto out = gradients_like(in, needs);
  double value = 0;
  if (pairs == 0)
    torch::stable::fill_(out[0], 0);
  else
    for_type(x, [&](auto compute, auto storage) {
      using T = decltype(compute);
      using S = decltype(storage);
      const S* from = static_cast<const S*>(x.data_ptr());
      Points<T> points(x, from, normalize, needs);
      const T width = std::max(factor<T>(t * points.unit * points.unit), kTiny<T>);  // times infinity it is infinity
      double total = potentials(points, needs, width, T(0)), shift = 0;
      if (is_log && total < std::sqrt(kTiny<T>) * pairs) {  // too faint for its type
        const T nearest = nearest_pair(points);
        total = potentials(points, needs, width, nearest);
        shift = t * points.unit * (points.unit * nearest);
      }
      value = is_sum ? total : is_log ? std::log(total / pairs) - shift : total / pairs;
      if (!needs) return;
      const double divisor = is_sum ? 1 : is_log ? total : pairs;
      const T scale = factor<T>(-4 * t * points.unit * grad / divisor);
      write_gradients(points, from, static_cast<S*>(out[0].data_ptr()), normalize, scale);
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
