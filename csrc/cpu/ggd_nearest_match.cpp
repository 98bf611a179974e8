#include "ggd_match_pairs.h"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) { m.impl("ggd_nearest_match", fastprob::nearest<fastprob::GgdMatchPairs>); }
