// probvlm_loss of an element, adapter by adapter: the maths stands in fastprob/ops/_ggd.py. Order of inputs and
// gradients: image mu, inv_alpha, beta; text mu, inv_alpha, beta; image, text.
#pragma once

#include "elementwise.h"
#include "ggd.h"

namespace fastprob {

// Of a distribution's own embedding and of the other modality's.
template <typename T>
struct Weights {
  T own, cross, own_l1, cross_l1;
};

template <typename T>
FASTPROB_INLINE Weights<T> operator*(T scale, const Weights<T>& w) {
  return {scale * w.own, scale * w.cross, scale * w.own_l1, scale * w.cross_l1};
}

// An adapter's two terms: the sum of their residuals; the gradients for mu by term, for inv_alpha and for beta; and the
// normaliser, stirling - log(2^exponent * factor), whose logarithm two adapters may share. Flat: a struct within would
// keep the CPU's loop from vectorising.
template <typename T>
struct Terms {
  T sum, own, cross, inv_alpha, beta, stirling, exponent, factor;
};

// Weights: w of the values, g of the gradients.
template <bool paper, bool has_l1, typename T>
FASTPROB_INLINE Terms<T> terms(
    T mu, T inv_alpha, T beta, T own_z, T cross_z, Weights<T> w, Weights<T> g, Bounds<T> bounds) {
  using std::fabs;
  const Shape<T> shape = shape_of(inv_alpha, beta, bounds.eps);
  const T d_own = mu - own_z, d_cross = mu - cross_z, both = g.own + g.cross;
  const Residual<T> o = residual<paper>(d_own, shape, bounds), c = residual<paper>(d_cross, shape, bounds);
  T sum = w.own * o.t + w.cross * c.t, own = g.own * o.d, cross = g.cross * c.d;
  if constexpr (has_l1) {  // an infinite distance counts only where it has a weight
    sum += select(w.own_l1 == 0, T(0), w.own_l1 * fabs(d_own) + w.cross_l1 * fabs(d_cross));
    own += g.own_l1 * sign(d_own), cross += g.cross_l1 * sign(d_cross);
  }
  return {
      sum,
      own,
      cross,
      g.own * o.a + g.cross * c.a - both * shape.inv_a,
      g.own * o.b + g.cross * c.b + both * shape.beta_gradient,
      shape.stirling,
      shape.split_a.exponent,
      shape.split_a.mantissa * shape.p};
}

struct ProbvlmOptions {
  double cross_weight, l1, nll;
  GgdOptions ggd;

  static ProbvlmOptions read(Arguments& arguments) {
    const double cross = arguments.next<double>(), l1 = arguments.next<double>(), nll = arguments.next<double>();
    return {cross, l1, nll, GgdOptions::read(arguments)};
  }

  template <typename T>
  Weights<T> weights() const {
    return {T(nll), T(cross_weight * nll), T(l1), T(cross_weight * l1)};
  }
};

}  // namespace fastprob
