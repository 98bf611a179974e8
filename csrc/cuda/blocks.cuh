// Element-wise work over tensors on the GPU, and sums over it: contiguous inputs of one shape, 8 bytes of each at a
// time. The grid and the order of summation depend on the number of elements alone, never on the device or on where the
// tensors lie, so that results are the same bits on every run. Nothing here waits for the GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <type_traits>

#include "../arguments.h"
#include "../elementwise.h"
#include "fast.cuh"

namespace fastprob {

// Small blocks: some load while others compute, which hides the latency of both.
constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 4096;  // some waves on the largest GPU; with four times as many, a tenth more time
constexpr int kFinishThreads = 1024;

// The types that sums and scalars have, and that bodies compute in.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;
template <typename S>
using Number = std::conditional_t<sizeof(S) == 2, Fast, S>;

// As many elements of a tensor as a thread works on at once: more of eight tensors would not fit into the registers.
template <typename S>
struct alignas(8) Vector {
  static constexpr int kCount = 8 / sizeof(S);
  S lane[kCount];
};

// A body says how many tensors it reads and writes, and how many of its blocks an SM is to hold at once: 65536
// registers are for all their threads. Inputs are aligned to vectors; outputs that are not wanted are null.
template <typename S, typename Body>
struct Pointers {
  const S* in[Body::kInputs];
  S* out[Body::kOutputs];
  int64_t size;
};

// Calls body(in, out) for each lane of V, a vector or an element, at index `at`; the sum of what it returns.
template <typename V, typename S, typename Body>
FASTPROB_INLINE Compute<S> for_lanes(const Pointers<S, Body>& tensors, int64_t at, const Body& body) {
  using T = Number<S>;
  constexpr int lanes = sizeof(V) / sizeof(S);
  Vector<S> in[Body::kInputs], out[Body::kOutputs];
#pragma unroll
  for (int k = 0; k < Body::kInputs; ++k) *reinterpret_cast<V*>(&in[k]) = reinterpret_cast<const V*>(tensors.in[k])[at];
  Compute<S> sum = 0;
#pragma unroll
  for (int v = 0; v < lanes; ++v) {
    T x[Body::kInputs], y[Body::kOutputs];
#pragma unroll
    for (int k = 0; k < Body::kInputs; ++k) x[k] = static_cast<Compute<S>>(in[k].lane[v]);
    sum += plain(body(x, y));
#pragma unroll
    for (int k = 0; k < Body::kOutputs; ++k) out[k].lane[v] = static_cast<S>(plain(y[k]));
  }
#pragma unroll
  for (int k = 0; k < Body::kOutputs; ++k)
    if (tensors.out[k] != nullptr) reinterpret_cast<V*>(tensors.out[k])[at] = *reinterpret_cast<const V*>(&out[k]);
  return sum;
}

// The sum over a block's threads, in a fixed order; thread 0 gets it.
template <int threads>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[threads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < threads / 32; ++w) sum += warps[w];
  return sum;
}

template <typename S, typename Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocksPerSM)
    elements_kernel(const __grid_constant__ Pointers<S, Body> tensors, const S* grad, double* partials, Body body) {
  constexpr int lanes = Vector<S>::kCount;
  body.start(grad ? static_cast<Compute<S>>(*grad) : Compute<S>(1));
  const int64_t vectors = tensors.size / lanes, step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  double sum = 0;
#pragma unroll 1
  for (int64_t at = first; at < vectors; at += step) sum += for_lanes<Vector<S>>(tensors, at, body);
  if (lanes > 1 && first < tensors.size % lanes) sum += for_lanes<S>(tensors, vectors * lanes + first, body);
  if (partials == nullptr) return;
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Loads all of a thread's partial sums before it adds any: their latency is most of this kernel's time.
template <typename S>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* partials, int64_t count, double divisor, S* out) {
  double terms[kMaxBlocks / kFinishThreads];
#pragma unroll
  for (int u = 0; u < kMaxBlocks / kFinishThreads; ++u) {
    const int64_t i = u * kFinishThreads + threadIdx.x;
    terms[u] = i < count ? partials[i] : 0;
  }
  double sum = 0;
  for (double term : terms) sum += term;
  sum = block_sum<kFinishThreads>(sum);
  if (threadIdx.x == 0) *out = static_cast<S>(static_cast<Compute<S>>(sum / divisor));
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches a kernel with no syntax of CUDA's own, which a host compiler would not take.
template <typename... Parameters, typename... Given>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, const Tensor& like, Given... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.stream = current_stream(like);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// A tensor or, where it is not aligned to vectors, a copy that is.
inline Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 8 ? torch::stable::clone(tensor) : tensor;
}

inline int64_t blocks_for(const Tensor& tensor) {
  const int64_t per_block = kThreads * (8 / static_cast<int64_t>(tensor.element_size()));
  return std::min((tensor.numel() + per_block - 1) / per_block, kMaxBlocks);
}

