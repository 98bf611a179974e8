// ggd_match_nll, by blocks of lanes: the maths stands in fastprob/ops/ggd_match_nll.py. Every stage is a loop over the
// lanes, which vectorises, inside of one over steps or nodes; what a lane has is kept in arrays that fit into L1.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../maths.h"

namespace fastprob {
namespace match {

constexpr int kLanes = 64;
constexpr int kNewtonSteps = 5, kBisections = 8;

// As the reference in double; in float so many nodes, and so much cut off, that nothing is lost to its rounding.
template <typename T>
struct Accuracy {
  static constexpr int nodes = 40;
  static constexpr T cut = 35, cut_slope = 2.8;
};
template <>
struct Accuracy<float> {
  static constexpr int nodes = 32;
  static constexpr float cut = 17, cut_slope = 2.2f;
};

constexpr double kLeastScale = 1e-12, kLargestScale = 1e12, kLeastShape = 0.2, kLargestShape = 10, kFarthest = 1e30;
constexpr double kLogitLimit = 60, kExtentBits = 50, kDepth = 80;

// Of Gauss and Legendre in (0, 1): y and 1 - y as logarithms and reciprocals.
template <typename T>
struct Node {
  T log2, log2_rest, weight, inverse, inverse_both;
};

template <typename T>
const std::vector<Node<T>>& nodes() {
  static const std::vector<Node<T>> table = [] {
    constexpr int count = Accuracy<T>::nodes;
    std::vector<Node<T>> made;
    for (int i = 0; i < count; ++i) {
      double x = std::cos(3.14159265358979323846 * (i + 0.75) / (count + 0.5)), slope = 1;
      for (int step = 0; step < 8; ++step) {
        double last = 1, now = x;
        for (int k = 2; k <= count; ++k) {
          const double next = ((2 * k - 1) * x * now - (k - 1) * last) / k;
          last = now, now = next;
        }
        slope = count * (x * now - last) / (x * x - 1);
        x -= now / slope;
      }
      const double y = (1 - x) / 2, rest = (1 + x) / 2;
      made.push_back(
          {T(std::log2(y)), T(std::log2(rest)), T(1 / ((1 - x * x) * slope * slope)), T(1 / y), T(1 / (y * rest))});
    }
    return made;
  }();
  return table;
}

template <typename T>
FASTPROB_INLINE T least_of(T x, T y) {
  return select(y < x, y, x);
}
template <typename T>
FASTPROB_INLINE T largest_of(T x, T y) {
  return select(y > x, y, x);
}
template <typename T>
FASTPROB_INLINE T limited(T w) {
  return largest_of(least_of(w, T(kLogitLimit)), T(-kLogitLimit));
}

// t = (a d)^b, and log(a d).
template <typename T>
FASTPROB_INLINE Power<T> power(T d, T a, T b) {
  constexpr T high = std::numeric_limits<T>::max() / 4, log2_high = std::numeric_limits<T>::max_exponent - 2;
  constexpr T log2_low = std::numeric_limits<T>::min_exponent - 1;
  return clamped_power(largest_of(d, 16 * kTiny<T>), split(a), b, kTiny<T>, high, log2_low, log2_high);
}

template <typename T>
FASTPROB_INLINE T cut(T b) {
  return Accuracy<T>::cut + Accuracy<T>::cut_slope * largest_of(1 / b - 1, T(0));
}

// The power that draws nodes to a cusp of shape b whose t reaches so far on a piece.
template <typename T>
FASTPROB_INLINE T clustering(T b, T t) {
  return std::ceil(largest_of(T(1.4) / b * least_of(4 * t / cut(b), T(1)), T(2)));
}

// How far a tail reaches beyond the cusp of (a, b).
template <typename T>
FASTPROB_INLINE T tail(T delta, T a, T b, T other_a, T other_b) {
  const T alone = exponential(log_positive(cut(b)) / b - log_positive(a));
  const T near = exponential(log_positive(cut(other_b)) / other_b - log_positive(other_a));
  const T t = power(delta, other_a, other_b).t, ratio = cut(other_b) / largest_of(t, T(1e-10));
  const T grown = exponential(log_positive(1 + ratio) / other_b) - 1;
  const T beyond = delta * select(ratio < T(1e-3), ratio / other_b, grown);
  return least_of(alone, select(t < T(1e-10), near, beyond));
}

// A block of pairs with b1 <= b2; `valid` and `swapped` are 0 or 1. Then the sums over their nodes.
template <typename T>
struct Pairs {
  alignas(64) T delta[kLanes], a1[kLanes], b1[kLanes], a2[kLanes], b2[kLanes], valid[kLanes], swapped[kLanes];
  T least[kLanes], peak[kLanes], valley[kLanes];
  T integral[kLanes], t1[kLanes], t2[kLanes], log1[kLanes], log2[kLanes], moved[kLanes];
};

// Pieces, those of one kind together: of the distribution whose cusp a piece has and of the other one the shape, t and
// log u where x = 1 and, other, 1 - x = 1, and the distance elsewhere over the one there.
template <typename T, int N>
struct Pieces {
  alignas(64) T own_b[N], own_t[N], own_log[N], own_low[N], other_b[N], other_t[N], other_log[N], other_low[N];
  T extent[N], size[N], power[N], least[N];  // size: of tails the other's largest distance, else delta
  T sum[N], own_sum[N], other_sum[N], own_logs[N], other_logs[N], moved[N];
  int lane[N];
  bool second[N];  // whether it is the second distribution that has the cusp
  int count = 0;
};

template <typename T>
void prepare(Pairs<T>& p, const std::array<const T*, 6>& in, int n, T eps) {
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    const T delta = std::fabs(in[0][k] - in[3][k]);
    const T a = in[1][k] + eps, b = in[2][k] + eps, c = in[4][k] + eps, d = in[5][k] + eps;
    const bool valid = (a >= T(kLeastScale)) & (a <= T(kLargestScale)) & (c >= T(kLeastScale)) &
                       (c <= T(kLargestScale)) & (b > 0) & (d > 0) & (delta >= 0);
    const T low = T(kLeastShape), high = T(kLargestShape);
    const T x = select(valid, a, T(1)), y = select(valid, c, T(1));
    const T u = select(valid, least_of(largest_of(b, low), high), T(1));
    const T v = select(valid, least_of(largest_of(d, low), high), T(1));
    p.delta[k] = select(valid & (delta <= T(kFarthest)), delta, T(0));
    p.valid[k] = select(valid, T(1), T(0));
    p.swapped[k] = select(u > v, T(1), T(0));
    p.a1[k] = select(u > v, y, x), p.a2[k] = select(u > v, x, y);
    p.b1[k] = select(u > v, v, u), p.b2[k] = select(u > v, u, v);
  }
}

// log(1 + e^w) and its derivative.
template <typename T>
FASTPROB_INLINE std::pair<T, T> softplus(T w) {
  const T e = exponential(-std::fabs(w)), inverse = 1 / (1 + e);
  return {largest_of(w, T(0)) + log_positive(1 + e), select(w > 0, T(1), e) * inverse};
}

template <typename T>
FASTPROB_INLINE T newton(T w, T c, T p1, T p2, T rising) {
  const auto [value, share] = softplus(w);
  const T slope = p1 + (p2 - p1) * share;
  const bool moves = rising * slope > 0;
  return select(moves, limited(w - (c + p1 * w + (p2 - p1) * value) / select(moves, slope, T(1))), w);
}

template <typename T>
void find_turns(Pairs<T>& p, int n) {
  alignas(64) T c[kLanes], peak[kLanes], valley[kLanes];
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    const T p1 = p.b1[k] - 1, p2 = p.b2[k] - 1, end = T(kLogitLimit);
    const T log_delta = log_positive(largest_of(p.delta[k], T(1e-30)));
    c[k] = (log_positive(p.b1[k]) + p.b1[k] * log_positive(p.a1[k]) + p1 * log_delta) -
           (log_positive(p.b2[k]) + p.b2[k] * log_positive(p.a2[k]) + p2 * log_delta);
    const T w1 = -c[k] / select(p1 == 0, T(1), p1), w2 = -c[k] / select(p2 == 0, T(1), p2);
    const T flat = select((p1 == 0) & (c[k] > 0), -end, end);
    peak[k] = limited(least_of(select(p1 > 0, w1, end), select(p2 > 0, w2, flat)));
    valley[k] = limited(largest_of(select(p1 < 0, w1, -end), select(p2 < 0, w2, -end)));
  }
  for (int step = 0; step < kNewtonSteps; ++step) {
#pragma omp simd
    for (int k = 0; k < n; ++k) {
      const T p1 = p.b1[k] - 1, p2 = p.b2[k] - 1;
      peak[k] = newton(peak[k], c[k], p1, p2, T(1));
      valley[k] = newton(valley[k], c[k], p1, p2, T(-1));
    }
  }
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    const T p1 = p.b1[k] - 1, p2 = p.b2[k] - 1, end = T(kLogitLimit);
    const bool inside = (p1 < 0) & (p2 > 0), both = (p1 < 0) & (p2 >= 0);
    const T lowest = select(inside, limited(log_positive(select(inside, -p1 / p2, T(1)))), end);
    const bool apart = c[k] + p1 * lowest + (p2 - p1) * softplus(lowest).first < 0, none = both & !apart;
    p.peak[k] = select(none, T(0), select(p2 < 0, valley[k], peak[k]));
    p.valley[k] = select(none, T(0), select(p1 >= 0, -end, valley[k]));
  }
}

