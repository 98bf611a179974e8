#include "../ggd_variance.h"
#include "blocks.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) {
  fastprob::implement<fastprob::Cuda, fastprob::GgdVariance>(m, "ggd_variance");
}
