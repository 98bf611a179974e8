// A block of rows of mc_dropout: the units that its passes have, their mean and what differs from it.
//
// A block's product of all of `hidden` is computed once; a pass takes off what it drops, or sums what it keeps,
// whichever is fewer. Passes are gone through twice, so that nothing cancels: for the mean of their units, then, some
// at a time, for the units less that mean; the units of the first passes are kept for the second time. The differences
// lie in L2, and their products with a panel of `last` in L1.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../random.h"
#include "blocks.h"
#include "tiles.h"

namespace fastprob {

constexpr int64_t kRowsAtOnce = 16;   // rows of a block
constexpr int64_t kPassesAtOnce = 8;  // their units, 128 rows of 512, take 256 KB
constexpr int64_t kKept = 1 << 18;    // units of a block that are kept: of 32 passes of 512 each
constexpr int64_t kTile = 4;          // passes of a row in one product
constexpr int64_t kDepth = 256;       // units at a time: a panel of `last` takes 16 or 32 KB

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename Body>
void in_parallel(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) body(i);
  });
}

// c += a b for kColumns columns, as in tiles.h, a row-major: by pieces of depth that stay in L1.
template <typename T>
void add_product(const T* a, int64_t lda, const T* b, int64_t depth, T* c, int64_t ldc, int64_t rows) {
  for (int64_t k = 0; k < depth; k += kDepth, b += kDepth * kColumns<T>)
    for (int64_t i = 0; i < rows; i += kRows)
      add_product(Left<T>{a + i * lda + k, lda, 1}, b, std::min(kDepth, depth - k), c + i * ldc, ldc);
}