// The points between the cusps from which a piece goes on, and how far.
template <typename T>
struct Extents {
  alignas(64) T d1[3][kLanes], d2[3][kLanes], length[3][kLanes], reach[3][kLanes];
};

template <typename T>
FASTPROB_INLINE bool above(const Pairs<T>& p, int k, T d1, T d2, T step) {
  const T t1 = power(d1 + step, p.a1[k], p.b1[k]).t, t2 = power(d2 - step, p.a2[k], p.b2[k]).t;
  return t1 + t2 - p.least[k] > cut(p.b1[k]);
}

template <typename T>
void find_extents(Pairs<T>& p, Extents<T>& e, int n) {
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    const T delta = p.delta[k], a1 = p.a1[k], b1 = p.b1[k], a2 = p.a2[k], b2 = p.b2[k], peak = p.peak[k];
    const T share = softplus(peak).second, rest = softplus(-peak).second, z1 = delta * share, z2 = delta * rest;
    const T v1 = select(b1 >= 1, T(0), delta * softplus(p.valley[k]).second);
    const T tiny = kTiny<T>;
    const T at_first = tiny + power(delta, a2, b2).t, at_second = power(delta, a1, b1).t + tiny;
    const T at_peak = power(z1, a1, b1).t + power(z2, a2, b2).t;
    const bool from_cusp = at_second < at_peak;
    p.least[k] = least_of(least_of(at_first, at_second), at_peak);
    e.d1[0][k] = 0, e.d1[1][k] = z1, e.d1[2][k] = select(from_cusp, delta, z1);
    e.d2[0][k] = delta, e.d2[1][k] = z2, e.d2[2][k] = select(from_cusp, T(0), z2);
    e.length[0][k] = v1, e.length[1][k] = v1 - z1, e.length[2][k] = select(from_cusp, -z2, z2);
  }
  for (int piece = 0; piece < 3; ++piece) {
    alignas(64) T low[kLanes], high[kLanes];
    for (int k = 0; k < n; ++k) low[k] = T(-kExtentBits), high[k] = 0;
    for (int step = 0; step < kBisections; ++step) {
#pragma omp simd
      for (int k = 0; k < n; ++k) {
        const T middle = (low[k] + high[k]) / 2;
        const bool far = above(p, k, e.d1[piece][k], e.d2[piece][k], e.length[piece][k] * exp2_bounded(middle));
        low[k] = select(far, low[k], middle), high[k] = select(far, middle, high[k]);
      }
    }
#pragma omp simd
    for (int k = 0; k < n; ++k) e.reach[piece][k] = std::fabs(e.length[piece][k]) * exp2_bounded(high[k]);
  }
}

