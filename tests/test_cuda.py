"""The CUDA library: what it registers and how it was compiled (on any machine), and what its kernels do.

They run on a GPU, or compiled for a CPU (`make emulate`), which sets EMULATED_ERROR.
"""

import json
import os
import pathlib
import re
import subprocess

import instructions
import pytest
import torch
from conftest import as_tuple, assert_within_budget, cast, leaves_of, maker, moving, weights_for

import fastprob
from fastprob import _backends
from fastprob._op import DTYPES, OPS

SOURCES = {path.stem for path in (pathlib.Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu")}
WITH_SOURCE = {name: op for name, op in OPS.items() if name in SOURCES}
RAW_NAMES = [raw for op in WITH_SOURCE.values() for raw in op.raw] + ["_scale_"]
LIBRARY = next(pathlib.Path(fastprob.__file__).parent.glob("_cuda.*so"), None)
EMULATED = "EMULATED_ERROR" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"

built = pytest.mark.skipif(LIBRARY is None, reason="the CUDA library is not built: no nvcc, or a torch without CUDA")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_gpu = lambda test: pytest.mark.gpu(no_gpu(test))  # noqa: E731
on_device = (lambda test: test) if EMULATED else on_gpu
if EMULATED:
    SERVED = [(op, "cpu") for op in WITH_SOURCE.values()]
else:
    SERVED = [(op, "triton") for op in OPS.values()] + [(op, "cuda") for op in WITH_SOURCE.values()]


def each(served):
    ids = [f"{op.name}-{backend}" for op, backend in served]
    return pytest.mark.parametrize(("op", "backend"), served, ids=ids, indirect=["backend"])


each_op = each(SERVED)
each_elementwise = each([(op, backend) for op, backend in SERVED if op.elementwise])


@built
@pytest.mark.parametrize("name", RAW_NAMES)
def test_library_registers_a_cuda_kernel(name):
    """The library's own kernel, not one laid over it: `_native` was read before anything was."""
    assert (name, "CUDA") in _backends._native
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastprob::{name}", "CUDA")


@built
def test_kernels_neither_spill_nor_use_the_stack():
    tool = instructions.tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump, in the CUDA toolkit or in Triton")
    text = subprocess.run([tool, "--dump-resource-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    architectures = set(re.findall(r"^arch = (sm_\w+)", text, re.MULTILINE))
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert architectures
    assert len(kernels) >= len(DTYPES) * len(RAW_NAMES) * len(architectures)
    assert [kernel for kernel in kernels if kernel[2:] != ("0", "0")] == []


SLACK = 1.03  # instructions per element may grow so much before the table is to say so


@built
def test_instructions_per_element_have_not_grown():
    if missing := [name for name in instructions.TOOLS if instructions.tool(name) is None]:
        pytest.skip(f"takes {missing}")
    table = json.loads(instructions.TABLE.read_text())
    if instructions.compiler() != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    counts, expected = instructions.count(LIBRARY), table["instructions per element"]
    if not counts:
        pytest.skip(f"not built for {instructions.ARCHITECTURE}")
    assert counts.keys() == expected.keys(), "make instructions rewrites the table"
    assert {name: n for name, n in counts.items() if n > SLACK * expected[name]} == {}, f"the table says {expected}"


@pytest.mark.skipif(not EMULATED, reason="make emulate")
@pytest.mark.parametrize("name", RAW_NAMES)
def test_emulated_kernels_take_the_place_of_the_cpus(name):
    """None other has a kernel of `_scale_` for the CPU."""
    assert (name, "CPU") in _backends._native
    assert not _backends._reasons["cpu"].startswith("_cpu_avx")


# ---- on a GPU, or emulated ------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted({backend for _, backend in SERVED}))
def backend(request):
    if "not" in _backends._reasons[request.param].split():
        pytest.skip(f"{request.param}: {_backends._reasons[request.param]}")
    with fastprob.backend(request.param):
        yield request.param


def call(op, inputs, options):
    """The results, and gradients of those inputs that ask for one, under gradients that are neither 1 nor uniform."""
    results = as_tuple(op.function(*inputs, **options))
    grads = torch.autograd.grad(moving(results), moving(inputs), [w / 2 for w in weights_for(results)])
    return [*(r.detach() for r in results), *grads]


def run(op, tensors, options):
    return call(op, leaves_of(tensors, op), options)


def check_budget(op, tensors, options):
    got = run(op, tensors, options)
    with fastprob.backend("reference"):
        reference, truth = run(op, tensors, options), run(op, cast(tensors, torch.float64), options)
    for i, (g, r, t) in enumerate(zip(got, reference, truth, strict=True)):
        assert_within_budget(g, r, t, f"{op.name} [{i}] {options}")


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_op
def test_values_and_gradients(op, dtype, backend):
    for tensors, options in op.samples(maker(dtype, DEVICE)):
        check_budget(op, tensors, options)


def large(op, dtype=torch.float32):
    """Inputs of many blocks and, where any size goes, an odd one: vectors, and a tail."""
    size = (515, 259) if op.elementwise else op.bench_sizes[0]
    return op.inputs(maker(dtype, DEVICE), *size), op.grid[0]


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_op
def test_many_blocks(op, dtype, backend):
    tensors, options = large(op, dtype)
    check_budget(op, tensors, options)


@on_device
@each_elementwise
def test_unaligned_tensors_give_the_same_bits(op, backend):
    tensors, options = large(op)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]
    assert all(t.data_ptr() % 16 for t in shifted)
    inputs = [t.requires_grad_(name in op.differentiable) for name, t in zip(op.tensors, shifted)]
    for a, b in zip(run(op, tensors, options), call(op, inputs, options), strict=True):
        assert torch.equal(a, b)


@on_device
@each_op
def test_same_bits_again(op, backend):
    tensors, options = large(op)
    for a, b in zip(run(op, tensors, options), run(op, tensors, options), strict=True):
        assert torch.equal(a, b)


@on_gpu
@each_op
def test_same_bits_on_another_stream(op, backend):
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
    inputs = leaves_of(tensors, op)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(op, inputs, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(op, inputs, options)
    with torch.no_grad():
        for t in moving(inputs):
            t.copy_((t.flip(0) if t.dim() else t) * 0.75)
    graph.replay()
    for a, b in zip(captured, call(op, inputs, options), strict=True):
        assert torch.equal(a, b)


@on_gpu
@each_op
def test_never_waits_for_the_gpu(op, backend):
    tensors, options = large(op)
    run(op, tensors, options)  # compiles Triton's kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, tensors, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_device
@each_op
def test_only_the_gradients_that_are_asked_for(op, backend):
    """For every single input, and for all but one: kernels must not write the ones that are not there."""
    tensors, options = large(op)
    names = op.differentiable
    full = dict(zip(names, run(op, tensors, options)[len(op.results) :], strict=True))
    for wanted in [{n} for n in names] + [set(names) - {n} for n in names if len(names) > 1]:
        grads = call(op, leaves_of(tensors, op, wanted), options)[len(op.results) :]
        for name, grad in zip([n for n in names if n in wanted], grads, strict=True):
            # Those of fewer inputs are a kernel of their own, whose sums of terms that cancel round in other places.
            torch.testing.assert_close(grad, full[name], rtol=1e-6, atol=1e-7 * full[name].abs().max().item())


@on_device
@each_elementwise
def test_a_nan_is_kept(op, backend):
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


@on_device
@pytest.mark.parametrize("reduction, expected", [("mean", torch.nan), ("sum", 0.0)])
def test_nothing_reduces_to_nan_or_zero(reduction, expected, backend):
    empty = [torch.empty(0, 4, device=DEVICE, requires_grad=True) for _ in range(4)]
    value = fastprob.ggd_nll(*empty, reduction=reduction)
    torch.testing.assert_close(value.detach().cpu(), torch.tensor(expected), equal_nan=True)
    assert [g.shape for g in torch.autograd.grad(value, empty)] == [(0, 4)] * 4


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.5, torch.nan])
def test_scale(factor, dtype, backend):
    """More tensors than one launch takes, empty ones and tails among them."""
    draw = maker(dtype, DEVICE)
    tensors = [draw(n) for n in (0, 1, 7, 8, 4096, 300_001, 0, 33, 5, 2, 70_000)]
    expected = [t * factor for t in tensors]
    versions = [t._version for t in tensors]
    torch.ops.fastprob._scale_(tensors, torch.tensor(factor, device=DEVICE, dtype=dtype))
    for t, e in zip(tensors, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=0, atol=0, equal_nan=True)
    assert [t._version for t in tensors] == versions
