"""The Triton kernels without a GPU: compiled ahead of time for the architectures, and run by Triton's interpreter.

The interpreter is chosen before Triton is imported, so this file runs itself a second time under TRITON_INTERPRET=1
(`test_interpreted`); there, and on a GPU where there is one, its class `TestValues` is what runs.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import cast

triton = pytest.importorskip("triton")

import fastprob  # noqa: E402
from fastprob import _op  # noqa: E402
from fastprob.kernels import (  # noqa: E402
    _launch,
    gaussian_potential,
    ggd_nll,
    ggd_variance,
    probvlm_loss,
    prototype_dispersion,
    scale,
)

INTERPRETING = triton.knobs.runtime.interpret
EPSILON = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.skipif(INTERPRETING, reason="is the second run itself")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "TestValues"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


# ---- ahead-of-time compilation --------------------------------------------------------------------------------------

ARCHITECTURES = (80, 90, 100)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def kernel_variants(ty):
    """(name, kernel, its arguments' types or constants' values); of each kernel the one that holds most comes first."""
    p, block = f"*{ty}", _launch.block_size(torch.empty(0, dtype=TYPES[ty]))
    weights = dict.fromkeys(("own_nll", "cross_nll", "own_l1", "cross_l1"), "fp64")
    bounds = dict.fromkeys(("eps", "clamp_min", "clamp_max"), "fp64")
    for paper, l1, (grad, partials, needs), n in itertools.product(
        (True, False),
        (True, False),
        ((p, "*fp64", 255), (None, "*fp64", 63), (None, "*fp64", 0), (p, None, 63)),
        ("i64", "i32", 1),
    ):
        arguments = {"inputs": (p,) * 8, "grad": grad, "partials": partials, "grads": (p,) * 8, "n": n}
        flags = {"PAPER": paper, "L1": l1, "NEEDS": needs, "BLOCK": block}
        yield "probvlm_loss", probvlm_loss._kernel, {**arguments, **weights, **bounds, **flags}
    for paper, (grad, out, has_sum, per_element, needs) in itertools.product(
        (True, False),
        (
            (None, "*fp64", True, False, 15),
            (p, None, False, True, 7),
            (p, None, False, False, 4),
            (None, p, False, False, 0),
        ),
    ):
        arguments = {"inputs": (p,) * 4, "grad": grad, "out": out, "grads": (p,) * 4, "n": "i64", "count": "i64"}
        flags = {"PAPER": paper, "SUM": has_sum, "PER_ELEMENT": per_element, "NEEDS": needs, "BLOCK": block}
        yield "ggd_nll", ggd_nll._kernel, {**arguments, **bounds, **flags}
    for grad, needs in ((p, 3), (None, 0)):
        arguments = {"inputs": (p, p), "grad": grad, "outs": (p, p), "n": "i64", "NEEDS": needs, "BLOCK": block}
        yield "ggd_variance", ggd_variance._kernel, arguments
    if ty in ("fp32", "fp64"):  # it computes in these
        arguments = {"gram": p, "squares": p, "partials": p, "width": p, "nearest": p, "first_row": "i32"}
        arguments |= {"first_column": "i32", "count": "i64", "stride": "i32", "rounding": "fp64"}
        for partials in (p, None):
            flags = {"partials": partials, "ROWS": gaussian_potential.ROWS, "BLOCK": gaussian_potential.BLOCK}
            yield "gaussian_potential", gaussian_potential._tile, {**arguments, **flags}
    inputs = {"x": p, "prototypes": p, "labels": "*i64"}
    for grad, partials, needed in ((p, None, 1), (None, "*fp64", 1), (None, "*fp64", 0)):
        arguments = {**inputs, "grad": grad, "partials": partials, "out": p, "n": "i64", "dim": "i32", "classes": "i64"}
        yield "points", prototype_dispersion._points, {**arguments, "NEEDED": needed, "BLOCK": block}
    for grad in (p, None):
        arguments = {"x": p, "prototypes": p, "points": "*i64", "bounds": "*i64", "grad": grad, "out": p, "n": "i64"}
        yield "classes", prototype_dispersion._classes, {**arguments, "dim": "i32", "BLOCK": block}
    sizes = ("i64", "i32", 1, *["i64"] * 5)
    arguments = {"grads": (p,) * 8, "sizes": sizes, "scale": p, "COUNT": 8, "BLOCK": 4 * block}
    yield "scale", scale._kernel, arguments
    arguments = {"partials": "*fp64", "out": p, "n": "i32", "count": "i64", "BLOCK": _launch.PARTIALS}
    yield "total", _launch._total, arguments


def variants_to_compile():
    variants = []
    for ty in TYPES:
        seen = set()
        for name, kernel, arguments in kernel_variants(ty):
            thorough = ty == "fp32" and arguments.get("L1", True) and arguments.get("n") != "i32"
            first = name not in seen
            for architecture in ARCHITECTURES if first and ty in ("fp32", "bf16") else (90,):
                if first or thorough:
                    case = f"{name}-{len(seen)}-{ty}-sm_{architecture}"
                    variants.append(pytest.param(name, kernel, arguments, architecture, id=case))
            seen.add(name)
    return variants


def compile_for(kernel, arguments, architecture, warps):
    """The kernel compiled from its arguments' types, all pointers and sizes multiples of 16."""
    constants, attributes = {}, {}

    def signature_of(value, path):
        if isinstance(value, tuple):
            return tuple(signature_of(v, (*path, i)) for i, v in enumerate(value))
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if value[0] in "*i":
            attributes[path] = [["tt.divisibility", 16]]
        return value

    signature = {name: signature_of(value, (i,)) for i, (name, value) in enumerate(arguments.items())}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


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
    @pytest.mark.parametrize("name, kernel, arguments, architecture", variants_to_compile())
    def test_fits_registers_and_shared_memory(self, name, kernel, arguments, architecture):
        warps = _launch.TOTAL_WARPS if name == "total" else _launch.WARPS
        compiled = compile_for(kernel, arguments, architecture, warps)
        used = resources(compiled)
        print(used)
        assert used["STACK"] == used["LOCAL"] == 0
        assert 0 < used["REG"] <= 255
        assert compiled.metadata.shared <= 48 * 1024
        if name != "total":  # its offsets count programs, not elements
            self.check_offsets(compiled.asm["ttir"])
        assert not re.search(r"\b(min|max)\.f(32|64)", compiled.asm["ptx"]), "drops NaN, which the interpreter's do not"

    def check_offsets(self, ttir):
        """Offsets into tensors are 64-bit, and so is the multiplication that makes them."""
        offsets = re.findall(r"tt\.addptr .*, tensor<(\w+)>", ttir)
        assert offsets and all(type_.endswith("xi64") for type_ in offsets)
        assert not re.search(r"arith\.muli .* : (tensor<\d+x)?i32", ttir)

    def test_moves_16_bytes_at_once(self):
        _, kernel, arguments = next(kernel_variants("fp32"))
        ptx = compile_for(kernel, arguments, 90, _launch.WARPS).asm["ptx"]
        assert len(re.findall(r"ld\.global\S*\.v4", ptx)) == len(re.findall(r"st\.global\S*\.v4", ptx)) == 8

    def test_launch_has_the_blocks_that_are_compiled_here(self):
        assert {ty: _launch.block_size(torch.empty(0, dtype=dtype)) for ty, dtype in TYPES.items()} == {
            "fp32": 512, "bf16": 512, "fp16": 512, "fp64": 256
        }  # fmt: skip


