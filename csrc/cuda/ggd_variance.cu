// ggd_variance and its gradient. See fastprob/ops/ggd_variance.py.
#include "blocks.cuh"

namespace fastprob {
namespace {

template <typename T>
struct VarianceValue {
  static constexpr int kInputs = 2, kOutputs = 1, kBlocksPerSM = 4;

  FASTPROB_INLINE void start(T) {}
  FASTPROB_INLINE T operator()(const T (&in)[kInputs], T (&out)[kOutputs]) const {
    out[0] = variance(in[0], in[1]).value;
    return 0;
  }
};

template <typename T>
struct VarianceGradient {
  static constexpr int kInputs = 3, kOutputs = 2, kBlocksPerSM = 4;

  FASTPROB_INLINE void start(T) {}
  FASTPROB_INLINE T operator()(const T (&in)[kInputs], T (&out)[kOutputs]) const {
    const auto v = variance(in[1], in[2]);
    out[0] = in[0] * v.inv_alpha;
    out[1] = in[0] * v.beta;
    return 0;
  }
};

void ggd_variance(StableIValue* stack, uint64_t, uint64_t) {
  const auto in = Arguments(stack).contiguous<2>();
  const DeviceGuard guard(in[0].get_device_index());
  const std::array<Tensor, 1> out = {torch::stable::empty_like(in[0])};
  for_type(in[0], [&](auto, auto storage) {
    using S = decltype(storage);
    for_elements<S>(in, out, nullptr, nullptr, VarianceValue<Number<S>>());
  });
  stack[0] = torch::stable::detail::from(out[0]);
}

void ggd_variance_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<3>();  // grad, inv_alpha, beta
  const DeviceGuard guard(in[0].get_device_index());
  const auto out = gradients_like(std::array<Tensor, 2>{in[1], in[2]}, arguments.next<int64_t>());
  for_type(in[0], [&](auto, auto storage) {
    using S = decltype(storage);
    for_elements<S>(in, out, nullptr, nullptr, VarianceGradient<Number<S>>());
  });
  for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) {
  m.impl("ggd_variance", fastprob::ggd_variance);
  m.impl("_ggd_variance_backward", fastprob::ggd_variance_backward);
}
