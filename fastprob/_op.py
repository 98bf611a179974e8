"""The one mechanism: a typed PyTorch function becomes a registered operator.

`@operator(...)` reads the function's signature and defines up to three torch operators from it:

    fastprob::x                   (tensors, options) -> the results
    fastprob::_x_backward         (gradients of the results, tensors, constant results, options, needs)
                                  -> a gradient per tensor
    fastprob::_x_value_and_grad   (tensors, options, needs) -> the value and the gradients for grad = 1, in one pass
                                  (only where the one result is a scalar)

The function's body is their kernel on every device (CompositeExplicitAutograd) and, run on fake tensors, the results'
shape function. C++ and Triton kernels only override it for a device (`fastprob/_backends.py`). Bit i of `needs` says
that tensor i wants its gradient; one that is not wanted, as an integer tensor's or an absent one's never is, comes back
as an empty tensor of shape (0,). Constant results are those that have no gradient, such as indices.

What stands around it: `_arguments.py` reads and checks tensors, `_autograd.py` differentiates, `_vmap.py` batches.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fastprob._arguments import (
    DTYPES,
    Argument,
    Detached,
    Indices,
    Mask,
    arguments_of,
    checked,
    one_of,
    plain,
    results_of,
)
from fastprob._autograd import as_tuple, differentiable, scale_
from fastprob._vmap import batched

__all__ = ["DTYPES", "EDGE_SHAPES", "OPS", "Detached", "Indices", "Mask", "Op", "one_of", "operator"]

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op] = {}
EDGE_SHAPES = ((), (0, 4), (1, 1), (3, 5), (65, 129))
BENCH_SHAPES = ((1024, 512), (8192, 512), (65536, 512))
_LIBRARY = torch.library.Library("fastprob", "DEF")


@dataclass
class Op:
    """An operator and all that is declared with it; `operator` says what each part is."""

    reference: Callable
    gradient: Callable[..., Sequence]
    check: Callable[..., None]
    inputs: Callable[..., Sequence]
    sizes: Sequence[tuple[int, ...]]
    grid: Sequence[Mapping[str, object]]
    bench_sizes: Sequence[tuple[int, ...]]
    bench_options: Mapping[str, object]
    frozen: Sequence[str]
    is_scalar: Callable[..., bool] | None
    elementwise: bool
    implicit: Sequence[str]
    # Read off the reference. All at once: Dynamo does not enter what computes a property when it is first read.
    name: str = field(init=False)
    signature: inspect.Signature = field(init=False)
    arguments: tuple[Argument, ...] = field(init=False)
    results: tuple[Argument, ...] = field(init=False)
    tensors: list[str] = field(init=False)  # names
    differentiable: list[str] = field(init=False)  # names of those that have a gradient
    options: dict[str, object] = field(init=False)  # keyword options and their defaults, or that there is none
    function: Callable = field(init=False)  # what users call

    def __post_init__(self):
        self.name, self.signature = self.reference.__name__, inspect.signature(self.reference)
        self.arguments, self.results = arguments_of(self.reference), results_of(self.reference)
        self.tensors = [a.name for a in self.arguments]
        self.differentiable = [a.name for a in self.arguments if a.kind.differentiable]
        parameters = self.signature.parameters.items()
        self.options = {k: p.default for k, p in parameters if p.kind is p.KEYWORD_ONLY}

    def samples(self, make: Callable[..., Tensor]) -> Iterator[tuple[Sequence, dict]]:
        """Small problems to test with: tensors of every size, with every set of options."""
        for size in self.sizes:
            tensors = self.inputs(make, *size)
            for options in self.grid:
                yield tensors, dict(options)

    @property
    def raw(self) -> dict[str, Callable]:
        """Torch operator name -> its reference."""
        raw: dict[str, Callable] = {self.name: self._value, f"_{self.name}_backward": self._backward}
        if self.is_scalar:
            raw[f"_{self.name}_value_and_grad"] = self._value_and_grad
        return raw

    def overload(self, name: str):
        return getattr(torch.ops.fastprob, name).default

    def _value(self, *tensors: Tensor | None, **options) -> Tensor | tuple[Tensor, ...]:
        # Contiguous: the bits of sums are not to depend on how tensors lie in memory.
        with torch._C._DisableAutocast():
            results = self.reference(*_contiguous(tensors), **options)
        return results.contiguous() if isinstance(results, Tensor) else tuple(r.contiguous() for r in results)

    def _backward(self, *inputs: Tensor | None, needs: int, **options) -> Tensor | tuple[Tensor, ...]:
        grads = self._gradients(inputs, needs, options)
        return grads if len(grads) > 1 else grads[0]  # as torch returns them

    def _value_and_grad(self, *tensors: Tensor | None, needs: int, **options) -> tuple[Tensor, ...]:
        (value,) = as_tuple(self._value(*tensors, **options))
        return value, *self._gradients((torch.ones_like(value), *tensors), needs, options)

    def fake(self, name: str) -> Callable:
        """The shape function of a torch operator: gradients are like their tensors."""
        if name == self.name:
            return self._value
        leading = 0 if name.endswith("_value_and_grad") else sum(r.kind.differentiable for r in self.results)

        def shapes(*inputs: Tensor | None, needs: int, **_):
            tensors = inputs[leading : leading + len(self.tensors)]
            given = [t for t in tensors if t is not None]
            like = [given[0] if t is None else t for t in tensors]
            grads = tuple(t.new_empty(t.shape if needs >> i & 1 else 0) for i, t in enumerate(like))
            if not leading:
                return like[0].new_empty(()), *grads
            return grads if len(grads) > 1 else grads[0]

        return shapes

    def _gradients(self, inputs: Sequence, needs: int, options: dict) -> tuple[Tensor, ...]:
        leading = sum(r.kind.differentiable for r in self.results)
        with torch._C._DisableAutocast():
            grads = self.gradient(*_contiguous(inputs), **{**self.options, **options})  # torch drops defaults
        like = [inputs[0] if t is None else t for t in inputs[leading:]]
        return tuple(
            g.to(t.dtype).contiguous() if needs >> i & 1 else t.new_empty(0)
            for i, (g, t) in enumerate(zip(grads, like))
        )


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def operator(
    *,
    gradient: Callable[..., Sequence],
    check: Callable[..., None],
    inputs: Callable[..., Sequence],
    sizes: Sequence[tuple[int, ...]] = EDGE_SHAPES,
    grid: Sequence[Mapping[str, object]] = ({},),
    bench_sizes: Sequence[tuple[int, ...]] = BENCH_SHAPES,
    bench_options: Mapping[str, object] = {},
    frozen: Sequence[str] = (),
    is_scalar: Callable[..., bool] | None = None,
    elementwise: bool = True,
    implicit: Sequence[str] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers the decorated reference as `torch.ops.fastprob.<name>` and returns the function that users call.

    Its tensors are positional, its options keyword-only. An int option named `seed` is what random numbers are drawn
    by; see `fastprob/_vmap.py` for vmap.

    Args:
        gradient: `gradient(*grads, *tensors, *constants, **options)` -> a gradient for every tensor, in differentiable
            torch code, None for one that has none. `grads` belong to the differentiable results, `constants` are the
            other results.
        check: `check(**arguments)` raises ValueError; dtype, device and broadcasting are checked for every operator.
        inputs: `inputs(make, *size)` -> the tensors of a problem of any size; `make(*shape, low, high, extreme)` draws
            one, uniform between low and high. Where a test looks for extremes it is log-uniform between the two numbers
            of `extreme`, or without them anything from a tie to 1e6.
        sizes: of problems to test: edges first, and more than one tile of every kernel.
        grid: sets of options to test, their edges among them.
        bench_sizes: of problems to time, the first one on the CPU as well.
        bench_options: to time them with, where not the defaults.
        frozen: tensors that want no gradient as a rule.
        is_scalar: `is_scalar(**options)`, where true the forward pass computes the gradients too.
        elementwise: broadcast the tensors to one shape; otherwise `check` says which shapes go together.
        implicit: tensors whose gradient is a draw's by implicit reparameterisation: it is that of expectations, not of
            the result at a fixed seed, and has no derivatives.
    """

    def register(reference: Callable[P, R]) -> Callable[P, R]:
        bench = bench_sizes, bench_options
        op = Op(reference, gradient, check, inputs, sizes, grid, *bench, frozen, is_scalar, elementwise, implicit)
        _define(op)
        op.function = functools.wraps(reference)(_function(op))
        OPS[op.name] = op
        return op.function

    return register


