// queue_contrastive_loss: value, or value and gradients, in one sweep over the keys. See
// fastprob/ops/queue_contrastive_loss.py.
//
// Queries are cut into tiles, keys into parts, whose number does not depend on that of the threads, and parts into
// tiles. A thread takes a tile of queries through a part. A tile of keys gives their similarities, which stay in cache
// and become exponentials relative to the greatest so far, and, for gradients, the sums of keys under these. At the end
// the parts of each query are joined in their order.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "../arguments.h"
#include "../ggd.h"
#include "blocks.h"
#include "half.h"
#include "tiles.h"

namespace fastprob {
namespace {

constexpr int64_t kQueries = 64, kKeys = 64;
constexpr int64_t kParts = 16;   // tiles of queries and parts of keys, together, that threads share, or more
constexpr int64_t kDepth = 128;  // coordinates at a time: as much of a panel of keys as stays in L1 for all queries
static_assert(kKeys % kColumns<float> == 0 && kQueries % kRows == 0);

// exp(x - greatest) of a query's similarities x to the keys so far: their sum, and that of their products with s.
template <typename T>
struct Softmax {
  T greatest = -kInf<T>;
  double sum = 0, weighted = 0;

  // What sums relative to the old greatest number are multiplied by for the new one.
  static T factor(T old, T greatest) { return old == greatest ? T(1) : std::exp(old - greatest); }

  void join(const Softmax& other) {
    const T most = std::max(greatest, other.greatest);
    const double mine = factor(greatest, most), theirs = factor(other.greatest, most);
    sum = mine * sum + theirs * other.sum;
    weighted = mine * weighted + theirs * other.weighted;
    greatest = most;
  }
};

// A query and some keys: the softmax of s, the teacher's, and the keys with its id.
template <typename T>
struct Query {
  Softmax<T> student, teacher;
  double own = 0;  // the sum of s
  int64_t count = 0;
};

template <typename T, typename S>
class Sweep {
  static constexpr int64_t kPanel = kColumns<T>;
  static constexpr int kSums = 3;  // of keys: under the student's softmax, under the teacher's, and those of its id

 public:
  Sweep(
      const std::array<Tensor, 5>& in,
      const std::optional<Tensor>& teacher,
      const std::optional<Tensor>& teacher_temperature,
      bool with_gradients)
      : count_(in[0].size(0)),
        keys_(in[1].size(0)),
        dim_(in[0].size(1)),
        width_((dim_ + kPanel - 1) / kPanel * kPanel),
        tiles_((count_ + kQueries - 1) / kQueries),
        parts_(std::clamp(kParts / tiles_, int64_t(1), (keys_ + kKeys - 1) / kKeys)),
        of_keys_(static_cast<const S*>(in[1].data_ptr())),
        ids_(static_cast<const int64_t*>(in[2].data_ptr())),
        key_ids_(static_cast<const int64_t*>(in[3].data_ptr())),
        inverse_(1 / static_cast<T>(item(in[4]))),
        has_teacher_(teacher),
        with_gradients_(with_gradients),
        found_(parts_ * tiles_ * kQueries),
        sums_(with_gradients ? parts_ * tiles_ * kSums * kQueries * width_ : 0) {
    widen(in[0], queries_);
    if (teacher) {
      widen(torch::stable::contiguous(*teacher), teacher_);
      teacher_inverse_ = 1 / static_cast<T>(item(*teacher_temperature));
    }
    torch::stable::parallel_for(0, tiles_ * parts_, 1, [&](int64_t first, int64_t last) {
      std::vector<T> by_dim(kKeys * dim_), by_key(kKeys * width_), rows(kKeys * width_);
      for (int64_t at = first; at < last; ++at) sweep(at / parts_, at % parts_, rows, by_dim, by_key);
    });
  }

  // The mean over the queries, times the number of these; its derivative for the temperature; and, if wanted, the
  // gradient of every query, times `scale`.
  std::array<double, 2> finish(double alpha, double scale, S* out) {
    std::vector<double> values(tiles_), slopes(tiles_);
    torch::stable::parallel_for(0, tiles_, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first * kQueries; i < std::min(count_, last * kQueries); ++i)
        finish(i, alpha, scale, out, values[i / kQueries], slopes[i / kQueries]);
    });
    return {std::accumulate(values.begin(), values.end(), 0.), std::accumulate(slopes.begin(), slopes.end(), 0.)};
  }

 private:
  int64_t count_, keys_, dim_, width_, tiles_, parts_;
  const S* of_keys_;
  const int64_t *ids_, *key_ids_;
  T inverse_, teacher_inverse_ = 0;  // of the temperatures
  bool has_teacher_, with_gradients_;
  std::vector<T> queries_, teacher_;  // [tiles kQueries, D], padded with zeros
  std::vector<Query<T>> found_;       // [tiles, parts, kQueries]
  std::vector<T> sums_;               // [tiles, parts, kSums, kQueries, width]

