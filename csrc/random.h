// Random numbers by counter, Philox4x32-10: which bits belong to which element stands in fastprob/ops/_random.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "maths.h"

#if !defined(__CUDACC__) && defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastprob {

// The product of x's low half and m.
FASTPROB_INLINE uint64_t low_product(uint64_t x, uint32_t m) { return uint64_t(static_cast<uint32_t>(x)) * m; }

#if !defined(__CUDACC__)
#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));

FASTPROB_INLINE Lanes low_product(Lanes x, uint32_t m) {
  const Lanes factor = Lanes{} + m;
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(factor)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(factor)));
#else
  return (x & 0xffffffffu) * factor;
#endif
}
#endif

// Makes words of a counter. L is a number of 64 bits or many, whose low halves count: a product brings its high half
// down by a shift and leaves its low one where it is.
template <typename L>
FASTPROB_INLINE void philox(L (&c)[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const L a = low_product(c[0], 0xD2511F53u), b = low_product(c[2], 0xCD9E8D57u);
    c[0] = (b >> 32) ^ (c[1] ^ k0);
    c[1] = b;
    c[2] = (a >> 32) ^ (c[3] ^ k1);
    c[3] = a;
  }
}

struct Words {
  uint32_t word[4];

  FASTPROB_INLINE uint32_t operator[](int64_t i) const { return word[i]; }
};

// The four words of the elements 4 group .. 4 group + 3.
FASTPROB_INLINE Words random_words(uint64_t group, uint64_t seed, uint32_t stream, uint32_t draw) {
  uint64_t c[4] = {group, group >> 32, stream, draw};
  philox(c, seed);
  Words words;
  for (int i = 0; i < 4; ++i) words.word[i] = static_cast<uint32_t>(c[i]);
  return words;
}

#if !defined(__CUDACC__)
// Those of n groups from `first` on, and of as many more as fill vectors: words[i][k] is word i of the k-th. Even and
// odd groups apart, so that the ones' low halves and the others' lie side by side in the end.
template <size_t N>
void random_words(uint64_t first, int64_t n, uint64_t seed, uint32_t stream, uint32_t draw, uint32_t (&words)[4][N]) {
  static_assert(N % (2 * kLanes) == 0, "random_words: room for whole vectors");
  Lanes group;
  for (int i = 0; i < kLanes; ++i) group[i] = first + 2 * i;
  for (int64_t k = 0; k < n; k += 2 * kLanes, group += 2 * kLanes) {
    const Lanes next = group + 1;
    Lanes even[4] = {group, group >> 32, Lanes{} + stream, Lanes{} + draw},
          odd[4] = {next, next >> 32, even[2], even[3]};
    philox(even, seed);
    philox(odd, seed);
    for (int i = 0; i < 4; ++i) {
      const Lanes both = (even[i] & 0xffffffffu) | odd[i] << 32;
      memcpy(&words[i][k], &both, sizeof(both));
    }
  }
}
#endif

// ---- normal numbers -------------------------------------------------------------------------------------------------

// sin and cos of pi g / 2 for |g| <= 1/2; errors of 5e-9 and 5e-11 before rounding, of double 1e-16.
FASTPROB_INLINE float quarter_sine(float g) {
  return g * polynomial(g * g, 1.570796322f, -0.6459634786f, 0.07968022806f, -0.004602176989f);
}
FASTPROB_INLINE double quarter_sine(double g) {
  return g * polynomial(
                 g * g, 1.5707963267948966, -0.64596409750624625, 0.079692626246167045, -0.0046817541353186881,
                 0.00016044118478735982, -3.5988432352120853e-06, 5.6921729219679268e-08, -6.6880351098114672e-10);
}
FASTPROB_INLINE float quarter_cosine(float g) {
  return polynomial(g * g, 1.f, -1.233700541f, 0.2536692039f, -0.02086007132f, 0.0009036317031f);
}
FASTPROB_INLINE double quarter_cosine(double g) {
  return polynomial(
      g * g, 1., -1.2337005501361698, 0.25366950790104801, -0.020863480763352961, 0.00091926027483942658,
      -2.5202042373060605e-05, 4.7108747788181715e-07, -6.3866030837918522e-09, 6.5659631149794724e-11);
}

// x, or -x where the word's highest bit is set.
FASTPROB_INLINE float signed_by(uint32_t word, float x) {
  return bit_cast<float>(bit_cast<uint32_t>(x) ^ (word & 0x80000000u));
}
FASTPROB_INLINE double signed_by(uint32_t word, double x) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ uint64_t(word & 0x80000000u) << 32);
}

// A pair of standard normal numbers, R cos and R sin of an angle. R^2 / 2 is -log u, u in (0, 1] of a word's 24 high
// bits, which a float holds. The two highest bits of the other word are the angle's quadrant, the rest how far it is
// from the middle of that, g quarter turns: there sqrt 2 cos and sin are g's cosine less and plus its sine.
template <typename T>
struct Normals {
  T cosine, sine;
};

template <typename T>
FASTPROB_INLINE Normals<T> normals(uint32_t of_radius, uint32_t of_angle) {
  const T u = static_cast<T>(static_cast<int32_t>((of_radius >> 8) + 1)) * T(0x1p-24f);
  const T g = static_cast<T>(static_cast<int32_t>(of_angle << 2 ^ 0x80000000u)) * T(0x1p-32f);
  const T radius = signed_by(of_angle, square_root(-log_positive(u))), cosine = quarter_cosine(g);
  const uint32_t odd = of_angle << 1;  // a quadrant, in which cosine and sine change places
  const T sine = signed_by(odd, quarter_sine(g));
  return {signed_by(odd, radius * (cosine - sine)), radius * (cosine + sine)};
}

}  // namespace fastprob