// A matrix [rows, columns] as the products read its transpose: [columns, kColumns] for every panel of rows.
template <typename T, typename S>
std::vector<T> panels(const S* x, int64_t rows, int64_t columns) {
  std::vector<T> out(padded(rows, kColumns<T>) * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      out[i / kColumns<T> * kColumns<T> * columns + j * kColumns<T> + i % kColumns<T>] =
          static_cast<T>(x[i * columns + j]);
  return out;
}

template <typename S>
S* data(const Tensor& x) {
  return static_cast<S*>(x.data_ptr());
}

template <typename S>
bool all_finite(const S* x, int64_t n) {
  return std::all_of(x, x + n, [](S value) { return std::isfinite(static_cast<double>(value)); });
}
template <typename S>
bool all_finite(const Tensor& x) {
  return all_finite(data<S>(x), x.numel());
}

// What a pass sums: the hidden units that it drops or, where they are fewer and all numbers finite, keeps. An infinite
// weight of a dropped unit makes NaN, as 0 times it does.
struct Pass {
  bool drops;
  std::vector<int64_t> units;
};

inline std::vector<Pass> passes_of(int64_t passes, int64_t units, double p, int64_t seed, bool finite) {
  const auto threshold = static_cast<uint64_t>(p * 4294967296.);
  std::vector<Pass> out(passes);
  Words words{};
  for (int64_t pass = 0; pass < passes; ++pass) {
    std::vector<int64_t> kept, dropped;
    for (int64_t k = 0; k < units; ++k) {
      const uint64_t element = static_cast<uint64_t>(pass * units + k);
      if (element % 4 == 0) words = random_words(element / 4, static_cast<uint64_t>(seed), 0, 0);
      (words[element % 4] < threshold ? dropped : kept).push_back(k);
    }
    const bool drops = !finite || dropped.size() <= kept.size();
    out[pass] = {drops, drops ? dropped : kept};
  }
  return out;
}

template <typename T>
struct Network {
  int64_t rows, hidden, units, dim;
  int64_t width, out_width;   // of units and outputs, padded to whole panels
  std::vector<T> fold, last;  // by panels
  bool dense;                 // where a number is not finite, every unit counts
  std::vector<Pass> passes;
  T scale;  // 1 / (1 - p)

  int64_t widest() const { return std::max({width, out_width, int64_t(1)}); }
};

// Of the operator's tensors in storage type S.
template <typename T, typename S>
Network<T> network_of(const std::array<Tensor, 4>& in, int64_t passes, double p, int64_t seed, bool finite) {
  const int64_t rows = in[0].size(0), hidden = in[0].size(1), units = in[1].size(1), dim = in[3].size(0);
  return {
      rows,
      hidden,
      units,
      dim,
      padded(units, kColumns<T>),
      padded(dim, kColumns<T>),
      panels<T>(data<S>(in[2]), units, hidden),
      panels<T>(data<S>(in[3]), dim, units),
      !finite,
      passes_of(passes, hidden, p, seed, finite),
      T(1 / (1 - p))};
}

// A block of rows, the mean of its units, and the sums of its squares.
template <typename T>
class Rows {
 public:
  template <typename S>
  Rows(const Network<T>& network, const S* h, const S* c, int64_t first)
      : net_(network),
        first_(first),
        count_(std::min(kRowsAtOnce, net_.rows - first)),
        padded_(padded(count_, kRows)),
        hidden_(padded_ * net_.hidden),
        constant_(padded_ * net_.width),
        all_(padded_ * net_.width),
        mean_(padded_ * net_.width),
        squares_(padded_ * net_.out_width),
        live_(padded_ * net_.width),
        before_(padded_ * (panels() + 1)),
        part_(padded_ * kColumns<T>),
        kept_(std::clamp<int64_t>(kKept / (kRowsAtOnce * net_.widest()), 1, net_.passes.size())),
        units_(new T[kept_ * padded_ * net_.width]) {
    for (int64_t i = 0; i < count_; ++i) {
      T* row = &hidden_[i * net_.hidden];
      std::copy_n(h + (first + i) * net_.hidden, net_.hidden, row);
      if (!all_finite(row, net_.hidden)) std::fill_n(row, net_.hidden, kNaN<T>);
      std::copy_n(c + (first + i) * net_.units, net_.units, &constant_[i * net_.width]);
    }
    for (int64_t j = 0; j < net_.width; j += kColumns<T>)
      add_product(hidden_.data(), net_.hidden, &net_.fold[j * net_.hidden], net_.hidden, &all_[j], net_.width, padded_);
    units<true>(0, net_.passes.size(), [&](int64_t, int64_t i, int64_t j, const T* unit) {
      T* sum = &mean_[i * net_.width + j];
#pragma omp simd
      for (int64_t c = 0; c < kColumns<T>; ++c) sum[c] += unit[c];
    });
    for (T& unit : mean_) unit /= T(net_.passes.size());
    for (int64_t i = 0; i < padded_; ++i) {
      int64_t *live = &live_[i * net_.width], *before = &before_[i * (panels() + 1)], n = 0;
      for (int64_t c = 0; c < net_.width; ++c) {
        if (c % kColumns<T> == 0) *before++ = n;
        live[n] = c;
        n += c < net_.units && (net_.dense || mean_[i * net_.width + c] != 0);  // `last` ends with the units
      }
      *before = n;
    }
  }

  // Rows, and the same padded to whole tiles, by which everything is laid out.
  int64_t rows() const { return count_; }
  int64_t count() const { return padded_; }

  const T* hidden() const { return hidden_.data(); }
  const T* mean(int64_t row) const { return &mean_[row * net_.width]; }

  // How many passes' units are kept, and the k-th one's: panels [width / kColumns, count, kColumns].
  int64_t kept() const { return kept_; }
  T* kept_units(int64_t k) { return &units_[k * padded_ * net_.width]; }

  // Keeps the units of some passes, in the place of others.
  void keep(int64_t pass, int64_t some) {
    first_kept_ = pass;
    for (int64_t k = 0; k < some; ++k)
      for (int64_t j = 0; j < net_.width; j += kColumns<T>)
        compute(net_.passes[pass + k], j, kept_units(k) + j * padded_);
  }

  // The live units of a row: those that any pass has. The others, a ReLU's zeros, add nothing to finite weights' sums.
  const int64_t* live(int64_t row) const { return &live_[row * net_.width]; }
  // How many of them there are before unit j, the first of a panel.
  int64_t live_before(int64_t row, int64_t j) const { return before_[row * (panels() + 1) + j / kColumns<T>]; }

  // Some passes' units less their mean, as type S: passes and rows so far apart.
  template <typename S>
  void deviations(int64_t pass, int64_t some, S* out, int64_t pass_stride, int64_t row_stride) {
    units(pass, some, [&](int64_t k, int64_t i, int64_t j, const T* unit) {
      const T* mean = &mean_[i * net_.width + j];
      S* to = out + k * pass_stride + i * row_stride + j;
#pragma omp simd
      for (int64_t c = 0; c < kColumns<T>; ++c) to[c] = static_cast<S>(unit[c] - mean[c]);
    });
  }

  // The same of live units alone, side by side.
  void live_deviations(int64_t pass, int64_t some, T* out, int64_t pass_stride, int64_t row_stride) {
    units(pass, some, [&](int64_t k, int64_t i, int64_t j, const T* unit) {
      const T* mean = &mean_[i * net_.width];
      T* to = out + k * pass_stride + i * row_stride;
      for (int64_t n = live_before(i, j); n < live_before(i, j + kColumns<T>); ++n)
        to[n] = unit[live(i)[n] - j] - mean[live(i)[n]];
    });
  }

  // Adds the squares of a pass's outputs of a row, n from column j on.
  template <typename S>
  void add_squares(int64_t row, const S* y, int64_t j, int64_t n) {
    T* sums = &squares_[row * net_.out_width + j];
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) sums[d] += static_cast<T>(y[d]) * static_cast<T>(y[d]);
  }

  // Writes both results, [N, D].
  template <typename S>
  void write(S* mean, S* variance) {
    for (int64_t j = 0; j < net_.dim; j += kColumns<T>) {
      const int64_t n = std::min<int64_t>(kColumns<T>, net_.dim - j);
      std::fill(part_.begin(), part_.end(), T(0));
      add_product(mean_.data(), net_.width, &net_.last[j * net_.units], net_.units, part_.data(), kColumns<T>, padded_);
      for (int64_t i = 0; i < count_; ++i)
        for (int64_t d = 0; d < n; ++d) {
          const int64_t at = (first_ + i) * net_.dim + j + d;
          mean[at] = static_cast<S>(part_[i * kColumns<T> + d]);
          variance[at] = static_cast<S>(squares_[i * net_.out_width + j + d] / T(net_.passes.size()));
        }
    }
  }

 private:
  int64_t panels() const { return net_.width / kColumns<T>; }

  // Calls use(k, i, j, units) for kColumns units of the k-th of some passes, of row i from unit j on.
  template <bool first_time = false, typename Use>
  void units(int64_t pass, int64_t some, const Use& use) {
    for (int64_t j = 0; j < net_.width; j += kColumns<T>)
      for (int64_t k = 0; k < some; ++k) {
        const bool kept = pass + k >= first_kept_ && pass + k < first_kept_ + kept_;
        T* units = kept ? kept_units(pass + k - first_kept_) + j * padded_ : part_.data();
        if (first_time || !kept) compute(net_.passes[pass + k], j, units);
        for (int64_t i = 0; i < padded_; ++i) use(k, i, j, units + i * kColumns<T>);
      }
  }

  // A pass's units of all rows from unit j on, to [count, kColumns].
  void compute(const Pass& pass, int64_t j, T* out) const {
    std::fill_n(out, padded_ * kColumns<T>, T(0));
    for (int64_t i = 0; i < padded_; i += kRows)
      add_product(
          Left<T>{&hidden_[i * net_.hidden], net_.hidden, 1}, &net_.fold[j * net_.hidden], pass.units.size(),
          out + i * kColumns<T>, kColumns<T>, Chosen{pass.units.data()});
    const T rest = pass.drops ? T(1) : T(0), sign = pass.drops ? T(-1) : T(1), scale = net_.scale;
    for (int64_t i = 0; i < padded_; ++i) {
      const T *all = &all_[i * net_.width + j], *constant = &constant_[i * net_.width + j];
      T* unit = out + i * kColumns<T>;
#pragma omp simd
      for (int64_t c = 0; c < kColumns<T>; ++c) {
        const T z = (rest * all[c] + sign * unit[c]) * scale + constant[c];
        unit[c] = select(z < 0, T(0), z);
      }
    }
  }

  const Network<T>& net_;
  int64_t first_, count_, padded_;
  std::vector<T> hidden_, constant_, all_, mean_, squares_;  // all: the product without dropout
  std::vector<int64_t> live_, before_;                       // see live()
  std::vector<T> part_;                                      // scratch: a panel of [count, kColumns]
  int64_t first_kept_ = 0, kept_;
  std::unique_ptr<T[]> units_;
};

