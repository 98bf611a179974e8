// Operators of all pairs of rows: [N, D] tensors of one side and [M, D] tensors of the other to [N, M], in a pair's
// place the sum over D of what a function makes of a coordinate of both.
//
// What depends on one row alone comes from tables, made anew for every tile: a thread takes kOwn rows and meets them
// with the other side's in tiles of kOthers. A pair's sum runs over D in one order and is written by one thread, so it
// is the same bits on any number of threads. The backward pass is a sweep for each side's gradients, which adds up over
// the other side's rows in their order.
//
// The function, for a type of computation Type:
//
//   kInputs[2], kTables[2]   tensors that a row of either side has, and tables that are made of them
//   tables<side>(in, out, n, constant) -> is_plain
//       table k of n coordinates at out + k kDepth; adds to `constant` what the row alone contributes to its pairs;
//       is_plain: value<true> may be used for them, if for the other side's as well
//   value<is_plain>(row, column), slopes<side>(row, column)
//       of a coordinate, table k at row[k * kDepth]: its value, and a Slopes of the derivatives for that side's inputs
//   finish<side>(in, total, sums, n)
//       adds the derivatives of `constant`, times `total`, to the gradients, in float64: input k's at sums + k kDepth
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "half.h"

namespace fastprob {

constexpr int64_t kDepth = 512;  // coordinates at a time: a row's tables stay in L1
constexpr int64_t kOwn = 32, kOthers = 32;
constexpr int64_t kGroup = 4;  // pairs whose gradients are added up before they join a sum in float64

template <typename T, size_t N>
struct Slopes {
  T slopes[N];
};

// The tensors of a side.
template <typename S, size_t N>
struct Side {
  std::array<const S*, N> in;
  int64_t count, dim;

  explicit Side(const std::array<Tensor, N>& tensors) : count(tensors[0].size(0)), dim(tensors[0].size(1)) {
    for (size_t k = 0; k < N; ++k) in[k] = static_cast<const S*>(tensors[k].data_ptr());
  }

  int64_t blocks() const { return (dim + kDepth - 1) / kDepth; }
  int64_t width(int64_t block) const { return std::min(kDepth, dim - block * kDepth); }

  // Calls body(in, n) with a block of a row's coordinates in the type of computation.
  template <typename T, typename Body>
  void with(int64_t row, int64_t block, const Body& body) const {
    const int64_t at = row * dim + block * kDepth, n = width(block);
    alignas(64) T wide[N][kDepth];
    std::array<const T*, N> from;
    for (size_t k = 0; k < N; ++k) {
      if constexpr (std::is_same_v<T, S>) {
        from[k] = in[k] + at;
      } else {
        convert(in[k] + at, wide[k], n);
        from[k] = wide[k];
      }
    }
    body(from, n);
  }
};

// The tables of some rows of a side.
template <typename P, int side>
class Tables {
  using T = typename P::Type;
  static constexpr size_t kInputs = P::kInputs[side];
  struct alignas(64) Table {
    T values[P::kTables[side]][kDepth];
  };

 public:
  std::vector<double> constants;
  std::vector<char> plain;

  Tables(int64_t rows, int64_t blocks) : constants(rows), plain(rows), blocks_(blocks), tables_(rows * blocks) {}

  const T* at(int64_t row, int64_t block) const { return tables_[row * blocks_ + block].values[0]; }

  template <typename S>
  void fill(const P& pair, const Side<S, kInputs>& from, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      constants[i] = 0;
      plain[i] = true;
      for (int64_t block = 0; block < blocks_; ++block)
        from.template with<T>(first + i, block, [&](const auto& in, int64_t n) {
          T* out = tables_[i * blocks_ + block].values[0];
          plain[i] &= pair.template tables<side>(in, out, n, constants[i]);
        });
    }
  }

 private:
  int64_t blocks_;
  std::vector<Table> tables_;
};

// ---- values ---------------------------------------------------------------------------------------------------------

