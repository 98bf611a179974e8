"""The Triton kernels without a GPU: compiled ahead of time for the architectures, and run by Triton's interpreter.

Kernels, their arguments and problems come from the operators: what is compiled is what their launchers launch. The
interpreter is chosen before Triton is imported, so this file runs itself a second time under TRITON_INTERPRET=1
(`test_interpreted`); there, and on a GPU where there is one, its class `TestValues` is what runs.
"""

import math
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import as_tuple, cast, maker

triton = pytest.importorskip("triton")

import fastprob  # noqa: E402
from fastprob import _backends  # noqa: E402
from fastprob._op import DTYPES, OPS  # noqa: E402
from fastprob.kernels import _launch  # noqa: E402

INTERPRETING = triton.knobs.runtime.interpret
EPSILON = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SERVED = [op for op in OPS.values() if _backends._triton_kernel(op.name)]
SUMS_THAT_CANCEL = ("ggd_pairwise_match_nll", "ggd_nearest_match")  # gradients, of many pairs' slopes of some tens
ELEMENTWISE = [op for op in SERVED if op.elementwise]


def name_of(value):
    return value.name if hasattr(value, "name") else str(value).removeprefix("torch.")


@pytest.mark.long
@pytest.mark.skipif(INTERPRETING, reason="is the second run itself")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "TestValues"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r"\b\d{2,} passed", result.stdout), result.stdout[-5000:]  # of what is not skipped


# ---- the torch operators --------------------------------------------------------------------------------------------


def every(op):
    """`needs` of every gradient that there is."""
    return sum(1 << i for i, a in enumerate(op.arguments) if a.kind.differentiable)


def unfrozen(op):
    return sum(1 << i for i, name in enumerate(op.tensors) if every(op) >> i & 1 and name not in op.frozen)


def is_scalar(op, options):
    return bool(op.is_scalar and op.is_scalar(**{**op.options, **options}))


def gradients_for(op, results, make, grad):
    """A gradient for every result that has one: `grad`, or where it is None any."""
    moving = [r for r, a in zip(results, op.results) if a.kind.differentiable]
    return [make(*r.shape, low=0.5, high=2).to(r.dtype) if grad is None else grad.expand(r.shape) for r in moving]


def raw_calls(op, tensors, options, make, grad=None):
    """(name, arguments, keywords but for `needs`) of the torch operators that serve a problem."""
    options = {**op.options, **options}
    results = as_tuple(op.reference(*tensors, **options))
    constants = [r for r, a in zip(results, op.results) if not a.kind.differentiable]
    grads = gradients_for(op, results, make, grad)
    for name in op.raw:
        if name.endswith("_backward"):
            yield name, (*grads, *tensors, *constants), options
        elif not name.endswith("_value_and_grad") or is_scalar(op, options):
            yield name, tuple(tensors), options


# ---- ahead-of-time compilation --------------------------------------------------------------------------------------

ARCHITECTURES = (80, 90, 100)


class Launch:
    """A kernel with what its launcher gave it, and `key`, which says what of that it is compiled for."""

    def __init__(self, kernel, arguments, keywords):
        backend = triton.compiler.compiler.make_backend(target_of(90))
        binder = triton.runtime.jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = binder(*arguments, **keywords)
        self.kernel = kernel
        self.options, *self.source = kernel._pack_args(backend, dict(keywords), bound, specialization, None)
        self.block = bound.get("BLOCK")
        self.key = (id(kernel), str(self.source), str(self.options))

    def compiled_for(self, architecture):
        source = triton.compiler.ASTSource(self.kernel, *self.source)
        options = {"num_warps": self.options.num_warps, "maxnreg": self.options.maxnreg}
        return triton.compile(source, target=target_of(architecture), options=options)


def target_of(architecture):
    return triton.backends.compiler.GPUTarget("cuda", architecture, 32)