  void widen(const Tensor& from, std::vector<T>& to) {
    to.resize(tiles_ * kQueries * dim_);
    convert(static_cast<const S*>(from.data_ptr()), to.data(), count_ * dim_);
  }

  T* sums(int64_t tile, int64_t part, int of) {
    return sums_.data() + ((tile * parts_ + part) * kSums + of) * kQueries * width_;
  }

  void sweep(int64_t tile, int64_t part, std::vector<T>& rows, std::vector<T>& by_dim, std::vector<T>& by_key) {
    const int64_t height = std::min(kQueries, count_ - tile * kQueries);
    const int64_t blocks = (keys_ + kKeys - 1) / kKeys;
    alignas(64) T s[kQueries][kKeys], t[kQueries][kKeys];
    for (int64_t block = blocks * part / parts_; block < blocks * (part + 1) / parts_; ++block) {
      const int64_t first = block * kKeys, n = std::min(kKeys, keys_ - first);
      lay_out(first, n, rows, by_dim, by_key);
      similarities(queries_, tile, height, by_dim, s);
      if (has_teacher_) similarities(teacher_, tile, height, by_dim, t);
      for (int64_t i = 0; i < height; ++i) {
        Query<T>& query = found_[(tile * parts_ + part) * kQueries + i];
        for (int64_t j = 0; j < n; ++j) s[i][j] *= inverse_;
        add_own(query, s[i], ids_[tile * kQueries + i], first, n, rows, row_of(tile, part, 2, i));
        if (has_teacher_) {
          for (int64_t j = 0; j < n; ++j) t[i][j] *= teacher_inverse_;
          add(query.teacher, t[i], s[i], n, row_of(tile, part, 1, i));
        }
        add(query.student, s[i], s[i], n, row_of(tile, part, 0, i));
      }
      if (!with_gradients_) continue;
      const int64_t panel = kKeys * kPanel;
      const int64_t padded = (height + kRows - 1) / kRows * kRows;
      add_product(Left<T>{s[0], kKeys, 1}, by_key.data(), panel, n, sums(tile, part, 0), width_, padded, width_);
      if (has_teacher_)
        add_product(Left<T>{t[0], kKeys, 1}, by_key.data(), panel, n, sums(tile, part, 1), width_, padded, width_);
    }
  }

  T* row_of(int64_t tile, int64_t part, int of, int64_t i) {
    return with_gradients_ ? sums(tile, part, of) + i * width_ : nullptr;
  }

  // n keys from the first on, as the products read them: panels of keys [D, kPanel], and of coordinates [kKeys,
  // kPanel].
  void lay_out(int64_t first, int64_t n, std::vector<T>& rows, std::vector<T>& by_dim, std::vector<T>& by_key) {
    for (int64_t j = 0; j < n; ++j) convert(of_keys_ + (first + j) * dim_, &rows[j * width_], dim_);
    for (int64_t j = 0; j < n; j += kPanel)
      for (int64_t d = 0; d < dim_; ++d)
        for (int64_t c = 0; c < kPanel; ++c) by_dim[j * dim_ + d * kPanel + c] = rows[(j + c) * width_ + d];
    for (int64_t p = 0; with_gradients_ && p < width_; p += kPanel)
      for (int64_t j = 0; j < n; ++j) std::copy_n(&rows[j * width_ + p], kPanel, &by_key[p * kKeys + j * kPanel]);
  }

  void similarities(
      const std::vector<T>& queries,
      int64_t tile,
      int64_t height,
      const std::vector<T>& by_dim,
      T (&s)[kQueries][kKeys]) {
    std::fill_n(s[0], kQueries * kKeys, T(0));
    for (int64_t d = 0; d < dim_; d += kDepth) {
      const Left<T> rows{queries.data() + tile * kQueries * dim_ + d, dim_, 1};
      const int64_t padded = (height + kRows - 1) / kRows * kRows;
      add_product(rows, &by_dim[d * kPanel], dim_ * kPanel, std::min(kDepth, dim_ - d), s[0], kKeys, padded, kKeys);
    }
  }

  // The keys with the query's id.
  void add_own(Query<T>& query, const T* s, int64_t id, int64_t first, int64_t n, const std::vector<T>& rows, T* sum) {
    const int64_t* ids = key_ids_ + first;
    int64_t equal = 0;
    for (int64_t j = 0; j < n; ++j) equal += ids[j] == id;
    if (!equal) return;
    query.count += equal;
    for (int64_t j = 0; j < n; ++j) {
      if (ids[j] != id) continue;
      query.own += s[j];
      for (int64_t d = 0; sum && d < dim_; ++d) sum[d] += rows[j * width_ + d];
    }
  }