// Calls use(j, y) with some passes' outputs from j on, less their mean: y is [count, kPassesAtOnce, kColumns]. `units`
// are their live deviations, of no more than kPassesAtOnce.
template <typename T, typename Use>
void deviating_outputs(
    const Network<T>& net,
    const Rows<T>& rows,
    int64_t some,
    const T* units,
    int64_t pass_stride,
    int64_t row_stride,
    const Use& use) {
  constexpr int64_t columns = kColumns<T>;
  std::vector<T> y(rows.count() * kPassesAtOnce * columns);
  for (int64_t j = 0; j < net.dim; j += columns) {
    std::fill(y.begin(), y.end(), T(0));
    for (int64_t depth = 0; depth < net.width; depth += kDepth)  // pieces of the panel that stay in L1
      for (int64_t i = 0; i < rows.count(); ++i) {
        const int64_t first = rows.live_before(i, depth), end = std::min(depth + kDepth, net.width);
        for (int64_t k = 0; k < some; k += kTile)
          add_product<kTile>(
              Left<T>{units + i * row_stride + k * pass_stride + first, pass_stride, 1}, &net.last[j * net.units],
              rows.live_before(i, end) - first, &y[(i * kPassesAtOnce + k) * columns], columns,
              Packed{rows.live(i) + first});
      }
    use(j, y.data());
  }
}

}  // namespace fastprob
