"""What the launchers share: block sizes, outputs and the second stage of every reduction.

A reduction is two kernels. The first writes one float64 partial a program; the second, one program, adds them up. Which
elements meet in which order depends on the block size and the layout of a block over threads: on the dtype, never on
the number of elements, on where tensors lie, on the device or on timing.
"""

import torch
import triton
import triton.language as tl

from fastprob.kernels import _maths

WARPS = 4
REGISTERS = 168  # a thread, at most: three blocks fit on a multiprocessor
PARTIALS, TOTAL_WARPS = 8192, 16  # partials that the second stage adds at a time: those of 4 M float32 elements


def block_size(tensor: torch.Tensor, single: bool = False) -> int:
    """Elements a program: four a thread, 16 bytes of a float32 tensor, and two of float64; or a single one, where it
    takes so long that how it is loaded does not count.

    Eight a thread, 16 bytes of a half type, spill registers in probvlm_loss.
    """
    return 32 * WARPS * (1 if single else 2 if tensor.dtype == torch.float64 else 4)


def registers(tensor: torch.Tensor) -> int | None:
    """The most that a thread may take; float64, which no GPU is fast at, takes what it needs."""
    return None if tensor.dtype == torch.float64 else REGISTERS


def programs(tensor: torch.Tensor, single: bool = False) -> int:
    return triton.cdiv(tensor.numel(), block_size(tensor, single))


def contiguous(tensors) -> tuple[torch.Tensor, ...]:
    """The tensors, copied where they are not contiguous or not aligned to 16 bytes, as all that torch allocates is.

    Kernels are thus compiled for aligned tensors alone, and a sum has one order.
    """
    return tuple(t.clone(memory_format=torch.contiguous_format) if _misplaced(t) else t for t in tensors)


def _misplaced(tensor: torch.Tensor) -> bool:
    return not tensor.is_contiguous() or tensor.data_ptr() % 16 != 0


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor with room for a multiple of 16 elements, so that kernels store 16 bytes at a time."""
    room = triton.cdiv(tensor.numel(), 16) * 16
    return torch.empty(room, dtype=tensor.dtype, device=tensor.device).resize_(tensor.shape)


def gradients_like(tensors, needs: int) -> tuple[torch.Tensor, ...]:
    """Tensors like the inputs for the gradients that bits of `needs` ask for, of shape (0,) for the others."""
    return tuple(empty_like(t) if needs >> i & 1 else t.new_empty(0) for i, t in enumerate(tensors))


def partials_of(tensor: torch.Tensor, single: bool = False) -> torch.Tensor:
    return torch.empty(programs(tensor, single), dtype=torch.float64, device=tensor.device)


def total(partials: torch.Tensor, like: torch.Tensor, count: int) -> torch.Tensor:
    """The partials' sum over `count`, as a scalar of the dtype of `like`."""
    out = torch.empty((), dtype=like.dtype, device=like.device)
    _total[(1,)](partials, out, partials.numel(), count, PARTIALS, num_warps=TOTAL_WARPS)
    return out


# ---- in a kernel: a program's block of elements ---------------------------------------------------------------------


@triton.jit
def block_of(n, BLOCK: tl.constexpr):
    """A program's elements in a tensor of n, their places in the block, and how many of them the tensor has."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = n - start
    left = tl.where(left < 0, 0, tl.where(left < BLOCK, left, BLOCK)).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    return start + lane, lane, left


@triton.jit
def load(pointers, at, lane, left, BLOCK: tl.constexpr):
    """A block of each tensor in the type of computation. Where it is whole no mask keeps loads from being of 16
    bytes.
    """
    if left == BLOCK:
        x = [_maths.load(pointer, at, None) for pointer in pointers]
    else:
        x = [_maths.load(pointer, at, lane < left) for pointer in pointers]
    return x


@triton.jit
def store(pointers, at, x, lane, left, NEEDS: tl.constexpr):
    """The blocks that bits of NEEDS ask for, 16 bytes at a time, to tensors with the room of `empty_like`."""
    room = (left + 15) >> 4 << 4  # Triton knows multiples of 16 elements to be aligned
    for i in tl.static_range(len(pointers)):
        if NEEDS >> i & 1:
            _maths.store(pointers[i], at, x[i], lane < room)


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
