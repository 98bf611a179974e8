"""The benches end with one table: times, ratios to fastprob's and the targets beside them.

    pytest bench [--out results.json] [--minutes 5]

A case's implementations are timed together, in turns (`measure.py`); each one's test then reports its rounds. The
results are written after every test, so what ends a run early leaves those before it. Where pytest-benchmark is
installed the rounds are replayed to it, for its own files and comparisons (`--benchmark-save`, `--benchmark-compare`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import time
from dataclasses import asdict
from statistics import quantiles

import pytest
import torch
from measure import Case, Result, copy_gb_s

import fastprob

# How many times fastprob's best time an implementation is to take: "time" by the wall clock on both sides, "graph" with
# fastprob in a CUDA graph. "copy bandwidth" is the share of it that fastprob is to reach in a CUDA graph.
LOSS_CPU = Case("probvlm_loss", (1024, 512), "float32", "forward+backward", "cpu")
LOSS_GPU = Case("probvlm_loss", (8192, 512), "float32", "forward+backward", "cuda")
TARGETS = {
    LOSS_CPU: {"eager as released": (40, "time"), "torch.compile": (12, "time")},
    LOSS_GPU: {
        "eager as released": (25, "time"),
        "torch.compile": (3.5, "time"),
        "copy bandwidth": (0.85, "graph"),
    },
    Case("probvlm_loss", (64, 512), "float32", "forward+backward", "cuda"): {"eager as released": (20, "graph")},
    Case("gaussian_potential", (1000, 512), "float32", "forward+backward", "cpu"): {
        "eager as released": (25, "time"),
        "eager best": (3.5, "time"),
    },
    Case("predict", (1000, 512), "float32", "20 passes", "cpu"): {
        "eager loop": (12, "time"),
        "eager best": (2, "time"),
    },
    Case("ggd_pairwise_nll", (200, 1000, 512), "float32", "forward", "cpu"): {
        "eager best": (25, "time"),
        "torch.compile": (6, "time"),
    },
    Case("training step", (64, 512), "float32", "step", "cuda"): {"eager as released": (20, "graph")},
}
ROWS: dict[Case, dict[str, dict]] = {}  # case -> implementation -> what is reported
LEAST_BYTES: dict[Case, int] = {}  # that a case reads and writes
START = time.monotonic()


class Clock:
    """The timer that pytest-benchmark gets here: it moves by the seconds that were measured."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


# ---- report ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(request):
    """`report(case, name, result, least_bytes)`: one implementation's rounds, to the table and the file."""

    def report(case: Case, name: str, result: Result, least_bytes: int | None = None) -> None:
        if result.error:
            raise result.error
        ROWS.setdefault(case, {})[name] = row(result, least_bytes)
        if least_bytes:
            LEAST_BYTES[case] = least_bytes
        if out := request.config.getoption("out"):
            write(out)
        if request.config.pluginmanager.hasplugin("benchmark"):
            seconds = iter(result.rounds)
            benchmark = request.getfixturevalue("benchmark")
            benchmark.pedantic(lambda: CLOCK.advance(next(seconds)), rounds=len(result.rounds))

    return report


def row(result: Result, least_bytes: int | None) -> dict:
    """What is reported of one implementation, the rounds themselves left out."""
    low, middle, high = quantiles(result.rounds, n=4)
    times = {"median_s": middle, "min_s": min(result.rounds), "iqr_s": high - low, "graph_s": result.graph}
    row = {name: significant(seconds) for name, seconds in times.items() if seconds is not None}
    row["rounds"] = len(result.rounds)
    if least_bytes:
        row["gb_s"] = significant(least_bytes / (result.graph or middle) / 1e9)
    if result.peak_bytes is not None:
        row["peak_bytes"] = result.peak_bytes
    return row


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def best(case: Case, kind: str) -> float | None:
    return min((r[kind] for n, r in ROWS[case].items() if n.startswith("fastprob") and kind in r), default=None)


