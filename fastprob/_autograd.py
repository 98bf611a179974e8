"""An operator's derivatives: kernels forward and backward, the declared gradient in torch code for higher ones.

Two autograd functions stand around the torch operators of `fastprob/_op.py`. `Value` calls the operator, or for a loss
`_x_value_and_grad`, and in its backward pass `Gradient`; `Gradient` calls `_x_backward`, and in its own backward pass
differentiates `op.gradient`. Both take flat arguments, tensors before options. Dynamo traces them, so that no plain
object but numbers, lists and functions is closed over where it looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastprob._op import Op


def differentiable(op: Op, library: torch.library.Library) -> type[torch.autograd.Function]:
    """`Value` of an operator. The torch operator becomes differentiable by itself, too, for exported graphs."""
    gradient = _gradient_function(op)
    _register(op, gradient, library)
    return _value_function(op, gradient)


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def scale_(grads: list[Tensor], scale: Tensor) -> None:
    """Multiplies the tensors by a scalar in place, and leaves them alone where it is 1: a loss's usual gradient."""
    grads = [g for g in grads if g.numel()]
    if not grads or (scale.device.type == "cpu" and scale.item() == 1):
        return
    with torch.autograd._unsafe_preserve_version_counter(tuple(grads)):
        torch._foreach_mul_(grads, scale)


def _value_function(op: Op, gradient: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    value, backward_of = op.overload(op.name), op.overload(f"_{op.name}_backward")
    value_and_grad = op.overload(f"_{op.name}_value_and_grad") if op.is_scalar else None
    names, count, results = list(op.options), len(op.tensors), len(op.results)
    constant = [i for i, r in enumerate(op.results) if not r.kind.differentiable]
    moving = [i for i in range(results) if i not in constant]

    class Value(torch.autograd.Function):
        """(needs, tensors, options) -> the results, and where `needs` has bits the gradients that they ask for."""

        generate_vmap_rule = True

        @staticmethod
        def forward(needs, *args):
            tensors, options = args[:count], dict(zip(names, args[count:]))
            return as_tuple(value_and_grad(*tensors, **options, needs=needs) if needs else value(*tensors, **options))

        @staticmethod
        def setup_context(ctx, inputs, output):
            constants = [output[i] for i in constant]
            ctx.option_values = inputs[1 + count :]
            ctx.save_for_backward(*inputs[1 : 1 + count], *constants, *output[results:])
            ctx.mark_non_differentiable(*constants, *output[results:])
            ctx.set_materialize_grads(results > 1)
            ctx.scaled = False

        @staticmethod
        def backward(ctx, *of_results):
            if of_results[moving[0]] is None:
                return (None,) * (1 + count + len(names))
            split = count + len(constant)
            saved = ctx.saved_tensors  # once: checkpoints compute them anew
            inputs, grads = (*[of_results[i] for i in moving], *saved[:split]), saved[split:]
            needs = sum(n << i for i, n in enumerate(ctx.needs_input_grad[1 : 1 + count]))
            if torch.compiler.is_compiling():  # there are no second derivatives to come
                if grads:
                    grads = [g * inputs[0] for g in grads]  # Inductor fuses the product into what reads it
                else:
                    grads = as_tuple(backward_of(*inputs, **dict(zip(names, ctx.option_values)), needs=needs))
            elif not grads or ctx.scaled or torch.is_grad_enabled():
                grads = gradient.apply(needs, *inputs, *ctx.option_values)
            else:
                ctx.scaled = True  # in place: a second backward pass recomputes them
                torch.ops.fastprob._scale_.default(list(grads), inputs[0])
            wanted = [g if needs >> i & 1 else None for i, g in enumerate(grads)]
            return None, *wanted, *[None] * len(names)

    return Value


def _gradient_function(op: Op) -> type[torch.autograd.Function]:
    backward_of, names = op.overload(f"_{op.name}_backward"), list(op.options)
    moving = [r.kind.differentiable for r in op.results]
    is_moving = [True] * sum(moving) + [a.kind.differentiable for a in op.arguments] + [False] * moving.count(False)
    count = len(is_moving)
    implicit = [op.tensors.index(name) for name in op.implicit]

    class Gradient(torch.autograd.Function):
        """(needs, gradients of results, tensors, constant results, options) -> a gradient for every tensor."""

        generate_vmap_rule = True

        @staticmethod
        def forward(needs, *args):
            return as_tuple(backward_of(*args[:count], **dict(zip(names, args[count:])), needs=needs))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.needs, ctx.option_values = inputs[0], inputs[1 + count :]
            ctx.save_for_backward(*inputs[1 : 1 + count])

        @staticmethod
        def backward(ctx, *grads):
            inputs, options = list(ctx.saved_tensors), dict(zip(names, ctx.option_values))
            if "seed" in options and any(_is_batched(t) for t in inputs if t is not None):
                raise RuntimeError(f"{op.name}: second derivatives under vmap would draw other random numbers")
            for i in implicit:
                if ctx.needs >> i & 1 or ctx.needs_input_grad[1 + sum(moving) + i]:
                    raise NotImplementedError(f"{op.name}: {op.tensors[i]} must be detached for second derivatives")
            places = [i for i, t in enumerate(inputs) if is_moving[i] and t is not None]

            def wanted(*moved):
                inputs_ = list(inputs)
                for i, t in zip(places, moved):
                    inputs_[i] = t
                gradients = op.gradient(*inputs_, **options)
                return tuple(g.to(grads[i].dtype) for i, g in enumerate(gradients) if ctx.needs >> i & 1)

            with torch._C._DisableAutocast():
                _, vjp = torch.func.vjp(wanted, *[inputs[i] for i in places])
                seconds = dict(zip(places, vjp(tuple(g for i, g in enumerate(grads) if ctx.needs >> i & 1))))
            return None, *[seconds.get(i) for i in range(count)], *[None] * len(names)

    return Gradient


def _is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is of a vmap, under whatever other transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def _register(op: Op, gradient: type[torch.autograd.Function], library: torch.library.Library) -> None:
    names, count = list(op.options), len(op.tensors)
    is_moving = [r.kind.differentiable for r in op.results]

    def setup_context(ctx, inputs, output, keyword_only_inputs=None):
        ctx.option_values = tuple(keyword_only_inputs[k] for k in names)
        constants = [r for r, moves in zip(as_tuple(output), is_moving) if not moves]
        ctx.save_for_backward(*inputs, *constants)
        ctx.mark_non_differentiable(*constants)

    def backward(ctx, *grads):
        needs = sum(n << i for i, n in enumerate(ctx.needs_input_grad[:count]))
        moving = [g for g, moves in zip(grads, is_moving) if moves]
        grads = gradient.apply(needs, *moving, *ctx.saved_tensors, *ctx.option_values)
        return tuple(g if needs >> i & 1 else None for i, g in enumerate(grads))

    torch.library.register_autograd(op.overload(op.name), backward, setup_context=setup_context, lib=library)