// Adds the values of a row's pairs with two columns: side by side, while one waits for its results the other works.
template <bool is_plain, typename P, typename T>
void add_values(const P& function, const T* row, const T* column, const T* other, int64_t n, T* value, T* other_value) {
  const P pair = function;
  T sum = 0, other_sum = 0;
#pragma omp simd reduction(+ : sum, other_sum)
  for (int64_t d = 0; d < n; ++d) {
    sum += pair.template value<is_plain>(row + d, column + d);
    other_sum += pair.template value<is_plain>(row + d, other + d);
  }
  *value += sum;
  *other_value += other_sum;
}

// Calls take(i, j, values, n) with the values of row i and columns j ... j + n - 1, for every row from j = 0 on.
template <typename P, typename S, typename Take>
void for_pairs(
    const P& pair, const Side<S, P::kInputs[0]>& rows, const Side<S, P::kInputs[1]>& columns, const Take& take) {
  using T = typename P::Type;
  const int64_t blocks = rows.blocks();
  torch::stable::parallel_for(0, (rows.count + kOwn - 1) / kOwn, 1, [&](int64_t begin, int64_t end) {
    Tables<P, 0> own(kOwn, blocks);
    Tables<P, 1> others(kOthers, blocks);
    for (int64_t first = begin * kOwn; first < std::min(rows.count, end * kOwn); first += kOwn) {
      const int64_t height = std::min(kOwn, rows.count - first);
      own.fill(pair, rows, first, height);
      for (int64_t column = 0; column < columns.count; column += kOthers) {
        const int64_t width = std::min(kOthers, columns.count - column);
        T values[kOwn][kOthers] = {};
        others.fill(pair, columns, column, width);
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width;) {
              const bool is_plain = own.plain[i] & others.plain[j];
              const int64_t next = j + (j + 1 < width && is_plain == (own.plain[i] & others.plain[j + 1]));
              const T *row = own.at(i, block), *one = others.at(j, block), *other = others.at(next, block);
              T unused = 0, *to = values[i] + j, *to_next = next == j ? &unused : to + 1;
              if (is_plain)
                add_values<true>(pair, row, one, other, rows.width(block), to, to_next);
              else
                add_values<false>(pair, row, one, other, rows.width(block), to, to_next);
              j = next + 1;
            }
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t j = 0; j < width; ++j) values[i][j] = T(own.constants[i] + others.constants[j] + values[i][j]);
          take(first + i, column, values[i], width);
        }
      }
    }
  });
}

// The k least of a row's values, which come in the order of their columns: equal ones in this order, NaN last.
template <typename T>
class Least {
 public:
  void add(const T* values, int64_t first, int64_t count, int64_t k) {
    for (int64_t c = 0; c < count; ++c) {
      const T x = values[c];
      if (!is_full_ || x < worst_ || (worst_ != worst_ && x == x)) entries_.push_back({x, first + c});
    }
    if (static_cast<int64_t>(entries_.size()) >= 2 * k) shorten(k);
  }

  // Writes them in order and forgets them.
  template <typename S>
  void write(S* values, int64_t* indices, int64_t k) {
    shorten(k);
    std::sort(entries_.begin(), entries_.end(), before);
    for (int64_t i = 0; i < k; ++i) {
      values[i] = static_cast<S>(entries_[i].value);
      indices[i] = entries_[i].index;
    }
    std::vector<Entry>().swap(entries_);
  }

 private:
  struct Entry {
    T value;
    int64_t index;
  };
  std::vector<Entry> entries_;
  bool is_full_ = false;
  T worst_ = 0;  // of the k least so far, if it is full

  static bool before(const Entry& a, const Entry& b) {
    if (a.value < b.value || b.value < a.value) return a.value < b.value;
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    return a_nan == b_nan ? a.index < b.index : b_nan;
  }

  void shorten(int64_t k) {
    std::nth_element(entries_.begin(), entries_.begin() + (k - 1), entries_.end(), before);
    entries_.resize(k);
    is_full_ = true;
    worst_ = entries_[k - 1].value;
  }
};

