// bottleneck: values and gradients. See fastprob/ops/bottleneck.py.
//
// A thread has four elements of a problem, which one Philox call serves for each draw; what they are before the noise
// is mixed in, or the sums over the draws, stay in its registers. Every problem draws the noise that it shares anew:
// its 40 instructions an element take about as long as the element's way to memory.
#include <algorithm>

#include "../bottleneck.h"
#include "../random.h"
#include "blocks.cuh"

namespace fastprob {
namespace {

constexpr int kQuad = 4;
constexpr int64_t kMaxColumns = 4096, kMaxRows = 65535;  // blocks for a problem, and problems at a time

template <typename S>
struct alignas(std::min(kQuad * sizeof(S), size_t(16))) Quad {
  S lane[kQuad];
};

// What all quads of tensors have in common.
template <typename T>
struct Common {
  int64_t problems, size;
  uint64_t seed;
  int64_t samples;
  T sigma, inverse_sigma;
};

// A quad of a tensor from `at` on. Of those that are not whole n elements exist; others are 0.
template <bool whole, typename S>
FASTPROB_INLINE Quad<S> load(const S* from, int64_t at, int64_t n) {
  Quad<S> quad;
  if constexpr (whole) {
    quad = *reinterpret_cast<const Quad<S>*>(from + at);
  } else {
#pragma unroll
    for (int v = 0; v < kQuad; ++v) quad.lane[v] = v < n ? from[at + v] : S(0);
  }
  return quad;
}

template <bool whole, typename S, typename T>
FASTPROB_INLINE void store(S* to, int64_t at, int64_t n, const T (&values)[kQuad]) {
  Quad<S> quad;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) quad.lane[v] = static_cast<S>(values[v]);
  if constexpr (whole) {
    *reinterpret_cast<Quad<S>*>(to + at) = quad;
  } else {
#pragma unroll
    for (int v = 0; v < kQuad; ++v)
      if (v < n) to[at + v] = quad.lane[v];
  }
}

template <typename T>
FASTPROB_INLINE void draw_quad(uint64_t group, uint64_t seed, int64_t draw, T (&noise)[kQuad]) {
  const Words words = random_words(group, seed, BottleneckOptions::kStream, static_cast<uint32_t>(draw));
#pragma unroll
  for (int v = 0; v < kQuad; v += 2) {
    const Normals<T> z = normals<T>(words[v], words[v + 1]);
    noise[v] = z.cosine;
    noise[v + 1] = z.sine;
  }
}

// Calls body(group, at, n) for each of this thread's quads: its place in its problem and among all elements.
template <typename T, typename Body>
FASTPROB_INLINE void for_quads(const Common<T>& common, const Body& body) {
  const int64_t groups = (common.size + kQuad - 1) / kQuad, step = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 1
  for (int64_t problem = blockIdx.y; problem < common.problems; problem += gridDim.y)
#pragma unroll 1
    for (int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; group < groups; group += step)
      body(group, problem * common.size + group * kQuad, common.size - group * kQuad);
}

template <typename S, bool whole>
__global__ void __launch_bounds__(kThreads)
    bottleneck_kernel(const Common<Compute<S>> common, const S* x, const S* logits, S* t, S* kl) {
  using T = Compute<S>;
  const int64_t count = common.problems * common.size;
  for_quads(common, [&](int64_t group, int64_t at, int64_t n) {
    const Quad<S> of_x = load<whole>(x, at, n), of_logits = load<whole>(logits, at, n);
    T mean[kQuad], spread[kQuad], result[kQuad];
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      const Unmixed<T> of =
          unmixed(static_cast<T>(of_x.lane[v]), static_cast<T>(of_logits.lane[v]), common.sigma, common.inverse_sigma);
      mean[v] = of.mean;
      spread[v] = of.spread;
      result[v] = of.kl;
    }
    store<whole>(kl, at, n, result);
#pragma unroll 1
    for (int64_t draw = 0; draw < common.samples; ++draw) {
      draw_quad(group, common.seed, draw, result);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) result[v] = mean[v] + spread[v] * result[v];
      store<whole>(t, draw * count + at, n, result);
    }
  });
}

