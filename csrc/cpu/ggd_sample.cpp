// ggd_sample: values and gradients. See fastprob/ops/ggd_sample.py.
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

// Of n elements from `start` on, with parameters a and b: X - mu, and G.
void draw(const double* a, const double* b, int64_t start, int64_t n, uint64_t seed, double* spread, double* g) {
  alignas(64) uint32_t words[4][kBlock];
  alignas(64) double taken[kBlock], z[kBlock];
  random_words(start, n, seed, kStream, 0, words);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const double d = 2. / 3 + 1 / b[k];
    const Proposal p = propose(d, 1 / (3 * std::sqrt(d)), words[0][k], words[1][k], words[2][k]);
    g[k] = d * p.v;
    taken[k] = p.taken;
  }
  for (int64_t k = 0; k < n; ++k)
    for (int attempt = 1; taken[k] == 0 && attempt < kAttempts; ++attempt) {
      const auto four = random_words(start + k, seed, kStream, attempt);
      const double d = 2. / 3 + 1 / b[k];
      const Proposal p = propose(d, 1 / (3 * std::sqrt(d)), four[0], four[1], four[2]);
      g[k] = d * p.v;
      taken[k] = p.taken;
    }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    z[k] = log_of(g[k]) / b[k];
    spread[k] = (2 * uniform(words[3][k]) - 1) * (exp_of(z[k]) / a[k]);
  }
  for (int64_t k = 0; k < n; ++k)
    if (!(std::fabs(z[k]) < 700))  // out of the exponential's range, or NaN
      spread[k] = (2 * uniform(words[3][k]) - 1) * std::exp(std::log(g[k]) / b[k] - std::log(a[k]));
}

// dG/dk of Gamma(k), k >= 1, by the approximations of torch._standard_gamma_grad (ATen/native/Distributions.h): a
// Taylor series of the distribution function, Rice's saddle point for large k, and a rational function in between.
double slope_of(double k, double g) {
  if (g < 0.8f) {
    double numerator = 1, denominator = k, series1 = 1 / k, series2 = 1 / (k * k);
    for (int i = 1; i <= 5; ++i) {
      numerator *= -g / i;
      denominator += 1;
      series1 += numerator / denominator;
      series2 += numerator / (denominator * denominator);
    }
    return -((std::log(g) - gamma1p(k - 1).digamma) * series1 - series2) * g * std::exp(g);
  }
  if (k > 8) {
    if (0.9f * k <= g && g <= 1.1f * k)
      return (1 + 24 * k * (1 + 12 * k)) *
             (1440 * (k * k) + 6 * g * (53 - 120 * g) - 65 * g * g / k + k * (107 + 3600 * g)) /
             (1244160 * (k * k) * (k * k));
    const double root = std::sqrt(8 * k), log_ratio = std::log(g / k), term2 = root / (k - g);
    const double term3 = std::pow(g - k - k * log_ratio, -1.5), term23 = g < k ? term2 - term3 : term2 + term3;
    const double term1 = log_ratio * term23 - std::sqrt(2 / k) * (k + g) / ((k - g) * (k - g));
    return -(1 + 1 / (12 * k) * (1 + 1 / (24 * k))) * g * term1 / root;
  }
  constexpr double c[3][8] = {
      {0.16009398, -0.094634809, 0.025146376, -0.0030648343, 1, 0.32668115, 0.10406089, 0.0014179084},
      {0.53487893, 0.1298071, 0.065735949, -0.0015649758, 0.16639465, 0.020070113, -0.0035938915, -0.00058392623},
      {0.040121004, -0.0065914022, -0.0026286047, -0.0013441777, 0.017050642, -0.0021309326, 0.00085092367,
       -1.5247877e-07}};
  const double u = std::log(g / k), v = std::log(k);
  double of_v[8];
  for (int i = 0; i < 8; ++i) of_v[i] = c[0][i] + u * (c[1][i] + u * c[2][i]);
  return std::exp(
      polynomial(v, of_v[0], of_v[1], of_v[2], of_v[3]) / polynomial(v, of_v[4], of_v[5], of_v[6], of_v[7]));
}

struct Options {
  int64_t n;
  uint64_t seed;
  double eps;

  static Options read(Arguments& arguments) {
    const int64_t n = arguments.next<int64_t>(), seed = arguments.next<int64_t>();
    return {n, static_cast<uint64_t>(seed), arguments.next<double>()};
  }
};

