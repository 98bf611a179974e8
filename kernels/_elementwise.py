"""Elementwise operators, losses among them, from what one of them does with an element: its body,

    body(*inputs, *numbers, *tables, *flags, FAST) -> value, (its derivative for each input)

in the type of computation. What a torch operator does not ask for, the compiler leaves out of its kernel.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _launch, _maths

NUMBERS = 8  # that a kernel has room for


def elementwise(body, arguments=lambda: ((), ())):
    """The launchers of an operator whose values are its elements': of x and of _x_backward.

    `arguments(**options)` gives the body's numbers, float64 for the kernel, and its flags, which are compiled in.
    """
    return _launchers(body, arguments, "none")[:2]


def loss(body, arguments=lambda: ((), ()), table=None):
    """The launchers of a loss, which has an option `reduction` or takes the mean: of x, _x_backward and
    _x_value_and_grad.

    `table(input)`, if any, is a tensor that the body reads for each element, which then takes its time.
    """
    return _launchers(body, arguments, "mean", table)


def _launchers(body, arguments, default, table=None):
    def launch(grad, inputs, needs, reduction=default, **options):
        tables = (table(inputs[0]),) if table else ()
        return _run(body, grad, _launch.contiguous(inputs), needs, reduction, *arguments(**options), tables)

    def value(*inputs, **options):
        return launch(None, inputs, 0, **options)[0]

    def backward(grad, *inputs, needs, **options):
        grads = launch(*_launch.contiguous((grad,)), inputs, needs, **options)[1:]
        return grads if len(grads) > 1 else grads[0]  # as torch returns them

    def value_and_grad(*inputs, needs, **options):
        return launch(None, inputs, needs, **options)

    return value, backward, value_and_grad


def _run(body, grad, inputs, needs, reduction, numbers, flags, tables):
    """The value, None where a gradient reaches it, and the gradients that `needs` asks for."""
    first, n = inputs[0], inputs[0].numel()
    reduced, count = reduction != "none", n if reduction == "mean" else 1
    grads, out, single = _launch.gradients_like(inputs, needs), None, bool(tables)
    if grad is None:
        out = _launch.partials_of(first, single) if reduced else _launch.empty_like(first)
    if n and (needs or out is not None):
        rest = *tables, *map(tl.constexpr, flags)
        with torch.cuda.device_of(first):
            _kernel[(_launch.programs(first, single),)](
                inputs, grad, out, grads, n, count, *numbers, *[0.0] * (NUMBERS - len(numbers)),
                rest, body, len(numbers), reduced, needs, _launch.block_size(first, single),
                num_warps=_launch.WARPS, maxnreg=_launch.registers(first),
            )  # fmt: skip
    return _launch.total(out, first, count) if reduced and out is not None else out, *grads


@triton.jit(do_not_specialize=["n", "count"])
def _kernel(
    inputs, grad, out, grads, n: tl.int64, count: tl.int64,
    number0: tl.float64, number1: tl.float64, number2: tl.float64, number3: tl.float64,
    number4: tl.float64, number5: tl.float64, number6: tl.float64, number7: tl.float64,
    rest, BODY: tl.constexpr, COUNT: tl.constexpr, REDUCED: tl.constexpr, NEEDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes to `out`, unless it is None, the elements' values or (REDUCED) the program's sum of them; and to `grads`
    the gradients for the inputs, times grad's element or (REDUCED) its scalar, None for 1, over `count`.

    The gradient that reaches the value comes last: known before the sum, it costs 60 registers in probvlm_loss.
    """
    at, lane, left = _launch.block_of(n, BLOCK)
    x = _launch.load(inputs, at, lane, left, BLOCK)
    FAST: tl.constexpr = inputs[0].dtype.element_ty.primitive_bitwidth == 16
    numbers = (number0, number1, number2, number3, number4, number5, number6, number7)
    numbers = [_maths.parameter(number, x[0].dtype) for number in numbers[:COUNT]]
    value, slopes = BODY(*x, *numbers, *rest, FAST)
    if out is not None:
        if REDUCED:
            tl.store(out + tl.program_id(0), tl.sum(tl.where(lane < left, value, 0.0)).to(tl.float64))
        else:
            _launch.store((out,), at, (value,), lane, left, 1)
    if NEEDS:
        if REDUCED:
            g = _launch.gradient_scale(grad, count, x[0].dtype)
        else:
            g = _launch.load((grad,), at, lane, left, BLOCK)[0]
        _launch.store(grads, at, [g * slope for slope in slopes], lane, left, NEEDS)
