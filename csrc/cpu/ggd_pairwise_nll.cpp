#include "ggd_pairs.h"

STABLE_TORCH_LIBRARY_IMPL(fastprob, CPU, m) {
  m.impl("ggd_pairwise_nll", fastprob::pairwise<fastprob::GgdPairs>);
  m.impl("_ggd_pairwise_nll_backward", fastprob::pairwise_backward<fastprob::GgdPairs>);
}