// a and b of `count` elements from `at` on, beginning anew after `size`; NaN outside of the domain.
template <typename T, typename S>
void parameters(
    const std::array<const S*, 3>& from, int64_t at, int64_t size, int64_t count, double eps, double* a, double* b) {
  for (int64_t k = 0; k < count; ++k, at = at + 1 < size ? at + 1 : 0) {
    a[k] = static_cast<T>(from[1][at]) + eps;
    b[k] = static_cast<T>(from[2][at]) + eps;
    a[k] = select(a[k] >= 0, a[k], kNaN<double>);
    b[k] = select(b[k] > 0, b[k], kNaN<double>);
  }
}

template <typename S>
std::array<const S*, 3> pointers(const std::array<Tensor, 3>& in) {
  std::array<const S*, 3> from;
  for (size_t i = 0; i < 3; ++i) from[i] = static_cast<const S*>(in[i].data_ptr());
  return from;
}

void ggd_sample(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<3>();
  const Options options = Options::read(arguments);
  std::vector<int64_t> shape = {options.n};
  for (int64_t i = 0; i < in[0].dim(); ++i) shape.push_back(in[0].size(i));
  const Tensor out = torch::stable::new_empty(in[0], shape);
  for_type(out, [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    const auto from = pointers<S>(in);
    S* const to = static_cast<S*>(out.data_ptr());
    const int64_t count = out.numel(), size = in[0].numel();
    torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
      alignas(64) double a[kBlock], b[kBlock], spread[kBlock], g[kBlock];
      for (int64_t start = first * kBlock; start < std::min(count, last * kBlock); start += kBlock) {
        const int64_t length = std::min(kBlock, count - start);
        parameters<T>(from, start % size, size, length, options.eps, a, b);
        draw(a, b, start, length, options.seed, spread, g);
        for (int64_t k = 0, at = start % size; k < length; ++k, at = at + 1 < size ? at + 1 : 0)
          to[start + k] = static_cast<S>(static_cast<T>(static_cast<T>(from[0][at]) + spread[k]));
      }
    });
  });
  push(stack, out);
}

// Draws the same numbers anew, a block of distributions at a time, and adds up over their n draws.
void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = torch::stable::contiguous(arguments.next<Tensor>());
  const auto in = arguments.contiguous<3>();
  const Options options = Options::read(arguments);
  const int64_t needs = arguments.next<int64_t>();
  const auto out = gradients_like(in, needs);
  for_type(grad, [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    const auto from = pointers<S>(in);
    const S* const grads = static_cast<const S*>(grad.data_ptr());
    const int64_t size = in[0].numel();
    torch::stable::parallel_for(0, (size + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
      alignas(64) double a[kBlock], b[kBlock], spread[kBlock], g[kBlock], sums[3][kBlock];
      for (int64_t start = first * kBlock; start < std::min(size, last * kBlock); start += kBlock) {
        const int64_t length = std::min(kBlock, size - start);
        parameters<T>(from, start, size, length, options.eps, a, b);
        for (auto& sum : sums) std::fill(sum, sum + length, 0.);
        for (int64_t i = 0; i < options.n; ++i) {
          const S* of_draw = grads + i * size + start;
          for (int64_t k = 0; k < length; ++k) sums[0][k] += static_cast<T>(of_draw[k]);
          if (needs & 6) draw(a, b, i * size + start, length, options.seed, spread, g);
          for (int64_t k = 0; needs & 2 && k < length; ++k) sums[1][k] -= static_cast<T>(of_draw[k]) * spread[k] / a[k];
          for (int64_t k = 0; needs & 4 && k < length; ++k)
            sums[2][k] -= static_cast<T>(of_draw[k]) * spread[k] *
                          (std::log(g[k]) + slope_of(1 + 1 / b[k], g[k]) / (g[k] * b[k])) / (b[k] * b[k]);
        }
        for (int i = 0; i < 3; ++i)
          for (int64_t k = 0; needs >> i & 1 && k < length; ++k)
            static_cast<S*>(out[i].data_ptr())[start + k] = static_cast<S>(static_cast<T>(sums[i][k]));
      }
    });
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  m.impl("ggd_sample", fastprob::ggd_sample);
  m.impl("_ggd_sample_backward", fastprob::backward);
}
