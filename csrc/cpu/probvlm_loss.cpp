// probvlm_loss: value, or value and gradients, in one pass over the eight tensors. See fastprob/ops/probvlm_loss.py.
#include "blocks.h"

namespace fastprob {
namespace {

template <typename T>
struct Weights {
  T own, cross, own_l1, cross_l1;
};

enum class Gradients { none, adapters, all };

// An adapter: its mu, inv_alpha and beta, its own embedding and the other modality's; or the gradients of these.
template <typename T>
using Adapter = std::array<T*, 5>;

// Its two likelihoods. A loop over both adapters would save a logarithm and lose more to spilled registers.
template <bool paper, Gradients gradients, typename T>
double likelihoods(Adapter<const T> in, Adapter<T> out, int64_t n, Weights<T> w, const Bounds<T>& bounds, T scale) {
  const auto [mu, inv_alpha, beta, own_z, cross_z] = in;
  const auto [g_mu, g_inv_alpha, g_beta, g_own_z, g_cross_z] = out;
  const Bounds<T> limits = bounds;
  const T own = scale * w.own, cross = scale * w.cross, both = own + cross;
  T norms = 0, owns = 0, crosses = 0;
#pragma omp simd reduction(+ : norms, owns, crosses)
  for (int64_t k = 0; k < n; ++k) {
    const Shape<T> shape = shape_of(inv_alpha[k], beta[k], limits.eps);
    const auto o = residual<paper>(mu[k] - own_z[k], shape.a, shape.b, shape.inv_a, limits);
    const auto c = residual<paper>(mu[k] - cross_z[k], shape.a, shape.b, shape.inv_a, limits);
    norms += shape.stirling - log_product(shape.a * shape.p, T(1));
    owns += o.t;
    crosses += c.t;
    if constexpr (gradients != Gradients::none) {
      g_mu[k] = own * o.d + cross * c.d;
      g_inv_alpha[k] = own * o.a + cross * c.a - both * shape.inv_a;
      g_beta[k] = own * o.b + cross * c.b + both * shape.beta_gradient;
    }
    if constexpr (gradients == Gradients::all) {
      g_own_z[k] -= own * o.d;
      g_cross_z[k] -= cross * c.d;
    }
  }
  return (w.own + w.cross) * double(norms) + w.own * double(owns) + w.cross * double(crosses);
}

// Its two l1 terms: their sum, and their gradients added to those of the likelihoods.
template <Gradients gradients, typename T>
double distances(Adapter<const T> in, Adapter<T> out, int64_t n, Weights<T> w, T scale) {
  const auto [mu, inv_alpha, beta, own_z, cross_z] = in;
  const auto [g_mu, g_inv_alpha, g_beta, g_own_z, g_cross_z] = out;
  const T own = scale * w.own_l1, cross = scale * w.cross_l1;
  double owns = 0, crosses = 0;
#pragma omp simd reduction(+ : owns, crosses)
  for (int64_t k = 0; k < n; ++k) {
    const T o = mu[k] - own_z[k], c = mu[k] - cross_z[k];
    owns += double(std::fabs(o));
    crosses += double(std::fabs(c));
    if constexpr (gradients != Gradients::none) g_mu[k] += own * sign(o) + cross * sign(c);
    if constexpr (gradients == Gradients::all) {
      g_own_z[k] -= own * sign(o);
      g_cross_z[k] -= cross * sign(c);
    }
  }
  return w.own_l1 * owns + w.cross_l1 * crosses;
}

// Order of inputs and gradients: image mu, inv_alpha, beta; text mu, inv_alpha, beta; image, text.
template <bool paper, Gradients gradients, typename T>
double block(
    const std::array<const T*, 8>& in,
    const std::array<T*, 8>& out,
    int64_t n,
    Weights<T> w,
    const Bounds<T>& bounds,
    T scale) {
  if constexpr (gradients == Gradients::all)
    for (T* z : {out[6], out[7]}) std::fill_n(z, n, T(0));
  double sum = 0;
  auto add = [&](const Adapter<const T>& from, const Adapter<T>& to) {
    sum += likelihoods<paper, gradients>(from, to, n, w, bounds, scale);
    if (w.own_l1 != 0) sum += distances<gradients>(from, to, n, w, scale);
  };
  add({in[0], in[1], in[2], in[6], in[7]}, {out[0], out[1], out[2], out[6], out[7]});
  add({in[3], in[4], in[5], in[7], in[6]}, {out[3], out[4], out[5], out[7], out[6]});
  return sum;
}

template <Kind kind>
void probvlm_loss(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const double grad = kind == Kind::backward ? item(arguments.next<Tensor>()) : 1;
  const auto in = arguments.contiguous<8>();
  const double cross_weight = arguments.next<double>(), l1 = arguments.next<double>(), nll = arguments.next<double>();
  const bool paper = arguments.next<std::string>() == "paper";
  const double eps = arguments.next<double>(), lo = arguments.next<double>(), hi = arguments.next<double>();
  const int64_t needs = kind == Kind::value ? 0 : arguments.next<int64_t>();

  const auto out = gradients_like(in, needs);
  const double count = static_cast<double>(in[0].numel());
  const double sum = for_blocks(in, out, [&](const auto& from, const auto& to, int64_t n) {
    using T = std::remove_reference_t<decltype(*to[0])>;
    const Weights<T> w{T(nll), T(cross_weight * nll), T(l1), T(cross_weight * l1)};
    const Bounds<T> bounds(eps, lo, hi);
    auto call = [&](auto is_paper) {
      constexpr bool p = decltype(is_paper)::value;
      if (needs >> 6) return block<p, Gradients::all>(from, to, n, w, bounds, T(grad / count));
      if (needs) return block<p, Gradients::adapters>(from, to, n, w, bounds, T(grad / count));
      return block<p, Gradients::none>(from, to, n, w, bounds, T(1));
    };
    return paper ? call(std::true_type()) : call(std::false_type());
  });

  if (kind != Kind::backward) *stack++ = torch::stable::detail::from(scalar_like(in[0], sum / count));
  if (kind != Kind::value)
    for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  using fastprob::Kind;
  m.impl("probvlm_loss", fastprob::probvlm_loss<Kind::value>);
  m.impl("_probvlm_loss_backward", fastprob::probvlm_loss<Kind::backward>);
  m.impl("_probvlm_loss_value_and_grad", fastprob::probvlm_loss<Kind::value_and_grad>);
}
