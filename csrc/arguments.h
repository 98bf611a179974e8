// What the CPU and the CUDA kernels of an operator share: its arguments off the dispatcher's stack, and its outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace fastprob {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Which of an operator's three torch operators a kernel is to be; see fastprob/_op.py.
enum class Kind { value, backward, value_and_grad };

// A kernel's arguments off the dispatcher's stack, in the order of the operator's schema: next<int64_t>(),
// next<bool>(), next<Tensor>(), next<std::optional<Tensor>>() for a `Tensor?`.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <typename T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }
  template <size_t N>
  std::array<Tensor, N> contiguous() {
    std::array<Tensor, N> tensors;
    for (Tensor& t : tensors) t = torch::stable::contiguous(next<Tensor>());
    return tensors;
  }

 private:
  StableIValue* next_;
};

// Tensors like the inputs for the gradients that bits of `needs` ask for, of shape (0,) for the others.
template <size_t N>
std::array<Tensor, N> gradients_like(const std::array<Tensor, N>& inputs, int64_t needs) {
  std::array<Tensor, N> out;
  for (size_t i = 0; i < N; ++i) {
    const bool wanted = needs >> i & 1;
    out[i] = wanted ? torch::stable::empty_like(inputs[i]) : torch::stable::new_empty(inputs[i], {0});
  }
  return out;
}

// Puts an operator's outputs onto the stack, in the order of its schema.
inline void push(StableIValue*& stack, const Tensor& output) { *stack++ = torch::stable::detail::from(output); }

template <size_t N>
void push(StableIValue*& stack, const std::array<Tensor, N>& outputs) {
  for (const Tensor& output : outputs) push(stack, output);
}

// Calls body(compute, storage) with values of a tensor's compute and storage types.
template <typename Body>
auto for_type(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return body(double(), double());
    case ScalarType::Float:
      return body(float(), float());
    case ScalarType::BFloat16:
      return body(float(), c10::BFloat16());
    case ScalarType::Half:
      return body(float(), c10::Half());
    default:
      STD_TORCH_CHECK(false, "fastprob: unsupported dtype");
  }
}

}  // namespace fastprob
