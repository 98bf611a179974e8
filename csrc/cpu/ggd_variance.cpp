#include "../ggd_variance.h"

#include "blocks.h"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  fastprob::implement<fastprob::Cpu, fastprob::GgdVariance>(m, "ggd_variance");
}
