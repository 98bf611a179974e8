// ggd_nll: values, their sum, gradients. See fastprob/ops/ggd_nll.py.
#include "blocks.h"

namespace fastprob {
namespace {

// Per element: out is the nll, or (if has_gradients) the gradients for mu, inv_alpha, beta, target times `scale`,
// and times grad's element where there is one. Returns the sum of the nll.
template <bool paper, bool has_gradients, bool has_grad, typename T, size_t I, size_t O>
double block(
    const std::array<const T*, I>& in, const std::array<T*, O>& out, int64_t n, const Bounds<T>& bounds, T scale) {
  const T *mu = in[0], *inv_alpha = in[1], *beta = in[2], *target = in[3], *grad = has_grad ? in[I - 1] : nullptr;
  T *values = out[0], *g_mu = out[0], *g_inv_alpha = out[1 % O], *g_beta = out[2 % O], *g_target = out[3 % O];
  const Bounds<T> limits = bounds;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const Shape<T> shape = shape_of(inv_alpha[k], beta[k], limits.eps);
    const auto t = residual<paper>(mu[k] - target[k], shape.a, shape.b, shape.inv_a, limits);
    const T nll = shape.stirling - log_product(shape.a * shape.p, T(1)) + t.t;
    sum += nll;
    if constexpr (has_gradients) {
      const T g = has_grad ? scale * grad[k] : scale;
      g_mu[k] = g * t.d;
      g_inv_alpha[k] = g * (t.a - shape.inv_a);
      g_beta[k] = g * (t.b + shape.beta_gradient);
      g_target[k] = -g * t.d;
    } else {
      values[k] = nll;
    }
  }
  return sum;
}

template <Kind kind>
void ggd_nll(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = kind == Kind::backward ? arguments.next<Tensor>() : Tensor();
  const auto in = arguments.contiguous<4>();
  const bool paper = arguments.next<std::string>() == "paper";
  const double eps = arguments.next<double>(), lo = arguments.next<double>(), hi = arguments.next<double>();
  const std::string reduction = arguments.next<std::string>();
  const int64_t needs = kind == Kind::value ? 0 : arguments.next<int64_t>();

  const bool is_none = reduction == "none";
  const double count = reduction == "mean" ? static_cast<double>(in[0].numel()) : 1;
  auto run = [&](const auto& inputs, const auto& outputs, auto has_gradients, double scale) {
    constexpr bool has_grad = std::tuple_size_v<std::decay_t<decltype(inputs)>> == 5;
    return for_blocks(inputs, outputs, [&](const auto& from, const auto& to, int64_t n) {
      using T = std::remove_reference_t<decltype(*to[0])>;
      const Bounds<T> bounds(eps, lo, hi);
      constexpr bool g = decltype(has_gradients)::value;
      return paper ? block<true, g, has_grad>(from, to, n, bounds, T(scale))
                   : block<false, g, has_grad>(from, to, n, bounds, T(scale));
    });
  };
  auto value = [&](double sum) { return scalar_like(in[0], sum / count); };

  if constexpr (kind == Kind::value) {
    const std::array<Tensor, 1> out = {
        is_none ? torch::stable::empty_like(in[0]) : torch::stable::new_empty(in[0], {0})};
    const double sum = run(in, out, std::false_type(), 1.0);
    stack[0] = torch::stable::detail::from(is_none ? out[0] : value(sum));
  } else {
    const auto out = gradients_like(in, needs);
    double sum;
    if (kind == Kind::backward && is_none) {
      const std::array<Tensor, 5> inputs = {in[0], in[1], in[2], in[3], torch::stable::contiguous(grad)};
      sum = run(inputs, out, std::true_type(), 1.0);
    } else {
      sum = run(in, out, std::true_type(), (kind == Kind::backward ? item(grad) : 1) / count);
    }
    if (kind == Kind::value_and_grad) *stack++ = torch::stable::detail::from(value(sum));
    for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
  }
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  using fastprob::Kind;
  m.impl("ggd_nll", fastprob::ggd_nll<Kind::value>);
  m.impl("_ggd_nll_backward", fastprob::ggd_nll<Kind::backward>);
  m.impl("_ggd_nll_value_and_grad", fastprob::ggd_nll<Kind::value_and_grad>);
}
