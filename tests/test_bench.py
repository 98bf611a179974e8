"""The benches: what they time has passed their check, and what they find is kept as it comes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

BENCH = pathlib.Path(__file__).parent.parent / "bench"


@pytest.fixture
def verify(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import verify

    return verify


@pytest.mark.parametrize("name", ["ggd_nll", "probvlm_loss"])
def test_baselines_pass_where_mu_meets_a_target(verify, monkeypatch, name):
    """There the gradients of plain autograd are NaN: the reference's as the baselines'."""

    def coarse(dtype=torch.float64, device="cpu"):
        return lambda *shape, low=-2.0, high=2.0, extreme=None: (
            torch.empty(shape, dtype=dtype, device=device).uniform_(low, high).mul(4).ceil().div(4)
        )

    monkeypatch.setattr(verify.tests_conftest, "maker", coarse)
    assert verify.check_samples.__wrapped__(name, torch.float64, "cpu") is None


def test_a_baseline_that_differs_is_named(verify, monkeypatch):
    monkeypatch.setitem(verify.BASELINES, "ggd_variance", {"eager best": lambda inv_alpha, beta: inv_alpha + beta})
    assert "eager best is not the reference" in verify.check_samples.__wrapped__("ggd_variance", torch.float64, "cpu")


TOY = """
import pytest
from measure import Case, Result

@pytest.mark.parametrize("name", ["fastprob cpu", "eager best", "broken"])
@pytest.mark.parametrize("case", [Case("toy", (n,), "float32", "forward", "cpu") for n in (1, 2)])
def test_toy(case, name, report):
    if name == "broken":
        import os
        os._exit(3)
    report(case, name, Result([1.0, 2.0, 3.0] if name == "eager best" else [1.0, 1.0, 1.0]), 10**9)
"""


def bench(tmp_path, *arguments):
    (tmp_path / "conftest.py").write_text((BENCH / "conftest.py").read_text())
    (tmp_path / "test_toy.py").write_text(TOY)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", *arguments, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_results_are_written_as_they_come(tmp_path):
    assert bench(tmp_path, "--out", "out/toy.json").returncode == 3
    written = json.loads((tmp_path / "out/toy.json").read_text())
    (case,) = written["benchmarks"]
    assert (case["op"], case["shape"], case["least_bytes"]) == ("toy", [1], 10**9)
    assert case["implementations"]["eager best"]["times_fastprob_time"] == 2.0
    assert written["machine_info"]["cpu"]["torch"] == torch.__version__


def test_cases_that_come_too_late_are_skipped(tmp_path):
    run = bench(tmp_path, "--minutes", "1e-9")
    assert run.returncode == 0 and "6 skipped" in run.stdout
