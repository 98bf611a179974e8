"""fastprob: fused operators and modules for probabilistic vision-language adaptation."""

import importlib
from typing import TYPE_CHECKING

from fastprob._version import __version__
from fastprob.dropout import mc_dropout_passes
from fastprob.ops.bottleneck import bottleneck
from fastprob.ops.csd import csd
from fastprob.ops.gaussian_potential import gaussian_potential
from fastprob.ops.ggd_match_nll import ggd_match_nll
from fastprob.ops.ggd_nearest import ggd_nearest
from fastprob.ops.ggd_nearest_match import ggd_nearest_match
from fastprob.ops.ggd_nll import ggd_nll
from fastprob.ops.ggd_pairwise_match_nll import ggd_pairwise_match_nll
from fastprob.ops.ggd_pairwise_nll import ggd_pairwise_nll
from fastprob.ops.ggd_sample import ggd_sample
from fastprob.ops.ggd_variance import ggd_variance
from fastprob.ops.mc_dropout import mc_dropout
from fastprob.ops.probvlm_loss import probvlm_loss
from fastprob.ops.prototype_dispersion import prototype_dispersion
from fastprob.ops.queue_contrastive_loss import queue_contrastive_loss

from fastprob._backends import backend, info, load  # isort: skip  (after the operators, whose kernels it chooses)

load()
del load

__all__ = [
    "__version__",
    "adapters",
    "attribution",
    "backend",
    "bottleneck",
    "compat",
    "csd",
    "data",
    "distributions",
    "encoders",
    "evaluation",
    "gaussian_potential",
    "ggd_match_nll",
    "ggd_nearest",
    "ggd_nearest_match",
    "ggd_nll",
    "ggd_pairwise_match_nll",
    "ggd_pairwise_nll",
    "ggd_sample",
    "ggd_variance",
    "info",
    "mc_dropout",
    "mc_dropout_passes",
    "nn",
    "pretraining",
    "probvlm_loss",
    "prompts",
    "prototype_dispersion",
    "queue_contrastive_loss",
    "training",
]


if TYPE_CHECKING:
    from fastprob import (
        adapters,
        attribution,
        compat,
        data,
        distributions,
        encoders,
        evaluation,
        nn,
        pretraining,
        prompts,
        training,
    )
else:

    def __getattr__(name: str):
        """The subpackages, imported when they are first asked for."""
        if name in __all__:
            return importlib.import_module(f"fastprob.{name}")
        raise AttributeError(f"module 'fastprob' has no attribute {name!r}")
