// ggd_nll: values, their sum, gradients. See fastprob/ops/ggd_nll.py.
#include "blocks.cuh"

namespace fastprob {
namespace {

template <typename T>
FASTPROB_INLINE T nll(const Shape<T>& shape, T t) {
  return shape.stirling - log_product(shape.a * shape.p, T(1)) + t;
}

template <bool paper, typename T>
struct NllValue {
  static constexpr int kInputs = 4, kOutputs = 1, kBlocksPerSM = 4;
  Bounds<T> bounds;

  FASTPROB_INLINE void start(T) {}
  FASTPROB_INLINE T operator()(const T (&in)[kInputs], T (&out)[kOutputs]) const {
    const Shape<T> shape = shape_of(in[1], in[2], bounds.eps);
    out[0] = nll(shape, residual<paper>(in[0] - in[3], shape.a, shape.b, shape.inv_a, bounds).t);
    return out[0];
  }
};

// Gradients for mu, inv_alpha, beta, target. With `elementwise` the fifth input is grad; else it is a scalar, and over
// `count` for the mean.
template <bool paper, bool elementwise, typename T>
struct NllGradient {
  static constexpr int kInputs = elementwise ? 5 : 4, kOutputs = 4, kBlocksPerSM = 4;
  Bounds<T> bounds;
  T count, scale;

  FASTPROB_INLINE void start(T grad) { scale = grad / count; }
  FASTPROB_INLINE T operator()(const T (&in)[kInputs], T (&out)[kOutputs]) const {
    const Shape<T> shape = shape_of(in[1], in[2], bounds.eps);
    const auto t = residual<paper>(in[0] - in[3], shape.a, shape.b, shape.inv_a, bounds);
    const T g = elementwise ? in[kInputs - 1] : scale;
    out[0] = g * t.d;
    out[1] = g * (t.a - shape.inv_a);
    out[2] = g * (t.b + shape.beta_gradient);
    out[3] = -g * t.d;
    return nll(shape, t.t);
  }
};

struct Options {
  bool paper;
  double eps, lo, hi, count;  // count: what the sum is divided by
  bool is_none;

  Options(Arguments& arguments, const Tensor& like) {
    paper = arguments.next<std::string>() == "paper";
    eps = arguments.next<double>(), lo = arguments.next<double>(), hi = arguments.next<double>();
    const std::string reduction = arguments.next<std::string>();
    is_none = reduction == "none";
    count = reduction == "mean" ? static_cast<double>(like.numel()) : 1;
  }
};

// Values into `out` and their sum's parts into `partials`, whichever there is.
void values(
    const std::array<Tensor, 4>& in, const std::array<Tensor, 1>& out, const Tensor* partials, const Options& options) {
  for_type(in[0], [&](auto, auto storage) {
    using S = decltype(storage);
    using T = Number<S>;
    const Bounds<T> bounds(options.eps, options.lo, options.hi);
    if (options.paper)
      for_elements<S>(in, out, nullptr, partials, NllValue<true, T>{bounds});
    else
      for_elements<S>(in, out, nullptr, partials, NllValue<false, T>{bounds});
  });
}

template <size_t I>
void gradients(
    const std::array<Tensor, I>& in,
    const std::array<Tensor, 4>& out,
    const Tensor* grad,
    const Tensor* partials,
    const Options& options) {
  for_type(in[0], [&](auto, auto storage) {
    using S = decltype(storage);
    using T = Number<S>;
    const Bounds<T> bounds(options.eps, options.lo, options.hi);
    const T count = static_cast<Compute<S>>(options.count);
    if (options.paper)
      for_elements<S>(in, out, grad, partials, NllGradient<true, I == 5, T>{bounds, count, 1});
    else
      for_elements<S>(in, out, grad, partials, NllGradient<false, I == 5, T>{bounds, count, 1});
  });
}

void ggd_nll(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<4>();
  const Options options(arguments, in[0]);
  const DeviceGuard guard(in[0].get_device_index());
  if (options.is_none) {
    const std::array<Tensor, 1> out = {torch::stable::empty_like(in[0])};
    values(in, out, nullptr, options);
    stack[0] = torch::stable::detail::from(out[0]);
  } else {
    const Tensor partials = partials_for(in[0]);
    values(in, {torch::stable::new_empty(in[0], {0})}, &partials, options);
    stack[0] = torch::stable::detail::from(finish(partials, in[0], options.count));
  }
}

void ggd_nll_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = torch::stable::contiguous(arguments.next<Tensor>());
  const auto in = arguments.contiguous<4>();
  const Options options(arguments, in[0]);
  const DeviceGuard guard(in[0].get_device_index());
  const auto out = gradients_like(in, arguments.next<int64_t>());
  if (options.is_none)
    gradients(std::array<Tensor, 5>{in[0], in[1], in[2], in[3], grad}, out, nullptr, nullptr, options);
  else
    gradients(in, out, &grad, nullptr, options);
  for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
}

void ggd_nll_value_and_grad(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<4>();
  const Options options(arguments, in[0]);
  const DeviceGuard guard(in[0].get_device_index());
  const auto out = gradients_like(in, arguments.next<int64_t>());
  const Tensor partials = partials_for(in[0]);
  gradients(in, out, nullptr, &partials, options);
  *stack++ = torch::stable::detail::from(finish(partials, in[0], options.count));
  for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) {
  m.impl("ggd_nll", fastprob::ggd_nll);
  m.impl("_ggd_nll_backward", fastprob::ggd_nll_backward);
  m.impl("_ggd_nll_value_and_grad", fastprob::ggd_nll_value_and_grad);
}
