#include "../ggd_nll.h"

#include "blocks.h"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) { fastprob::implement<fastprob::Cpu, fastprob::GgdNll>(m, "ggd_nll"); }
