// bottleneck: values and gradients. See fastprob/ops/bottleneck.py.
//
// A task is a block of elements of some stacked problems. It draws the block's noise once, of all draws, and goes
// through its problems with it. What bounds it, float32 on AVX2: where problems share their noise the memory, for t is
// written and its gradient read once; else the noise, 10 instructions a number each way, half of them Philox's.
#include "../bottleneck.h"

#include <algorithm>
#include <array>
#include <vector>

#include "../random.h"
#include "blocks.h"
#include "half.h"

namespace fastprob {
namespace {

constexpr int64_t kNoise = 1 << 14;  // numbers of noise that a task keeps, in L2, but for those of the smallest blocks
constexpr int64_t kSmallest = 64;    // elements of a block
constexpr int64_t kProblems = 16;    // of a task

// The noise of so many groups of four elements.
template <typename T>
void draw_noise(uint64_t first, int64_t groups, uint64_t seed, uint32_t draw, T* to) {
  alignas(64) uint32_t words[4][kBlock / 4];
  random_words(first, groups, seed, BottleneckOptions::kStream, draw, words);
#pragma omp simd
  for (int64_t k = 0; k < groups; ++k) {
    const Normals<T> z0 = normals<T>(words[0][k], words[1][k]), z1 = normals<T>(words[2][k], words[3][k]);
    to[4 * k] = z0.cosine;
    to[4 * k + 1] = z0.sine;
    to[4 * k + 2] = z1.cosine;
    to[4 * k + 3] = z1.sine;
  }
}

// Calls body(noise, stride, at, n) for every block: n elements from `at` on, and their noise [samples, stride].
template <typename T, typename Body>
void for_noisy_blocks(const Problems& problems, const BottleneckOptions& options, const Body& body) {
  const int64_t room = kNoise / std::max(options.samples, int64_t(1)) / kSmallest * kSmallest;
  const int64_t stride = std::clamp(room, kSmallest, kBlock), blocks = (problems.size + stride - 1) / stride;
  const int64_t tasks = blocks * ((problems.count + kProblems - 1) / kProblems);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> noise(options.samples * stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t start = task % blocks * stride, n = std::min(stride, problems.size - start);
      for (int64_t draw = 0; draw < options.samples; ++draw)
        draw_noise(start / 4, (n + 3) / 4, options.seed, static_cast<uint32_t>(draw), &noise[draw * stride]);
      const int64_t first = task / blocks * kProblems, last = std::min(problems.count, first + kProblems);
      for (int64_t problem = first; problem < last; ++problem)
        body(noise.data(), stride, problem * problems.size + start, n);
    }
  });
}

// n elements in the type of computation: in place, or in `room`.
template <typename T, typename S>
const T* load(const S* from, int64_t n, T* room) {
  if constexpr (std::is_same_v<T, S>) return from;
  convert(from, room, n);
  return room;
}

template <typename S>
S* data(const Tensor& x) {
  return static_cast<S*>(x.data_ptr());
}

void bottleneck(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<2>();
  const auto options = BottleneckOptions::read(arguments);
  const std::array<Tensor, 2> out = options.outputs_for(in[0]);
  const int64_t count = in[0].numel();
  for_type(in[0], [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    const T sigma = T(options.sigma), inverse_sigma = T(1 / options.sigma);
    const auto values = [&](const T* noise, int64_t stride, int64_t at, int64_t n) {
      alignas(64) T rooms[2][kBlock], mean[kBlock], spread[kBlock], room[kBlock];
      const T *x = load(data<S>(in[0]) + at, n, rooms[0]), *logits = load(data<S>(in[1]) + at, n, rooms[1]);
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) {
        const Unmixed<T> of = unmixed(x[k], logits[k], sigma, inverse_sigma);
        mean[k] = of.mean;
        spread[k] = of.spread;
        room[k] = of.kl;
      }
      convert(room, data<S>(out[1]) + at, n);
      for (int64_t draw = 0; draw < options.samples; ++draw, noise += stride) {
        S* const to = data<S>(out[0]) + draw * count + at;
        T* const t = std::is_same_v<T, S> ? reinterpret_cast<T*>(to) : room;
        for (int64_t k = 0; k < n; ++k) t[k] = mean[k] + spread[k] * noise[k];
        if (!std::is_same_v<T, S>) convert(t, to, n);
      }
    };
    for_noisy_blocks<T>(Problems(in[0], options.batch_dims), options, values);
  });
  push(stack, out);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto grads = arguments.contiguous<2>(), in = arguments.contiguous<2>();
  const auto options = BottleneckOptions::read(arguments);
  const int64_t needs = arguments.next<int64_t>(), count = in[0].numel();
  const auto out = gradients_like(in, needs);
  for_type(in[0], [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    const T sigma = T(options.sigma), inverse_sigma = T(1 / options.sigma);
    const auto gradients = [&](const T* noise, int64_t stride, int64_t at, int64_t n) {
      alignas(64) T rooms[4][kBlock], total[kBlock] = {}, along[kBlock] = {}, results[2][kBlock];
      const T *x = load(data<S>(in[0]) + at, n, rooms[0]), *logits = load(data<S>(in[1]) + at, n, rooms[1]);
      const T* of_kl = load(data<S>(grads[1]) + at, n, rooms[2]);
      for (int64_t draw = 0; draw < options.samples; ++draw, noise += stride) {
        const T* of_t = load(data<S>(grads[0]) + draw * count + at, n, rooms[3]);
        for (int64_t k = 0; k < n; ++k) {
          total[k] += of_t[k];
          along[k] += of_t[k] * noise[k];
        }
      }
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) {
        const Slopes<T> of = slopes(x[k], logits[k], of_kl[k], total[k], along[k], sigma, inverse_sigma);
        results[0][k] = of.for_x;
        results[1][k] = of.for_logit;
      }
      for (int i = 0; i < 2; ++i)
        if (needs >> i & 1) convert(results[i], data<S>(out[i]) + at, n);
    };
    for_noisy_blocks<T>(Problems(in[0], options.batch_dims), options, gradients);
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  m.impl("bottleneck", fastprob::bottleneck);
  m.impl("_bottleneck_backward", fastprob::backward);
}
