// CUDA on the CPU, as far as csrc/cuda uses it: its kernels compile as C++ and run under the tests of the operators.
//
// Blocks run one after the other, in a shuffled order. A block's threads are fibers that run until they wait for each
// other, in an order shuffled again after every barrier: what depends on the order of threads or blocks shows in the
// results. A barrier that not all threads reach ends the process. What it does not see: races of which no order of
// whole stretches between barriers makes use.
#pragma once

// First of all, as they ask whether a GPU's compiler is at work.
#include <setjmp.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "ptx.h"

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;

enum class State { runs, waits_for_block, waits_for_warp, done };

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

// The block that runs. Its fibers stay, each in a loop around `body_`, and change places by _longjmp: by swapcontext,
// which calls the kernel, it would take ten times as long.
class Block {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0);
    for (unsigned i = 0; i < threads; ++i) fibers_[i].state = State::runs;
    do step();
    while (release());
  }

  void wait(State state) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.state = state;
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
  }

  // What the thread `offset` further on in the warp has brought; where there is none, what this one has.
  template <typename T>
  T from_lane_above(T value, unsigned offset) {
    static_assert(sizeof(T) <= sizeof(brought_[0]));
    const unsigned thread = threadIdx.x, source = thread % kWarp + offset < kWarp ? thread + offset : thread;
    std::memcpy(&brought_[thread], &value, sizeof(T));
    wait(State::waits_for_warp);
    std::memcpy(&value, &brought_[source], sizeof(T));
    wait(State::waits_for_warp);
    return value;
  }

  std::mt19937 random{1};

 private:
  struct Fiber {
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    State state;
  };

  // Every thread that can run, until it waits or is done.
  void step() {
    std::shuffle(order_.begin(), order_.end(), random);
    for (const unsigned i : order_) {
      if (fibers_[i].state != State::runs) continue;
      threadIdx = dim3(i, 0, 0);
      resume(fibers_[i]);
    }
  }
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.stack) _longjmp(fiber.place, 1);
    start(fiber);
  }
  void start(Fiber& fiber) {
    fiber.stack = std::make_unique<char[]>(kStack);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }
  static void enter();

  // Lets those go on whose warp or block waits as a whole; false where all threads are done.
  bool release() {
    const unsigned threads = static_cast<unsigned>(order_.size());
    bool released = false;
    for (unsigned first = 0; first < threads; first += kWarp)
      released |= release(State::waits_for_warp, first, std::min(threads, first + kWarp));
    if (released || release(State::waits_for_block, 0, threads)) return true;
    if (!all(State::done, 0, threads)) fail("not all threads reach a barrier or a shuffle");
    return false;
  }
  bool release(State state, unsigned first, unsigned last) {
    if (!all(state, first, last)) return false;
    for (unsigned i = first; i < last; ++i) fibers_[i].state = State::runs;
    return true;
  }
  bool all(State state, unsigned first, unsigned last) const {
    return std::all_of(&fibers_[first], &fibers_[last], [&](const Fiber& fiber) { return fiber.state == state; });
  }

  const std::function<void()>* body_ = nullptr;
  std::array<Fiber, kMaxThreads> fibers_;
  std::vector<unsigned> order_;
  jmp_buf scheduler_;
  uint64_t brought_[kMaxThreads];
};

inline Block block;

inline void Block::enter() {
  for (;;) {
    (*block.body_)();
    block.wait(State::done);
  }
}

inline void run_grid(const std::function<void()>& body) {
  std::vector<unsigned> order(gridDim.x * gridDim.y);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), block.random);
  for (const unsigned i : order) {
    blockIdx = dim3(i % gridDim.x, i / gridDim.x, 0);
    block.run(blockDim.x, body);
  }
}

}  // namespace emulation

// ---- what device code calls -----------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::block.wait(emulation::State::waits_for_block); }

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  if (mask != 0xffffffffu) emulation::fail("shuffles are of whole warps");
  return emulation::block.from_lane_above(value, offset);
}

// ---- what host code calls -------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Given&&... arguments) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const bool fits = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 0xffffu && grid.z == 1;
  if (!fits || threads.x - 1 >= emulation::kMaxThreads || threads.y != 1 || threads.z != 1 || config->dynamicSmemBytes)
    return cudaErrorInvalidConfiguration;
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  gridDim = grid, blockDim = threads;
  emulation::run_grid([&] { kernel(arguments...); });
  return cudaSuccess;
}

// What torch has of CUDA, and does not declare without it.
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
inline void torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char**) {
  if (error != cudaSuccess) throw std::runtime_error("emulated CUDA: invalid launch");
}
inline void torch_c10_cuda_free_error_msg(char*) {}

// The operators are the CPU's, and so are their tensors.
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard
#define is_cuda is_cpu
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(space, device, library) _STABLE_TORCH_LIBRARY_IMPL(space, CPU, library, C10_UID)
