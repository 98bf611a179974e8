// bottleneck: values and gradients. See fastprob/ops/bottleneck.py.
//
// A thread has four elements of a problem, which one Philox call serves for each draw; what they are before the noise
// is mixed in, or the sums over the draws, stay in its registers. Problems redraw the noise that they share: 40
// instructions an element cost less than would the threads that waited for others'.
#include <algorithm>
#include <vector>

#include "../bottleneck.h"
#include "../random.h"
#include "blocks.cuh"

namespace fastprob {
namespace {

constexpr int kQuad = 4;
constexpr int64_t kMaxColumns = 4096, kMaxRows = 65535;  // blocks for a problem, and problems at a time

template <typename S>
struct alignas(kQuad * sizeof(S) < 16 ? kQuad * sizeof(S) : 16) Quad {
  S lane[kQuad];
};

// Pointers to tensors of which every problem has `size` elements, and whether their quads are aligned.
struct Layout {
  int64_t problems, size;
  bool aligned;
};

struct Noise {
  uint64_t seed;
  int64_t samples;
};

// The n elements from `at` on of a quad; 0 in the place of the others.
template <typename S>
FASTPROB_INLINE Quad<S> load(const S* from, int64_t at, int64_t n, bool aligned) {
  if (aligned) return *reinterpret_cast<const Quad<S>*>(from + at);
  Quad<S> quad;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) quad.lane[v] = v < n ? from[at + v] : S(0);
  return quad;
}

template <typename S>
FASTPROB_INLINE void store(S* to, int64_t at, int64_t n, bool aligned, const Compute<S> (&values)[kQuad]) {
  Quad<S> quad;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) quad.lane[v] = static_cast<S>(values[v]);
  if (aligned) {
    *reinterpret_cast<Quad<S>*>(to + at) = quad;
    return;
  }
#pragma unroll
  for (int v = 0; v < kQuad; ++v)
    if (v < n) to[at + v] = quad.lane[v];
}

template <typename T>
FASTPROB_INLINE void draw_quad(uint64_t group, uint64_t seed, int64_t draw, T (&noise)[kQuad]) {
  const auto words = random_words(group, seed, BottleneckOptions::kStream, static_cast<uint32_t>(draw));
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const Normals<T> z = normals<T>(words[2 * pair], words[2 * pair + 1]);
    noise[2 * pair] = z.cosine;
    noise[2 * pair + 1] = z.sine;
  }
}

