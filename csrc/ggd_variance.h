// ggd_variance of an element: the maths stands in fastprob/ops/ggd_variance.py.
#pragma once

#include "elementwise.h"
#include "ggd.h"

namespace fastprob {

struct GgdVariance : Elementwise<GgdVariance, 2> {
  template <typename T>
  FASTPROB_INLINE Element<T, 2> operator()(T inv_alpha, T beta) const {
    const T a = select(inv_alpha >= 0, inv_alpha + 0, T(kNaN<float>));  // -0 + 0 is 0
    const T y = inverse(select(beta > 0, beta, T(kNaN<float>)));
    const Gamma<T> g1 = gamma1p(y), g3 = gamma1p(3 * y);
    // lgamma(1 + 3y) - lgamma(1 + y) - log 3 - 2 log a, with one logarithm of p1 / (3 p3)
    const T logs = log_positive(quotient(g1.p, 3 * g3.p)) - 2 * log_product(split(a), T(1));
    const T value = exponential((g3.stirling - g1.stirling) + logs);
    return {value, {-2 * quotient(value, a), value * y * y * (g1.digamma - 3 * g3.digamma)}};
  }
};

}  // namespace fastprob
