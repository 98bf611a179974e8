// Half types to the type of computation and back. GCC vectorises bfloat16's loops but not float16's, for which x86
// processors since AVX2 have an instruction.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastprob {

template <typename S, typename T>
inline void convert(const S* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

#if defined(__F16C__)
inline void convert(const torch::headeronly::Half* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline void convert(const float* from, torch::headeronly::Half* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) to[i] = static_cast<torch::headeronly::Half>(from[i]);
}
#endif

}  // namespace fastprob
