"""The CUDA library: what it registers and how it was compiled (on any machine), and what its kernels do (on a GPU)."""

import importlib.util
import math
import pathlib
import re
import shutil
import subprocess

import pytest
import torch
from conftest import assert_within_budget, cast, leaves_of, maker

import fastprob
from fastprob import _backends
from fastprob._op import DTYPES, OPS

SOURCES = {path.stem for path in (pathlib.Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu")}
WITH_SOURCE = {name: op for name, op in OPS.items() if name in SOURCES}
RAW_NAMES = [raw for op in WITH_SOURCE.values() for raw in op.raw] + ["_scale_"]
LIBRARY = next(pathlib.Path(fastprob.__file__).parent.glob("_cuda.*so"), None)

built = pytest.mark.skipif(LIBRARY is None, reason="the CUDA library is not built: no nvcc, or a torch without CUDA")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_gpu = lambda test: gpu[0](gpu[1](test))  # noqa: E731
# Operators and the backends whose kernels do all the work: gaussian_potential's products are the vendor library's.
SERVED = [(op, "triton") for name, op in OPS.items() if name != "gaussian_potential"]
SERVED += [(op, "cuda") for op in WITH_SOURCE.values()]
each_op = pytest.mark.parametrize(
    ("op", "backend"), SERVED, ids=[f"{op.name}-{backend}" for op, backend in SERVED], indirect=["backend"]
)


def cuobjdump() -> str | None:
    """cuobjdump, from the CUDA toolkit or the copy that Triton brings."""
    triton = importlib.util.find_spec("triton")
    candidates = [shutil.which("cuobjdump")]
    if triton and triton.origin:
        candidates.append(str(pathlib.Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((path for path in candidates if path and pathlib.Path(path).exists()), None)


@built
@pytest.mark.parametrize("name", RAW_NAMES)
def test_library_registers_a_cuda_kernel(name):
    """The library's own kernel, not one laid over it: `_native` was read before anything was."""
    assert (name, "CUDA") in _backends._native
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastprob::{name}", "CUDA")


@built
def test_kernels_neither_spill_nor_use_the_stack():
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump, in the CUDA toolkit or in Triton")
    text = subprocess.run([tool, "--dump-resource-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    architectures = set(re.findall(r"^arch = (sm_\w+)", text, re.MULTILINE))
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert architectures
    assert len(kernels) >= len(DTYPES) * len(RAW_NAMES) * len(architectures)
    assert [kernel for kernel in kernels if kernel[2:] != ("0", "0")] == []


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if "CUDA" not in _backends.DEVICES or _backends._reasons[request.param] in ("not built", "triton is not installed"):
        pytest.skip(f"{request.param}: {_backends._reasons[request.param]}")
    with fastprob.backend(request.param):
        yield request.param


def samples(op, dtype):
    torch.manual_seed(0)
    return list(op.samples(maker(dtype, "cuda")))


def run(op, tensors, options):
    """Value, and gradients of all inputs that have one, under a gradient that is neither 1 nor uniform."""
    tensors = leaves_of(tensors)
    value = op.function(*tensors, **options)
    weight = torch.linspace(0.5, 1.5, value.numel(), device="cuda", dtype=torch.float64).view(value.shape)
    weight = weight.to(torch.bfloat16).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, tensors[: len(op.differentiable)], weight)]


def check_budget(op, tensors, options):
    got = run(op, tensors, options)
    with fastprob.backend("reference"):
        reference, truth = run(op, tensors, options), run(op, cast(tensors, torch.float64), options)
    for what, g, r, t in zip(["value", *op.differentiable], got, reference, truth, strict=True):
        assert_within_budget(g, r, t, f"{op.name} {what} {options}")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_op
def test_values_and_gradients(op, dtype, backend):
    for tensors, options in samples(op, dtype):
        check_budget(op, tensors, options)


def large(op, dtype=torch.float32, size=(1023, 517)):
    """Inputs of many blocks and an odd size: vectors, and a tail."""
    tensors, options = next((t, o) for t, o in samples(op, dtype) if t[0].shape == (65, 129))
    shapes = [[dict(zip((65, 129), size)).get(n, n) for n in t.shape] for t in tensors]
    counts = [math.prod(shape) for shape in shapes]
    draws = [t.reshape(-1).repeat(-(-n // t.numel()))[:n].view(shape) for t, n, shape in zip(tensors, counts, shapes)]
    return draws, options


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_op
def test_many_blocks(op, dtype, backend):
    tensors, options = large(op, dtype)
    check_budget(op, tensors, options)


@on_gpu
@each_op
def test_unaligned_tensors_give_the_same_bits(op, backend):
    tensors, options = large(op)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]
    assert all(t.data_ptr() % 16 for t in shifted)
    for a, b in zip(run(op, tensors, options), run(op, shifted, options), strict=True):
        assert torch.equal(a, b)


@on_gpu
@each_op
def test_same_bits_again_and_on_another_stream(op, backend):
    tensors, options = large(op)
    first = run(op, tensors, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on the default stream would not wait for this
        late = [t + 0 for t in tensors]
        second = run(op, late, options)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@on_gpu
@each_op
def test_cuda_graph_replays_with_new_inputs(op, backend):
    tensors, options = large(op)
    inputs = leaves_of(tensors)
    leaves, function = inputs[: len(op.differentiable)], op.function
    weight = torch.ones_like(function(*inputs, **options)) * 2

    def step():
        value = function(*inputs, **options)
        return [value.detach(), *torch.autograd.grad(value, leaves, weight)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in inputs:
            t.copy_(t.flip(0) * 0.75)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@on_gpu
@each_op
def test_never_waits_for_the_gpu(op, backend):
    tensors, options = large(op)
    run(op, tensors, options)  # compiles Triton's kernels
    inputs = leaves_of(tensors)
    ones = torch.ones_like(op.function(*inputs, **options))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves = inputs[: len(op.differentiable)]
        torch.autograd.grad(op.function(*inputs, **options), leaves, ones)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@each_op
def test_only_the_gradients_that_are_asked_for(op, backend):
    """For every single input, and for all but one: kernels must not write the ones that are not there."""
    tensors, options = large(op)
    count = len(op.differentiable)
    full = run(op, tensors, options)[1:]
    for wanted in [{i} for i in range(count)] + [set(range(count)) - {i} for i in range(count)]:
        inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        value = op.function(*inputs, **options)
        weight = torch.linspace(0.5, 1.5, value.numel(), device="cuda", dtype=torch.float64).view(value.shape)
        grads = torch.autograd.grad(
            value, [inputs[i] for i in sorted(wanted)], weight.to(torch.bfloat16).to(value.dtype)
        )
        for i, grad in zip(sorted(wanted), grads, strict=True):
            torch.testing.assert_close(grad, full[i], rtol=1e-6, atol=0)


@on_gpu
def test_a_nan_is_kept_by_every_op(backend):
    for op in WITH_SOURCE.values():
        tensors, options = large(op)
        for i in range(len(tensors)):
            poisoned = [t.clone() for t in tensors]
            poisoned[i][500, 100] = torch.nan
            with fastprob.backend("reference"):
                expected = run(op, poisoned, options)
            for g, e in zip(run(op, poisoned, options), expected, strict=True):
                assert torch.equal(g.isnan(), e.isnan())


@on_gpu
def test_more_than_2_to_the_31_elements(backend):
    """Offsets of 64 bits: the last elements, beyond 2^31, are worked on, and no other is written in their place."""
    size, tail = 2**31 + 8, slice(2**31 - 8, None)
    if torch.cuda.mem_get_info()[0] < 7 * 2 * size:
        pytest.skip("needs 30 GB of GPU memory")
    inv_alpha = torch.full((size,), 2.0, device="cuda", dtype=torch.bfloat16)
    beta = torch.full((size,), 2.0, device="cuda", dtype=torch.bfloat16)
    inv_alpha[tail] = torch.linspace(0.5, 1.5, 16, device="cuda").bfloat16()
    value = fastprob.ggd_variance(inv_alpha, beta)
    expected = fastprob.ggd_variance(inv_alpha[tail].clone(), beta[tail].clone())
    assert torch.equal(value[tail], expected)
    assert (value[: 2**20] == 0.125).all() and (value[-(2**20) : -16] == 0.125).all()


@on_gpu
@pytest.mark.parametrize("reduction, expected", [("mean", torch.nan), ("sum", 0.0)])
def test_nothing_reduces_to_nan_or_zero(reduction, expected, backend):
    empty = [torch.empty(0, 4, device="cuda", requires_grad=True) for _ in range(4)]
    value = fastprob.ggd_nll(*empty, reduction=reduction)
    torch.testing.assert_close(value.detach().cpu(), torch.tensor(expected), equal_nan=True)
    assert [g.shape for g in torch.autograd.grad(value, empty)] == [(0, 4)] * 4


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.5, torch.nan])
def test_scale(factor, dtype, backend):
    """More tensors than one launch takes, empty ones and tails among them."""
    draw = maker(dtype, "cuda")
    tensors = [draw(n) for n in (0, 1, 7, 8, 4096, 300_001, 0, 33, 5, 2, 70_000)]
    expected = [t * factor for t in tensors]
    versions = [t._version for t in tensors]
    torch.ops.fastprob._scale_(tensors, torch.tensor(factor, device="cuda", dtype=dtype))
    for t, e in zip(tensors, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=0, atol=0, equal_nan=True)
    assert [t._version for t in tensors] == versions
