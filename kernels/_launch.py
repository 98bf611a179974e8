"""What the launchers share: block sizes, outputs and the second stage of every reduction.

A reduction is two kernels. The first writes one float64 partial a program; the second, one program, adds them up. Which
elements meet in which order depends on the block size alone, never on the device or on timing.
"""

import torch
import triton
import triton.language as tl

WARPS = 4
PARTIALS, TOTAL_WARPS = 8192, 16  # partials that the second stage adds at a time: those of 4 M float32 elements


def block_size(tensor: torch.Tensor) -> int:
    """Elements a program: four a thread, 16 bytes of a float32 tensor, and two of float64.

    Eight a thread, 16 bytes of a half type, spill registers in probvlm_loss.
    """
    return 32 * WARPS * (2 if tensor.dtype == torch.float64 else 4)


def programs(tensor: torch.Tensor) -> int:
    return triton.cdiv(tensor.numel(), block_size(tensor))


def contiguous(tensors) -> tuple[torch.Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def gradients_like(tensors, needs: int) -> tuple[torch.Tensor, ...]:
    """Tensors like the inputs for the gradients that bits of `needs` ask for, of shape (0,) for the others."""
    return tuple(empty_like(t) if needs >> i & 1 else t.new_empty(0) for i, t in enumerate(tensors))


def partials_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(programs(tensor), dtype=torch.float64, device=tensor.device)


def total(partials: torch.Tensor, like: torch.Tensor, count: int) -> torch.Tensor:
    """The partials' sum over `count`, as a scalar of the dtype of `like`."""
    out = torch.empty((), dtype=like.dtype, device=like.device)
    _total[(1,)](partials, out, partials.numel(), count, PARTIALS, num_warps=TOTAL_WARPS)
    return out


@triton.jit(do_not_specialize=["n", "count"])
def _total(partials, out, n, count, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float64)
    offsets = tl.arange(0, BLOCK)
    start = tl.program_id(0)
    while start < n:  # the interpreter's range takes no tensor under NumPy 2.4
        sums += tl.load(partials + start + offsets, mask=start + offsets < n, other=0.0)
        start += BLOCK
    mean = tl.sum(sums) / count.to(tl.float64)
    if out.dtype.element_ty != tl.float64:
        mean = mean.to(tl.float32)
    tl.store(out, mean.to(out.dtype.element_ty))


@triton.jit
def gradient_scale(grad, count, dtype: tl.constexpr):
    """The gradient that reaches the reduction (None: 1) over `count`, correctly rounded."""
    divisor = tl.cast(count, dtype)
    scale = tl.full((), 1.0, dtype) if grad is None else tl.load(grad).to(dtype)
    return tl.div_rn(scale, divisor) if dtype == tl.float32 else scale / divisor