// Calls body(group, at, n) for this thread's quads: their place in a problem, that of their first element among all
// problems', and how many elements they have.
template <typename Body>
FASTPROB_INLINE void for_quads(const Layout& layout, const Body& body) {
  const int64_t groups = (layout.size + kQuad - 1) / kQuad, step = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 1
  for (int64_t problem = blockIdx.y; problem < layout.problems; problem += gridDim.y)
#pragma unroll 1
    for (int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; group < groups; group += step) {
      const int64_t left = layout.size - group * kQuad;
      body(group, problem * layout.size + group * kQuad, left < kQuad ? left : kQuad);
    }
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) value_kernel(
    const S* x, const S* logits, S* t, S* kl, const Layout layout, const Noise noise, T sigma, T inverse_sigma) {
  const int64_t count = layout.problems * layout.size;
  for_quads(layout, [&](int64_t group, int64_t at, int64_t n) {
    const Quad<S> of_x = load(x, at, n, layout.aligned), of_logits = load(logits, at, n, layout.aligned);
    T mean[kQuad], spread[kQuad], result[kQuad];
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      const Unmixed<T> of =
          unmixed(static_cast<T>(of_x.lane[v]), static_cast<T>(of_logits.lane[v]), sigma, inverse_sigma);
      mean[v] = of.mean;
      spread[v] = of.spread;
      result[v] = of.kl;
    }
    store(kl, at, n, layout.aligned, result);
#pragma unroll 1
    for (int64_t draw = 0; draw < noise.samples; ++draw) {
      draw_quad(group, noise.seed, draw, result);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) result[v] = mean[v] + spread[v] * result[v];
      store(t, draw * count + at, n, layout.aligned, result);
    }
  });
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(
    const S* grad_t,
    const S* grad_kl,
    const S* x,
    const S* logits,
    S* for_x,
    S* for_logits,
    const Layout layout,
    const Noise noise,
    T sigma,
    T inverse_sigma) {
  const int64_t count = layout.problems * layout.size;
  for_quads(layout, [&](int64_t group, int64_t at, int64_t n) {
    T total[kQuad] = {}, along[kQuad] = {};
#pragma unroll 1
    for (int64_t draw = 0; draw < noise.samples; ++draw) {
      const Quad<S> of_t = load(grad_t, draw * count + at, n, layout.aligned);
      T z[kQuad];
      draw_quad(group, noise.seed, draw, z);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        total[v] += static_cast<T>(of_t.lane[v]);
        along[v] += static_cast<T>(of_t.lane[v]) * z[v];
      }
    }
    const Quad<S> of_kl = load(grad_kl, at, n, layout.aligned), of_x = load(x, at, n, layout.aligned),
                  of_logits = load(logits, at, n, layout.aligned);
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      const Slopes<T> of = slopes(
          static_cast<T>(of_x.lane[v]), static_cast<T>(of_logits.lane[v]), static_cast<T>(of_kl.lane[v]), total[v],
          along[v], sigma, inverse_sigma);
      total[v] = of.for_x;
      along[v] = of.for_logit;
    }
    if (for_x != nullptr) store(for_x, at, n, layout.aligned, total);
    if (for_logits != nullptr) store(for_logits, at, n, layout.aligned, along);
  });
}

template <typename S>
S* data(const Tensor& x) {
  return x.numel() ? static_cast<S*>(x.data_ptr()) : nullptr;
}

// Launches a kernel of quads over tensors, given and made, for storage type S, which come first among its arguments.
template <typename S, typename T, typename Kernel, typename... Tensors>
void launch_quads(Kernel kernel, const Tensor& x, const BottleneckOptions& options, const Tensors&... tensors) {
  const Problems problems(x, options.batch_dims);
  if (x.numel() == 0) return;
  const bool aligned =
      problems.size % kQuad == 0 && ((reinterpret_cast<uintptr_t>(data<S>(tensors)) % alignof(Quad<S>) == 0) && ...);
  const int64_t groups = (problems.size + kQuad - 1) / kQuad, columns = (groups + kThreads - 1) / kThreads;
  const dim3 grid(
      static_cast<unsigned>(std::min(columns, kMaxColumns)), static_cast<unsigned>(std::min(problems.count, kMaxRows)));
  launch(
      kernel, grid, kThreads, x, data<S>(tensors)..., Layout{problems.count, problems.size, aligned},
      Noise{options.seed, options.samples}, T(options.sigma), T(1 / options.sigma));
}

void bottleneck(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<2>();
  const auto options = BottleneckOptions::read(arguments);
  const Cuda::Guard guard(in[0].get_device_index());
  const std::array<Tensor, 2> out = options.outputs_for(in[0]);
  for_type(in[0], [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    launch_quads<S, T>(value_kernel<S, T>, in[0], options, in[0], in[1], out[0], out[1]);
  });
  push(stack, out);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto grads = arguments.contiguous<2>(), in = arguments.contiguous<2>();
  const auto options = BottleneckOptions::read(arguments);
  const Cuda::Guard guard(in[0].get_device_index());
  const auto out = gradients_like(in, arguments.next<int64_t>());
  for_type(in[0], [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    launch_quads<S, T>(gradient_kernel<S, T>, in[0], options, grads[0], grads[1], in[0], in[1], out[0], out[1]);
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) {
  m.impl("bottleneck", fastprob::bottleneck);
  m.impl("_bottleneck_backward", fastprob::backward);
}