// Room for a sum over tensors like this one.
inline Tensor partials_for(const Tensor& like) {
  return torch::stable::new_empty(like, {blocks_for(like)}, ScalarType::Double);
}

// Runs a body over tensors of storage type S; outputs with no elements are not stored. `grad`, a scalar, goes to the
// body; each block's sum goes to `partials`. Both may be absent (null).
template <typename S, typename Body, size_t I, size_t O>
void for_elements(
    const std::array<Tensor, I>& in,
    const std::array<Tensor, O>& out,
    const Tensor* grad,
    const Tensor* partials,
    const Body& body) {
  static_assert(I == Body::kInputs && O >= Body::kOutputs, "for_elements: the body is for other tensors");
  Pointers<S, Body> tensors{{}, {}, in[0].numel()};
  if (tensors.size == 0) return;
  std::array<Tensor, Body::kInputs> from;
  for (int k = 0; k < Body::kInputs; ++k) {
    from[k] = aligned(in[k]);
    tensors.in[k] = static_cast<const S*>(from[k].data_ptr());
  }
  for (int k = 0; k < Body::kOutputs; ++k)
    tensors.out[k] = out[k].numel() ? static_cast<S*>(out[k].data_ptr()) : nullptr;
  launch(
      elements_kernel<S, Body>, static_cast<unsigned>(blocks_for(in[0])), kThreads, in[0], tensors,
      grad ? static_cast<const S*>(grad->data_ptr()) : nullptr,
      partials ? static_cast<double*>(partials->data_ptr()) : nullptr, body);
}

// The partial sums' sum over `divisor`, as a scalar like `like`.
inline Tensor finish(const Tensor& partials, const Tensor& like, double divisor) {
  Tensor out = torch::stable::new_empty(like, {});
  for_type(like, [&](auto, auto storage) {
    using S = decltype(storage);
    launch(
        finish_kernel<S>, 1, kFinishThreads, like, static_cast<const double*>(partials.data_ptr()), partials.numel(),
        divisor, static_cast<S*>(out.data_ptr()));
  });
  return out;
}

// The body of an operator's function: values or, with gradients, these times a scalar over `divisor`, or times the last
// input where that is one more than the function's.
template <bool has_gradients, size_t inputs, size_t outputs, typename F, typename T>
struct FunctionBody {
  static constexpr int kInputs = inputs, kOutputs = outputs, kBlocksPerSM = 4;
  F function;
  T divisor, scale;

  FASTPROB_INLINE void start(T grad) { scale = grad / divisor; }
  FASTPROB_INLINE T operator()(const T (&in)[kInputs], T (&out)[kOutputs]) const {
    return call(in, out, std::make_index_sequence<has_gradients ? outputs : inputs>());
  }

 private:
  template <size_t... K>
  FASTPROB_INLINE T call(const T (&in)[kInputs], T (&out)[kOutputs], std::index_sequence<K...>) const {
    const auto y = function(in[K]...);
    if constexpr (has_gradients) {
      const T g = inputs > outputs ? in[inputs - 1] : scale;
      ((out[K] = g * y.slopes[K]), ...);
    } else {
      out[0] = y.value;
    }
    return y.value;
  }
};

template <bool has_gradients, size_t inputs, size_t outputs, typename F, typename T>
FunctionBody<has_gradients, inputs, outputs, F, T> body_of(const F& function, T divisor) {
  return {function, divisor, 1};
}

// Runs an operator's function, or its own body, over tensors.
struct Cuda {
  using Guard = torch::stable::accelerator::DeviceGuard;

  template <bool has_gradients, typename Op, size_t I, size_t O>
  static void run(
      const Op& op,
      int64_t needs,
      const std::array<Tensor, I>& in,
      const std::array<Tensor, O>& out,
      double divisor = 1,
      const Tensor* grad = nullptr,
      const Tensor* partials = nullptr) {
    for_type(in[0], [&](auto, auto storage) {
      using S = decltype(storage);
      using T = Number<S>;
      op.template visit<T, has_gradients>(needs, [&](const auto& function) {
        const T count = static_cast<Compute<S>>(divisor);
        for_elements<S>(in, out, grad, partials, body_of<has_gradients, I, O>(function, count));
      });
    });
  }

  template <bool has_gradients, typename Op, size_t I, size_t O>
  static Tensor sum(
      const Op& op, int64_t needs, const std::array<Tensor, I>& in, const std::array<Tensor, O>& out, double divisor) {
    const Tensor partials = partials_for(in[0]);
    run<has_gradients>(op, needs, in, out, divisor, nullptr, &partials);
    return finish(partials, in[0], divisor);
  }

  template <typename Op, size_t N>
  static void gradients(
      const Op& op,
      int64_t needs,
      const std::array<Tensor, N>& in,
      const std::array<Tensor, N>& out,
      const Tensor& grad,
      double divisor) {
    run<true>(op, needs, in, out, divisor, &grad);
  }
};

}  // namespace fastprob