// Puts the pieces that are not empty at the end of the list. `second`: whether it is the second distribution's cusp.
template <typename T, int N>
void add(Pieces<T, N>& out, const Pieces<T, kLanes>& from, int n, bool second) {
  for (int k = 0; k < n; ++k) {
    if (!(from.extent[k] > 0)) continue;
    const int i = out.count++;
    out.own_b[i] = from.own_b[k], out.own_t[i] = from.own_t[k], out.own_log[i] = from.own_log[k];
    out.other_b[i] = from.other_b[k], out.other_t[i] = from.other_t[k], out.other_log[i] = from.other_log[k];
    out.own_low[i] = from.own_low[k], out.other_low[i] = from.other_low[k], out.extent[i] = from.extent[k];
    out.size[i] = from.size[k], out.power[i] = from.power[k], out.least[i] = from.least[k];
    out.lane[i] = k, out.second[i] = second;
    out.sum[i] = out.own_sum[i] = out.other_sum[i] = out.own_logs[i] = out.other_logs[i] = out.moved[i] = 0;
  }
}

// What rounding adds to phi on a piece, where the other distance is least, over what it was when the least phi was
// found: the same for all nodes of the piece.
template <typename T>
FASTPROB_INLINE T offset(T t, T b, T low, T d, T a) {
  return t * exp2_bounded(b * log2_positive(low)) - power(d, a, b).t;
}