# ---- values ---------------------------------------------------------------------------------------------------------


def error(x, truth):
    """The largest error relative to max(1, |truth|); infinite where only one of the two is NaN or infinite."""
    limit = truth.to(x.dtype).double()
    x = x.double()
    same = (x == limit) | x.isnan() & limit.isnan()
    errors = torch.where(same, 0, (x - truth).abs() / truth.abs().clamp(min=1))
    return torch.where(errors.isnan(), torch.inf, errors).amax().item() if errors.numel() else 0.0


def raw_results(op, tensors, options, grad):
    """(name, result, reference of the same dtype, reference in float64) for each output of the torch operators.

    Not for the empty ones in the indices' places: `test_needs`.
    """
    options, every = {**op.options, **options}, (1 << len(op.differentiable)) - 1
    for name, reference in op.raw.items():
        arguments, keywords = tensors, dict(options)
        if name != op.name:
            keywords["needs"] = every
        if name.endswith("_backward"):
            arguments = (grad, *tensors)
        if name.endswith("_value_and_grad") and not op.is_scalar(**options):
            continue
        with fastprob.backend("triton"):
            result = getattr(torch.ops.fastprob, name).default(*arguments, **keywords)
        same, truth = reference(*arguments, **keywords), reference(*cast(arguments, torch.float64), **keywords)
        results = (result, same, truth) if isinstance(result, tuple) else ((result,), (same,), (truth,))
        for i, outputs in enumerate(zip(*results, strict=True)):
            if outputs[0].is_floating_point():
                yield f"{name}[{i}]", *outputs


