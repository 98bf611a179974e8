// Random numbers by counter, Philox4x32-10: which bits belong to which element stands in fastprob/ops/_random.py.
#pragma once

#include <array>
#include <cstdint>

#include "maths.h"

namespace fastprob {

// The four words of the elements 4 group .. 4 group + 3.
FASTPROB_INLINE std::array<uint32_t, 4> random_words(uint64_t group, uint64_t seed, uint32_t stream, uint32_t draw) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = stream, c3 = draw;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
  }
  return {c0, c1, c2, c3};
}

}  // namespace fastprob
