"""The text side of a prompt-tuning step, forward and backward, by each path through ViT-B-32's text tower.

    python bench/prompts.py [--device cuda] [--out bench/results/prompts-cpu.json]

The weights are random: the time does not depend on them. A path whose activations would not fit is run in chunks of
classes or images, each with its own backward pass: the same work. Every measurement is a process of its own, so that
its peak memory is its own; the paths take turns, and their gradients are compared. A case is written when it is done;
one that fails leaves the others, and an exit status of 1. Needs open_clip.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CASES = {  # classes, context length, images with a context of their own, rounds on a CPU (on a GPU one)
    "CoOp and DAPT, 64 classes": (64, 16, None, 3),
    "CoOp and DAPT, 1000 classes": (1000, 16, None, 1),
    "CoCoOp, 8 images, 64 classes": (64, 4, 8, 1),
}
CHUNK = {  # prompts at once
    "cpu": {"plain": 64, "truncated": 512, "shared": None},
    "cuda": {"plain": 256, "truncated": 1024, "shared": None},
}
TARGET = 12


def step(case: str, path: str, device: str) -> dict:
    """Seconds and peak memory of a step, and its gradient for the context."""
    import open_clip

    from fastprob.prompts import PromptTextEncoder

    classes, length, images, _ = CASES[case]
    chunk = CHUNK[device][path]
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval().requires_grad_(False).to(device)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    names = open_clip.IMAGENET_CLASSNAMES[:: 1000 // classes][:classes]
    context = 0.02 * torch.randn(*([] if images is None else [images, 1]), length, 512)
    context = context.to(device).requires_grad_()
    at_once = min(chunk or classes, classes)
    encoders = [
        PromptTextEncoder(model, tokenizer, names[i : i + at_once], context_length=length, path=path)
        for i in range(0, classes, at_once)
    ]
    parts = [context] if images is None or chunk is None else context.split(max(chunk // classes, 1))
    weights = torch.randn(classes, 512).to(device)
    times = []
    long = classes == 1000 and path == "plain"  # its many chunks warm each other up
    for _ in range(10 if device == "cuda" else 1 if long else 2):
        synchronize()
        context.grad, start = None, time.perf_counter()
        for part in parts:
            for i, encoder in enumerate(encoders):
                (encoder(part) * weights[i * at_once :][:at_once]).sum().backward()
        synchronize()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": min(times), "peak_mb": round(peak), "gradient": context.grad.flatten()[:2000].tolist()}


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(case: str, device: str) -> dict[str, dict]:
    """Path -> seconds, times as long as the shared path, peak memory, error of the gradient, by steps in turns."""
    runs: dict[str, list[dict]] = {path: [] for path in CHUNK[device]}
    for _ in range(CASES[case][3] if device == "cpu" else 1):
        for path, each in runs.items():
            command = [sys.executable, __file__, "--device", device, "--step", case, path]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            each.append(json.loads(run.stdout.splitlines()[-1]))
    plain = torch.tensor(runs["plain"][0]["gradient"])
    seconds = {path: statistics.median(r["seconds"] for r in each) for path, each in runs.items()}
    results = {}
    for path, each in runs.items():
        error = (torch.tensor(each[0]["gradient"]) - plain).norm() / plain.norm()
        results[path] = {
            "seconds": round(seconds[path], 4), "times_shared": round(seconds[path] / seconds["shared"], 2),
            "peak_mb": each[0]["peak_mb"], "gradient_error": float(f"{error:.1e}"),
        }  # fmt: skip
    return results


def table(case: str, results: dict[str, dict]) -> str:
    lines = [case]
    for path, r in results.items():
        line = f"  {path:10} {r['seconds']:9.3f} s {r['times_shared']:7.2f}x {r['peak_mb']:7} MB"
        line += f"   gradient {r['gradient_error']:.0e}"
        verdict = "met" if r["times_shared"] >= TARGET else "missed"
        lines.append(line + (f"   target {TARGET}x: {verdict}" if path == "plain" else ""))
    return "\n".join(lines)


def machine(device: str) -> dict:
    cuda = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        "machine": platform.machine(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "open_clip": importlib.metadata.version("open_clip_torch"), **cuda,
    }  # fmt: skip


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(CHUNK), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--step", nargs=2, metavar=("CASE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("open_clip") is None:
        return "bench/prompts.py needs open_clip: pip install open_clip_torch"
    if args.step:
        return print(json.dumps(step(*args.step, args.device)))
    results, failed = {}, []
    for case in CASES:
        try:
            results[case] = measure(case, args.device)
        except subprocess.CalledProcessError as error:
            failed.append(f"{case}: {error}")
            continue
        print(table(case, results[case]), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"device": machine(args.device), "results": results}, indent=1) + "\n")
    return "\n".join(failed) or None


if __name__ == "__main__":
    sys.exit(main())
