"""The operators, a file each; importing this package registers them."""

from fastprob.ops.gaussian_potential import gaussian_potential
from fastprob.ops.ggd_nll import ggd_nll
from fastprob.ops.ggd_variance import ggd_variance
from fastprob.ops.probvlm_loss import probvlm_loss
from fastprob.ops.prototype_dispersion import prototype_dispersion

__all__ = ["gaussian_potential", "ggd_nll", "ggd_variance", "probvlm_loss", "prototype_dispersion"]
