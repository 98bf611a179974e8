"""What goes into an operator and what comes out, read off its signature, and the checks that all operators share.

A tensor is floating point and differentiable unless its annotation says otherwise:

    def nearest(x: Tensor, y: Tensor, mask: Mask | None = None, *, k: int = 1) -> tuple[Tensor, Indices]: ...
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def as_tensor(name: str, value: object) -> Tensor:
    """A tensor, or what numpy or torch makes one of. Raises ValueError, as `name`, for anything else."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor or an array, got {type(value).__name__}: {error}") from error


@dataclass(frozen=True)
class Kind:
    """What a tensor is: of a dtype of its own (None: one of `DTYPES`), and differentiable or not."""

    dtype: torch.dtype | None = None
    differentiable: bool = False


Indices = Annotated[Tensor, Kind(torch.int64)]
Mask = Annotated[Tensor, Kind(torch.bool)]
Detached = Annotated[Tensor, Kind()]
FLOATING = Kind(differentiable=True)


@dataclass(frozen=True)
class Argument:
    """A tensor that an operator takes or returns."""

    name: str
    kind: Kind
    optional: bool


def arguments_of(function: Callable) -> tuple[Argument, ...]:
    """The tensors that a function takes: all parameters that are not keyword-only."""
    hints, parameters = _hints(function), inspect.signature(function).parameters.values()
    return tuple(_argument(p.name, hints[p.name]) for p in parameters if p.kind is not p.KEYWORD_ONLY)


def results_of(function: Callable) -> tuple[Argument, ...]:
    """The tensors that a function returns, by number."""
    returned = _hints(function)["return"]
    each = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    return tuple(_argument(str(i), hint) for i, hint in enumerate(each))


def plain(function: Callable) -> Callable:
    """A function of the same signature whose annotations torch knows, for its schema."""
    hints, signature = _hints(function), inspect.signature(function)

    def stub(): ...

    parameters = [p.replace(annotation=_without_kind(hints[p.name])) for p in signature.parameters.values()]
    returned = hints["return"]
    if typing.get_origin(returned) is tuple:
        returned = tuple[tuple(_without_kind(hint) for hint in typing.get_args(returned))]  # type: ignore[misc]
    stub.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=_without_kind(returned)
    )
    return stub


def _hints(function: Callable) -> dict[str, typing.Any]:
    return typing.get_type_hints(function, include_extras=True)


def _argument(name: str, hint) -> Argument:
    choices = [h for h in typing.get_args(hint) if h is not type(None)]
    optional = type(None) in typing.get_args(hint)
    kinds = [k for k in getattr(choices[0] if optional else hint, "__metadata__", ()) if isinstance(k, Kind)]
    return Argument(name, kinds[0] if kinds else FLOATING, optional)


def _without_kind(hint):
    if type(None) in typing.get_args(hint):
        return typing.Optional[Tensor]  # noqa: UP045  (torch's schemas know no `Tensor | None`)
    return Tensor if hasattr(hint, "__metadata__") else hint


def one_of(op: str, name: str, value: object, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def checked(op: str, arguments: tuple[Argument, ...], tensors: list, elementwise: bool) -> list:
    """The tensors on one device, the differentiable ones of one dtype, float32 under autocast unless they are float64;
    of one shape if elementwise. An absent optional tensor is None.

    Raises:
        ValueError: for what is no tensor, a tensor of another dtype or device, or shapes that do not broadcast.
    """
    for a, t in zip(arguments, tensors):
        if not isinstance(t, Tensor) and not (a.optional and t is None):
            raise ValueError(f"{op}: {a.name} must be a tensor{' or None' * a.optional}, got {type(t).__name__}")
    lead, first = next((a.name, t) for a, t in zip(arguments, tensors) if t is not None and a.kind.differentiable)
    if first.device.type != "meta" and torch.is_autocast_enabled(first.device.type):
        tensors = [_widened(t) if a.kind.dtype is None else t for a, t in zip(arguments, tensors)]
        first = _widened(first)
    given = [(a, t) for a, t in zip(arguments, tensors) if t is not None]
    for a, t in given:
        if t.dtype != (a.kind.dtype or t.dtype):
            raise ValueError(f"{op}: {a.name} must be {_name(a.kind.dtype)}, got {t.dtype}")
        if a.kind.dtype is None and t.dtype not in DTYPES:
            raise ValueError(f"{op}: {a.name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        if t.device != first.device or (a.kind.dtype is None and t.dtype != first.dtype):
            expected = f"{a.kind.dtype or first.dtype} on {first.device} as {lead} is"
            raise ValueError(f"{op}: {a.name} must be {expected}, got {t.dtype} on {t.device}")
    if not elementwise or all(t.shape == first.shape for _, t in given):
        return tensors
    _check_broadcast(op, given)
    shaped = iter(torch.broadcast_tensors(*[t for _, t in given]))
    return [None if t is None else next(shaped) for t in tensors]


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _widened(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def _check_broadcast(op: str, given: list[tuple[Argument, Tensor]]) -> None:
    for axis in range(-max(t.dim() for _, t in given), 0):
        if len({t.shape[axis] for _, t in given if t.dim() >= -axis} - {1}) > 1:
            shapes = ", ".join(f"{a.name} {tuple(t.shape)}" for a, t in given)
            raise ValueError(f"{op}: inputs must broadcast to one shape, got {shapes}")
