"""Monte-Carlo dropout of any module: mean and variance of its outputs over passes with dropout.

A pass is one thinned network, applied to every row. The mask of the k-th dropout layer is over its input's shape
without the batch, of `nn.Dropout1d` to `3d` over its channels, and comes from the seed alone: pass m drops unit i
where Philox's number of element m units + i in stream k is below floor(p 2^32); see `fastprob/ops/_random.py`. So a
row's result depends on no other row, and rows are compared under the same networks.

What is run is a copy of the module's structure that shares its parameters: the module itself is only read, and other
threads may use it meanwhile.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fastprob.ops._random import kept

WHOLE_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUTS = (nn.Dropout, *WHOLE_CHANNELS)


@torch.no_grad()
def mc_dropout_passes(
    module: nn.Module, x: Tensor | tuple[Tensor, ...], *, passes: int, seed: int = 0, batch_size: int = 1024
):
    """Mean and population variance of a module's outputs over passes with dropout.

        mean = y + sum_m d_m / M,    variance = sum_m d_m^2 / M - (sum_m d_m / M)^2,    d_m = y_m - y

    with y_m the output of pass m and y that without dropout, which comes first: sums of differences lose little, and
    one sweep over the passes is enough. Everything else is as in evaluation mode, whatever mode the module is in;
    neither the module nor x changes. On `batch_size` and on other rows a result depends by its rounding alone.

    Args:
        module: with `nn.Dropout`, `nn.Dropout1d`, `2d` or `3d` layers whose inputs have the batch first. A layer that
            is called twice drops the same units both times. Dropout by function is off, as in evaluation mode. What
            `torch.compile` made is run as it was before. `copy.deepcopy` has to take what a module holds.
        x: rows [N, ...] on the module's device, N may be 0; or a tuple of such tensors, the positional arguments.
        passes: M, at least 1.
        seed: of the masks, the same bits on every device. Layers are counted in the order of `module.modules()`, those
            of p = 0 too.
        batch_size: rows times passes at a time; memory grows with it and not with `passes`.

    Returns:
        (mean, variance), both of the structure of the module's output, every tensor [N, ...] of the output's dtype; the
        sums are of float32 at least. What is no tensor, None say, is in both as the module gave it.

    Raises:
        ValueError: for passes or a batch size below 1, inputs that differ in their number of rows, a module without
            dropout of p > 0 or whose forward pass calls none, other layers that draw (they are named: alpha dropout,
            attention and recurrent layers with dropout), a dropout whose input has not the batch first, or an output
            that is no floating-point tensor [N, ...].

    Source:
        Gal and Ghahramani, Dropout as a Bayesian approximation, ICML 2016; Tompson et al., CVPR 2015, for channels.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    _check(module, inputs, passes, batch_size)
    run = _Run(seed)
    network = _thinned(module, run)
    rows = inputs[0].shape[0]
    results: list[Tensor] = []
    for start in range(0, max(rows, 1), batch_size):
        block = [t[start : start + batch_size] for t in inputs]
        output, statistics = _statistics(network, run, block, passes, batch_size)
        results = results or [t.new_empty(rows, *t.shape[1:]) for t in statistics]
        for result, part in zip(results, statistics):
            result[start : start + batch_size] = part
    half = len(results) // 2
    return _with_tensors(output, results[:half]), _with_tensors(output, results[half:])


@dataclass
class _Run:
    """What the dropout layers have to know: passes first .. first + passes - 1 of so many rows; 0: no dropout."""

    seed: int
    first: int = 0
    passes: int = 0
    rows: int = 0
    called: bool = False


def _check(module: nn.Module, inputs: tuple[Tensor, ...], passes: int, batch_size: int) -> None:
    if passes < 1 or batch_size < 1:
        raise ValueError(f"mc_dropout_passes: passes and batch_size must be at least 1, got {passes} and {batch_size}")
    if not inputs or any(not isinstance(t, Tensor) or t.dim() == 0 or len(t) != len(inputs[0]) for t in inputs):
        got = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in inputs]
        raise ValueError(f"mc_dropout_passes: x must be one tensor [N, ...] or several of one N, got {got}")
    for name, layer in module.named_modules():
        if _draws_unseen(layer):
            raise ValueError(
                f"mc_dropout_passes: module must draw by nn.Dropout, 1d, 2d and 3d alone, "
                f"got {type(layer).__name__} with dropout at {name or 'its root'!r}"
            )
    if not any(isinstance(layer, DROPOUTS) and layer.p > 0 for layer in module.modules()):
        raise ValueError("mc_dropout_passes: module must have an nn.Dropout of p > 0, got none")


def _draws_unseen(layer: nn.Module) -> bool:
    if isinstance(layer, nn.RNNBase):
        return layer.dropout > 0 and layer.num_layers > 1  # between its layers
    if isinstance(layer, nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, (nn.AlphaDropout, nn.FeatureAlphaDropout)) and layer.p > 0


