"""The text side of a prompt-tuning step, forward and backward, by each path through ViT-B-32's text tower.

    python bench/prompts.py [--device cuda] [--out bench/results/prompts-cpu.json]

The weights are random: the time does not depend on them. A path whose activations would not fit is run in chunks of
classes or images, each with its own backward pass: the same work. Every measurement is a process of its own, so that
its peak memory is its own; the paths take turns, and their gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import torch
from open_clip import IMAGENET_CLASSNAMES

from fastprob.prompts import PromptTextEncoder

CASES = {  # classes, context length, images with a context of their own, rounds
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
    classes, length, images, _ = CASES[case]
    chunk = CHUNK[device][path]
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval().requires_grad_(False).to(device)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    names = IMAGENET_CLASSNAMES[:: 1000 // classes][:classes]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(CHUNK), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--step", nargs=2, metavar=("CASE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        return print(json.dumps(step(*args.step, args.device)))
    results = {}
    for case, (*_, rounds) in CASES.items():
        runs: dict[str, list[dict]] = {path: [] for path in CHUNK[args.device]}
        for _ in range(rounds):
            for path in runs:
                command = [sys.executable, __file__, "--device", args.device, "--step", case, path]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[path].append(json.loads(run.stdout.splitlines()[-1]))
        plain = torch.tensor(runs["plain"][0]["gradient"])
        seconds = {path: statistics.median(r["seconds"] for r in each) for path, each in runs.items()}
        print(case)
        for path, each in runs.items():
            ratio = seconds[path] / seconds["shared"]
            error = (torch.tensor(each[0]["gradient"]) - plain).norm() / plain.norm()
            results.setdefault(case, {})[path] = {
                "seconds": round(seconds[path], 4), "times_shared": round(ratio, 2), "peak_mb": each[0]["peak_mb"],
                "gradient_error": float(f"{error:.1e}"),
            }  # fmt: skip
            line = f"  {path:10} {seconds[path]:9.3f} s {ratio:7.2f}x {each[0]['peak_mb']:7} MB   gradient {error:.0e}"
            verdict = "met" if ratio >= TARGET else "missed"
            print(line + (f"   target {TARGET}x: {verdict}" if path == "plain" else ""), flush=True)
    if args.out:
        device = {
            "machine": platform.machine(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "open_clip": open_clip.__version__,
        }  # fmt: skip
        if args.device == "cuda":
            device |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        args.out.write_text(json.dumps({"device": device, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
