"""`queue_contrastive_loss` with its gradients at BLIP's size: time against its matrix products alone, and memory.

    python bench/contrast.py [--out bench/results/contrast-cpu.json]

The products are those of similarities with the keys, of queries and teacher, and of both softmaxes' weights with the
keys: on whole matrices, and block by block of the keys, which stay in the cache between the two. Memory is what a call
adds to the peak of a process of its own, after one with a short queue; times are medians, the ways in turns. Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from baselines import best_queue, released_queue  # the file beside this one
from prompts import machine
from torch.nn import functional as F

import fastprob

QUERIES, QUEUE, DIM = 64, 57_600, 256
BLOCK, ROUNDS = 512, 15
TARGETS = {"times products": 1.15, "share of eager's memory": 0.1}


def ways(queue: int = QUEUE) -> dict[str, Callable[[], None]]:
    keys_count = QUERIES + queue
    draw = torch.Generator().manual_seed(0)
    queries, teacher = F.normalize(torch.randn(2, QUERIES, DIM, generator=draw), dim=2)
    keys = F.normalize(torch.randn(keys_count, DIM, generator=draw), dim=1)
    tau, alpha = torch.tensor(0.07, requires_grad=True), torch.tensor(0.4)
    ids, key_ids = torch.arange(QUERIES), torch.arange(keys_count)
    both = torch.cat([queries, teacher])

    def loss(of: Callable) -> None:
        asks = queries.detach().requires_grad_()
        of(asks, keys, ids, key_ids, tau, teacher, tau.detach(), alpha).backward()

    def products(block: int) -> None:
        total = torch.zeros_like(both)
        for part in keys.split(block):
            total.addmm_(both @ part.T, part)

    return {
        "fastprob": partial(loss, fastprob.queue_contrastive_loss),
        "eager as released": partial(loss, released_queue),
        "eager best": partial(loss, best_queue),
        "products, whole": partial(products, keys_count),
        f"products, {BLOCK} keys at once": partial(products, BLOCK),
    }


def memory_of(way: str) -> float:
    """MB that one call adds."""
    run = ways()[way]
    ways(queue=QUERIES)[way]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_mb("VmRSS")
    run()
    return resident_mb("VmHWM") - before


def resident_mb(name: str) -> float:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(memory_of(args.memory))
        return
    runs = ways()
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(ROUNDS):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - start)
    found = {way: {"ms": round(1e3 * statistics.median(of[3:]), 1)} for way, of in times.items()}
    for way in runs:
        command = [sys.executable, __file__, "--memory", way]
        grown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[way]["mb"] = round(float(grown), 1)
        print(f"{way:28} {found[way]['ms']:7.1f} ms {found[way]['mb']:7.1f} MB")
    ours, eager = found["fastprob"], found["eager best"]
    reached = {
        "times products": round(ours["ms"] / min(of["ms"] for way, of in found.items() if "products" in way), 2),
        "share of eager's memory": round(ours["mb"] / eager["mb"], 3),
    }
    for name, target in TARGETS.items():
        print(f"{name}: {reached[name]}, target {target}: {'met' if reached[name] <= target else 'missed'}")
    if args.out:
        results = {"device": machine("cpu"), "queries, queue, dim": [QUERIES, QUEUE, DIM], **reached, "ways": found}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