// ---- gradients ------------------------------------------------------------------------------------------------------

template <int side, typename P, typename T, size_t... K>
void add_slopes(
    const P& function, const T* row, const T* column, T grad, T* sums, int64_t n, std::index_sequence<K...>) {
  const P pair = function;
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) {
    const auto y = pair.template slopes<side>(row + d, column + d);
    ((sums[K * kDepth + d] += grad * y.slopes[K]), ...);
  }
}

// Writes the gradients for a side's tensors, unless they are null: those of its row i and the other side's row j reach
// the pair by grad[i * stride + j * other_stride].
template <int side, typename P, typename S>
void sweep(
    const P& pair,
    const Side<S, P::kInputs[side]>& from,
    const Side<S, P::kInputs[1 - side]>& with,
    const S* grad,
    int64_t stride,
    int64_t other_stride,
    const std::array<S*, P::kInputs[side]>& out) {
  using T = typename P::Type;
  constexpr size_t kInputs = P::kInputs[side];
  using Sums = std::array<double, kInputs * kDepth>;
  const int64_t blocks = from.blocks();
  torch::stable::parallel_for(0, (from.count + kOwn - 1) / kOwn, 1, [&](int64_t begin, int64_t end) {
    Tables<P, side> own(kOwn, blocks);
    Tables<P, 1 - side> others(kOthers, blocks);
    std::vector<Sums> sums(kOwn * blocks);
    alignas(64) T group[kInputs * kDepth];
    for (int64_t first = begin * kOwn; first < std::min(from.count, end * kOwn); first += kOwn) {
      const int64_t height = std::min(kOwn, from.count - first);
      std::fill(sums.begin(), sums.end(), Sums{});
      std::array<double, kOwn> totals = {};
      own.fill(pair, from, first, height);
      for (int64_t other = 0; other < with.count; other += kOthers) {
        const int64_t width = std::min(kOthers, with.count - other);
        others.fill(pair, with, other, width);
        for (int64_t i = 0; i < height; ++i) {
          T grads[kOthers];
          for (int64_t j = 0; j < width; ++j) {
            grads[j] = static_cast<T>(grad[(first + i) * stride + (other + j) * other_stride]);
            totals[i] += grads[j];
          }
          for (int64_t block = 0; block < blocks; ++block)
            for (int64_t start = 0; start < width; start += kGroup) {
              const int64_t n = from.width(block);
              for (size_t k = 0; k < kInputs; ++k) std::fill_n(group + k * kDepth, n, T(0));
              for (int64_t j = start; j < std::min(start + kGroup, width); ++j) {
                const T *mine = own.at(i, block), *theirs = others.at(j, block);
                const T *row = side == 0 ? mine : theirs, *column = side == 0 ? theirs : mine;
                add_slopes<side>(pair, row, column, grads[j], group, n, std::make_index_sequence<kInputs>());
              }
              double* to = sums[i * blocks + block].data();
              for (size_t k = 0; k < kInputs; ++k)
                for (int64_t d = k * kDepth; d < int64_t(k) * kDepth + n; ++d) to[d] += group[d];
            }
        }
      }
      for (int64_t i = 0; i < height; ++i)
        for (int64_t block = 0; block < blocks; ++block)
          from.template with<T>(first + i, block, [&](const auto& in, int64_t n) {
            double* of = sums[i * blocks + block].data();
            pair.template finish<side>(in, totals[i], of, n);
            for (size_t k = 0; k < kInputs; ++k)
              for (int64_t d = 0; out[k] && d < n; ++d)
                out[k][(first + i) * from.dim + block * kDepth + d] = static_cast<S>(T(of[k * kDepth + d]));
          });
    }
  });
}

// ---- torch operators ------------------------------------------------------------------------------------------------
//
// An operator Op has kInputs[2], read(Arguments&) for its options, and visit<T>(run), which calls run(function).

