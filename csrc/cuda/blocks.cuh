// Element-wise work over tensors on the GPU, and sums over it: contiguous inputs of one shape, 16 bytes of each at a
// time. The grid and the order of summation depend on the number of elements alone, never on the device or on where the
// tensors lie, so that results are the same bits on every run. Nothing here waits for the GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <type_traits>

#include "../arguments.h"
#include "fast.cuh"
#include "lanes.cuh"

namespace fastprob {

using torch::stable::accelerator::DeviceGuard;

// Small blocks: some load while others compute, which hides the latency of both.
constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 16384;  // many waves on the largest GPU, and as many partial sums as one block adds fast
constexpr int kFinishThreads = 512;

// The types that sums and scalars have, and that bodies compute in.
template <typename S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;
template <typename S>
using Number = std::conditional_t<sizeof(S) == 2, Fast, S>;

// A body says how many tensors it reads and writes, and how many of its blocks an SM is to hold at once: 4 leave 128
// registers to a thread, 3 leave 168; as many as need no stack. Outputs that are not wanted are null.
template <typename S, typename Body>
struct Pointers {
  const S* in[Body::kInputs];
  S* out[Body::kOutputs];
  int64_t size;
  bool aligned;
};

// Lanes that are worked on together: of many tensors, or of eight lanes each, all would not fit into the registers.
template <typename S, typename Body>
constexpr int kStep = Body::kInputs + Body::kOutputs < 14 ? (Lanes<S>::kCount < 8 ? Lanes<S>::kCount : 4) : 2;

// Calls body(in, out) for the elements of the lanes from `at` on; the sum of what it returns.
template <typename S, typename Body>
FASTPROB_INLINE Compute<S> for_lanes(const Pointers<S, Body>& tensors, int64_t at, const Body& body) {
  using T = Number<S>;
  const int64_t size = tensors.size;
  const bool vector = tensors.aligned && at + Lanes<S>::kCount <= size;
  // Kept as words: a lane of 16 bits by itself would take a register of 32.
  uint4 in[Body::kInputs], out[Body::kOutputs] = {};
  load(in, tensors.in, at, size, vector);
  Compute<S> sum = 0;
#pragma unroll 1
  for (int first = 0; first < Lanes<S>::kCount; first += kStep<S, Body>) {
    Lanes<S> results[Body::kOutputs] = {};
#pragma unroll
    for (int v = 0; v < kStep<S, Body>; ++v) {
      T x[Body::kInputs], y[Body::kOutputs];
#pragma unroll
      for (int k = 0; k < Body::kInputs; ++k)
        x[k] = static_cast<Compute<S>>(fastprob::bit_cast<Lanes<S>>(in[k]).lane[v]);
      const Compute<S> term = plain(body(x, y));
      sum += select(at + first + v < size, term, Compute<S>(0));
#pragma unroll
      for (int k = 0; k < Body::kOutputs; ++k) results[k].lane[v] = static_cast<S>(plain(y[k]));
    }
    constexpr int words = kStep<S, Body> * sizeof(S) / 4;
#pragma unroll
    for (int k = 0; k < Body::kInputs; ++k) in[k] = shift_out<words>(in[k]);
#pragma unroll
    for (int k = 0; k < Body::kOutputs; ++k) out[k] = shift_in<words>(out[k], fastprob::bit_cast<uint4>(results[k]));
  }
  store(out, tensors.out, at, size, vector);
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
  constexpr int lanes = Lanes<S>::kCount;
  body.start(grad ? static_cast<Compute<S>>(*grad) : Compute<S>(1));
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * lanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * lanes;
#pragma unroll 1
  for (int64_t at = first; at < tensors.size; at += step) sum += for_lanes(tensors, at, body);
  if (partials == nullptr) return;
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename S>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* partials, int64_t count, double divisor, S* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += partials[i];
  sum = block_sum<kFinishThreads>(sum);
  if (threadIdx.x == 0) *out = static_cast<S>(static_cast<Compute<S>>(sum / divisor));
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline int64_t blocks_for(const Tensor& tensor) {
  const int64_t per_block = kThreads * (16 / static_cast<int64_t>(tensor.element_size()));
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
  Pointers<S, Body> tensors{{}, {}, in[0].numel(), true};
  if (tensors.size == 0) return;
  for (int k = 0; k < Body::kInputs; ++k) {
    tensors.in[k] = static_cast<const S*>(in[k].data_ptr());
    tensors.aligned &= is_aligned(tensors.in[k]);
  }
  for (int k = 0; k < Body::kOutputs; ++k) {
    tensors.out[k] = out[k].numel() ? static_cast<S*>(out[k].data_ptr()) : nullptr;
    tensors.aligned &= is_aligned(tensors.out[k]);
  }
  elements_kernel<S, Body><<<static_cast<unsigned>(blocks_for(in[0])), kThreads, 0, current_stream(in[0])>>>(
      tensors, grad ? static_cast<const S*>(grad->data_ptr()) : nullptr,
      partials ? static_cast<double*>(partials->data_ptr()) : nullptr, body);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The partial sums' sum over `divisor`, as a scalar like `like`.
inline Tensor finish(const Tensor& partials, const Tensor& like, double divisor) {
  Tensor out = torch::stable::new_empty(like, {});
  for_type(like, [&](auto, auto storage) {
    using S = decltype(storage);
    finish_kernel<S><<<1, kFinishThreads, 0, current_stream(like)>>>(
        static_cast<const double*>(partials.data_ptr()), partials.numel(), divisor, static_cast<S*>(out.data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace fastprob
