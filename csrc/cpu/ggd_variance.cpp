// ggd_variance and its gradient. See fastprob/ops/ggd_variance.py.
#include "blocks.h"

namespace fastprob {
namespace {

void ggd_variance(StableIValue* stack, uint64_t, uint64_t) {
  const auto in = Arguments(stack).contiguous<2>();
  const std::array<Tensor, 1> out = {torch::stable::empty_like(in[0])};
  for_blocks(in, out, [](const auto& from, const auto& to, int64_t n) {
    const auto inv_alpha = from[0], beta = from[1];
    auto out = to[0];
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = variance(inv_alpha[k], beta[k]).value;
    return 0.0;
  });
  stack[0] = torch::stable::detail::from(out[0]);
}

void ggd_variance_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<3>();  // grad, inv_alpha, beta
  const std::array<Tensor, 2> inputs = {in[1], in[2]};
  const auto out = gradients_like(inputs, arguments.next<int64_t>());
  for_blocks(in, out, [](const auto& from, const auto& to, int64_t n) {
    const auto grad = from[0], inv_alpha = from[1], beta = from[2];
    auto grad_inv_alpha = to[0], grad_beta = to[1];
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const auto v = variance(inv_alpha[k], beta[k]);
      grad_inv_alpha[k] = grad[k] * v.inv_alpha;
      grad_beta[k] = grad[k] * v.beta;
    }
    return 0.0;
  });
  for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  m.impl("ggd_variance", fastprob::ggd_variance);
  m.impl("_ggd_variance_backward", fastprob::ggd_variance_backward);
}
