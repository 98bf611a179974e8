// probvlm_loss: value, or value and gradients, in one pass over the eight tensors. See fastprob/ops/probvlm_loss.py.
#include "blocks.h"

namespace fastprob {
namespace {

template <typename T>
struct Weights {
  T own_nll, cross_nll, own_l1, cross_l1;
};

enum class Gradients { none, adapters, all };

// Order of inputs and gradients: image mu, inv_alpha, beta; text mu, inv_alpha, beta; image, text.
template <bool paper, Gradients gradients, typename T>
double block(
    const std::array<const T*, 8>& in,
    const std::array<T*, 8>& out,
    int64_t n,
    const Weights<T>& w,
    const Bounds<T>& bounds,
    T scale) {
  const T *mu_i = in[0], *ia_i = in[1], *b_i = in[2], *mu_t = in[3], *ia_t = in[4], *b_t = in[5], *z_i = in[6],
          *z_t = in[7];
  T *g_mu_i = out[0], *g_ia_i = out[1], *g_b_i = out[2], *g_mu_t = out[3], *g_ia_t = out[4], *g_b_t = out[5],
    *g_z_i = out[6], *g_z_t = out[7];
  const T norm_weight = w.own_nll + w.cross_nll;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const Shape<T> image(ia_i[k], b_i[k], bounds.eps), text(ia_t[k], b_t[k], bounds.eps);
    const T d_ii = mu_i[k] - z_i[k], d_it = mu_i[k] - z_t[k], d_tt = mu_t[k] - z_t[k], d_ti = mu_t[k] - z_i[k];
    const auto ii = residual<paper>(d_ii, image, bounds), it = residual<paper>(d_it, image, bounds);
    const auto tt = residual<paper>(d_tt, text, bounds), ti = residual<paper>(d_ti, text, bounds);
    const T logs = log_product(image.a, text.a, image.gamma.p, text.gamma.p);
    sum += norm_weight * (image.gamma.stirling + text.gamma.stirling - logs) + w.own_nll * (ii.t + tt.t) + w.cross_nll * (it.t + ti.t) +
           w.own_l1 * (std::fabs(d_ii) + std::fabs(d_tt)) + w.cross_l1 * (std::fabs(d_it) + std::fabs(d_ti));
    if constexpr (gradients != Gradients::none) {
      const T s_ii = scale * (w.own_nll * ii.d + w.own_l1 * sign(d_ii));
      const T s_tt = scale * (w.own_nll * tt.d + w.own_l1 * sign(d_tt));
      const T s_it = scale * (w.cross_nll * it.d + w.cross_l1 * sign(d_it));
      const T s_ti = scale * (w.cross_nll * ti.d + w.cross_l1 * sign(d_ti));
      g_mu_i[k] = s_ii + s_it;
      g_mu_t[k] = s_tt + s_ti;
      g_ia_i[k] = scale * (w.own_nll * ii.a + w.cross_nll * it.a - norm_weight * image.inv_a);
      g_ia_t[k] = scale * (w.own_nll * tt.a + w.cross_nll * ti.a - norm_weight * text.inv_a);
      g_b_i[k] = scale * (w.own_nll * ii.b + w.cross_nll * it.b + norm_weight * image.beta_gradient);
      g_b_t[k] = scale * (w.own_nll * tt.b + w.cross_nll * ti.b + norm_weight * text.beta_gradient);
      if constexpr (gradients == Gradients::all) {
        g_z_i[k] = -(s_ii + s_ti);
        g_z_t[k] = -(s_tt + s_it);
      }
    }
  }
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
    const Bounds<T> bounds{T(eps), T(lo), T(hi)};
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
