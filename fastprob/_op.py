"""The one mechanism: a typed PyTorch function becomes a registered operator.

`@operator(...)` reads the function's signature and defines up to three torch operators from it:

    fastprob::x                   the function itself
    fastprob::_x_backward         (grad, inputs..., needs) -> a gradient per tensor input
    fastprob::_x_value_and_grad   (inputs..., needs) -> the value and the gradients for grad = 1, in one pass
                                  (only where the result is a scalar)

The function's body is their kernel on every device (CompositeExplicitAutograd) and, run on fake tensors, their
shape function. C++ and Triton kernels only override it for a device (`fastprob/_backends.py`). Bit i of `needs` says
that tensor input i wants its gradient; one that is not wanted, as an integer input's never is, comes back as an empty
tensor of shape (0,).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OPS: dict[str, Op] = {}
EDGE_SHAPES = ((), (0, 4), (1, 1), (3, 5), (65, 129))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("fastprob", "DEF")


@dataclass(frozen=True)
class Op:
    """An operator and all that is declared with it."""

    name: str
    signature: inspect.Signature
    reference: Callable[..., Tensor]
    gradient: Callable[..., tuple]
    check: Callable[..., None]
    samples: Callable[..., Iterator[tuple[tuple, dict]]]
    is_scalar: Callable[..., bool] | None
    elementwise: bool
    indices: tuple[str, ...]

    @functools.cached_property
    def tensors(self) -> list[str]:
        return [k for k, p in self.signature.parameters.items() if p.kind is not p.KEYWORD_ONLY]

    @functools.cached_property
    def differentiable(self) -> list[str]:
        """The tensors but for the indices, which come last."""
        return [k for k in self.tensors if k not in self.indices]

    @functools.cached_property
    def options(self) -> dict[str, object]:
        """Keyword options and their defaults."""
        return {k: p.default for k, p in self.signature.parameters.items() if p.kind is p.KEYWORD_ONLY}

    @functools.cached_property
    def raw(self) -> dict[str, Callable]:
        """Torch operator name -> its reference."""
        raw: dict[str, Callable] = {self.name: self._value, f"_{self.name}_backward": self._backward}
        if self.is_scalar:
            raw[f"_{self.name}_value_and_grad"] = self._value_and_grad
        return raw

    def _value(self, *tensors: Tensor, **options) -> Tensor:
        return self.reference(*tensors, **options).contiguous()

    def _backward(self, grad: Tensor, *tensors: Tensor, needs: int, **options) -> Tensor | tuple[Tensor, ...]:
        grads = self._gradients(grad, tensors, needs, options)
        return grads if len(grads) > 1 else grads[0]  # as torch returns them

    def _value_and_grad(self, *tensors: Tensor, needs: int, **options) -> tuple[Tensor, ...]:
        one = tensors[0].new_ones(())
        return self._value(*tensors, **options), *self._gradients(one, tensors, needs, options)

    def _gradients(self, grad: Tensor, tensors: tuple[Tensor, ...], needs: int, options: dict) -> tuple[Tensor, ...]:
        grads = self.gradient(grad, *tensors, **{**self.options, **options})  # torch drops defaults
        return tuple(
            g.to(t.dtype).contiguous() if needs >> i & 1 else t.new_empty(0)
            for i, (g, t) in enumerate(zip(grads, tensors, strict=True))
        )


def operator(*, gradient, check, samples, is_scalar=None, elementwise=True, indices=()):
    """Registers the decorated reference as `torch.ops.fastprob.<name>` and returns the function that users call.

    Args:
        gradient: `gradient(grad, *tensors, **options)` -> one gradient per tensor, in differentiable torch code, and
            None for each of `indices`.
        check: `check(**arguments)` raises ValueError; dtype, device and broadcasting are checked for every operator.
        samples: `samples(make)` yields `(tensors, options)`; `make(*shape, low, high)` draws a tensor.
        is_scalar: `is_scalar(**options)`, where true the forward pass computes the gradients too.
        elementwise: broadcast the tensors to one shape; otherwise `check` says which shapes go together.
        indices: the names of int64 tensors, the last ones of the signature; they have no gradient.
    """

    def register(reference):
        signature = inspect.signature(reference)
        op = Op(reference.__name__, signature, reference, gradient, check, samples, is_scalar, elementwise, indices)
        _define(op)
        OPS[op.name] = op
        apply, value = _autograd_function(op).apply, getattr(torch.ops.fastprob, op.name).default
        count, names = len(op.tensors), list(op.signature.parameters)

        @functools.wraps(reference)
        def function(*args, **kwargs):
            values = {**op.options, **dict(zip(names, args)), **kwargs}
            if len(values) != len(names) or len(args) > count or any(k in kwargs for k in names[: len(args)]):
                op.signature.bind(*args, **kwargs)  # raises the TypeError that Python would
            tensors = _check_tensors(op, [values[k] for k in names[:count]])
            op.check(**values)
            options = {k: values[k] for k in names[count:]}
            if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
                return apply(0, *tensors, *options.values())[0]
            needs = sum(t.requires_grad << i for i, t in enumerate(tensors)) if torch.is_grad_enabled() else 0
            if not needs:
                return value(*tensors, **options)
            return apply(needs if op.is_scalar and op.is_scalar(**options) else 0, *tensors, *options.values())[0]

        return function

    return register


def _define(op: Op) -> None:
    """Defines the torch operators of `op`, with the reference as kernel and as shape function."""
    inputs = torch.library.infer_schema(op.reference, mutates_args=()).rsplit(" -> ", 1)[0][1:-1]
    with_needs = inputs + (", " if op.options else ", *, ") + "int needs"
    grads = ", ".join(["Tensor"] * len(op.tensors))
    schemas = {
        op.name: f"({inputs}) -> Tensor",
        f"_{op.name}_backward": f"(Tensor grad, {with_needs}) -> ({grads})",
        f"_{op.name}_value_and_grad": f"({with_needs}) -> (Tensor, {grads})",
    }
    for name, reference in op.raw.items():
        _LIBRARY.define(name + schemas[name])
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastprob::{name}", reference, lib=_LIBRARY)
        torch.library.register_vmap(f"fastprob::{name}", functools.partial(_batched, name), lib=_LIBRARY)


def _batched(name: str, info, in_dims: tuple, *tensors: Tensor, **options):
    """A torch operator under vmap: call by call, as torch's own fallback does with a warning."""
    calls = [
        getattr(torch.ops.fastprob, name)(
            *(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims)), **options
        )
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(outputs) for outputs in zip(*calls)), (0,) * len(calls[0])