def _function(op: Op) -> Callable:
    """What users call: binds and checks the arguments, and takes the shortest way to the kernel."""
    apply, value = differentiable(op, _LIBRARY).apply, op.overload(op.name)
    names, count, arguments = list(op.signature.parameters), len(op.tensors), op.arguments
    defaults = {name: default for name, default in op.options.items() if default is not inspect.Parameter.empty}
    absent = {a.name: None for a in arguments if a.optional}
    results, results_of = len(op.results), (lambda all_: all_[0]) if len(op.results) == 1 else (lambda all_: all_)
    is_scalar = op.is_scalar or (lambda **_: False)

    def function(*args, **kwargs):
        values = {**absent, **defaults, **dict(zip(names, args)), **kwargs}
        if len(values) != len(names) or len(args) > count or any(k in kwargs for k in names[: len(args)]):
            op.signature.bind(*args, **kwargs)  # raises the TypeError that Python would
        tensors = checked(op.name, arguments, [values[k] for k in names[:count]], op.elementwise)
        op.check(**values)
        options = {k: values[k] for k in names[count:]}
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return results_of(apply(0, *tensors, *options.values())[:results])
        needs = 0
        if torch.is_grad_enabled():
            needs = sum(t.requires_grad << i for i, t in enumerate(tensors) if t is not None)
        if not needs:
            return value(*tensors, **options)
        return results_of(apply(needs if is_scalar(**options) else 0, *tensors, *options.values())[:results])

    return function