  // n exponents x more, which become exponentials; `sum` is that of the keys under the earlier ones.
  void add(Softmax<T>& of, T* x, const T* s, int64_t n, T* sum) {
    T greatest = of.greatest;
#pragma omp simd reduction(max : greatest)
    for (int64_t j = 0; j < n; ++j) greatest = std::max(greatest, x[j]);
    if (greatest != of.greatest) {
      const T factor = Softmax<T>::factor(of.greatest, greatest);
      of.sum *= factor;
      of.weighted *= factor;
      for (int64_t d = 0; sum && d < width_; ++d) sum[d] *= factor;
      of.greatest = greatest;
    }
    T total = 0, weighted = 0;
#pragma omp simd reduction(+ : total, weighted)
    for (int64_t j = 0; j < n; ++j) {
      const T similarity = s[j], e = exponential(x[j] - greatest);
      total += e;
      weighted += e * similarity;
      x[j] = e;
    }
    of.sum += total;
    of.weighted += weighted;
  }

  // Adds a query's value and its slope for the temperature; writes its gradient.
  void finish(int64_t i, double alpha, double scale, S* out, double& value, double& slope) {
    const int64_t tile = i / kQueries, row = i % kQueries;
    Query<T> all;
    for (int64_t part = 0; part < parts_; ++part) {
      const Query<T>& one = found_[(tile * parts_ + part) * kQueries + row];
      all.student.join(one.student);
      all.teacher.join(one.teacher);
      all.own += one.own;
      all.count += one.count;
    }
    const double greatest = all.student.greatest, own = all.count ? (1 - alpha) / all.count : 0;
    const double soft = has_teacher_ ? alpha / all.teacher.sum : 0, weight = (all.count ? 1 - alpha : 0) + alpha;
    const double expected = soft * all.teacher.weighted + own * all.own - weight * greatest;  // of s - greatest by y
    const double chances = weight / all.student.sum;
    value += weight * std::log(all.student.sum) - expected;
    slope -= (chances * all.student.weighted - weight * greatest - expected) * inverse_;
    if (!out) return;
    std::vector<double> gradient(dim_);
    for (int64_t part = 0; part < parts_; ++part) {
      const Query<T>& one = found_[(tile * parts_ + part) * kQueries + row];
      const double factors[kSums] = {
          chances * Softmax<T>::factor(one.student.greatest, all.student.greatest),
          -soft * Softmax<T>::factor(one.teacher.greatest, all.teacher.greatest), -own};
      for (int of = 0; of < kSums; ++of) {
        const T* sum = row_of(tile, part, of, row);
        for (int64_t d = 0; d < dim_; ++d) gradient[d] += factors[of] * sum[d];
      }
    }
    for (int64_t d = 0; d < dim_; ++d)
      out[i * dim_ + d] = static_cast<S>(static_cast<T>(gradient[d] * scale * inverse_));
  }
};

template <Kind kind>
void queue_contrastive_loss(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const double grad = kind == Kind::backward ? item(arguments.next<Tensor>()) : 1;
  const auto in = arguments.contiguous<5>();
  const auto teacher = arguments.next<std::optional<Tensor>>(), warmer = arguments.next<std::optional<Tensor>>();
  const auto weight = arguments.next<std::optional<Tensor>>();
  const double alpha = weight ? item(*weight) : 0;
  const int64_t needs = kind == Kind::value ? 0 : arguments.next<int64_t>();

  const Tensor& queries = in[0];
  const double count = std::max(queries.size(0), int64_t(1));
  std::array<Tensor, 8> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = torch::stable::new_empty(i < in.size() ? in[i] : queries, {0});
  if (needs & 1) out[0] = torch::stable::empty_like(queries);
  std::array<double, 2> totals{0, 0};
  if (queries.size(0))
    for_type(queries, [&](auto compute, auto storage) {
      using S = decltype(storage);
      Sweep<decltype(compute), S> sweep(in, teacher, warmer, needs & 1);
      totals = sweep.finish(alpha, grad / count, needs & 1 ? static_cast<S*>(out[0].data_ptr()) : nullptr);
    });
  if (needs & 16) out[4] = scalar_like(queries, grad * totals[1] / count);

  if (kind != Kind::backward) push(stack, scalar_like(queries, totals[0] / count));
  if (kind != Kind::value) push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  using fastprob::Kind;
  m.impl("queue_contrastive_loss", fastprob::queue_contrastive_loss<Kind::value>);
  m.impl("_queue_contrastive_loss_backward", fastprob::queue_contrastive_loss<Kind::backward>);
  m.impl("_queue_contrastive_loss_value_and_grad", fastprob::queue_contrastive_loss<Kind::value_and_grad>);
}
