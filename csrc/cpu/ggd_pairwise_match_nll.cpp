#include "ggd_match_pairs.h"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  m.impl("ggd_pairwise_match_nll", fastprob::pairwise<fastprob::GgdMatchPairs>);
  m.impl("_ggd_pairwise_match_nll_backward", fastprob::pairwise_backward<fastprob::GgdMatchPairs>);
}
