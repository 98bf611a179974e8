// bottleneck of an element, and its options, for the CPU and CUDA: the maths stands in fastprob/ops/bottleneck.py.
#pragma once

#include <array>
#include <vector>

#include "arguments.h"
#include "maths.h"

namespace fastprob {

struct BottleneckOptions {
  static constexpr uint32_t kStream = (1u << 31) + 1;

  uint64_t seed;
  int64_t samples;
  double sigma;
  int64_t batch_dims;

  static BottleneckOptions read(Arguments& arguments) {
    const auto seed = static_cast<uint64_t>(arguments.next<int64_t>());
    const auto samples = arguments.next<int64_t>();
    const auto sigma = arguments.next<double>();
    return {seed, samples, sigma, arguments.next<int64_t>()};
  }

  // Room for t and kl.
  std::array<Tensor, 2> outputs_for(const Tensor& x) const {
    std::vector<int64_t> sizes = {samples};
    for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
    return {torch::stable::new_empty(x, sizes), torch::stable::empty_like(x)};
  }
};

// How many problems are stacked, and how many elements one has.
struct Problems {
  int64_t count = 1, size = 1;

  Problems(const Tensor& x, int64_t batch_dims) {
    for (int64_t i = 0; i < x.dim(); ++i) (i < batch_dims ? count : size) *= x.size(i);
  }
};

// e^-x for x >= 0, 0 below the least normal number; log(1 + e) for 0 <= e <= 1, relative error 3e-8.
FASTPROB_INLINE float decay(float x) {
  const float v = x * -1.44269504f;
#if defined(__CUDA_ARCH__)
  return exp2_hardware(v);
#else
  return select(v < -126.f, 0.f, exp2_bounded(v));
#endif
}
FASTPROB_INLINE double decay(double x) { return std::exp(-x); }
FASTPROB_INLINE float log1p_of_decay(float e) {
  const float e2 = e * e;  // even and odd powers apart halve what the loops wait for
  return e * polynomial(e2, 0.9999999745f, 0.3332034351f, 0.191451151f, 0.07921070655f, 0.005384056802f) +
         e2 * polynomial(e2, -0.4999955259f, -0.2485294543f, -0.1374661934f, -0.03011094444f);
}
FASTPROB_INLINE double log1p_of_decay(double e) { return std::log1p(e); }

// lambda and 1 - lambda; e is e^-|logit|.
template <typename T>
struct Gate {
  T e, kept, lost;
};

template <typename T>
FASTPROB_INLINE Gate<T> gate(T logit) {
  const T e = decay(select(logit < 0, -logit, logit)), larger = inverse(1 + e), smaller = e * larger;
  return {e, select(logit < 0, smaller, larger), select(logit < 0, larger, smaller)};
}

// What an element is before the noise is drawn, t = mean + spread eps, and its divergence.
template <typename T>
struct Unmixed {
  T mean, spread, kl;
};

template <typename T>
FASTPROB_INLINE Unmixed<T> unmixed(T x, T logit, T sigma, T inverse_sigma) {
  const Gate<T> g = gate(logit);
  const T mean = g.kept * x, u = mean * inverse_sigma;
  const T shut = select(logit < 0, T(0), logit) + log1p_of_decay(g.e);  // -log(1 - lambda)
  return {mean, g.lost * sigma, (u * u - g.kept * (1 + g.lost)) / 2 + shut};
}

// Gradients, given kl's and the sums over the draws of t's and of t's times the noise.
template <typename T>
struct Slopes {
  T for_x, for_logit;
};

template <typename T>
FASTPROB_INLINE Slopes<T> slopes(T x, T logit, T of_kl, T total, T along, T sigma, T inverse_sigma) {
  const Gate<T> g = gate(logit);
  const T mean = g.kept * x, u = mean * inverse_sigma;
  const T through_t = g.lost * (mean * total - g.kept * (sigma * along));
  const T through_kl = g.kept + g.lost * (u * u - g.kept * g.lost);
  return {g.kept * (total + of_kl * (u * inverse_sigma)), through_t + of_kl * through_kl};
}

}  // namespace fastprob
