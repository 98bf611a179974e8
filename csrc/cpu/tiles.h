// Products of matrices that lie in cache, for kernels that use a product before it leaves it. Sums run in one fixed
// order, so results are the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fastprob {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRows = 4;
#else
constexpr int kVectorBytes = 16, kRows = 4;
#endif

// Columns that one pass computes: two registers. With kRows of them the sums fill half of the register file or more.
template <typename T>
constexpr int kColumns = 2 * kVectorBytes / sizeof(T);

// A matrix read by single elements: (i, k) at data[i * row + k * column].
template <typename T>
struct Left {
  const T* data;
  int64_t row, column;
};

// Which terms a product sums: all, or those that a list names, whose places in a are the list's or side by side.
struct Every {
  int64_t in_a(int64_t k) const { return k; }
  int64_t in_b(int64_t k) const { return k; }
};
struct Chosen {
  const int64_t* list;
  int64_t in_a(int64_t k) const { return list[k]; }
  int64_t in_b(int64_t k) const { return list[k]; }
};
struct Packed {
  const int64_t* list;
  int64_t in_a(int64_t k) const { return k; }
  int64_t in_b(int64_t k) const { return list[k]; }
};

template <typename T>
using Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias)) = T;

// c += a b for kColumns columns of some rows, which lie anywhere: row i's k-th term is a[i][k * column]. b is
// [.., kColumns], its rows side by side.
template <size_t rows, typename T, typename Terms = Every>
inline void add_product(
    const std::array<const T*, rows>& a,
    int64_t column,
    const T* b,
    int64_t depth,
    const std::array<T*, rows>& c,
    Terms terms = {}) {
  constexpr int width = kVectorBytes / sizeof(T);
  Vector<T> sums[rows][2];
#pragma GCC unroll 8
  for (size_t i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j) sums[i][j] = *reinterpret_cast<const Vector<T>*>(c[i] + j * width);
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = b + terms.in_b(k) * kColumns<T>;
    const auto first = *reinterpret_cast<const Vector<T>*>(row);
    const auto second = *reinterpret_cast<const Vector<T>*>(row + width);
#pragma GCC unroll 8
    for (size_t i = 0; i < rows; ++i) {
      const T x = a[i][terms.in_a(k) * column];
      sums[i][0] += x * first;
      sums[i][1] += x * second;
    }
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j) *reinterpret_cast<Vector<T>*>(c[i] + j * width) = sums[i][j];
}

// The same for rows of a matrix, and of c those ldc apart. Not inlined, as those below: all registers are its own.
template <size_t rows = kRows, typename T, typename Terms = Every>
[[gnu::noinline]] void add_product(Left<T> a, const T* b, int64_t depth, T* c, int64_t ldc, Terms terms = {}) {
  std::array<const T*, rows> from;
  std::array<T*, rows> to;
  for (size_t i = 0; i < rows; ++i) {
    from[i] = a.data + i * a.row;
    to[i] = c + i * ldc;
  }
  add_product(from, a.column, b, depth, to, terms);
}

// The same for rows that a list names, a Chosen or Packed: b's places are c's here.
template <typename T, typename List>
[[gnu::noinline]] void add_to_rows(Left<T> a, const T* b, int64_t depth, T* c, int64_t count, List list) {
  T unused[kColumns<T>] = {};
  for (int64_t n = 0; n < count; n += kRows) {
    std::array<const T*, kRows> from;
    std::array<T*, kRows> to;
    for (int i = 0; i < kRows; ++i) {
      from[i] = a.data + list.in_a(std::min(n + i, count - 1)) * a.row;
      to[i] = n + i < count ? c + list.in_b(n + i) * kColumns<T> : unused;
    }
    add_product(from, a.column, b, depth, to);
  }
}

// The dot products of some rows with others, which lie anywhere: a's panels of kColumns terms so far apart, b's side by
// side.
template <size_t rows, size_t others, typename T>
[[gnu::noinline]] void dots(
    std::array<const T*, rows> a,
    int64_t a_panel,
    std::array<const T*, others> b,
    int64_t panels,
    T (&out)[rows][others]) {
  constexpr int width = kVectorBytes / sizeof(T);
  Vector<T> sums[rows][others] = {};
  for (int64_t p = 0; p < panels; ++p)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vector<T> of_b[others];
#pragma GCC unroll 8
      for (size_t j = 0; j < others; ++j)
        of_b[j] = *reinterpret_cast<const Vector<T>*>(b[j] + p * kColumns<T> + half * width);
#pragma GCC unroll 8
      for (size_t i = 0; i < rows; ++i) {
        const auto of_a = *reinterpret_cast<const Vector<T>*>(a[i] + p * a_panel + half * width);
#pragma GCC unroll 8
        for (size_t j = 0; j < others; ++j) sums[i][j] += of_a * of_b[j];
        asm volatile("" ::: "memory");  // or else GCC loads all rows first, into more registers than there are
      }
    }
#pragma GCC unroll 8
  for (size_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (size_t j = 0; j < others; ++j) {
      T sum = 0;
      for (int lane = 0; lane < width; ++lane) sum += sums[i][j][lane];
      out[i][j] = sum;
    }
}

// c += a b, [rows, columns] by panels of kColumns columns: panel p of b is [depth, kColumns] at b + p * panel.
template <typename T>
inline void add_product(
    Left<T> a, const T* b, int64_t panel, int64_t depth, T* c, int64_t ldc, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kColumns<T>, b += panel)
    for (int64_t i = 0; i < rows; i += kRows)
      add_product(Left<T>{a.data + i * a.row, a.row, a.column}, b, depth, c + i * ldc + j, ldc);
}

}  // namespace fastprob