template <typename T>
void add_tails(Pieces<T, 2 * kLanes>& out, const Pairs<T>& p, int n) {
  Pieces<T, kLanes> made;
  for (const bool second : {false, true}) {
    const T *own_a = second ? p.a2 : p.a1, *own_b = second ? p.b2 : p.b1;
    const T *other_a = second ? p.a1 : p.a2, *other_b = second ? p.b1 : p.b2;
#pragma omp simd
    for (int k = 0; k < n; ++k) {
      const T delta = p.delta[k], extent = tail(delta, own_a[k], own_b[k], other_a[k], other_b[k]);
      const T size = delta + extent;
      const Power<T> own = power(extent, own_a[k], own_b[k]), other = power(size, other_a[k], other_b[k]);
      made.own_b[k] = own_b[k], made.own_t[k] = own.t, made.own_log[k] = own.log, made.own_low[k] = 0;
      made.other_b[k] = other_b[k], made.other_t[k] = other.t, made.other_log[k] = other.log;
      const T low = delta / size;
      made.other_low[k] = low, made.extent[k] = extent, made.size[k] = size;
      made.least[k] = p.least[k] + offset(other.t, other_b[k], low, delta, other_a[k]);
      made.power[k] = largest_of(clustering(own_b[k], own.t), clustering(other_b[k], other.t));
    }
    add(out, made, n, second);
  }
}

template <int piece, typename T>
void add_between(Pieces<T, 3 * kLanes>& out, const Pairs<T>& p, const Extents<T>& e, int n) {
  constexpr bool second = piece == 2;
  Pieces<T, kLanes> made;
  const T *own_a = second ? p.a2 : p.a1, *own_b = second ? p.b2 : p.b1;
  const T *other_a = second ? p.a1 : p.a2, *other_b = second ? p.b1 : p.b2;
  const T *own_d = second ? e.d2[piece] : e.d1[piece], *other_d = second ? e.d1[piece] : e.d2[piece];
  const T *length = e.length[piece], *reach = e.reach[piece];
#pragma omp simd
  for (int k = 0; k < n; ++k) {
    // Away from the own cusp, from the point on: that is where x = 0.
    const T direction = second ? -length[k] : length[k], delta = p.delta[k], extent = reach[k], own_k = own_d[k];
    const T other_k = other_d[k], left = own_k - extent, right = delta - extent, both = other_k + extent;
    const bool outward = direction > 0;
    const T low = select(outward, T(0), largest_of(left, T(0))), high = select(outward, extent, own_k);
    const T far = select(outward, right, other_k), wide = select(outward, delta, both);
    const Power<T> own = power(high, own_a[k], own_b[k]), other = power(wide, other_a[k], other_b[k]);
    made.own_b[k] = own_b[k], made.own_t[k] = own.t, made.own_log[k] = own.log, made.own_low[k] = low / high;
    made.other_b[k] = other_b[k], made.other_t[k] = other.t, made.other_log[k] = other.log;
    const T other_low = far / wide;
    made.other_low[k] = other_low, made.extent[k] = extent, made.size[k] = delta;
    made.least[k] = p.least[k] + offset(other.t, other_b[k], other_low, far, other_a[k]);
    const T power = clustering(own_b[k], own.t);
    made.power[k] = piece == 1 ? T(2) : power;
  }
  add(out, made, n, second);
}

