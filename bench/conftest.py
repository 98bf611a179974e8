"""The benches end with one table: times, ratios to fastprob's and the targets beside them.

A case's implementations are timed together, in turns (`measure.py`); each one's test then replays its rounds to
pytest-benchmark, whose timer here is a clock that moves by the measured seconds.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict
from statistics import median, quantiles

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
    Case("training step", (64, 512), "float32", "step", "cuda"): {"eager as released": (20, "graph")},
}
ROWS: dict[Case, dict[str, dict]] = {}  # case -> implementation -> what is reported
STATS = ("median", "min", "iqr")  # of pytest-benchmark's, what its JSON keeps


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


# ---- report ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(request):
    """`report(case, name, result, least_bytes)`: one implementation's rounds, to pytest-benchmark and the table."""

    def report(case: Case, name: str, result: Result, least_bytes: int | None = None) -> None:
        if result.error:
            raise result.error
        benchmark = request.getfixturevalue("benchmark")
        info = {"case": asdict(case), "implementation": name}
        time = median(result.rounds)
        if least_bytes:
            info["case"]["least_bytes"] = least_bytes
            info["gb_s"] = significant(least_bytes / (result.graph or time) / 1e9)
        if result.graph:
            info["graph_s"] = significant(result.graph)
        if result.peak_bytes is not None:
            info["peak_bytes"] = result.peak_bytes
        benchmark.extra_info |= info
        durations = iter(result.rounds)
        benchmark.pedantic(lambda: CLOCK.advance(next(durations)), rounds=len(result.rounds))
        low, _, high = quantiles(result.rounds, n=4)
        row = {"time": time, "graph": result.graph, "spread": (high - low) / 2 / time, "info": benchmark.extra_info}
        ROWS.setdefault(case, {})[name] = row

    return report


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def best(case: Case, kind: str) -> float | None:
    return min((r[kind] for n, r in ROWS[case].items() if n.startswith("fastprob") and r[kind]), default=None)


def judge(case: Case) -> None:
    """Adds ratios, targets and verdicts to what is reported of a case."""
    for name, row in ROWS[case].items():
        info = row["info"]
        for kind in ("time", "graph"):
            if row["time"] and best(case, kind):
                info[f"times_fastprob_{kind}"] = significant(row["time"] / best(case, kind))
        target, kind = TARGETS.get(case, {}).get(name, (None, "time"))
        if target and f"times_fastprob_{kind}" in info:
            info["target"] = f"{target}x {'CUDA graph' if kind == 'graph' else 'wall'}"
            info["verdict"] = "met" if info[f"times_fastprob_{kind}"] >= target else "missed"


def table(case: Case) -> list[str]:
    rows = ROWS[case]
    on_gpu, moves = case.device == "cuda", any("gb_s" in row["info"] for row in rows.values())
    head = f"  {'implementation':28}{'time':>11}{'spread':>8}{'/fastprob':>11}"
    head += f"{'graph':>11}{'/graph':>9}{'peak MB':>9}" if on_gpu else ""
    lines = ["", f"{case.op} {list(case.shape)} {case.dtype} {case.direction}, {case.device}"]
    lines.append(head + f"{'GB/s':>8}" * moves)
    for name, row in rows.items():
        info = row["info"]
        line = f"  {name:28}{row['time'] * 1e3:8.3f} ms{row['spread']:>8.0%}{times(info, 'time'):>11}"
        if on_gpu:
            graph = f"{row['graph'] * 1e3:8.3f} ms" if row["graph"] else ""
            line += f"{graph:>11}{times(info, 'graph'):>9}{info['peak_bytes'] / 1e6:9.1f}"
        line += f"{info['gb_s']:8.1f}" if moves else ""
        line += f"   target {info['target']}: {info['verdict']}" if "verdict" in info else ""
        lines.append(line)
    share = TARGETS.get(case, {}).get("copy bandwidth", (None,))[0]
    if share and best(case, "graph"):
        reached = max(r["info"]["gb_s"] for n, r in rows.items() if n.startswith("fastprob")) / copy(case.device)
        verdict = "met" if reached >= share else "missed"
        lines.append(f"  fastprob in a CUDA graph: {reached:.0%} of copy bandwidth   target {share:.0%}: {verdict}")
    return lines


def times(info: dict, kind: str) -> str:
    key = f"times_fastprob_{kind}"
    return f"{info[key]:.2f}x" if key in info else ""


@functools.cache
def copy(device: str) -> float:
    return copy_gb_s(device)


def machine(device: str) -> dict:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "copy_gb_s": round(copy(device), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "cuda": torch.version.cuda if cuda else None,
        "fastprob": fastprob.__version__,
    }


# ---- hooks ----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")
    config.option.benchmark_quiet = True  # its table of absolute times; ours says the ratios


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_benchmark_update_machine_info(machine_info):
    processor = machine_info.get("cpu", {}).get("brand_raw")
    machine_info.clear()
    machine_info.update(
        {"processor": processor}, **{device: machine(device) for device in dict.fromkeys(case.device for case in ROWS)}
    )


def pytest_benchmark_update_json(output_json):
    """A case at a time, without the rounds: the file is committed."""
    cases: dict[str, dict] = {}
    for case in ROWS:
        judge(case)
    for one in output_json["benchmarks"]:
        info = one["extra_info"]
        case = cases.setdefault(str(info["case"]), {**info.pop("case"), "implementations": {}})
        stats = {f"{name}_s": significant(one["stats"][name]) for name in STATS}
        name = info.pop("implementation")
        case["implementations"][name] = {**stats, "rounds": one["stats"]["rounds"], **info}
    output_json["benchmarks"] = list(cases.values())


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
