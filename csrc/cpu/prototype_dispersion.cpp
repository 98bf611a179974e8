// prototype_dispersion: value, gradients or both. See fastprob/ops/prototype_dispersion.py.
//
// One pass over the points for the value and their gradient: each reads its prototype where it lies. The prototypes'
// gradient, rarely wanted, is a second pass: by class, over its points in the batch's order.
#include <algorithm>
#include <numeric>
#include <vector>

#include "blocks.h"
#include "half.h"

namespace fastprob {
namespace {

// Of n coordinates of a point x and its prototype p: the sum of (x - p)^2, and x's gradient scale (x - p).
template <bool with_gradient, typename T>
T squares(const T* x, const T* p, T* g, int64_t n, T scale) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const T d = x[k] - p[k];
    sum += d * d;
    if constexpr (with_gradient) g[k] = scale * d;
  }
  return sum;
}

// The same of half types, of up to kBlock coordinates: widened first, which is what vectorises.
template <bool with_gradient, typename T, typename S, std::enable_if_t<!std::is_same_v<T, S>, int> = 0>
T squares(const S* x, const S* p, S* g, int64_t n, T scale) {
  alignas(64) T wide[3][kBlock];
  convert(x, wide[0], n);
  convert(p, wide[1], n);
  const T sum = squares<with_gradient>(wide[0], wide[1], wide[2], n, scale);
  if (with_gradient) convert(wide[2], g, n);
  return sum;
}

// The sum of all squares. Chunks are of about kChunk elements, whole points of them, on any number of threads.
template <bool with_gradient, typename T, typename S>
double all_squares(const S* x, const S* p, const int64_t* labels, S* g, int64_t count, int64_t dim, T scale) {
  const int64_t points = std::max(kChunk / dim, int64_t(1)), chunks = (count + points - 1) / points;
  std::vector<double> sums(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      for (int64_t b = chunk * points; b < std::min(count, (chunk + 1) * points); ++b)
        for (int64_t d = 0; d < dim; d += kBlock) {
          const int64_t at = b * dim + d, n = std::min(kBlock, dim - d);
          sums[chunk] += squares<with_gradient>(x + at, p + labels[b] * dim + d, g + at, n, scale);
        }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.);
}

// The prototypes' gradient: minus scale times the sum of (x - p) over each class's points.
template <typename T, typename S>
void by_class(
    const S* x, const S* p, const int64_t* labels, S* g, int64_t count, int64_t dim, int64_t classes, double scale) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
  torch::stable::parallel_for(0, classes, 1, [&](int64_t first, int64_t last) {
    std::vector<double> sum(dim);
    auto point = std::partition_point(order.begin(), order.end(), [&](int64_t b) { return labels[b] < first; });
    for (int64_t c = first; c < last; ++c) {
      std::fill(sum.begin(), sum.end(), 0.);
      for (; point != order.end() && labels[*point] == c; ++point)
        for (int64_t d = 0; d < dim; ++d)
          sum[d] += double(static_cast<T>(x[*point * dim + d]) - static_cast<T>(p[c * dim + d]));
      for (int64_t d = 0; d < dim; ++d) g[c * dim + d] = static_cast<S>(T(-scale * sum[d]));
    }
  });
}

template <Kind kind>
void prototype_dispersion(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const double grad = kind == Kind::backward ? item(arguments.next<Tensor>()) : 1;
  const auto in = arguments.contiguous<3>();
  const int64_t needs = kind == Kind::value ? 0 : arguments.next<int64_t>();

  const auto& [x, prototypes, labels] = in;
  const int64_t count = x.size(0), dim = x.size(1), classes = prototypes.size(0);
  const int64_t* classes_of = static_cast<const int64_t*>(labels.data_ptr());
  for (int64_t b = 0; b < count; ++b)
    STD_TORCH_CHECK(
        classes_of[b] >= 0 && classes_of[b] < classes, "prototype_dispersion: labels must be in 0..", classes - 1,
        ", got ", classes_of[b]);
  const auto out = gradients_like(in, needs);
  const double elements = std::max(static_cast<double>(x.numel()), 1.), scale = 2 * grad / elements;
  double sum = 0;
  for_type(x, [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    const S *from = static_cast<const S*>(x.data_ptr()), *p = static_cast<const S*>(prototypes.data_ptr());
    S *g = static_cast<S*>(out[0].data_ptr()), *g_p = static_cast<S*>(out[1].data_ptr());
    if (x.numel() && needs & 1)
      sum = all_squares<true>(from, p, classes_of, g, count, dim, T(scale));
    else if (x.numel() && kind != Kind::backward)
      sum = all_squares<false>(from, p, classes_of, g, count, dim, T(scale));
    if (needs & 2) by_class<T>(from, p, classes_of, g_p, count, dim, classes, scale);
  });

  if (kind != Kind::backward) *stack++ = torch::stable::detail::from(scalar_like(x, sum / elements));
  if (kind != Kind::value)
    for (const Tensor& gradient : out) *stack++ = torch::stable::detail::from(gradient);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  using fastprob::Kind;
  m.impl("prototype_dispersion", fastprob::prototype_dispersion<Kind::value>);
  m.impl("_prototype_dispersion_backward", fastprob::prototype_dispersion<Kind::backward>);
  m.impl("_prototype_dispersion_value_and_grad", fastprob::prototype_dispersion<Kind::value_and_grad>);
}