def judge(case: Case) -> None:
    """Adds ratios, targets and verdicts to what is reported of a case."""
    for name, row in ROWS[case].items():
        for kind, ours in (("time", best(case, "median_s")), ("graph", best(case, "graph_s"))):
            if ours:
                row[f"times_fastprob_{kind}"] = significant(row["median_s"] / ours)
        target, kind = TARGETS.get(case, {}).get(name, (None, "time"))
        if target and f"times_fastprob_{kind}" in row:
            row["target"] = f"{target}x {'CUDA graph' if kind == 'graph' else 'wall'}"
            row["verdict"] = "met" if row[f"times_fastprob_{kind}"] >= target else "missed"


def table(case: Case) -> list[str]:
    rows = ROWS[case]
    on_gpu, moves = case.device == "cuda", case in LEAST_BYTES
    head = f"  {'implementation':28}{'time':>11}{'spread':>8}{'/fastprob':>11}"
    head += f"{'graph':>11}{'/graph':>9}{'peak MB':>9}" if on_gpu else ""
    lines = ["", f"{case.op} {list(case.shape)} {case.dtype} {case.direction}, {case.device}"]
    lines.append(head + f"{'GB/s':>8}" * moves)
    for name, row in rows.items():
        spread = row["iqr_s"] / 2 / row["median_s"]
        line = f"  {name:28}{milliseconds(row, 'median_s'):>11}{spread:>8.0%}{times(row, 'time'):>11}"
        if on_gpu:
            line += f"{milliseconds(row, 'graph_s'):>11}{times(row, 'graph'):>9}{row['peak_bytes'] / 1e6:9.1f}"
        line += f"{row['gb_s']:8.1f}" if moves else ""
        line += f"   target {row['target']}: {row['verdict']}" if "verdict" in row else ""
        lines.append(line)
    share = TARGETS.get(case, {}).get("copy bandwidth", (None,))[0]
    if share and best(case, "graph_s"):
        reached = max(r["gb_s"] for n, r in rows.items() if n.startswith("fastprob")) / copy(case.device)
        verdict = "met" if reached >= share else "missed"
        lines.append(f"  fastprob in a CUDA graph: {reached:.0%} of copy bandwidth   target {share:.0%}: {verdict}")
    return lines


def milliseconds(row: dict, key: str) -> str:
    return f"{row[key] * 1e3:.3f} ms" if key in row else ""


def times(row: dict, kind: str) -> str:
    key = f"times_fastprob_{kind}"
    return f"{row[key]:.2f}x" if key in row else ""


@functools.cache
def copy(device: str) -> float:
    return copy_gb_s(device)


def machine(device: str) -> dict:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "copy_gb_s": round(copy(device), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda if cuda else None,
        "fastprob": fastprob.__version__,
    }


def processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return text.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()


def write(path: pathlib.Path) -> None:
    """Writes what there is so far: the machine, and a case at a time."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    machines = {device: machine(device) for device in dict.fromkeys(case.device for case in ROWS)}
    cases = []
    for case, rows in ROWS.items():
        judge(case)
        least = {"least_bytes": LEAST_BYTES[case]} if case in LEAST_BYTES else {}
        cases.append({**asdict(case), **least, "implementations": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine_info": machines, "commit": commit, "benchmarks": cases}, indent=1) + "\n")


# ---- hooks ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--out", type=pathlib.Path, help="write the results to this JSON file")
    parser.addoption("--minutes", type=float, help="skip the cases that have not begun after so many minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")
    config.option.benchmark_quiet = True  # its table of absolute times; ours says the ratios


def pytest_collection_modifyitems(config, items):
    for item in items:
        if config.pluginmanager.hasplugin("benchmark"):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=str(item.callspec.params["case"])))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: item.callspec.params["case"] not in TARGETS)  # those first, should time run out


def pytest_runtest_setup(item):
    minutes, begun = item.config.getoption("minutes"), item.callspec.params["case"] in ROWS
    if minutes and not begun and time.monotonic() - START > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over")


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("times and ratios")
    for device in dict.fromkeys(case.device for case in ROWS):
        terminalreporter.write_line(", ".join(f"{k} {v}" for k, v in machine(device).items() if v is not None))
    for case in ROWS:
        judge(case)
        for line in table(case):
            terminalreporter.write_line(line)