def _thinned(module: nn.Module, run: _Run) -> nn.Module:
    """A copy in evaluation mode whose dropout layers drop as `run` says. Parameters are shared; buffers, which a module
    may write, are copied.
    """
    memo: dict[int, Tensor | nn.Module] = {id(t): t for t in module.parameters()}
    for layer in module.modules():
        for t in (*layer._buffers.values(), *vars(layer).values()):
            if isinstance(t, Tensor):  # deepcopy refuses those that are computed from others
                memo.setdefault(id(t), t.detach().clone())
    for layer in reversed(list(module.modules())):
        if "_orig_mod" in layer._modules:  # a compiled one, which every pass would compile anew
            memo[id(layer)] = copy.deepcopy(layer._orig_mod, memo)
    network = copy.deepcopy(module, memo).eval()
    for layer in network.modules():
        if isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False  # these have no rows to drop units of
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, DROPOUTS)]
    for stream, (name, layer) in enumerate(layers):
        # Hooks keep encoder layers off their fused path, which would leave the layer out.
        layer.register_forward_hook(functools.partial(_drop, run, stream, name), prepend=True)
    return network


def _drop(run: _Run, stream: int, name: str, layer: nn.Module, _, x: Tensor) -> Tensor:
    """What a dropout layer gives for x [passes rows, ...], laid out pass by pass."""
    count, of_channels = max(run.passes, 1) * run.rows, isinstance(layer, WHOLE_CHANNELS)
    least = 5 if isinstance(layer, nn.Dropout3d) else 3 if of_channels else 1
    if x.dim() < least or x.shape[0] != count:
        raise ValueError(
            f"mc_dropout_passes: the input of dropout {name!r} must have the batch first, {count} here, "
            f"got {tuple(x.shape)}"
        )
    run.called = True
    if not (run.passes and layer.p):
        return x
    shape = [*x.shape[1:2], *[1] * (x.dim() - 2)] if of_channels else x.shape[1:]
    units = torch.Size(shape).numel()
    keep = kept(run.passes, units, p=layer.p, seed=run.seed, device=x.device, stream=stream, first=run.first)
    scaled = keep.to(x.dtype) / (1 - layer.p if layer.p < 1 else 1)
    dropped = (x.unflatten(0, (run.passes, run.rows)) * scaled.view(run.passes, 1, *shape)).flatten(0, 1)
    return x.copy_(dropped) if layer.inplace else dropped


def _statistics(network: nn.Module, run: _Run, block: list[Tensor], passes: int, batch_size: int):
    """For a block of rows the output without dropout; and of its tensors all means, then all variances."""
    rows = block[0].shape[0]
    output = _output(network, run, block, 0, 0)
    centres = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in _tensors(output)]
    shifts, squares = [torch.zeros_like(t) for t in centres], [torch.zeros_like(t) for t in centres]
    some = max(batch_size // max(rows, 1), 1)
    for first in range(0, passes if rows else 0, some):
        count = min(some, passes - first)
        outputs = _tensors(_output(network, run, block, first, count))
        for y, centre, shift, square in zip(outputs, centres, shifts, squares, strict=True):
            difference = y.unflatten(0, (count, rows)).to(centre.dtype) - centre
            shift += difference.sum(0) / passes
            square += difference.square_().sum(0) / passes
    means = [centre + shift for centre, shift in zip(centres, shifts)]
    variances = [(square - shift.square()).clamp_min(0) for square, shift in zip(squares, shifts)]
    return output, [t.to(like.dtype) for t, like in zip(means + variances, 2 * _tensors(output))]


def _output(network: nn.Module, run: _Run, block: list[Tensor], first: int, passes: int):
    """The output for so many passes, laid out pass by pass; for 0 passes the one without dropout."""
    run.first, run.passes, run.rows, run.called = first, passes, block[0].shape[0], False
    copies = max(passes, 1)
    output = network(*[t.repeat(copies, *[1] * (t.dim() - 1)) for t in block])  # a network may write its inputs
    if not run.called:
        raise ValueError("mc_dropout_passes: module must call its dropout layers, but its forward pass called none")
    tensors = _tensors(output)
    bad = [t for t in tensors if not t.is_floating_point() or t.dim() == 0 or t.shape[0] != copies * run.rows]
    if bad or not tensors:
        got = f"{bad[0].dtype} {tuple(bad[0].shape)} for N = {copies * run.rows}" if bad else type(output).__name__
        raise ValueError(f"mc_dropout_passes: outputs must be floating-point [N, ...], got {got}")
    return output


def _tensors(output) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _with_tensors(output, tensors: list[Tensor]):
    """The output with others in its tensors' place."""
    each = iter(tensors)
    return _pytree.tree_map(lambda leaf: next(each) if isinstance(leaf, Tensor) else leaf, output)
