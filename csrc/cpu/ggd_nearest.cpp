#include "ggd_pairs.h"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) { m.impl("ggd_nearest", fastprob::nearest<fastprob::GgdPairs>); }
