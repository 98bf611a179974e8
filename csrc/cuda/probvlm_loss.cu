// probvlm_loss: value, or value and gradients, in one pass over the eight tensors. See fastprob/ops/probvlm_loss.py.
#include "blocks.cuh"

namespace fastprob {
namespace {

template <typename T>
struct Weights {
  T own, cross, own_l1, cross_l1;
};

// What a kernel computes: the value alone; with it the gradients of the adapters, without or with the l1 terms'; with
// these the embeddings' too.
enum class Parts { value, adapters, adapters_l1, all };

// Order of inputs and gradients: image mu, inv_alpha, beta; text mu, inv_alpha, beta; image, text.
template <bool paper, Parts parts, typename T>
struct Loss {
  static constexpr bool has_gradients = parts != Parts::value, has_l1 = parts != Parts::adapters;
  static constexpr int kInputs = 8, kOutputs = parts == Parts::all ? 8 : has_gradients ? 6 : 1;
  static constexpr bool is_small = parts == Parts::value || (parts == Parts::adapters && sizeof(T) == 4);
  static constexpr int kBlocksPerSM = is_small ? 4 : 3;
  Bounds<T> bounds;
  Weights<T> w;
  T count;
  Weights<T> g;  // the weights times grad / count

  FASTPROB_INLINE void start(T grad) {
    const T scale = grad / count;
    g = {scale * w.own, scale * w.cross, scale * w.own_l1, scale * w.cross_l1};
  }

  FASTPROB_INLINE T operator()(const T (&in)[kInputs], T (&out)[kOutputs]) const {
    const Shape<T> image = shape_of(in[1], in[2], bounds.eps), text = shape_of(in[4], in[5], bounds.eps);
    const T d_ii = in[0] - in[6], d_it = in[0] - in[7], d_tt = in[3] - in[7], d_ti = in[3] - in[6];
    const auto ii = residual<paper>(d_ii, image.a, image.b, image.inv_a, bounds);
    const auto it = residual<paper>(d_it, image.a, image.b, image.inv_a, bounds);
    const auto tt = residual<paper>(d_tt, text.a, text.b, text.inv_a, bounds);
    const auto ti = residual<paper>(d_ti, text.a, text.b, text.inv_a, bounds);
    const T norm = image.stirling + text.stirling - log_product(image.a * image.p, text.a * text.p);
    T sum = w.own * (norm + ii.t + tt.t) + w.cross * (norm + it.t + ti.t);
    T mu_ii = g.own * ii.d, mu_it = g.cross * it.d, mu_tt = g.own * tt.d, mu_ti = g.cross * ti.d;
    if constexpr (has_l1) {
      using std::fabs;
      const T l1 = w.own_l1 * (fabs(d_ii) + fabs(d_tt)) + w.cross_l1 * (fabs(d_it) + fabs(d_ti));
      sum += select(w.own_l1 == 0, T(0), l1);  // an infinite distance counts only where it has a weight
      mu_ii += g.own_l1 * sign(d_ii), mu_it += g.cross_l1 * sign(d_it);
      mu_tt += g.own_l1 * sign(d_tt), mu_ti += g.cross_l1 * sign(d_ti);
    }
    if constexpr (has_gradients) {
      const T both = g.own + g.cross;
      out[0] = mu_ii + mu_it;
      out[1] = g.own * ii.a + g.cross * it.a - both * image.inv_a;
      out[2] = g.own * ii.b + g.cross * it.b + both * image.beta_gradient;
      out[3] = mu_tt + mu_ti;
      out[4] = g.own * tt.a + g.cross * ti.a - both * text.inv_a;
      out[5] = g.own * tt.b + g.cross * ti.b + both * text.beta_gradient;
    } else {
      out[0] = 0;  // never stored
    }
    if constexpr (parts == Parts::all) {
      out[6] = -(mu_ii + mu_ti);
      out[7] = -(mu_tt + mu_it);
    }
    return sum;
  }
};

struct Options {
  double cross_weight, l1, nll, eps, lo, hi;
  bool paper;

  explicit Options(Arguments& arguments) {
    cross_weight = arguments.next<double>(), l1 = arguments.next<double>(), nll = arguments.next<double>();
    paper = arguments.next<std::string>() == "paper";
    eps = arguments.next<double>(), lo = arguments.next<double>(), hi = arguments.next<double>();
  }
};

template <Parts parts>
void run(
    const std::array<Tensor, 8>& in,
    const std::array<Tensor, 8>& out,
    const Tensor* grad,
    const Tensor* partials,
    const Options& options) {
  for_type(in[0], [&](auto, auto storage) {
    using S = decltype(storage);
    using T = Number<S>;
    const Bounds<T> bounds(options.eps, options.lo, options.hi);
    const Weights<T> w{
        T(options.nll), T(options.cross_weight * options.nll), T(options.l1), T(options.cross_weight * options.l1)};
    const T count = static_cast<Compute<S>>(in[0].numel());
    if (options.paper)
      for_elements<S>(in, out, grad, partials, Loss<true, parts, T>{bounds, w, count, w});
    else
      for_elements<S>(in, out, grad, partials, Loss<false, parts, T>{bounds, w, count, w});
  });
}

template <Kind kind>
void probvlm_loss(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = kind == Kind::backward ? arguments.next<Tensor>() : Tensor();
  const auto in = arguments.contiguous<8>();
  const Options options(arguments);
  const int64_t needs = kind == Kind::value ? 0 : arguments.next<int64_t>();

  const DeviceGuard guard(in[0].get_device_index());
  const auto out = gradients_like(in, needs);
  const Tensor sums = kind == Kind::backward ? Tensor() : partials_for(in[0]);
  const Tensor *scale = kind == Kind::backward ? &grad : nullptr, *partials = kind == Kind::backward ? nullptr : &sums;
  if (kind == Kind::value)
    run<Parts::value>(in, out, scale, partials, options);
  else if (needs >> 6)
    run<Parts::all>(in, out, scale, partials, options);
  else if (options.l1 != 0)
    run<Parts::adapters_l1>(in, out, scale, partials, options);
  else
    run<Parts::adapters>(in, out, scale, partials, options);

  const double count = static_cast<double>(in[0].numel());
  if (kind != Kind::backward) *stack++ = torch::stable::detail::from(finish(sums, in[0], count));
  if (kind != Kind::value)
    for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) {
  using fastprob::Kind;
  m.impl("probvlm_loss", fastprob::probvlm_loss<Kind::value>);
  m.impl("_probvlm_loss_backward", fastprob::probvlm_loss<Kind::backward>);
  m.impl("_probvlm_loss_value_and_grad", fastprob::probvlm_loss<Kind::value_and_grad>);
}