// [N, M] values.
template <typename Op>
void pairwise(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto rows = arguments.contiguous<Op::kInputs[0]>();
  const auto columns = arguments.contiguous<Op::kInputs[1]>();
  const Op op = Op::read(arguments);
  const int64_t m = columns[0].size(0);
  const Tensor out = torch::stable::new_empty(rows[0], {rows[0].size(0), m});
  for_type(rows[0], [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    S* values = static_cast<S*>(out.data_ptr());
    op.template visit<T>([&](const auto& pair) {
      for_pairs(
          pair, Side<S, Op::kInputs[0]>(rows), Side<S, Op::kInputs[1]>(columns),
          [&](int64_t i, int64_t j, const T* from, int64_t n) { convert(from, values + i * m + j, n); });
    });
  });
  push(stack, out);
}

// The k least values of every row [N, k] and their columns; k is the first option.
template <typename Op>
void nearest(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto rows = arguments.contiguous<Op::kInputs[0]>();
  const auto columns = arguments.contiguous<Op::kInputs[1]>();
  const int64_t k = arguments.next<int64_t>(), n = rows[0].size(0), m = columns[0].size(0);
  const Op op = Op::read(arguments);
  STD_TORCH_CHECK(k >= 1 && k <= m, "fastprob: k must be in 1..", m, ", got ", k);
  const Tensor out = torch::stable::new_empty(rows[0], {n, k});
  const Tensor out_indices = torch::stable::new_empty(rows[0], {n, k}, ScalarType::Long);
  for_type(rows[0], [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    S* values = static_cast<S*>(out.data_ptr());
    int64_t* indices = static_cast<int64_t*>(out_indices.data_ptr());
    std::vector<Least<T>> least(n);
    op.template visit<T>([&](const auto& pair) {
      for_pairs(
          pair, Side<S, Op::kInputs[0]>(rows), Side<S, Op::kInputs[1]>(columns),
          [&](int64_t i, int64_t j, const T* from, int64_t count) {
            least[i].add(from, j, count, k);
            if (j + count == m) least[i].write(values + i * k, indices + i * k, k);
          });
    });
  });
  push(stack, out);
  push(stack, out_indices);
}

template <typename S, size_t N>
std::array<S*, N> pointers(const std::array<Tensor, N>& tensors, int64_t needs) {
  std::array<S*, N> out;
  for (size_t k = 0; k < N; ++k) out[k] = needs >> k & 1 ? static_cast<S*>(tensors[k].data_ptr()) : nullptr;
  return out;
}

// The gradients of the [N, M] values.
template <typename Op>
void pairwise_backward(StableIValue* stack, uint64_t, uint64_t) {
  constexpr size_t kRows = Op::kInputs[0], kColumns = Op::kInputs[1];
  Arguments arguments(stack);
  const Tensor grad = torch::stable::contiguous(arguments.next<Tensor>());
  const auto rows = arguments.contiguous<kRows>();
  const auto columns = arguments.contiguous<kColumns>();
  const Op op = Op::read(arguments);
  const int64_t needs = arguments.next<int64_t>(), of_columns = needs >> kRows, m = columns[0].size(0);
  const int64_t of_rows = needs & ((1 << kRows) - 1);
  const auto row_grads = gradients_like(rows, of_rows);
  const auto column_grads = gradients_like(columns, of_columns);
  for_type(rows[0], [&](auto compute, auto storage) {
    using S = decltype(storage);
    const S* from = static_cast<const S*>(grad.data_ptr());
    const Side<S, kRows> row_side(rows);
    const Side<S, kColumns> column_side(columns);
    op.template visit<decltype(compute)>([&](const auto& pair) {
      if (of_rows) sweep<0>(pair, row_side, column_side, from, m, 1, pointers<S>(row_grads, of_rows));
      if (of_columns) sweep<1>(pair, column_side, row_side, from, 1, m, pointers<S>(column_grads, of_columns));
    });
  });
  push(stack, row_grads);
  push(stack, column_grads);
}

}  // namespace fastprob