template <typename S, bool whole>
__global__ void __launch_bounds__(kThreads) bottleneck_gradient_kernel(
    const Common<Compute<S>> common,
    const S* grad_t,
    const S* grad_kl,
    const S* x,
    const S* logits,
    S* for_x,
    S* for_logits) {
  using T = Compute<S>;
  const int64_t count = common.problems * common.size;
  for_quads(common, [&](int64_t group, int64_t at, int64_t n) {
    T total[kQuad] = {}, along[kQuad] = {};
#pragma unroll 1
    for (int64_t draw = 0; draw < common.samples; ++draw) {
      const Quad<S> of_t = load<whole>(grad_t, draw * count + at, n);
      T noise[kQuad];
      draw_quad(group, common.seed, draw, noise);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        total[v] += static_cast<T>(of_t.lane[v]);
        along[v] += static_cast<T>(of_t.lane[v]) * noise[v];
      }
    }
    const Quad<S> of_kl = load<whole>(grad_kl, at, n), of_x = load<whole>(x, at, n);
    const Quad<S> of_logits = load<whole>(logits, at, n);
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      const Slopes<T> of = slopes(
          static_cast<T>(of_x.lane[v]), static_cast<T>(of_logits.lane[v]), static_cast<T>(of_kl.lane[v]), total[v],
          along[v], common.sigma, common.inverse_sigma);
      total[v] = of.for_x;
      along[v] = of.for_logit;
    }
    if (for_x != nullptr) store<whole>(for_x, at, n, total);
    if (for_logits != nullptr) store<whole>(for_logits, at, n, along);
  });
}

// Launches `whole` or `parts`, kernels of quads of these tensors, of which x is one; null for a tensor without
// elements.
template <typename S, typename Kernel, typename... Tensors>
void launch_quads(
    Kernel whole, Kernel parts, const BottleneckOptions& options, const Tensor& x, const Tensors&... tensors) {
  if (x.numel() == 0) return;
  const Problems problems(x, options.batch_dims);
  const auto is_aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.data_ptr()) % alignof(Quad<S>) == 0;
  };
  const bool is_whole = problems.size % kQuad == 0 && (is_aligned(tensors) && ...);
  const int64_t columns = (problems.size + kQuad * kThreads - 1) / (kQuad * kThreads);
  const dim3 grid(
      static_cast<unsigned>(std::min(columns, kMaxColumns)), static_cast<unsigned>(std::min(problems.count, kMaxRows)));
  using T = Compute<S>;
  const Common<T> common{problems.count,  problems.size,    options.seed,
                         options.samples, T(options.sigma), T(1 / options.sigma)};
  launch(
      is_whole ? whole : parts, grid, kThreads, x, common,
      (tensors.numel() ? static_cast<S*>(tensors.data_ptr()) : nullptr)...);
}

void bottleneck(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<2>();
  const auto options = BottleneckOptions::read(arguments);
  const Cuda::Guard guard(in[0].get_device_index());
  const auto out = options.outputs_for(in[0]);
  for_type(in[0], [&](auto, auto storage) {
    using S = decltype(storage);
    launch_quads<S>(
        bottleneck_kernel<S, true>, bottleneck_kernel<S, false>, options, in[0], in[0], in[1], out[0], out[1]);
  });
  push(stack, out);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto grads = arguments.contiguous<2>(), in = arguments.contiguous<2>();
  const auto options = BottleneckOptions::read(arguments);
  const Cuda::Guard guard(in[0].get_device_index());
  const auto out = gradients_like(in, arguments.next<int64_t>());
  for_type(in[0], [&](auto, auto storage) {
    using S = decltype(storage);
    launch_quads<S>(
        bottleneck_gradient_kernel<S, true>, bottleneck_gradient_kernel<S, false>, options, in[0], grads[0], grads[1],
        in[0], in[1], out[0], out[1]);
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) {
  m.impl("bottleneck", fastprob::bottleneck);
  m.impl("_bottleneck_backward", fastprob::backward);
}
