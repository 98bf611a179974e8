"""The two dispersion terms of the released DAPT trainer, for `forward_backward` of its trainers/dapt.py:

    from fastprob.compat.dapt import text_dispersion, visual_dispersion

    loss_dist_i = visual_dispersion(image_features, self.prototype, label)
    loss_dist_t = text_dispersion(text_features, self.cfg.TRAINER.DAPT.TXT_RBF_T)

in place of the lines between `loss_orig` and `loss`. They give the released values, but for one class: there the mean
over no pair is NaN as released, and 0 here. `fastprob.prompts.DAPT` is the whole method.

Source: the code released with Cho et al., "Distribution-Aware Prompt Tuning for Vision-Language Models", ICCV 2023.
"""

from __future__ import annotations

from torch import Tensor

from fastprob.ops.gaussian_potential import gaussian_potential
from fastprob.ops.prototype_dispersion import prototype_dispersion

__all__ = ["text_dispersion", "visual_dispersion"]


def text_dispersion(text_features: Tensor, t: float = 2.0) -> Tensor:
    """mean over pairs m < n of exp(-t ||w_m - w_n||^2), in float32. text_features: [C, D] -> a scalar."""
    return gaussian_potential(text_features.float(), t=t)


def visual_dispersion(image_features: Tensor, prototype: Tensor, label: Tensor) -> Tensor:
    """mean over b, d of (z_bd - s_{y_b, d})^2, in the dtype of image_features.

    image_features: [B, D]; prototype: [C, D], of any dtype and on any device; label: [B] long -> a scalar.
    """
    return prototype_dispersion(image_features, prototype.to(image_features), label)
