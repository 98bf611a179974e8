// mc_dropout's gradients, by blocks of rows. See fastprob/ops/mc_dropout.py.
//
// Some passes at a time, as many as have their units kept. Their outputs, less the mean, are computed anew, and so the
// gradients g_m of the outputs and b_m = (g_m W) [u_m > 0] of what the ReLU takes, for active units alone. As the g_m
// sum to the mean's gradient g, that of W is g^T u and the sum of g_m^T (u_m - u): by the live units of a row, one
// row's passes at a time. What F and h get of b_m is computed for the units that a pass takes off or sums, and once for
// all units and the sum of b_m over passes that take off.
//
// The weights' gradients are added up by slices of rows, whose number depends on that of the rows alone.
#include <numeric>

#include "mc_dropout.h"

namespace fastprob {
namespace {

constexpr int64_t kSlices = 8;
constexpr int64_t kActive = 64;  // units whose rows of W, 128 KB of 512 outputs, stay in L2 for all rows
constexpr size_t kOthers = 3;    // of a tile of dots: 12 sums in registers

// [columns, rows], the rows padded with zeros.
template <typename T, typename S>
std::vector<T> transposed(const S* x, int64_t rows, int64_t columns) {
  const int64_t width = padded(rows, kColumns<T>);
  std::vector<T> out(columns * width);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * width + i] = static_cast<T>(x[i * columns + j]);
  return out;
}

// Sums of the weights' gradients: panels [hidden, kColumns] of units and [units, kColumns] of outputs.
template <typename T>
struct Sums {
  std::vector<T> fold, last;
};

// What the gradients of all rows share.
template <typename T>
struct Problem {
  Network<T> net;
  std::vector<T> fold, last;  // transposed
  std::vector<int64_t> all;   // hidden units
  std::vector<char> used;     // hidden units that any pass keeps
  int64_t needs;

  template <typename S>
  Problem(Network<T> network, const S* fold, const S* last, int64_t wanted)
      : net(std::move(network)),
        fold(transposed<T>(fold, net.units, net.hidden)),
        last(transposed<T>(last, net.dim, net.units)),
        all(net.hidden),
        used(net.hidden),
        needs(wanted) {
    std::iota(all.begin(), all.end(), 0);
    for (const Pass& pass : net.passes) {
      std::vector<char> kept(net.hidden, pass.drops);
      for (int64_t k : pass.units) kept[k] = !pass.drops;
      for (int64_t k = 0; k < net.hidden; ++k) used[k] |= kept[k];
    }
  }

  Sums<T> zeros() const {
    return {
        std::vector<T>(needs & 4 ? net.width * net.hidden : 0),
        std::vector<T>(needs & 8 ? net.out_width * net.units : 0)};
  }
};

// A block of rows.
template <typename T>
class Gradients {
  static constexpr int64_t columns = kColumns<T>;

 public:
  template <typename S>
  Gradients(
      const Problem<T>& problem,
      const S* h,
      const S* c,
      const S* grad_mean,
      const S* grad_variance,
      int64_t first,
      Sums<T>& sums)
      : problem_(problem),
        net_(problem.net),
        rows_(net_, h, c, first),
        sums_(sums),
        count_(rows_.count()),
        panel_(count_ * columns),
        at_once_(padded(rows_.kept() + 1, kTile)),
        stride_(net_.width + columns),
        grad_mean_(count_ * net_.out_width),
        grad_variance_(count_ * net_.out_width),
        deviations_(count_ * at_once_ * stride_),
        grads_(count_ * at_once_ * net_.out_width),
        constant_(count_ * net_.width),
        taking_off_(count_ * net_.width),
        hidden_(count_ * net_.hidden) {
    const int64_t passes = net_.passes.size();
    for (int64_t i = 0; i < rows_.rows(); ++i)
      for (int64_t d = 0; d < net_.dim; ++d) {
        grad_mean_[i * net_.out_width + d] = static_cast<T>(grad_mean[(first + i) * net_.dim + d]);
        grad_variance_[i * net_.out_width + d] = static_cast<T>(grad_variance[(first + i) * net_.dim + d]);
      }
    for (int64_t pass = 0; pass < passes; pass += rows_.kept()) {
      const int64_t some = std::min(rows_.kept(), passes - pass);
      if (pass) rows_.keep(pass, some);
      rows_.live_deviations(pass, some, deviations_.data(), stride_, at_once_ * stride_);
      of_outputs(some);
      if (problem_.needs & 8) of_last(some, pass == 0);
      if (problem_.needs & 7) of_units(pass, some);
    }
    of_hidden(taking_off_.data(), problem_.all);
  }

  // Writes the inputs' gradients, unless they are null.
  template <typename S>
  void write(S* hidden, S* constant, int64_t first) const {
    for (int64_t i = 0; i < rows_.rows(); ++i) {
      for (int64_t k = 0; hidden && k < net_.hidden; ++k)
        hidden[(first + i) * net_.hidden + k] =
            static_cast<S>(problem_.used[k] ? hidden_[i * net_.hidden + k] * net_.scale : T(0));
      for (int64_t c = 0; constant && c < net_.units; ++c)
        constant[(first + i) * net_.units + c] = static_cast<S>(constant_[in_panels(i, c)]);
    }
  }

