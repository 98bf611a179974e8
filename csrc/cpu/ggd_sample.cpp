// ggd_sample: values. See fastprob/ops/ggd_sample.py.
//
// In double, whatever the type, as the reference. Blocks of elements: random words, then first attempts in a loop that
// vectorises, one by one what they left, then powers. Logarithm, exponential and cosine are polynomials, good to some
// 3e-16, for a library's would not vectorise.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../random.h"
#include "blocks.h"

namespace fastprob {
namespace {

constexpr uint32_t kStream = 1u << 31;
constexpr int kAttempts = 16;
constexpr double kInteger = 4503599627370496;  // 2^52: the low bits of a sum with it are an integer

// The middle of a word's share of (0, 1).
FASTPROB_INLINE double uniform(uint32_t word) {
  return (static_cast<int32_t>(word ^ 0x80000000u) + 2147483648.5) * 0x1p-32;
}

// log x for positive normal x; finite nonsense for any other.
FASTPROB_INLINE double log_of(double x) {
  const int64_t i = bit_cast<int64_t>(x);
  const uint64_t e = static_cast<uint64_t>(i - 0x3fe6a09e667f3bcd) >> 52;  // of the mantissa in [1/sqrt 2, sqrt 2)
  const double exponent = bit_cast<double>(((e + 1024) & 0xfff) | bit_cast<uint64_t>(kInteger)) - (kInteger + 1024);
  const double m = bit_cast<double>(i - static_cast<int64_t>(e << 52)), s = (m - 1) / (m + 1);
  return exponent * kLn2 +
         2 * s * polynomial(s * s, 1., 1. / 3, 1. / 5, 1. / 7, 1. / 9, 1. / 11, 1. / 13, 1. / 15, 1. / 17, 1. / 19);
}

// e^x for |x| < 700.
FASTPROB_INLINE double exp_of(double x) {
  const double rounded = x * (1 / kLn2) + 1.5 * kInteger, n = rounded - 1.5 * kInteger;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;  // log 2 in two parts
  const double scale = bit_cast<double>((bit_cast<uint64_t>(rounded) << 52) + bit_cast<uint64_t>(1.));
  return scale * polynomial(
                     r, 1., 1., 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880,
                     1. / 3628800, 1. / 39916800, 1. / 479001600);
}

// cos(2 pi turn) for 0 < turn < 1: the sine of a quarter turn's distance from 1/4 and 3/4.
FASTPROB_INLINE double cosine(double turn) {
  const double y = 4 * std::fabs(turn - 0.5) - 1;
  return y * polynomial(
                 y * y, 1.5707963267948966, -0.6459640975062462, 0.07969262624616703, -0.004681754135318687,
                 0.00016044118478735975, -3.598843235212084e-06, 5.692172921967924e-08, -6.688035109811464e-10,
                 6.066935731106192e-12, -4.377065467313739e-14);
}

// A proposal for v, 1 where it is not above 0, and 1 or 0: whether it is taken. slope: 1 / (3 sqrt d).
struct Proposal {
  double v, taken;
};

FASTPROB_INLINE Proposal propose(double d, double slope, uint32_t of_radius, uint32_t of_angle, uint32_t of_w) {
  const double x = std::sqrt(-2 * log_of(uniform(of_radius))) * cosine(uniform(of_angle));
  const double root = 1 + x * slope, v = select(root > 0, root * root * root, 1.);
  const double bound = x * x / 2 + d * (1 - v + log_of(v));
  return {v, select((root > 0) & (log_of(uniform(of_w)) < bound), 1., 0.)};
}

// The draws of n elements from `start` on; mu, a and b are theirs, and NaN outside of the domain.
void draw(const double* mu, const double* a, const double* b, int64_t start, int64_t n, uint64_t seed, double* out) {
  alignas(64) uint32_t words[4][kBlock];
  alignas(64) double v[kBlock], taken[kBlock], z[kBlock];
  for (int64_t k = 0; k < n; ++k) {
    const auto four = random_words(start + k, seed, kStream, 0);
    for (int i = 0; i < 4; ++i) words[i][k] = four[i];
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const double d = 2. / 3 + 1 / b[k];
    const Proposal p = propose(d, 1 / (3 * std::sqrt(d)), words[0][k], words[1][k], words[2][k]);
    v[k] = p.v;
    taken[k] = p.taken;
  }
  for (int64_t k = 0; k < n; ++k)
    for (int attempt = 1; taken[k] == 0 && attempt < kAttempts; ++attempt) {
      const auto four = random_words(start + k, seed, kStream, attempt);
      const double d = 2. / 3 + 1 / b[k];
      const Proposal p = propose(d, 1 / (3 * std::sqrt(d)), four[0], four[1], four[2]);
      v[k] = p.v;
      taken[k] = p.taken;
    }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    z[k] = log_of((2. / 3 + 1 / b[k]) * v[k]) / b[k];
    out[k] = mu[k] + (2 * uniform(words[3][k]) - 1) * (exp_of(z[k]) / a[k]);
  }
  for (int64_t k = 0; k < n; ++k)
    if (!(std::fabs(z[k]) < 700))  // out of the exponential's range, or NaN
      out[k] = mu[k] +
               (2 * uniform(words[3][k]) - 1) * std::exp(std::log((2. / 3 + 1 / b[k]) * v[k]) / b[k] - std::log(a[k]));
}

void ggd_sample(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<3>();
  const int64_t n = arguments.next<int64_t>();
  const uint64_t seed = static_cast<uint64_t>(arguments.next<int64_t>());
  const double eps = arguments.next<double>();

  std::vector<int64_t> shape = {n};
  for (int64_t i = 0; i < in[0].dim(); ++i) shape.push_back(in[0].size(i));
  const Tensor out = torch::stable::new_empty(in[0], shape);
  for_type(out, [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    std::array<const S*, 3> from;
    for (size_t i = 0; i < 3; ++i) from[i] = static_cast<const S*>(in[i].data_ptr());
    S* const to = static_cast<S*>(out.data_ptr());
    const int64_t count = out.numel(), size = in[0].numel();
    torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
      alignas(64) double mu[kBlock], a[kBlock], b[kBlock], drawn[kBlock];
      for (int64_t start = first * kBlock; start < std::min(count, last * kBlock); start += kBlock) {
        const int64_t length = std::min(kBlock, count - start);
        for (int64_t k = 0, at = start % size; k < length; ++k, at = at + 1 < size ? at + 1 : 0) {
          mu[k] = static_cast<T>(from[0][at]);
          a[k] = static_cast<T>(from[1][at]) + eps;
          b[k] = static_cast<T>(from[2][at]) + eps;
          a[k] = select(a[k] >= 0, a[k], kNaN<double>);
          b[k] = select(b[k] > 0, b[k], kNaN<double>);
        }
        draw(mu, a, b, start, length, seed, drawn);
        for (int64_t k = 0; k < length; ++k) to[start + k] = static_cast<S>(static_cast<T>(drawn[k]));
      }
    });
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) { m.impl("ggd_sample", fastprob::ggd_sample); }
