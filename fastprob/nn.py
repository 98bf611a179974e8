"""The losses as modules: operators whose options are set once.

A loss takes the keyword options of its operator and, when called, its tensors; what they mean and their defaults
stand with the operator in `fastprob.ops` and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fastprob._op import OPS
from fastprob.ops.ggd_nll import ggd_nll
from fastprob.ops.probvlm_loss import probvlm_loss

__all__ = ["GGDNLLLoss", "ProbVLMLoss"]


class _Loss(nn.Module):
    """A loss over `operator`.

    Raises:
        TypeError: on construction, for an option that the operator does not have.
        ValueError: on construction, for an option's value that it refuses; on calling, for tensors that it refuses.
    """

    _operator: ClassVar[Callable[..., Tensor]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, *, operator):
        cls._operator = staticmethod(operator)
        parameters = OPS[operator.__name__].signature.parameters.values()
        cls.__signature__ = inspect.Signature([p for p in parameters if p.kind is p.KEYWORD_ONLY])

    def __init__(self, **options: float | str):
        super().__init__()
        unknown = options.keys() - self.__signature__.parameters.keys()
        if unknown:
            known = ", ".join(self.__signature__.parameters)
            raise TypeError(f"{type(self).__name__}: options are {known}, got {', '.join(sorted(unknown))}")
        nothing = [torch.empty(0, device="cpu")] * len(OPS[self._operator.__name__].tensors)
        self._operator(*nothing, **options)  # refuses bad values
        self.options = options

    def forward(self, *tensors: Tensor, **named_tensors: Tensor) -> Tensor:
        return self._operator(*tensors, **named_tensors, **self.options)

    if TYPE_CHECKING:  # torch types every call of a module as Any

        def __call__(self, *tensors: Tensor, **named_tensors: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        defaults = self.__signature__.parameters
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v != defaults[k].default)


class GGDNLLLoss(_Loss, operator=ggd_nll):
    """`fastprob.ggd_nll` as a module: `loss(mu, inv_alpha, beta, target)`.

    Args:
        **options: form, eps, clamp_min, clamp_max and reduction of `fastprob.ggd_nll`.
    """


class ProbVLMLoss(_Loss, operator=probvlm_loss):
    """`fastprob.probvlm_loss` as a module, called with its eight tensors, in its order or by its names.

        loss(image_mu, image_inv_alpha, image_beta, text_mu, text_inv_alpha, text_beta, image, text)

    Args:
        **options: cross_weight, l1_weight, nll_weight, form, eps, clamp_min and clamp_max of `fastprob.probvlm_loss`.
    """
