"""fastprob: fused operators and modules for probabilistic vision-language adaptation."""

from fastprob._backends import backend, info, load
from fastprob._version import __version__
from fastprob.ops import gaussian_potential, ggd_nll, ggd_variance, probvlm_loss, prototype_dispersion

load()
del load


__all__ = [
    "__version__",
    "backend",
    "gaussian_potential",
    "ggd_nll",
    "ggd_variance",
    "info",
    "probvlm_loss",
    "prototype_dispersion",
]
