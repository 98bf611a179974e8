// _scale_: tensors times a scalar, in place. See fastprob/_op.py.
#include <algorithm>
#include <vector>

#include "blocks.cuh"

namespace fastprob {
namespace {

constexpr int kGroup = 8;         // tensors of one launch: all that any operator has
constexpr int kInFlight = 4;      // vectors that a thread loads before it stores any
constexpr int kMaxColumns = 128;  // blocks for a tensor: few, as usually they find a scale of 1 and leave

// 16 bytes of a tensor.
template <typename S>
struct alignas(16) Lanes {
  static constexpr int kCount = 16 / sizeof(S);
  S lane[kCount];
};

template <typename S>
struct Group {
  S* data[kGroup];
  int64_t size[kGroup];
};

template <typename S>
constexpr int64_t kTile = int64_t(kThreads) * kInFlight * Lanes<S>::kCount;

// Multiplies a block's tile of a tensor; `at`: this thread's first element.
template <typename S>
FASTPROB_INLINE void scale_tile(S* data, int64_t at, int64_t size, bool aligned, Compute<S> scale) {
  constexpr int lanes = Lanes<S>::kCount;
  constexpr int64_t apart = int64_t(kThreads) * lanes;
  Lanes<S> values[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int64_t from = at + u * apart;
    if (aligned && from + lanes <= size)
      values[u] = *reinterpret_cast<const Lanes<S>*>(data + from);
    else
      for (int v = 0; v < lanes; ++v) values[u].lane[v] = from + v < size ? data[from + v] : S(0);
  }
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
    for (int v = 0; v < lanes; ++v)
      values[u].lane[v] = static_cast<S>(static_cast<Compute<S>>(values[u].lane[v]) * scale);
    const int64_t to = at + u * apart;
    if (aligned && to + lanes <= size)
      *reinterpret_cast<Lanes<S>*>(data + to) = values[u];
    else
      for (int v = 0; v < lanes && to + v < size; ++v) data[to + v] = values[u].lane[v];
  }
}

// Rows of the grid are tensors. A loss's gradient is 1 as a rule, and then this reads one number.
template <typename S>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Group<S> group, const S* scale) {
  const Compute<S> factor = static_cast<Compute<S>>(*scale);
  if (factor == 1) return;
  S* data = group.data[blockIdx.y];
  const int64_t size = group.size[blockIdx.y];
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int64_t first = blockIdx.x * kTile<S> + threadIdx.x * Lanes<S>::kCount;
  for (int64_t at = first; at < size; at += gridDim.x * kTile<S>) scale_tile(data, at, size, aligned, factor);
}

template <typename S>
void scale_group(const Tensor* tensors, int count, const Tensor& scale) {
  Group<S> group{};
  int64_t largest = 0;
  for (int k = 0; k < count; ++k) {
    group.data[k] = static_cast<S*>(tensors[k].data_ptr());
    group.size[k] = tensors[k].numel();
    largest = std::max(largest, group.size[k]);
  }
  const int64_t columns = std::min<int64_t>((largest + kTile<S> - 1) / kTile<S>, kMaxColumns);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(count));
  launch(scale_kernel<S>, grid, kThreads, scale, group, static_cast<const S*>(scale.data_ptr()));
}

void scale_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  std::vector<Tensor> tensors;
  for (const Tensor& t : arguments.next<std::vector<Tensor>>())
    if (t.numel()) tensors.push_back(t);
  const Tensor scale = arguments.next<Tensor>();
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(
        t.scalar_type() == scale.scalar_type() && t.get_device_index() == scale.get_device_index() && t.is_contiguous(),
        "fastprob: _scale_ takes contiguous tensors of the scale's dtype and device");
  if (tensors.empty()) return;
  STD_TORCH_CHECK(scale.is_cuda() && scale.numel() == 1, "fastprob: _scale_ takes one number on the GPU as the scale");
  const Cuda::Guard guard(scale.get_device_index());
  for_type(scale, [&](auto, auto storage) {
    for (size_t k = 0; k < tensors.size(); k += kGroup)
      scale_group<decltype(storage)>(&tensors[k], std::min<int>(kGroup, tensors.size() - k), scale);
  });
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) { m.impl("_scale_", fastprob::scale_); }
