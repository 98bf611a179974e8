// probvlm_loss: value, or value and gradients, in one pass over the eight tensors.
#include "../probvlm_loss.h"

#include "blocks.h"

namespace fastprob {
namespace {

// An adapter: its mu, inv_alpha and beta, its own embedding and the other modality's; or the gradients of these.
template <typename T>
using Adapter = std::array<T*, 5>;

template <bool paper, bool has_l1, bool embeddings, typename T>
struct Body {
  Weights<T> w;
  Bounds<T> bounds;
};

// One adapter of a block. A loop over both would save a logarithm and lose more to spilled registers.
template <bool has_gradients, bool paper, bool has_l1, bool embeddings, typename T>
double adapter(Body<paper, has_l1, embeddings, T> body, Adapter<const T> in, Adapter<T> out, int64_t n, T scale) {
  const auto [mu, inv_alpha, beta, own_z, cross_z] = in;
  const auto [g_mu, g_inv_alpha, g_beta, g_own_z, g_cross_z] = out;
  const Weights<T> w = body.w, g = scale * w;
  const Bounds<T> bounds = body.bounds;
  const T both = w.own + w.cross;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const Terms<T> t = terms<paper, has_l1>(mu[k], inv_alpha[k], beta[k], own_z[k], cross_z[k], w, g, bounds);
    sum += t.sum + both * (t.stirling - log_product(Split<T>{t.exponent, t.factor}, T(1)));
    if constexpr (has_gradients) {
      g_mu[k] = t.own + t.cross;
      g_inv_alpha[k] = t.inv_alpha;
      g_beta[k] = t.beta;
    }
    if constexpr (has_gradients && embeddings) {
      g_own_z[k] -= t.own;
      g_cross_z[k] -= t.cross;
    }
  }
  return sum;
}

template <bool has_gradients, bool paper, bool has_l1, bool embeddings, typename T, size_t O>
double block(
    const Body<paper, has_l1, embeddings, T>& body,
    const std::array<const T*, 8>& in,
    const std::array<T*, O>& out,
    int64_t n,
    T scale) {
  std::array<T*, 8> to = {};
  if constexpr (has_gradients) to = out;
  if constexpr (has_gradients && embeddings)
    for (T* z : {to[6], to[7]}) std::fill_n(z, n, T(0));
  return adapter<has_gradients>(
             body, {in[0], in[1], in[2], in[6], in[7]}, {to[0], to[1], to[2], to[6], to[7]}, n, scale) +
         adapter<has_gradients>(
             body, {in[3], in[4], in[5], in[7], in[6]}, {to[3], to[4], to[5], to[7], to[6]}, n, scale);
}

struct ProbvlmLoss : Elementwise<ProbvlmLoss, 8, Reduces::to_mean> {
  ProbvlmOptions options;

  static ProbvlmLoss read(Arguments& arguments) { return {{}, ProbvlmOptions::read(arguments)}; }

  template <typename T, bool has_gradients, typename Run>
  void visit(int64_t needs, const Run& run) const {
    options.ggd.visit<T>([&](auto paper, const Bounds<T>& bounds) {
      const Weights<T> w = options.weights<T>();
      auto call = [&](auto has_l1, auto embeddings) {
        run(Body<decltype(paper)::value, decltype(has_l1)::value, decltype(embeddings)::value, T>{w, bounds});
      };
      auto with_l1 = [&](auto has_l1) {
        has_gradients&& needs >> 6 ? call(has_l1, std::bool_constant<has_gradients>())
                                   : call(has_l1, std::false_type());
      };
      options.l1 != 0 ? with_l1(std::true_type()) : with_l1(std::false_type());
    });
  }
};

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  fastprob::implement<fastprob::Cpu, fastprob::ProbvlmLoss>(m, "probvlm_loss");
}
