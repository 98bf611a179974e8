// Elementwise operators, and the losses that are means or sums of them: from the maths of one element to the torch
// operators that fastprob/_op.py defines. A Device runs it over tensors: Cpu in cpu/blocks.h, Cuda in cuda/blocks.cuh.
#pragma once

#include <algorithm>
#include <string>

#include "arguments.h"
#include "maths.h"

namespace fastprob {

// What an operator makes of one element: its value, and the value's derivatives for the N inputs. It always states
// both; compilers leave out what is not stored.
template <typename T, size_t N>
struct Element {
  T value, slopes[N];
};

// Whether an operator is a loss: the mean over its elements, or what its last option, `reduction`, says.
enum class Reduces { never, to_mean, as_told };

// An operator without options derives from this and has a template operator()(T input, ...) -> Element<T, N>. One with
// options reads them in `read`, and `visit` calls `run` with its function for type T. `needs`: see fastprob/_op.py.
template <typename Op, size_t N, Reduces reduces = Reduces::never>
struct Elementwise {
  static constexpr size_t kInputs = N;
  static constexpr Reduces kReduces = reduces;

  static Op read(Arguments&) { return {}; }

  template <typename T, bool has_gradients, typename Run>
  void visit(int64_t /*needs*/, const Run& run) const {
    run(static_cast<const Op&>(*this));
  }
};

// Every element's value; or its gradients, given those of the values.
template <typename Device, Kind kind, typename Op, size_t N>
void by_element(StableIValue* stack, const Op& op, const std::array<Tensor, N>& in, const Tensor& grad, int64_t needs) {
  if constexpr (kind == Kind::value) {
    const std::array<Tensor, 1> out = {torch::stable::empty_like(in[0])};
    Device::template run<false>(op, needs, in, out);
    push(stack, out);
  } else {
    std::array<Tensor, N + 1> with_grad;
    std::copy(in.begin(), in.end(), with_grad.begin());
    with_grad[N] = torch::stable::contiguous(grad);
    const auto out = gradients_like(in, needs);
    Device::template run<true>(op, needs, with_grad, out);
    push(stack, out);
  }
}

// The values' sum over `divisor`, its gradients, or both.
template <typename Device, Kind kind, typename Op, size_t N>
void reduced(
    StableIValue* stack,
    const Op& op,
    const std::array<Tensor, N>& in,
    const Tensor& grad,
    int64_t needs,
    double divisor) {
  if constexpr (kind == Kind::value) {
    const std::array<Tensor, 1> nothing = {torch::stable::new_empty(in[0], {0})};
    push(stack, Device::template sum<false>(op, needs, in, nothing, divisor));
  } else {
    const auto out = gradients_like(in, needs);
    if constexpr (kind == Kind::value_and_grad)
      push(stack, Device::template sum<true>(op, needs, in, out, divisor));
    else
      Device::gradients(op, needs, in, out, grad, divisor);
    push(stack, out);
  }
}

template <typename Device, typename Op, Kind kind>
void kernel(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = kind == Kind::backward ? arguments.next<Tensor>() : Tensor();
  const auto in = arguments.contiguous<Op::kInputs>();
  const Op op = Op::read(arguments);
  const std::string reduction = Op::kReduces == Reduces::as_told ? arguments.next<std::string>() : "mean";
  const int64_t needs = kind == Kind::value ? 0 : arguments.next<int64_t>();
  const typename Device::Guard guard(in[0].get_device_index());
  const double divisor = reduction == "mean" ? static_cast<double>(in[0].numel()) : 1;
  if constexpr (Op::kReduces == Reduces::never) {
    by_element<Device, kind>(stack, op, in, grad, needs);
  } else if constexpr (Op::kReduces == Reduces::to_mean || kind == Kind::value_and_grad) {
    reduced<Device, kind>(stack, op, in, grad, needs, divisor);
  } else if (reduction == "none") {
    by_element<Device, kind>(stack, op, in, grad, needs);
  } else {
    reduced<Device, kind>(stack, op, in, grad, needs, divisor);
  }
}

// Registers the kernels of an operator in the library `m`.
template <typename Device, typename Op, typename Library>
void implement(Library& m, const std::string& name) {
  m.impl(name.c_str(), kernel<Device, Op, Kind::value>);
  m.impl(("_" + name + "_backward").c_str(), kernel<Device, Op, Kind::backward>);
  if constexpr (Op::kReduces != Reduces::never)
    m.impl(("_" + name + "_value_and_grad").c_str(), kernel<Device, Op, Kind::value_and_grad>);
}

}  // namespace fastprob
