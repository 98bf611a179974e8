// mc_dropout: mean and variance over passes, by blocks of rows. See fastprob/ops/mc_dropout.py.
//
// The passes' differences from their mean are multiplied with `last`, and the products squared and summed while they
// lie in L1. bfloat16 products are torch's own, of more rows and passes at a time.
#include "mc_dropout.h"

namespace fastprob {
namespace {

constexpr int64_t kBlocksAtOnce = 16;  // blocks of one bfloat16 product: of 2048 rows

// The squares of a block, by products of its own type: some passes of a row by its live units.
template <typename T>
void add_squares(const Network<T>& net, Rows<T>& rows) {
  const int64_t passes = net.passes.size(), size = kPassesAtOnce * net.width;
  std::vector<T> units(rows.count() * size);
  for (int64_t pass = 0; pass < passes; pass += kPassesAtOnce) {
    const int64_t some = std::min(kPassesAtOnce, passes - pass);
    rows.live_deviations(pass, some, units.data(), net.width, size);
    deviating_outputs(net, rows, some, units.data(), net.width, size, [&](int64_t j, const T* y) {
      for (int64_t i = 0; i < rows.count(); ++i)
        for (int64_t k = 0; k < some; ++k)
          rows.add_squares(i, y + (i * kPassesAtOnce + k) * kColumns<T>, j, kColumns<T>);
    });
  }
}

// Those of several blocks, by bfloat16 products with `last` [D, width].
inline void add_squares(
    const Network<float>& net, const std::vector<std::unique_ptr<Rows<float>>>& blocks, const Tensor& last) {
  const int64_t passes = net.passes.size(), at_once = std::min(kPassesAtOnce, passes), n = blocks.size();
  const Tensor units = torch::stable::new_empty(last, {at_once * n * kRowsAtOnce, net.width});
  for (int64_t pass = 0; pass < passes; pass += at_once) {
    const int64_t some = std::min(at_once, passes - pass);
    in_parallel(n, [&](int64_t block) {
      auto* to = static_cast<c10::BFloat16*>(units.data_ptr()) + block * kRowsAtOnce * net.width;
      blocks[block]->deviations(pass, some, to, n * kRowsAtOnce * net.width, net.width);
    });
    const Tensor y = torch::stable::matmul(units, torch::stable::transpose(last, 0, 1));
    for_type(y, [&](auto, auto storage) {  // autocast may have chosen another type
      const auto* from = static_cast<const decltype(storage)*>(y.data_ptr());
      in_parallel(n, [&](int64_t block) {
        for (int64_t k = 0; k < some; ++k)
          for (int64_t i = 0; i < blocks[block]->count(); ++i)
            blocks[block]->add_squares(i, from + ((k * n + block) * kRowsAtOnce + i) * net.dim, 0, net.dim);
      });
    });
  }
}

// A matrix in bfloat16, its rows padded with zeros.
template <typename S>
Tensor half_of(const Tensor& x, int64_t width) {
  const Tensor out = torch::stable::new_empty(x, {x.size(0), width}, ScalarType::BFloat16);
  auto* to = static_cast<c10::BFloat16*>(out.data_ptr());
  const S* from = static_cast<const S*>(x.data_ptr());
  for (int64_t i = 0; i < x.size(0); ++i)
    for (int64_t j = 0; j < width; ++j)
      to[i * width + j] = c10::BFloat16(j < x.size(1) ? static_cast<float>(from[i * x.size(1) + j]) : 0.f);
  return out;
}

void mc_dropout(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = arguments.contiguous<4>();
  const int64_t passes = arguments.next<int64_t>();
  const double p = arguments.next<double>();
  const int64_t seed = arguments.next<int64_t>();
  const bool half_products = arguments.next<std::string>() == "bfloat16";
  const auto& [hidden, constant, fold, last] = in;
  const int64_t rows = hidden.size(0), dim = last.size(0);
  const std::array<Tensor, 2> out = {
      torch::stable::new_empty(hidden, {rows, dim}), torch::stable::new_empty(hidden, {rows, dim})};
  for_type(hidden, [&](auto compute, auto storage) {
    using T = decltype(compute);
    using S = decltype(storage);
    const bool finite = all_finite<S>(fold) && all_finite<S>(last);
    const Network<T> net = network_of<T, S>(in, passes, p, seed, finite);
    const int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    const auto block_at = [&](int64_t block) {
      return std::make_unique<Rows<T>>(net, data<S>(hidden), data<S>(constant), block * kRowsAtOnce);
    };
    if constexpr (std::is_same_v<T, float>) {
      if (half_products) {
        const Tensor half_last = half_of<S>(last, net.width);
        for (int64_t first = 0; first < blocks; first += kBlocksAtOnce) {
          std::vector<std::unique_ptr<Rows<T>>> some(std::min(kBlocksAtOnce, blocks - first));
          in_parallel(some.size(), [&](int64_t i) { some[i] = block_at(first + i); });
          add_squares(net, some, half_last);
          in_parallel(some.size(), [&](int64_t i) { some[i]->write(data<S>(out[0]), data<S>(out[1])); });
        }
        return;
      }
    }
    in_parallel(blocks, [&](int64_t i) {
      const auto block = block_at(i);
      add_squares(net, *block);
      block->write(data<S>(out[0]), data<S>(out[1]));
    });
  });
  push(stack, out);
}

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) { m.impl("mc_dropout", fastprob::mc_dropout); }