def launches_of(calls):
    """The distinct launches of (torch operator's name, arguments, keywords); nothing is run."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        record = lambda self, *args, grid, warmup, **kw: seen.append((self, args, kw))  # noqa: E731
        patch.setattr(triton.runtime.jit.JITFunction, "run", record)
        for name, arguments, keywords in calls:
            _backends._triton_kernel(name)(*arguments, **keywords)
    launches = [Launch(*what) for what in seen]
    return list({launch.key: launch for launch in launches}.values())


def problem(op, dtype, size=None):
    """The tensors of its largest sample."""
    return cast(op.inputs(maker(), *(size or max(op.sizes, key=math.prod))), dtype)


def launches_of_op(op, dtype, size=None):
    """Those of every set of options, without the gradients that no one wants as a rule but for the first set's; what
    serves a training step first.
    """
    tensors, calls = problem(op, dtype, size), []
    for i, options in enumerate(op.grid):
        needs = {"needs": unfrozen(op) if i else every(op)}
        for name, arguments, keywords in raw_calls(op, tensors, options, maker()):
            calls.append((name, arguments, keywords if name == op.name else {**keywords, **needs}))
    return launches_of(sorted(calls, key=lambda call: -len(call[0])))


def launches_of_scale(dtype):
    grads = [torch.ones(n, dtype=dtype) for n in (4096, 300, 1, 16, 16, 16, 16, 16)]
    return launches_of([("_scale_", (grads, grads[0][0]), {})])


def variants_to_compile():
    """In float32 every launch; else the first of every operator, in bfloat16 and float32 for every architecture."""
    for dtype in DTYPES if not INTERPRETING else ():
        for name, launches in [(op.name, launches_of_op(op, dtype)) for op in SERVED] + [
            ("_scale_", launches_of_scale(dtype))
        ]:
            for i, launch in enumerate(launches if dtype == torch.float32 else launches[:2]):
                launch.dtype = dtype
                thorough = i == 0 and dtype in (torch.float32, torch.bfloat16)
                for architecture in ARCHITECTURES if thorough else (90,):
                    case = f"{name}-{i}-{launch.kernel.__name__}-{name_of(dtype)}-sm_{architecture}"
                    yield pytest.param(launch, architecture, id=case)


def resources(compiled):
    """What the compiler says that a kernel uses: REG, STACK, LOCAL and more; spilled registers lie on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.skipif(INTERPRETING, reason="compiles kernels that are not interpreted")