def one_of(op: str, name: str, value: object, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_tensors(op: Op, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on one device, of one dtype (float32 under autocast; indices of int64), broadcast if elementwise."""
    for name, t in zip(op.tensors, tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op.name}: {name} must be a tensor, got {type(t).__name__}")
    first, count = tensors[0], len(op.differentiable)
    if first.device.type != "meta" and torch.is_autocast_enabled(first.device.type):
        tensors = [t if t.dtype == torch.float64 else t.float() for t in tensors[:count]] + tensors[count:]
        first = tensors[0]
    for name, t in zip(op.indices, tensors[count:]):
        if t.dtype != torch.int64:
            raise ValueError(f"{op.name}: {name} must be int64, got {t.dtype}")
        if t.device != first.device:
            raise ValueError(f"{op.name}: {name} must be on {first.device} as {op.tensors[0]} is, got {t.device}")
    for name, t in zip(op.differentiable, tensors):
        if t.dtype not in DTYPES:
            raise ValueError(f"{op.name}: {name} must be float64, float32, bfloat16 or float16, got {t.dtype}")
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(
                f"{op.name}: {name} must be {first.dtype} on {first.device} as {op.tensors[0]} is,"
                f" got {t.dtype} on {t.device}"
            )
    if not op.elementwise or all(t.shape == first.shape for t in tensors):
        return tensors
    for axis in range(-max(t.dim() for t in tensors), 0):
        if len({t.shape[axis] for t in tensors if t.dim() >= -axis} - {1}) > 1:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(op.tensors, tensors))
            raise ValueError(f"{op.name}: inputs must broadcast to one shape, got {shapes}")
    return list(torch.broadcast_tensors(*tensors))


def _autograd_function(op: Op) -> type[torch.autograd.Function]:
    """The differentiable operator: kernels forward and backward, the reference for higher derivatives."""
    overloads = {name: getattr(torch.ops.fastprob, name).default for name in op.raw}
    value, value_and_grad = overloads[op.name], overloads.get(f"_{op.name}_value_and_grad")
    gradients = overloads[f"_{op.name}_backward"]
    count, names = len(op.tensors), list(op.options)

    def split(args):
        return args[:count], dict(zip(names, args[count:]))

    def backward_(*tensors, **options):
        grads = gradients(*tensors, **options)
        return (grads,) if isinstance(grads, Tensor) else grads

    class Gradient(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(needs, grad, *args):
            tensors, options = split(args)
            return backward_(grad, *tensors, **options, needs=needs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.needs, ctx.option_values = inputs[0], inputs[2 + count :]
            ctx.save_for_backward(*inputs[1 : 2 + count])

        @staticmethod
        def backward(ctx, *grads):
            options, last = dict(zip(names, ctx.option_values)), 1 + len(op.differentiable)
            indices = ctx.saved_tensors[last:]  # vjp would ask them for gradients

            def wanted(*tensors):
                gradients = op.gradient(*tensors, *indices, **options)
                return tuple(g for i, g in enumerate(gradients) if ctx.needs >> i & 1)

            _, vjp = torch.func.vjp(wanted, *ctx.saved_tensors[:last])
            seconds = vjp(tuple(g for i, g in enumerate(grads) if ctx.needs >> i & 1))
            return None, *seconds, *[None] * (len(indices) + len(names))

    class Value(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(needs, *args):
            tensors, options = split(args)
            return value_and_grad(*tensors, **options, needs=needs) if needs else (value(*tensors, **options),)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.option_values = inputs[1 + count :]
            ctx.save_for_backward(*inputs[1 : 1 + count], *output[1:])
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)
            ctx.scaled = False

        @staticmethod
        def backward(ctx, grad, *_):
            if grad is None:
                return (None,) * (1 + count + len(names))
            saved = ctx.saved_tensors
            tensors, grads = saved[:count], saved[count:]
            needs = sum(n << i for i, n in enumerate(ctx.needs_input_grad[1 : 1 + count]))
            if torch.compiler.is_compiling():  # there are no second derivatives to come
                if grads:
                    grads = [g * grad for g in grads]  # Inductor fuses the product into what reads it
                else:
                    grads = backward_(grad, *tensors, **dict(zip(names, ctx.option_values)), needs=needs)
            elif not grads or ctx.scaled or torch.is_grad_enabled():
                grads = Gradient.apply(needs, grad, *tensors, *ctx.option_values)
            else:
                ctx.scaled = True  # in place: a second backward pass recomputes them
                torch.ops.fastprob._scale_.default(list(grads), grad)
            wanted = [g if needs >> i & 1 else None for i, g in enumerate(grads)]
            return None, *wanted, *[None] * len(names)

    def setup_context(ctx, inputs, output, keyword_only_inputs=None):
        ctx.option_values = tuple(keyword_only_inputs[k] for k in names)
        ctx.save_for_backward(*inputs)

    def backward(ctx, grad):
        needs = sum(n << i for i, n in enumerate(ctx.needs_input_grad[:count]))
        grads = Gradient.apply(needs, grad, *ctx.saved_tensors, *ctx.option_values)
        return tuple(g if needs >> i & 1 else None for i, g in enumerate(grads))

    torch.library.register_autograd(value, backward, setup_context=setup_context, lib=_LIBRARY)
    return Value


def _scale_(grads: list[Tensor], scale: Tensor) -> None:
    """Multiplies the tensors by a scalar in place, and leaves them alone where it is 1: a loss's usual gradient."""
    if scale.device.type == "cpu" and scale.item() == 1:
        return
    with torch.autograd._unsafe_preserve_version_counter(tuple(grads)):
        torch._foreach_mul_([g for g in grads if g.numel()], scale)


_LIBRARY.define("_scale_(Tensor(a!)[] grads, Tensor scale) -> ()")
_LIBRARY.impl("_scale_", _scale_, "CompositeExplicitAutograd")
