// probvlm_loss: value, or value and gradients, in one pass over the eight tensors.
#include "../probvlm_loss.h"
#include "blocks.cuh"

namespace fastprob {
namespace {

// What a kernel computes: the value alone; with it the gradients of the adapters, without or with the l1 terms'; with
// these the embeddings' too.
enum class Parts { value, adapters, adapters_l1, all };

template <bool paper, Parts parts, typename T>
struct Body {
  static constexpr bool has_gradients = parts != Parts::value, has_l1 = parts != Parts::adapters;
  static constexpr int kInputs = 8, kOutputs = parts == Parts::all ? 8 : has_gradients ? 6 : 1;
  // as many as need no stack on any architecture
  static constexpr bool is_small = parts == Parts::value || parts == Parts::adapters;
  static constexpr int kBlocksPerSM = (std::is_same_v<T, float> ? 4 : 3) + is_small;
  Weights<T> w;
  Bounds<T> bounds;
  T count;
  Weights<T> g;  // the weights times grad / count

  FASTPROB_INLINE void start(T grad) { g = grad / count * w; }
  FASTPROB_INLINE T operator()(const T (&in)[kInputs], T (&out)[kOutputs]) const {
    const Terms<T> image = terms<paper, has_l1>(in[0], in[1], in[2], in[6], in[7], w, g, bounds);
    const Terms<T> text = terms<paper, has_l1>(in[3], in[4], in[5], in[7], in[6], w, g, bounds);
    if constexpr (has_gradients) {
      out[0] = image.own + image.cross, out[1] = image.inv_alpha, out[2] = image.beta;
      out[3] = text.own + text.cross, out[4] = text.inv_alpha, out[5] = text.beta;
    } else {
      out[0] = 0;  // never stored
    }
    if constexpr (parts == Parts::all) out[6] = -(image.own + text.cross), out[7] = -(text.own + image.cross);
    const Split<T> factors{image.exponent + text.exponent, image.factor};
    const T norm = image.stirling + text.stirling - log_product(factors, text.factor);
    return image.sum + text.sum + (w.own + w.cross) * norm;
  }
};

template <bool, size_t, size_t, bool paper, Parts parts, typename T>
Body<paper, parts, T> body_of(Body<paper, parts, T> body, T count) {
  body.count = count;
  return body;
}

struct ProbvlmLoss : Elementwise<ProbvlmLoss, 8, Reduces::to_mean> {
  ProbvlmOptions options;

  static ProbvlmLoss read(Arguments& arguments) { return {{}, ProbvlmOptions::read(arguments)}; }

  template <typename T, bool has_gradients, typename Run>
  void visit(int64_t needs, const Run& run) const {
    options.ggd.visit<T>([&](auto paper, const Bounds<T>& bounds) {
      constexpr bool p = decltype(paper)::value;
      const Weights<T> w = options.weights<T>();
      if constexpr (!has_gradients)
        run(Body<p, Parts::value, T>{w, bounds, 1, w});
      else if (needs >> 6)
        run(Body<p, Parts::all, T>{w, bounds, 1, w});
      else if (options.l1 != 0)
        run(Body<p, Parts::adapters_l1, T>{w, bounds, 1, w});
      else
        run(Body<p, Parts::adapters, T>{w, bounds, 1, w});
    });
  }
};

}  // namespace
}  // namespace fastprob

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) {
  fastprob::implement<fastprob::Cuda, fastprob::ProbvlmLoss>(m, "probvlm_loss");
}
