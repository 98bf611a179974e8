// ggd_sample: values. See fastprob/ops/ggd_sample.py.
//
// In double, whatever the type, as the reference. Marsaglia and Tsang's squeeze, w < 1 - 0.0331 x^4, spares two
// logarithms for nine proposals in ten; it takes none that the test itself would not.
#include <algorithm>
#include <cmath>

#include "../random.h"
#include "blocks.h"

namespace fastprob {
namespace {

constexpr uint32_t kStream = 1u << 31;
constexpr int kAttempts = 16;
constexpr double kPi = 3.141592653589793238463;

double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

// Element `element` of the draws. NaN outside of the domain.
double draw(double mu, double a, double b, uint64_t element, uint64_t seed) {
  const double d = 2. / 3 + 1 / b, slope = 1 / (3 * std::sqrt(d));
  double u = 0, v = 1;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const auto words = random_words(element, seed, kStream, attempt);
    if (attempt == 0) u = 2 * uniform(words[3]) - 1;
    const double x = std::sqrt(-2 * std::log(uniform(words[0]))) * std::cos(2 * kPi * uniform(words[1]));
    const double root = 1 + x * slope, x2 = x * x, w = uniform(words[2]);
    v = root > 0 ? root * root * root : 1;
    if (root > 0 && (w < 1 - 0.0331 * x2 * x2 || std::log(w) < x2 / 2 + d * (1 - v + std::log(v)))) break;
  }
  const double z = std::log(d * v) / b;
  return mu + u * (z < 700 ? std::exp(z) / a : std::exp(z - std::log(a)));
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
      for (int64_t e = first * kBlock; e < std::min(count, last * kBlock); ++e) {
        const int64_t k = e % size;
        const double mu = static_cast<T>(from[0][k]), a = static_cast<T>(from[1][k]) + eps,
                     b = static_cast<T>(from[2][k]) + eps;
        const double x = draw(mu, a >= 0 ? a : kNaN<double>, b > 0 ? b : kNaN<double>, e, seed);
        to[e] = static_cast<S>(static_cast<T>(x));
      }
    });
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) { m.impl("ggd_sample", fastprob::ggd_sample); }