 private:
  // Where row i's number c is in panels [width / kColumns, count, kColumns].
  int64_t in_panels(int64_t i, int64_t c) const { return c / columns * panel_ + i * columns + c % columns; }
  // The gradients of row i's outputs from j on, [passes, kColumns].
  T* grads(int64_t i, int64_t j) { return &grads_[(i * net_.out_width + j) * at_once_]; }

  // Those of some passes: (grad_mean + 2 grad_variance (y - mean)) / M.
  void of_outputs(int64_t some) {
    const T passes = T(net_.passes.size());
    for (int64_t k = 0; k < some; k += kPassesAtOnce) {
      const int64_t n = std::min(kPassesAtOnce, some - k);
      const T* units = &deviations_[k * stride_];
      deviating_outputs(net_, rows_, n, units, stride_, at_once_ * stride_, [&](int64_t j, const T* y) {
        for (int64_t i = 0; i < count_; ++i) {
          const T *mean = &grad_mean_[i * net_.out_width + j], *variance = &grad_variance_[i * net_.out_width + j];
          for (int64_t m = 0; m < n; ++m) {
            const T* from = y + (i * kPassesAtOnce + m) * columns;
            T* to = grads(i, j) + (k + m) * columns;
#pragma omp simd
            for (int64_t d = 0; d < columns; ++d) to[d] = (mean[d] + 2 * variance[d] * from[d]) / passes;
          }
        }
      });
    }
  }

  // Of `last`, to which the mean is one more pass.
  void of_last(int64_t some, bool with_mean) {
    for (int64_t i = 0; with_mean && i < rows_.rows(); ++i) {
      T* to = &deviations_[(i * at_once_ + some) * stride_];
      for (int64_t n = 0; n < rows_.live_before(i, net_.width); ++n) to[n] = rows_.mean(i)[rows_.live(i)[n]];
      for (int64_t j = 0; j < net_.out_width; j += columns)
        std::copy_n(&grad_mean_[i * net_.out_width + j], columns, grads(i, j) + some * columns);
    }
    for (int64_t j = 0; j < net_.out_width; j += columns)
      for (int64_t i = 0; i < rows_.rows(); ++i)
        add_to_rows(
            Left<T>{&deviations_[i * at_once_ * stride_], 1, stride_}, grads(i, j), some + with_mean,
            &sums_.last[j * net_.units], rows_.live_before(i, net_.width), Packed{rows_.live(i)});
  }

  // Of what the ReLU of some passes takes, in the place of the kept units; and what follows from it.
  void of_units(int64_t pass, int64_t some) {
    const int64_t size = count_ * net_.width;
    T* const units = rows_.kept_units(0);
    for (int64_t c = 0; c < net_.units; c += kActive)
      for (int64_t i = 0; i < rows_.rows(); ++i)
        for (int64_t k = 0; k < some; k += kTile)
          of_active(units + k * size, i, k, std::min(kTile, some - k), c, std::min(c + kActive, net_.units));
    for (int64_t k = 0; k < some; ++k) {
      const Pass& of_pass = net_.passes[pass + k];
      T* b = units + k * size;
      for (int64_t at = 0; at < size; ++at) {
        constant_[at] += b[at];
        taking_off_[at] += of_pass.drops ? b[at] : T(0);
        b[at] = of_pass.drops ? -b[at] : b[at];
      }
      of_hidden(b, of_pass.units);
    }
  }

  // Of a row's units from c to end that any of a tile of passes has.
  void of_active(T* units, int64_t i, int64_t k, int64_t some, int64_t c, int64_t end) {
    const int64_t size = count_ * net_.width;
    int64_t active[kActive], count = 0;
    for (; c < end; c += columns) {
      T most[columns];
      std::fill_n(most, columns, T(net_.dense));
      for (int64_t m = 0; m < some; ++m) {
        const T* unit = units + m * size + in_panels(i, c);
#pragma omp simd
        for (int64_t lane = 0; lane < columns; ++lane)
          most[lane] = select(unit[lane] > most[lane], unit[lane], most[lane]);
      }
      for (int64_t lane = 0; lane < std::min(columns, end - c); ++lane) {
        active[count] = c + lane;
        count += most[lane] > 0;
      }
    }
    std::array<const T*, kTile> a;
    for (int64_t m = 0; m < kTile; ++m) a[m] = grads(i, 0) + (k + m) * columns;
    for (int64_t n = 0; n < count; n += kOthers) {
      std::array<const T*, kOthers> b;
      for (size_t o = 0; o < kOthers; ++o)
        b[o] = &problem_.last[active[std::min<int64_t>(n + o, count - 1)] * net_.out_width];
      T out[kTile][kOthers];
      dots(a, at_once_ * columns, b, net_.out_width / columns, out);
      for (int64_t o = 0; o < std::min<int64_t>(kOthers, count - n); ++o) {
        T* unit = units + in_panels(i, active[n + o]);
        for (int64_t m = 0; m < some; ++m, unit += size) *unit = out[m][o] * T(*unit > 0);
      }
    }
  }

