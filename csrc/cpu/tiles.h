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

// c += a b for kRows rows of c (ldc apart) and kColumns columns; b is [depth, kColumns], its rows side by side.
template <typename T>
inline void add_product(Left<T> a, const T* b, int64_t depth, T* c, int64_t ldc) {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  constexpr int width = kVectorBytes / sizeof(T);
  Vector sums[kRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) sums[i][j] = *reinterpret_cast<const Vector*>(c + i * ldc + j * width);
  for (int64_t k = 0; k < depth; ++k, b += kColumns<T>) {
    const Vector first = *reinterpret_cast<const Vector*>(b), second = *reinterpret_cast<const Vector*>(b + width);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const T x = a.data[i * a.row + k * a.column];
      sums[i][0] += x * first;
      sums[i][1] += x * second;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
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