// Adds up e^-phi, and with t and t log2 of the distance over the largest one; for tails t over that, too.
template <bool has_gradients, bool is_tail, typename T, int N>
void sum_nodes(Pieces<T, N>& p) {
  const int count = p.count;
  for (const Node<T> node : nodes<T>()) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const T q = p.power[i], log2_near = q * node.log2, near = exp2_bounded(log2_near);
      T log2_own = log2_near, x = near, rest = near, slope = q * near * node.inverse;
      if constexpr (!is_tail) {
        const T far = exp2_bounded(q * node.log2_rest), inverse = 1 / (near + far);
        x = near * inverse, rest = far * inverse, slope = q * x * rest * node.inverse_both;
        log2_own = log2_positive(p.own_low[i] + (1 - p.own_low[i]) * x);
      }
      const T other = p.other_low[i] + (1 - p.other_low[i]) * rest, log2_other = log2_positive(other);
      const T own_t = p.own_t[i] * exp2_bounded(p.own_b[i] * log2_own);
      const T other_t = p.other_t[i] * exp2_bounded(p.other_b[i] * log2_other);
      const T least = p.least[i], depth = least - (own_t + other_t);
      const T cut = largest_of(least_of(depth, T(10)), T(-kDepth)) * T(1 / kLn2);  // least is rounded
      const T e = select(depth > T(-kDepth) - T(1e-4) * least, node.weight * slope * exp2_bounded(cut), T(0));
      p.sum[i] += e;
      if constexpr (has_gradients) {
        const T own = e * own_t, others = e * other_t;
        p.own_sum[i] += own, p.other_sum[i] += others;
        p.own_logs[i] += own * log2_own, p.other_logs[i] += others * log2_other;
        if constexpr (is_tail) p.moved[i] += others / other;
      }
    }
  }
}

template <bool is_tail, typename T, int N>
void collect(Pairs<T>& p, const Pieces<T, N>& from) {
  for (int i = 0; i < from.count; ++i) {
    const int k = from.lane[i];
    const T extent = from.extent[i];
    const T own = extent * from.own_sum[i], other = extent * from.other_sum[i], sum = extent * from.sum[i];
    const T own_log = extent * T(kLn2) * from.own_logs[i] + from.own_log[i] * own;
    const T other_log = extent * T(kLn2) * from.other_logs[i] + from.other_log[i] * other;
    const bool second = from.second[i];
    p.integral[k] += sum;
    (second ? p.t2 : p.t1)[k] += own, (second ? p.t1 : p.t2)[k] += other;
    (second ? p.log2 : p.log1)[k] += own_log, (second ? p.log1 : p.log2)[k] += other_log;
    if constexpr (is_tail)
      p.moved[k] -= extent * from.other_b[i] * from.moved[i] / from.size[i];
    else
      p.moved[k] += (sum - from.own_b[i] * own - from.other_b[i] * other) / from.size[i];
  }
}

template <bool has_gradients, typename T>
void integrate(Pairs<T>& p, int n) {
  find_turns(p, n);
  Extents<T> extents;
  find_extents(p, extents, n);
  for (T* sum : {p.integral, p.t1, p.t2, p.log1, p.log2, p.moved}) std::fill_n(sum, n, T(0));
  Pieces<T, 2 * kLanes> tails;
  add_tails(tails, p, n);
  sum_nodes<has_gradients, true>(tails);
  collect<true>(p, tails);
  Pieces<T, 3 * kLanes> between;
  add_between<0>(between, p, extents, n);
  add_between<1>(between, p, extents, n);
  add_between<2>(between, p, extents, n);
  sum_nodes<has_gradients, false>(between);
  collect<false>(p, between);
}

}  // namespace match
}  // namespace fastprob