  // Adds to the gradients of `hidden` and `fold` what chosen hidden units get of b, in panels.
  void of_hidden(const T* b, const std::vector<int64_t>& chosen) {
    const int64_t count = chosen.size();
    for (int64_t i = 0; problem_.needs & 1 && i < rows_.rows(); i += kTile)
      for (int64_t n = 0; n < count; n += kOthers) {
        std::array<const T*, kTile> a;
        std::array<const T*, kOthers> fold;
        for (int64_t r = 0; r < kTile; ++r) a[r] = b + (i + r) * columns;
        for (size_t o = 0; o < kOthers; ++o)
          fold[o] = &problem_.fold[chosen[std::min<int64_t>(n + o, count - 1)] * net_.width];
        T out[kTile][kOthers];
        dots(a, panel_, fold, net_.width / columns, out);
        for (int64_t r = 0; r < kTile; ++r)
          for (int64_t o = 0; o < std::min<int64_t>(kOthers, count - n); ++o)
            hidden_[(i + r) * net_.hidden + chosen[n + o]] += out[r][o];
      }
    for (int64_t j = 0; problem_.needs & 4 && j < net_.width; j += columns)
      add_to_rows(
          Left<T>{rows_.hidden(), 1, net_.hidden}, b + j * count_, rows_.rows(), &sums_.fold[j * net_.hidden], count,
          Chosen{chosen.data()});
  }

  const Problem<T>& problem_;
  const Network<T>& net_;
  Rows<T> rows_;
  Sums<T>& sums_;
  const int64_t count_, panel_, at_once_, stride_;
  std::vector<T> grad_mean_, grad_variance_;  // [count, out_width]
  std::vector<T> deviations_;                 // [count, at_once, stride], of live units
  std::vector<T> grads_;                      // see grads()
  std::vector<T> constant_, taking_off_;      // sums of b over all passes and those that take off, in panels
  std::vector<T> hidden_;                     // [count, hidden]
};

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto grads = arguments.contiguous<2>();
  const auto in = arguments.contiguous<4>();
  const int64_t passes = arguments.next<int64_t>();
  const double p = arguments.next<double>();
  const int64_t seed = arguments.next<int64_t>();
  arguments.next<std::string>();  // gradients' products are the tensors' own
  const int64_t needs = arguments.next<int64_t>();
  const auto out = gradients_like(in, needs);
  for_type(in[0], [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    bool finite = true;
    for (const Tensor& t : {grads[0], grads[1], in[0], in[1], in[2], in[3]}) finite &= all_finite<S>(t);
    const Problem<T> problem(network_of<T, S>(in, passes, p, seed, finite), data<S>(in[2]), data<S>(in[3]), needs);
    const Network<T>& net = problem.net;
    const auto wanted = [&](int i) { return needs >> i & 1 ? data<S>(out[i]) : nullptr; };
    const int64_t blocks = (net.rows + kRowsAtOnce - 1) / kRowsAtOnce, of_slice = (blocks + kSlices - 1) / kSlices;
    std::vector<Sums<T>> sums(of_slice ? (blocks + of_slice - 1) / of_slice : 0, problem.zeros());
    in_parallel(sums.size(), [&](int64_t slice) {
      for (int64_t block = slice * of_slice; block < std::min(blocks, (slice + 1) * of_slice); ++block) {
        const int64_t first = block * kRowsAtOnce;
        const Gradients<T> gradients(
            problem, data<S>(in[0]), data<S>(in[1]), data<S>(grads[0]), data<S>(grads[1]), first, sums[slice]);
        gradients.write(wanted(0), wanted(1), first);
      }
    });
    // Writes the sum over slices of a weight's panels [rows, kColumns] of its rows, `row` being its columns.
    const auto write = [&](S* to, std::vector<T> Sums<T>::* of, int64_t rows, int64_t row, const auto& finish) {
      in_parallel(to ? rows : 0, [&](int64_t i) {
        for (int64_t k = 0; k < row; ++k) {
          T sum = 0;
          for (const Sums<T>& slice : sums)
            sum += (slice.*of)[i / kColumns<T> * kColumns<T> * row + k * kColumns<T> + i % kColumns<T>];
          to[i * row + k] = static_cast<S>(finish(sum, k));
        }
      });
    };
    write(wanted(2), &Sums<T>::fold, net.units, net.hidden, [&](T sum, int64_t k) {
      return sum * net.scale * T(problem.used[k]);
    });
    write(wanted(3), &Sums<T>::last, net.dim, net.units, [](T sum, int64_t) { return sum; });
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) { m.impl("_mc_dropout_backward", fastprob::backward); }
