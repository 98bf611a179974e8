#include "../ggd_nll.h"
#include "blocks.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CUDA, m) { fastprob::implement<fastprob::Cuda, fastprob::GgdNll>(m, "ggd_nll"); }
