// ggd_nll of an element: the maths stands in fastprob/ops/_ggd.py.
#pragma once

#include "elementwise.h"
#include "ggd.h"

namespace fastprob {

template <bool paper, typename T>
struct Nll {
  Bounds<T> bounds;

  FASTPROB_INLINE Element<T, 4> operator()(T mu, T inv_alpha, T beta, T target) const {
    const Shape<T> shape = shape_of(inv_alpha, beta, bounds.eps);
    const Residual<T> t = residual<paper>(mu - target, shape, bounds);
    const T value = shape.stirling - log_product(shape.split_a, shape.p) + t.t;
    return {value, {t.d, t.a - shape.inv_a, t.b + shape.beta_gradient, -t.d}};
  }
};

struct GgdNll : Elementwise<GgdNll, 4, Reduces::as_told> {
  GgdOptions options;

  static GgdNll read(Arguments& arguments) { return {{}, GgdOptions::read(arguments)}; }

  template <typename T, bool has_gradients, typename Run>
  void visit(int64_t, const Run& run) const {
    options.visit<T>([&](auto paper, const Bounds<T>& bounds) { run(Nll<decltype(paper)::value, T>{bounds}); });
  }
};

}  // namespace fastprob
