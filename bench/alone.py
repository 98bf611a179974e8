"""The operators alone on a GPU, at sizes at which others take too long: `python bench/alone.py --out results.json`.

Milliseconds are the median of seven calls between CUDA events, launches in; peak memory is beyond the inputs.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from conftest import machine

from fastprob._op import OPS

CASES = [  # operator, size, options, with the backward pass, in TF32
    ("ggd_pairwise_nll", (1000, 1000, 512), {}, False, False),
    ("ggd_pairwise_nll", (5000, 5000, 512), {}, False, False),
    ("ggd_nearest", (5000, 5000, 512), {"k": 10}, False, False),
    ("ggd_nearest", (5000, 5000, 512), {"k": 10}, True, False),
    ("gaussian_potential", (21000, 512), {}, False, False),
    ("gaussian_potential", (21000, 512), {}, True, False),
    ("gaussian_potential", (21000, 512), {}, True, True),
    ("ggd_pairwise_match_nll", (300, 300, 512), {}, False, False),
    ("ggd_pairwise_match_nll", (300, 300, 512), {}, True, False),
    ("ggd_nearest_match", (300, 300, 512), {"k": 5}, True, False),
]
CALLS = 7


def draw(*shape, low=-2.0, high=2.0, extreme=None):
    return torch.empty(shape, device="cuda").uniform_(low, high)


def milliseconds(call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measured(name: str, size: tuple[int, ...], options: dict, backward: bool, tf32: bool) -> dict:
    op = OPS[name]
    tensors = op.inputs(draw, *size)
    wanted = [t.requires_grad_() for n, t in zip(op.tensors, tensors) if backward and n in op.differentiable]

    def call():
        results = op.function(*tensors, **options)
        results = results if isinstance(results, tuple) else (results,)
        if backward:
            torch.autograd.grad([r.sum() for r in results if r.requires_grad], wanted)

    torch.backends.cuda.matmul.allow_tf32 = tf32
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(call) for _ in range(2 + CALLS)][2:]
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "op": name, "shape": size, "options": options, "direction": "forward+backward" if backward else "forward",
        "tf32": tf32, "milliseconds": round(statistics.median(times), 3), "peak_mb": round(peak / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="write the results to this JSON file")
    out, rows = parser.parse_args().out, []
    torch.manual_seed(0)
    for case in CASES:
        rows.append(measured(*case))
        print(rows[-1], flush=True)
        out.write_text(json.dumps({"machine_info": machine("cuda"), "benchmarks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
