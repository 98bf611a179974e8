"""Which kernels serve what: the choice by what is built and installed, and the package with nothing built at all."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import fastprob
from fastprob import _backends

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    ("native", "triton", "choice", "chosen"),
    [
        (True, True, None, "cuda"),
        (True, False, None, "cuda"),
        (False, True, None, "triton"),
        (False, False, None, "reference"),
        (True, True, "triton", "triton"),
        (True, False, "triton", "cuda"),
        (False, True, "cuda", "reference"),
        (True, True, "cpu", "cuda"),
        (True, True, "reference", "reference"),
    ],
)
def test_a_gpu_takes_the_native_kernel_then_triton(monkeypatch, native, triton, choice, chosen):
    monkeypatch.setattr(_backends, "_native", {("ggd_nll", "CUDA")} if native else set())
    monkeypatch.setattr(_backends, "_triton_kernel", lambda name: print if triton else None)
    assert _backends._chosen("ggd_nll", "CUDA", choice) == chosen


@pytest.mark.parametrize(
    ("capability", "built", "loaded"),
    [
        ("AVX512", ("portable", "avx2", "avx512"), "avx512"),
        ("AVX512", ("portable", "avx2"), "avx2"),
        ("AVX2", ("portable", "avx2", "avx512"), "avx2"),
        ("DEFAULT", ("portable", "avx2", "avx512"), "portable"),
        ("NO AVX", ("portable", "avx2", "avx512"), "portable"),
    ],
)
def test_the_best_build_that_the_processor_runs_is_loaded(monkeypatch, tmp_path, capability, built, loaded):
    libraries = []
    for variant in built:
        (tmp_path / f"_cpu_{variant}.abi3.so").touch()
    monkeypatch.setattr(_backends, "__file__", str(tmp_path / "_backends.py"))
    monkeypatch.setattr(_backends, "_reasons", {})
    monkeypatch.setattr(torch.ops, "load_library", lambda path: libraries.append(path.name))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    _backends.load()
    assert libraries == [f"_cpu_{loaded}.abi3.so"]
    assert _backends._reasons["cpu"] == libraries[0] and f"C++ for the CPU: {libraries[0]}" in fastprob.info()


@pytest.mark.parametrize(("interpreting", "chosen"), [(False, "cpu"), (True, "triton")])
def test_a_cpu_takes_triton_kernels_in_the_interpreter_alone(monkeypatch, interpreting, chosen):
    monkeypatch.setattr(_backends, "_native", {("ggd_nll", "CPU")})
    monkeypatch.setattr(_backends, "_triton_kernel", lambda name: print)
    monkeypatch.setattr(_backends, "_interpreting", lambda: interpreting)
    assert _backends._chosen("ggd_nll", "CPU", "triton") == chosen
    assert _backends._chosen("ggd_nll", "CPU", None) == "cpu"


def test_only_derivatives_may_be_missing_from_a_triton_module(monkeypatch):
    monkeypatch.setattr(_backends, "_found", lambda module: True)
    monkeypatch.setattr(_backends.importlib, "import_module", lambda module: object())
    with pytest.raises(AttributeError, match="ggd_nll"):
        _backends._triton_kernel("ggd_nll")()
    x = torch.ones(3)
    grads = _backends._triton_kernel("_ggd_nll_backward")(torch.ones(()), x, x, x, 0 * x, needs=1)
    assert [g.shape for g in grads] == [(3,), (0,), (0,), (0,)]


def test_backend_chooses_and_restores():
    with pytest.raises(ValueError, match=r"name must be one of .* got 'gpu'"), fastprob.backend("gpu"):
        pass
    before = fastprob.info()
    with fastprob.backend("reference"):
        assert re.search("ggd_nll +reference", fastprob.info())
        with fastprob.backend("cpu") if "cpu " in before else fastprob.backend("reference"):
            assert fastprob.info() == before
        assert re.search("ggd_nll +reference", fastprob.info())
    assert fastprob.info() == before


# An installation of Python files alone, without the folder of Triton kernels.
BARE = """
import sys
sys.path[:0] = [{package!r}, {tests!r}]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import fastprob
assert fastprob.__file__.startswith({package!r})
print(fastprob.info())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs Python code where nothing is built."""
    package = tmp_path_factory.mktemp("bare")
    source = pathlib.Path(fastprob.__file__).parent
    shutil.copytree(source, package / "fastprob", ignore=shutil.ignore_patterns("*.so", "__pycache__", "kernels"))
    head = BARE.format(package=str(package), tests=str(TESTS))

    def run(code=""):
        return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, cwd=package)

    return run


def test_imports_with_nothing_built(bare):
    run = bare("fastprob.backend('cpu').__enter__()")
    assert "C++ for the CPU: not built" in run.stdout
    assert re.search("ggd_nll +reference +reference", run.stdout)
    assert "ValueError: backend: 'cpu' must be available, got: not built" in run.stderr


def test_the_reference_keeps_the_promises(bare):
    slice_ = "error_budget and float32 and not own or layout and transposed or empty or optional or autocast"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", str(TESTS / "test_ops.py"), "-k", slice_]
    run = bare(f"import pytest; sys.exit(pytest.main({arguments!r}))")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert re.search(r"\d{3} passed", run.stdout)