class TestCompiled:
    @pytest.mark.parametrize("launch, architecture", list(variants_to_compile()))
    def test_fits_registers_and_shared_memory(self, launch, architecture):
        compiled = launch.compiled_for(architecture)
        used = resources(compiled)
        print(used)
        # All six gradients of a float64 match leave 24 bytes on the stack, beside thousands of instructions.
        assert used["STACK"] <= (24 if launch.dtype == torch.float64 else 0) and used["LOCAL"] == 0
        assert 0 < used["REG"] <= 255
        assert compiled.metadata.shared <= 48 * 1024
        if launch.kernel is not _launch._total:  # its offsets count programs, not elements
            self.check_offsets(compiled.asm["ttir"])
        assert not re.search(r"\b(min|max)\.f(32|64)", compiled.asm["ptx"]), "drops NaN, which the interpreter's do not"

    def check_offsets(self, ttir):
        """Offsets into tensors are 64-bit, and so is the multiplication that makes them."""
        offsets = re.findall(r"tt\.addptr .*, tensor<(\w+)>", ttir)
        assert offsets and all(type_.endswith("xi64") for type_ in offsets)
        multipliers = {0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32}  # Philox's, whose products are no offsets
        constants = re.findall(r"(%\w+) = arith\.constant dense<(-?\d+)>", ttir)
        constants = {name for name, value in constants if int(value) in multipliers}
        products = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<\d+x)?i32", ttir)
        assert all(constants & set(factors) for factors in products)

    @pytest.mark.parametrize("op", [op for op in ELEMENTWISE if "seed" not in op.options], ids=name_of)
    def test_moves_16_bytes_at_once(self, op):
        """Whatever the number of elements: where a block of them is whole, and what a launcher allocates. Not what
        draws or has one element a thread, which takes its time for that.
        """
        launch = launches_of_op(op, torch.float32)[0]
        if launch.block == 32 * _launch.WARPS:
            pytest.skip("a thread has one element")
        ptx = launch.compiled_for(90).asm["ptx"]
        reads = len(op.tensors) + (not op.is_scalar)  # and the gradient's elements
        assert len(re.findall(r"ld\.global\S*\.v4", ptx)) == reads
        assert len(re.findall(r"st\.global\S*\.v4", ptx)) == every(op).bit_count()

    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize("op", ELEMENTWISE, ids=name_of)
    def test_one_kernel_for_any_number_of_elements_and_any_place_in_memory(self, op, dtype):
        """A kernel of its own for some of them might add up in another order."""
        keys = {launch.key for launch in launches_of_op(op, dtype)}
        for size in (1,), (16, 16), (2, 1000):
            assert {launch.key for launch in launches_of_op(op, dtype, size)} == keys
        unaligned = [torch.cat([t[:1, 0], t.flatten()])[1:].view(t.shape) for t in problem(op, dtype)]
        assert all(t.data_ptr() % 16 for t in unaligned)
        calls = raw_calls(op, unaligned, op.grid[0], maker())
        calls = [(n, a, k if n == op.name else {**k, "needs": every(op)}) for n, a, k in calls]
        assert {launch.key for launch in launches_of(calls)} <= keys

    def test_launch_has_the_blocks_that_are_compiled_here(self):
        assert [_launch.block_size(torch.empty(0, dtype=dtype)) for dtype in DTYPES] == [256, 512, 512, 512]


# ---- values ---------------------------------------------------------------------------------------------------------


def error(x, truth, share=1.0):
    """The largest error among the best `share` of the elements, relative to max(1, |truth|); infinite where only one of
    the two is NaN or infinite.
    """
    limit = truth.to(x.dtype).double()
    x = x.double()
    same = (x == limit) | x.isnan() & limit.isnan()
    errors = torch.where(same, 0, (x - truth).abs() / truth.abs().clamp(min=1))
    errors = torch.where(errors.isnan(), torch.inf, errors).flatten()
    return errors.kthvalue(math.ceil(share * errors.numel())).values.item() if errors.numel() else 0.0


def triton_call(name, arguments, keywords):
    with fastprob.backend("triton"):
        return as_tuple(getattr(torch.ops.fastprob, name).default(*arguments, **keywords))


def raw_results(op, tensors, options, make, grad=None):
    """(name, result, reference of the same dtype, reference in float64) for each output of the torch operators.

    Not for the empty ones in the indices' places: `test_needs`.
    """
    for name, arguments, keywords in raw_calls(op, tensors, options, make, grad):
        if name != op.name:
            keywords = {**keywords, "needs": every(op)}
        reference = op.raw[name]
        truth = as_tuple(reference(*cast(arguments, torch.float64), **keywords))
        results = triton_call(name, arguments, keywords), as_tuple(reference(*arguments, **keywords)), truth
        for i, outputs in enumerate(zip(*results, strict=True)):
            if outputs[0].is_floating_point():
                yield f"{name}[{i}]", *outputs


def check_budget(op, tensors, options, make, epsilon, factors=((1.0, 2),), grad=None):
    """Errors against float64 at most so many times the reference's own and epsilon, for shares of the elements; dtypes
    and layouts as promised.
    """
    for name, x, same, truth in raw_results(op, tensors, options, make, grad):
        assert x.shape == same.shape and x.dtype == tensors[0].dtype and x.is_contiguous(), name
        for share, factor in factors:
            budget = factor * error(same, truth, share) + epsilon
            worst = error(x, truth, share)
            assert worst <= budget, f"{name} {options} {tuple(tensors[0].shape)}, {share}: {worst} > {budget}"