def grad_for(op, tensors, options, make):
    scalar = op.is_scalar is not None and op.is_scalar(**{**op.options, **options})
    return make(*(() if scalar else tensors[0].shape), low=0.5, high=2).to(tensors[0].dtype)


def check_budget(op, tensors, options, grad, epsilon, factor=2):
    """Errors against float64 at most `factor` times the reference's own and epsilon; dtypes and layouts as promised."""
    for name, x, same, truth in raw_results(op, tensors, options, grad):
        assert x.shape == same.shape and x.dtype == tensors[0].dtype and x.is_contiguous(), name
        budget = factor * error(same, truth) + epsilon
        assert error(x, truth) <= budget, f"{name} {options} {tuple(tensors[0].shape)}: {error(x, truth)} > {budget}"


OPS = sorted(_op.OPS)
ELEMENTWISE = [name for name in OPS if _op.OPS[name].elementwise]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy in the interpreter, at logarithms of 0
class TestValues:
    __test__ = INTERPRETING
    device = "cpu"

    @pytest.fixture(autouse=True)
    def poisoned_memory(self):
        """torch.empty is filled with NaN, so that an element that no kernel writes shows."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

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
            monkeypatch.setattr(_launch, "block_size", lambda tensor: 8192)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("op", OPS)
    def test_samples(self, op, dtype, make):
        op = _op.OPS[op]
        for tensors, options in op.samples(make):
            if op.elementwise and tensors[0].numel() > 2000:
                tensors = [t[:10] for t in tensors]  # three programs, the last in part; each takes some 10 ms
            tensors = cast(tensors, dtype)
            check_budget(op, tensors, options, grad_for(op, tensors, options, make), EPSILON[dtype])

    @pytest.mark.parametrize("form", ("paper", "released"))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_extreme_parameters(self, dtype, form, make, few_programs):
        """inv_alpha 1e-6 to 1e6, beta 1e-4 to 1e4, as far as the dtype holds them.

        Three times the reference's error where one element decides whose large terms cancel (-321 from 74,000).
        """
        n = 20000

        def distribution():
            return make(n), 10 ** make(n, low=-6, high=6), 10 ** make(n, low=-4, high=4)

        first, second, targets = distribution(), distribution(), (make(n), make(n))
        small = torch.finfo(dtype).smallest_normal
        tensors = [t.to(dtype).clamp(max=torch.finfo(dtype).max) for t in (*first, *second, *targets)]
        for i in (1, 2, 4, 5):
            tensors[i] = tensors[i].clamp(min=small)
        epsilon = 1e-10 if dtype == torch.float64 else EPSILON[dtype]  # there the truth is as ill-conditioned
        grad = torch.ones((), dtype=dtype, device=self.device)
        nll = (*tensors[:3], tensors[6])
        check_budget(_op.OPS["ggd_nll"], nll, {"form": form, "reduction": "none"}, grad.expand(n), epsilon, 3)
        check_budget(_op.OPS["probvlm_loss"], tensors, {"form": form}, grad * n / 2, epsilon)
        check_budget(_op.OPS["ggd_variance"], tensors[1:3], {}, grad.expand(n), epsilon, 3)

    def test_power_of_exact_arguments(self, make, few_programs):
        """u^b is as exact for a large exponent as for a small one: u = |mu| and b have no rounding error to hide in."""
        mu, one = make(2000, low=0.01, high=1000).float(), torch.ones(2000, device=self.device)
        beta = make(2000, low=16, high=160).round().float() / 16  # so few bits that b e is exact unfused too
        options = {"eps": 0.0, "clamp_min": 0.0, "clamp_max": 1e38, "reduction": "none"}
        check_budget(_op.OPS["ggd_nll"], (mu, one, beta, 0 * one), options, one, EPSILON[torch.float32])

    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
    @pytest.mark.parametrize("op", ELEMENTWISE)
    def test_special_values(self, op, dtype, few_programs):
        """Ties, zeros, infinities, subnormals and NaN in any place: what the reference gives."""
        op = _op.OPS[op]
        numbers = torch.tensor([0.0, -0.0, 1e-40, 0.5, -3.0, 1e30, torch.inf, -torch.inf, torch.nan], dtype=dtype)
        rows = torch.cartesian_prod(*[torch.arange(len(numbers))] * min(len(op.tensors), 4))
        if len(op.tensors) > 4:  # every combination of each half, with another of the other half
            rows = torch.cat([rows, rows.roll(len(rows) // 3, 0).flip(1)], 1)
        tensors = [numbers[column].to(self.device) for column in rows.T]
        subnormal = sum((t.abs() == numbers[2]).int() for t in tensors)  # one over two of them overflows on the way
        every = [{"eps": 0.0}, {"form": "released"}] if op.options else []
        for options in ({}, *every):
            if op.name == "ggd_nll":
                options = {**options, "reduction": "none"}
            elif op.name == "probvlm_loss":
                options = {**options, "l1_weight": 0.5}
            n = 1 if op.name != "probvlm_loss" else len(rows)
            grad = torch.full_like(tensors[0] if n == 1 else tensors[0][0], n)
            for name, x, same, truth in raw_results(op, tensors, options, grad):
                close = torch.isclose(x, same, rtol=1e-5, atol=1e-6, equal_nan=True)
                close |= torch.isclose(x, truth.to(dtype), rtol=1e-5, atol=1e-6, equal_nan=True)
                if x.dim():
                    close |= (subnormal > 1) & (dtype == torch.float32) | same.isnan() & ~truth.isnan()
                wrong = (~close).flatten().nonzero()[:5, 0].tolist()
                assert not wrong, f"{name} {options}: " + "; ".join(
                    f"{[t[k].item() for t in tensors]} -> {x[k].item()}, reference {same[k].item()}" for k in wrong
                )

    @pytest.mark.parametrize("op", OPS)
    def test_needs(self, op, make):
        """Each gradient alone has the bits that it has among all; the others are empty."""
        op = _op.OPS[op]
        tensors, options = next(s for s in op.samples(make) if s[0][0].shape == (3, 5))
        grad = grad_for(op, tensors, options, make)
        for name in list(op.raw)[1:]:
            arguments = (grad, *tensors) if name.endswith("_backward") else tensors
            results = {}
            for needs in ((1 << len(op.differentiable)) - 1, 0, *[1 << i for i in range(len(op.differentiable))]):
                with fastprob.backend("triton"):
                    function = getattr(torch.ops.fastprob, name).default
                    outputs = function(*arguments, **{**op.options, **options}, needs=needs)
                results[needs] = outputs[-len(tensors) :] if isinstance(outputs, tuple) else (outputs,)
            complete = next(iter(results.values()))
            for needs, gradients in results.items():
                for i, (x, expected) in enumerate(zip(gradients, complete, strict=True)):
                    assert torch.equal(x, expected) if needs >> i & 1 else x.shape == (0,)

    @pytest.mark.parametrize("op", ELEMENTWISE)
    def test_strided_inputs(self, op, make):
        op = _op.OPS[op]
        options = {"reduction": "none"} if op.name == "ggd_nll" else {}
        bounds = [{"low": 0.5} if name.endswith(("inv_alpha", "beta")) else {} for name in op.tensors]
        tensors = [make(7, 5, **b).T if i % 2 else make(5, 1, **b).expand(5, 7) for i, b in enumerate(bounds)]
        grad = grad_for(op, tensors, options, make)
        grad = grad[:, :1].expand(5, 7) if grad.dim() else grad
        check_budget(op, tensors, options, grad, EPSILON[torch.float64])

    @pytest.mark.parametrize("label", (-1, 2**40))
    def test_a_label_out_of_range_is_nan(self, label, make):
        x, prototypes = make(4, 5), make(3, 5)
        labels = torch.tensor([2, label, 0, 2], device=self.device)
        with fastprob.backend("triton"):
            function = torch.ops.fastprob._prototype_dispersion_value_and_grad.default
            value, grad_x, grad_prototypes, _ = function(x, prototypes, labels, needs=3)
        assert value.isnan() and grad_x[1].isnan().all()
        assert not grad_x[[0, 2, 3]].isnan().any() and not grad_prototypes.isnan().any()

    def test_total_of_many_partials(self, make):
        """More than the second stage takes at a time, and no multiple of it; NaN stays."""
        for n in (1, _launch.PARTIALS, 2 * _launch.PARTIALS + 77):
            partials = make(n, low=0)
            total = _launch.total(partials, partials, 3)
            torch.testing.assert_close(total, partials.sum() / 3, rtol=1e-13, atol=0)
            partials[n // 2] = torch.nan
            assert _launch.total(partials, partials, 3).isnan()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
            torch.ops.fastprob._scale_.default([], torch.ones((), dtype=dtype, device=self.device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestValuesOnGpu(TestValues):
    __test__ = not INTERPRETING
    device = "cuda"
