// Element-wise work over tensors on the CPU: contiguous inputs of one shape, cut into chunks that do not depend on the
// number of threads, so that sums are the same bits on any. Half types pass through float buffers, block by block.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../arguments.h"
#include "../elementwise.h"
#include "../maths.h"

namespace fastprob {

constexpr int64_t kBlock = 512;         // elements that one call of a body works on: 14 float arrays in 28 KB of L1
constexpr int64_t kChunk = 8 * kBlock;  // elements that one thread takes at a time

inline Tensor scalar_like(const Tensor& like, double value) {
  const Tensor out = torch::stable::new_empty(like, {});
  for_type(like, [&](auto compute, auto storage) {  // fill_ raises where the type overflows
    *static_cast<decltype(storage)*>(out.data_ptr()) = static_cast<decltype(compute)>(value);
  });
  return out;
}

inline double item(const Tensor& scalar) {
  return for_type(scalar, [&](auto compute, auto storage) {
    return double(static_cast<decltype(compute)>(*static_cast<const decltype(storage)*>(scalar.data_ptr())));
  });
}

// Calls body(in, out, n) -> double for every block of elements, compute type C and storage type S, and returns the sum
// of what it returns. A null output is not stored; the body gets a scratch array in its place.
template <typename C, typename S, size_t I, size_t O, typename Body>
double for_blocks(const std::array<const S*, I>& in, const std::array<S*, O>& out, int64_t size, const Body& body) {
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<double> sums(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    alignas(64) C scratch[(std::is_same_v<C, S> ? 0 : I) + O][kBlock];
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double sum = 0;
      for (int64_t at = chunk * kChunk; at < std::min(size, (chunk + 1) * kChunk); at += kBlock) {
        const int64_t n = std::min(kBlock, size - at);
        std::array<const C*, I> block_in;
        std::array<C*, O> block_out;
        for (size_t k = 0; k < O; ++k) block_out[k] = scratch[k];
        if constexpr (std::is_same_v<C, S>) {
          for (size_t k = 0; k < I; ++k) block_in[k] = in[k] + at;
          for (size_t k = 0; k < O; ++k)
            if (out[k]) block_out[k] = out[k] + at;
          sum += body(block_in, block_out, n);
        } else {
          for (size_t k = 0; k < I; ++k) {
            for (int64_t i = 0; i < n; ++i) scratch[O + k][i] = static_cast<C>(in[k][at + i]);
            block_in[k] = scratch[O + k];
          }
          sum += body(block_in, block_out, n);
          for (size_t k = 0; k < O; ++k)
            for (int64_t i = 0; out[k] && i < n; ++i) out[k][at + i] = static_cast<S>(block_out[k][i]);
        }
      }
      sums[chunk] = sum;
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// The values of a block or, with gradients, these times `scale`, or times the last input where that is one more than
// the function's. Returns the sum of the values.
template <bool has_gradients, typename F, typename T, size_t I, size_t O, size_t... K>
double block_of(
    const F& function,
    const std::array<const T*, I>& in,
    const std::array<T*, O>& out,
    int64_t n,
    T scale,
    std::index_sequence<K...>) {
  const F f = function;
  const auto from = in;
  const auto to = out;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const auto y = f(from[K][k]...);
    sum += y.value;
    if constexpr (has_gradients) {
      const T g = I > sizeof...(K) ? from[I - 1][k] : scale;
      ((to[K][k] = g * y.slopes[K]), ...);
    } else {
      to[0][k] = y.value;
    }
  }
  return sum;
}

template <bool has_gradients, typename F, typename T, size_t I, size_t O>
double block(const F& function, const std::array<const T*, I>& in, const std::array<T*, O>& out, int64_t n, T scale) {
  return block_of<has_gradients>(function, in, out, n, scale, std::make_index_sequence<has_gradients ? O : I>());
}

// Runs an operator's function, or its own `block`, over tensors; an output with no elements is not stored.
struct Cpu {
  struct Guard {
    explicit Guard(int32_t /*device*/) {}
  };

  template <bool has_gradients, typename Op, size_t I, size_t O>
  static double run(
      const Op& op,
      int64_t needs,
      const std::array<Tensor, I>& in,
      const std::array<Tensor, O>& out,
      double scale = 1) {
    double sum = 0;
    for_type(in[0], [&](auto compute, auto storage) {
      using T = decltype(compute);
      using S = decltype(storage);
      std::array<const S*, I> from;
      std::array<S*, O> to;
      for (size_t k = 0; k < I; ++k) from[k] = static_cast<const S*>(in[k].data_ptr());
      for (size_t k = 0; k < O; ++k) to[k] = out[k].numel() ? static_cast<S*>(out[k].data_ptr()) : nullptr;
      op.template visit<T, has_gradients>(needs, [&](const auto& function) {
        sum = for_blocks<T, S>(from, to, in[0].numel(), [&](const auto& block_in, const auto& block_out, int64_t n) {
          return block<has_gradients>(function, block_in, block_out, n, T(scale));
        });
      });
    });
    return sum;
  }

  template <bool has_gradients, typename Op, size_t I, size_t O>
  static Tensor sum(
      const Op& op, int64_t needs, const std::array<Tensor, I>& in, const std::array<Tensor, O>& out, double divisor) {
    return scalar_like(in[0], run<has_gradients>(op, needs, in, out, 1 / divisor) / divisor);
  }

  template <typename Op, size_t N>
  static void gradients(
      const Op& op,
      int64_t needs,
      const std::array<Tensor, N>& in,
      const std::array<Tensor, N>& out,
      const Tensor& grad,
      double divisor) {
    run<true>(op, needs, in, out, item(grad) / divisor);
  }
};

}  // namespace fastprob