def by_element(op):
    """The sets of options whose results are elements', in which nothing hides; all if there are none."""
    return [options for options in op.grid if not is_scalar(op, options)] or op.grid


each_op = pytest.mark.parametrize("op", SERVED, ids=name_of)
each_elementwise = pytest.mark.parametrize("op", ELEMENTWISE, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy in the interpreter, at logarithms of 0
class TestValues:
    __test__ = INTERPRETING
    device = "cpu"

    @pytest.fixture(autouse=True)
    def poisoned_memory(self):
        """torch.empty is filled with NaN, so that an element that no kernel writes shows."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.fixture(autouse=True)
    def patched_once(self, monkeypatch):
        """The interpreter lays its functions over triton.language anew for every function that a kernel calls, which
        takes half of its time; a launch has done so already. Not for Triton's own, which see other modules.
        """
        if INTERPRETING:
            function = triton.runtime.interpreter.InterpretedFunction
            patching = function.__call__

            def call(self, *args, **kwargs):
                own = self.fn.__module__.startswith("fastprob.")
                return self.rewrite()(*args, **kwargs) if own else patching(self, *args, **kwargs)

            monkeypatch.setattr(function, "__call__", call)

    @pytest.fixture(autouse=True)
    def no_single_elements(self, monkeypatch):
        """Programs do not get smaller where an element takes its time."""
        if INTERPRETING:
            size = _launch.block_size
            monkeypatch.setattr(_launch, "block_size", lambda tensor, single=False: 2048 if single else size(tensor))

    @pytest.fixture
    def make(self):
        generator = torch.Generator().manual_seed(0)

        def make(*shape, low=-2.0, high=2.0, extreme=None):
            values = torch.rand(shape, generator=generator, dtype=torch.float64)
            return (low + (high - low) * values).to(self.device)

        return make

    @pytest.fixture
    def few_programs(self, monkeypatch):
        """The interpreter takes some 10 ms for a program of any size."""
        if INTERPRETING:
            monkeypatch.setattr(_launch, "block_size", lambda *_: 8192)

    @each_dtype
    @each_op
    def test_samples(self, op, dtype, make):
        for tensors, options in op.samples(make):
            if op.elementwise and tensors[0].numel() > 2000:
                tensors = [t[:10] for t in tensors]  # three programs, the last in part; each takes some 10 ms
            factor = 4 if op.name in SUMS_THAT_CANCEL else 2
            check_budget(op, cast(tensors, dtype), options, make, EPSILON[dtype], ((1.0, factor),))

    @each_dtype
    @each_elementwise
    def test_extreme_parameters(self, op, dtype, make, few_programs):
        """Log-uniform over the ranges that the operator names, as far as the dtype holds them.

        Where large terms cancel (224 from 99,000) a rounding decides: twelve times the reference's error for those few.
        """
        n, limits = 20000, torch.finfo(dtype)

        def extremes(*shape, low=-2.0, high=2.0, extreme=None):
            if not extreme:
                return make(*shape, low=low, high=high).to(dtype)
            first, last = (math.log10(end) for end in extreme)
            return (10 ** make(*shape, low=first, high=last)).clamp(limits.smallest_normal, limits.max).to(dtype)

        epsilon = 1e-10 if dtype == torch.float64 else EPSILON[dtype]  # there the truth is as ill-conditioned
        for options in by_element(op):
            tensors, scalar = op.inputs(extremes, 4, n // 4), is_scalar(op, options)
            grad = torch.full((), n / 2 if scalar else 1, dtype=dtype, device=self.device)
            check_budget(op, tensors, options, make, epsilon, ((0.999, 2), (1.0, 12)), grad)

    def test_powers(self, make, few_programs):
        """u^b as exact for a large exponent as for a small one: u = |mu| and b have no rounding error to hide in; and
        where its factors' product is out of range.
        """
        op, one = OPS["ggd_nll"], torch.ones(2000, device=self.device)
        beta = make(2000, low=16, high=160).round().float() / 16  # so few bits that b e is exact unfused too
        options = {"eps": 0.0, "clamp_min": 0.0, "clamp_max": 1e38, "reduction": "none"}
        exact = make(2000, low=0.01, high=1000).float(), one, beta, 0 * one
        mu, inv_alpha = torch.tensor([[1e30, 1e30], [-1e-30, 1e-30], [1e-42, 1e-20], [3e38, 2e20], [0, 1]]).T
        beyond = [t.to(self.device) for t in (mu, inv_alpha, torch.full_like(mu, 0.01), 0 * mu)]
        for tensors in exact, beyond:
            check_budget(op, tensors, options, make, EPSILON[torch.float32], grad=torch.ones_like(tensors[0]))

    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=name_of)
    @each_elementwise
    def test_special_values(self, op, dtype, make, few_programs):
        """Ties, zeros, infinities, subnormals and NaN in any place: what the reference gives."""
        numbers = torch.tensor([0.0, -0.0, 1e-40, 0.5, -3.0, 1e30, torch.inf, -torch.inf, torch.nan], dtype=dtype)
        rows = torch.cartesian_prod(*[torch.arange(len(numbers))] * min(len(op.tensors), 4))
        if len(op.tensors) > 4:  # every combination of each half, with another of the other half
            rows = torch.cat([rows, rows.roll(len(rows) // 3, 0).flip(1)], 1)[:, : len(op.tensors)]
        tensors = [numbers[column].to(self.device)[None] for column in rows.T]
        # In float32 one over a subnormal is infinite, and one over two of them is so on the way.
        subnormal = sum((t.abs() == numbers[2]).int() for t in tensors) * (dtype == torch.float32)
        for options in by_element(op):
            grad = torch.full((), len(rows) if is_scalar(op, options) else 1, dtype=dtype, device=self.device)
            for name, x, same, truth in raw_results(op, tensors, options, make, grad):
                close = torch.isclose(x, same, rtol=1e-5, atol=1e-6, equal_nan=True)
                close |= torch.isclose(x, truth.to(dtype), rtol=1e-5, atol=1e-6, equal_nan=True)
                if x.dim():
                    close |= (subnormal > 1) | (subnormal > 0) & same.isinf() | same.isnan() & ~truth.isnan()
                wrong = (~close).flatten().nonzero()[:5, 0].tolist()
                assert not wrong, f"{name} {options}: " + "; ".join(
                    f"{[t[0, k % len(rows)].item() for t in tensors]} -> {x.flatten()[k]}, not {same.flatten()[k]}"
                    for k in wrong
                )

    @each_op
    def test_needs(self, op, make):
        """Each gradient alone has the bits that it has among all; the others are empty."""
        tensors, options = next(s for s in op.samples(make) if s[0][0].shape == (3, 5))
        for name, arguments, keywords in list(raw_calls(op, tensors, options, make))[1:]:
            complete = triton_call(name, arguments, {**keywords, "needs": every(op)})[-len(tensors) :]
            for needs in (0, *[1 << i for i in range(len(tensors)) if every(op) >> i & 1]):
                gradients = triton_call(name, arguments, {**keywords, "needs": needs})[-len(tensors) :]
                for i, (x, expected) in enumerate(zip(gradients, complete, strict=True)):
                    assert torch.equal(x, expected) if needs >> i & 1 else x.shape == (0,)

    @each_elementwise
    def test_strided_inputs(self, op, make):
        options = by_element(op)[0]
        tensors = [t.T if i % 2 else t.T[:, :1].expand(5, 7) for i, t in enumerate(op.inputs(make, 7, 5))]
        check_budget(op, tensors, options, make, EPSILON[torch.float64])
        if not is_scalar(op, options):
            check_budget(op, tensors, options, make, EPSILON[torch.float64], grad=make(5, 1, low=0.5))

    @pytest.mark.parametrize("label", (-1, 2**40))
    def test_a_label_out_of_range_is_nan(self, label, make):
        x, prototypes = make(4, 5), make(3, 5)
        labels = torch.tensor([2, label, 0, 2], device=self.device)
        with fastprob.backend("triton"):
            function = torch.ops.fastprob._prototype_dispersion_value_and_grad.default
            value, grad_x, grad_prototypes, _ = function(x, prototypes, labels, needs=3)
        assert value.isnan() and grad_x[1].isnan().all()
        assert not grad_x[[0, 2, 3]].isnan().any() and not grad_prototypes.isnan().any()

    @pytest.mark.parametrize("rows", (2, 6))
    def test_mc_dropout_in_blocks_of_passes(self, rows, make, monkeypatch):
        """One pass at a time or two, the last one alone, whose masks begin within a group and need a program more; an
        infinite number and a NaN; other products are others.
        """
        monkeypatch.setattr("fastprob.kernels.mc_dropout.ROWS", rows)
        monkeypatch.setattr("fastprob.kernels.mc_dropout.BLOCK", 8)
        op, values = OPS["mc_dropout"], []
        tensors = cast(op.inputs(make, 3, 7, 5, 4), torch.float32)
        tensors[0][1, 2], tensors[0][2, 0] = torch.inf, torch.nan
        for products in ("float32", "bfloat16"):
            options = {"passes": 3, "p": 0.4, "seed": 3, "products": products}
            check_budget(op, tensors, options, make, EPSILON[getattr(torch, products)])
            values.append(triton_call(op.name, tensors, {**op.options, **options})[1])
        assert not torch.isclose(*values, rtol=1e-5, equal_nan=True).all()

    def test_mc_dropout_writes_its_masks_alone(self):
        """Groups of four that begin before the first element and end behind the last one."""
        from fastprob.kernels.mc_dropout import _draw

        for first in range(5):
            out = torch.zeros(32, dtype=torch.bool, device=self.device)
            _draw[(1,)](out[8:17], first, 0, 7, 9, 4, num_warps=1)
            assert out.nonzero()[:, 0].tolist() == list(range(8, 17))

    def test_total_of_many_partials(self, make):
        """More than the second stage takes at a time, and no multiple of it; NaN stays."""
        for n in (1, _launch.PARTIALS, 2 * _launch.PARTIALS + 77):
            partials = make(n, low=0)
            total = _launch.total(partials, partials, 3)
            torch.testing.assert_close(total, partials.sum() / 3, rtol=1e-13, atol=0)
            partials[n // 2] = torch.nan
            assert _launch.total(partials, partials, 3).isnan()

    @each_dtype
    def test_scale(self, dtype, make):
        """Tensors of any sizes by a scalar, in place; 1 leaves every bit alone, NaN does not."""
        with fastprob.backend("triton"):
            for factor in (0.5, 1.0, -3.0, torch.nan):
                grads = [make(*shape).to(dtype) for shape in ((), (0,), (1, 1), (65, 129), (3,))]
                wanted = [(g.double() * factor).to(dtype) for g in grads]
                torch.ops.fastprob._scale_.default(grads, torch.tensor(factor, dtype=dtype, device=self.device))
                for x, want in zip(grads, wanted, strict=True):
                    rounding = EPSILON[dtype] if factor == -3.0 else 0
                    torch.testing.assert_close(x, want, rtol=rounding, atol=0, equal_nan=True)
            for nothing in [], [make(0).to(dtype), make(0, 4).to(dtype)]:
                torch.ops.fastprob._scale_.default(nothing, torch.full((), 0.5, dtype=dtype, device=self.device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestValuesOnGpu(TestValues):
    __test__ = not INTERPRETING
    device = "cuda"
