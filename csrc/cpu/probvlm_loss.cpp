// probvlm_loss: value, or value and gradients, in one pass over the eight tensors. See fastprob/ops/probvlm_loss.py.
#include "blocks.h"

namespace fastprob {
namespace {

template <typename T>
struct Weights {
  T own, cross, own_l1, cross_l1;
};

enum class Gradients { none, adapters, all };

// Order of inputs and gradients: image mu, inv_alpha, beta; text mu, inv_alpha, beta; image, text.
template <typename T>
using In = std::array<const T*, 8>;
template <typename T>
using Out = std::array<T*, 8>;

template <bool paper, Gradients gradients, typename T>
double likelihoods(const In<T>& in, const Out<T>& out, int64_t n, Weights<T> w, const Bounds<T>& bounds, T scale) {
  const auto [mu_i, ia_i, b_i, mu_t, ia_t, b_t, z_i, z_t] = in;
  const auto [g_mu_i, g_ia_i, g_b_i, g_mu_t, g_ia_t, g_b_t, g_z_i, g_z_t] = out;
  const Bounds<T> limits = bounds;
  const T own = scale * w.own, cross = scale * w.cross, both = own + cross;
  T norms = 0, owns = 0, crosses = 0;
#pragma omp simd reduction(+ : norms, owns, crosses)
  for (int64_t k = 0; k < n; ++k) {
    const Shape<T> image = shape_of(ia_i[k], b_i[k], limits.eps), text = shape_of(ia_t[k], b_t[k], limits.eps);
    const auto ii = residual<paper>(mu_i[k] - z_i[k], image.a, image.b, image.inv_a, limits);
    const auto it = residual<paper>(mu_i[k] - z_t[k], image.a, image.b, image.inv_a, limits);
    const auto tt = residual<paper>(mu_t[k] - z_t[k], text.a, text.b, text.inv_a, limits);
    const auto ti = residual<paper>(mu_t[k] - z_i[k], text.a, text.b, text.inv_a, limits);
    norms += image.stirling + text.stirling - log_product(image.a * image.p, text.a * text.p);
    owns += ii.t + tt.t;
    crosses += it.t + ti.t;
    if constexpr (gradients != Gradients::none) {
      g_mu_i[k] = own * ii.d + cross * it.d;
      g_mu_t[k] = own * tt.d + cross * ti.d;
      g_ia_i[k] = own * ii.a + cross * it.a - both * image.inv_a;
      g_ia_t[k] = own * tt.a + cross * ti.a - both * text.inv_a;
      g_b_i[k] = own * ii.b + cross * it.b + both * image.beta_gradient;
      g_b_t[k] = own * tt.b + cross * ti.b + both * text.beta_gradient;
      if constexpr (gradients == Gradients::all) {
        g_z_i[k] = -(own * ii.d + cross * ti.d);
        g_z_t[k] = -(own * tt.d + cross * it.d);
      }
    }
  }
  return (w.own + w.cross) * double(norms) + w.own * double(owns) + w.cross * double(crosses);
}

// The l1 terms: their sum, and their gradients added to those of the likelihoods.
template <Gradients gradients, typename T>
double distances(const In<T>& in, const Out<T>& out, int64_t n, Weights<T> w, T scale) {
  const auto [mu_i, ia_i, b_i, mu_t, ia_t, b_t, z_i, z_t] = in;
  const T own = scale * w.own_l1, cross = scale * w.cross_l1;
  double owns = 0, crosses = 0;
#pragma omp simd reduction(+ : owns, crosses)
  for (int64_t k = 0; k < n; ++k) {
    const T ii = mu_i[k] - z_i[k], it = mu_i[k] - z_t[k], tt = mu_t[k] - z_t[k], ti = mu_t[k] - z_i[k];
    owns += double(std::fabs(ii)) + double(std::fabs(tt));
    crosses += double(std::fabs(it)) + double(std::fabs(ti));
    if constexpr (gradients != Gradients::none) {
      out[0][k] += own * sign(ii) + cross * sign(it);
      out[3][k] += own * sign(tt) + cross * sign(ti);
    }
    if constexpr (gradients == Gradients::all) {
      out[6][k] -= own * sign(ii) + cross * sign(ti);
      out[7][k] -= own * sign(tt) + cross * sign(it);
    }
  }
  return w.own_l1 * owns + w.cross_l1 * crosses;
}

template <bool paper, Gradients gradients, typename T>
double block(const In<T>& in, const Out<T>& out, int64_t n, Weights<T> w, const Bounds<T>& bounds, T scale) {
  const double sum = likelihoods<paper, gradients>(in, out, n, w, bounds, scale);
  return w.own_l1 == 0 ? sum : sum + distances<gradients>(in, out, n, w, scale);
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