def _define(op: Op) -> None:
    """Defines the torch operators of `op`, with the reference as kernel and as shape function."""
    taken, returned = torch.library.infer_schema(plain(op.reference), mutates_args=()).rsplit(" -> ", 1)
    moving = [r.kind.differentiable for r in op.results]
    leading = ["Tensor grad"] if sum(moving) == 1 else [f"Tensor grad_{i}" for i, moves in enumerate(moving) if moves]
    constants = [f"Tensor result_{i}" for i, moves in enumerate(moving) if not moves]
    positional, _, options = taken[1:-1].partition("*, ")
    tensors = [t.partition("=")[0] for t in positional.strip(", ").split(", ")]  # defaults would have to come last
    needs = f"*, {options}{', ' if options else ''}int needs"
    grads = ", ".join(["Tensor"] * len(op.tensors))
    schemas = {
        op.name: f"{taken} -> {returned}",
        f"_{op.name}_backward": f"({', '.join([*leading, *tensors, *constants])}, {needs}) -> ({grads})",
        f"_{op.name}_value_and_grad": f"({', '.join(tensors)}, {needs}) -> (Tensor, {grads})",
    }
    for name, reference in op.raw.items():
        _LIBRARY.define(name + schemas[name])
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastprob::{name}", op.fake(name), lib=_LIBRARY)
        rule = functools.partial(batched, op.overload(name), op.options, len(leading) if "backward" in name else 0)
        torch.library.register_vmap(f"fastprob::{name}", rule, lib=_LIBRARY)


_LIBRARY.define("_scale_(Tensor(a!)[] grads, Tensor scale) -> ()")
_LIBRARY.impl("_scale_", scale_, "CompositeExplicitAutograd")
