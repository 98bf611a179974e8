"""The operators, a file each; importing this package registers them."""

from fastprob.ops.ggd_nll import ggd_nll
from fastprob.ops.ggd_variance import ggd_variance
from fastprob.ops.probvlm_loss import probvlm_loss

__all__ = ["ggd_nll", "ggd_variance", "probvlm_loss"]
