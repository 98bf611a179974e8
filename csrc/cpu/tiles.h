// Products of matrices that lie in cache, for kernels that use a product before it leaves it. Sums run in one fixed
// order, so results are the same bits on any number of threads.
#pragma once

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

// c += a b for some rows of c (ldc apart) and kColumns columns; b is [.., kColumns], its rows side by side.
template <int rows = kRows, typename T, typename Terms = Every>
inline void add_product(Left<T> a, const T* b, int64_t depth, T* c, int64_t ldc, Terms terms = {}) {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  constexpr int width = kVectorBytes / sizeof(T);
  Vector sums[rows][2];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j) sums[i][j] = *reinterpret_cast<const Vector*>(c + i * ldc + j * width);
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = b + terms.in_b(k) * kColumns<T>;
    const Vector first = *reinterpret_cast<const Vector*>(row), second = *reinterpret_cast<const Vector*>(row + width);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const T x = a.data[i * a.row + terms.in_a(k) * a.column];
      sums[i][0] += x * first;
      sums[i][1] += x * second;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j) *reinterpret_cast<Vector*>(c + i * ldc + j * width) = sums[i][j];
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
