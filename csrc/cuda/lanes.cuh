// 16 bytes of a tensor at a time, and lanes one by one where a tensor ends or is not aligned to 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../ggd.h"

namespace fastprob {

// 16 bytes of a tensor.
template <typename S>
struct alignas(16) Lanes {
  static constexpr int kCount = 16 / sizeof(S);
  S lane[kCount];
};

// An aligned 16 bytes at once.
template <typename S>
FASTPROB_INLINE uint4 load_vector(const S* from) {
  return *reinterpret_cast<const uint4*>(from);
}
template <typename S>
FASTPROB_INLINE void store_vector(S* to, uint4 words) {
  *reinterpret_cast<uint4*>(to) = words;
}

// The lanes from element `at` on, one by one; those beyond `size` come back as 0.
template <typename S>
FASTPROB_INLINE uint4 load_lanes(const S* from, int64_t at, int64_t size) {
  Lanes<S> lanes = fastprob::bit_cast<Lanes<S>>(uint4{0, 0, 0, 0});
#pragma unroll
  for (int v = 0; v < Lanes<S>::kCount; ++v)
    if (at + v < size) lanes.lane[v] = from[at + v];
  return fastprob::bit_cast<uint4>(lanes);
}

template <typename S>
FASTPROB_INLINE void store_lanes(S* to, int64_t at, int64_t size, uint4 words) {
  const auto lanes = fastprob::bit_cast<Lanes<S>>(words);
#pragma unroll
  for (int v = 0; v < Lanes<S>::kCount; ++v)
    if (at + v < size) to[at + v] = lanes.lane[v];
}

// Reads lanes of several tensors: 16 bytes at once if `vector`, which is where they are aligned and all there.
template <typename S, int count>
FASTPROB_INLINE void load(uint4 (&words)[count], const S* const (&from)[count], int64_t at, int64_t size, bool vector) {
  if (vector) {
#pragma unroll
    for (int k = 0; k < count; ++k) words[k] = load_vector(from[k] + at);
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) words[k] = load_lanes(from[k], at, size);
  }
}

// Writes them; null tensors are left out.
template <typename S, int count>
FASTPROB_INLINE void store(const uint4 (&words)[count], S* const (&to)[count], int64_t at, int64_t size, bool vector) {
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (to[k] == nullptr) continue;
    if (vector)
      store_vector(to[k] + at, words[k]);
    else
      store_lanes(to[k], at, size, words[k]);
  }
}

// The words after the first `count`; what follows them is of no use.
template <int count>
FASTPROB_INLINE uint4 shift_out(uint4 words) {
  if constexpr (count == 2) return {words.z, words.w, words.z, words.w};
  if constexpr (count == 1) return {words.y, words.z, words.w, words.w};
  return words;
}

// `count` words of `next` behind the last ones of `words`; the first ones of `words` fall out.
template <int count>
FASTPROB_INLINE uint4 shift_in(uint4 words, uint4 next) {
  if constexpr (count == 4) return next;
  if constexpr (count == 2) return {words.z, words.w, next.x, next.y};
  return {words.y, words.z, words.w, next.x};
}

}  // namespace fastprob
