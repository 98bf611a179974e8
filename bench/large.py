"""Memory and time of the ordinary commands on many embeddings: `python -m bench.large [--images N --texts M --dim D]`.

Texts are their images with noise, so that ranks and losses are of the usual kind. Arrays, store and runs are kept in
--work, and what is there already, or in --out of the same sizes, is not made again. Peak memory is that of the process
itself and, apart, with the pages of the store that are mapped, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import fastprob
from fastprob._files import replaced, write_atomically

BLOCK = 10_000
NOISE = 4.0  # length of the noise, that of the image being 1: about half of the best matches are right
OUT = Path("bench/results/large.json")


def arrays(work: Path, images: int, texts: int, dim: int) -> list[str]:
    """Write image.npy [N, D], text.npy [M, D] and pairs.npy [M]; return the arguments that name them."""
    files = [work / f"{name}.npy" for name in ("image", "text", "pairs")]
    if not files[-1].exists():
        work.mkdir(parents=True, exist_ok=True)
        _write(files[0], images, dim, lambda rows, noise: noise)
        image = np.load(files[0], mmap_mode="r")
        _write(files[1], texts, dim, lambda rows, noise: image[rows % images] + NOISE * noise)
        with replaced(files[2]) as path, open(path, "wb") as file:
            np.save(file, np.arange(texts) % images)
    return ["--from-arrays", str(files[0]), str(files[1]), "--pairs", str(files[2])]


def _write(file: Path, count: int, dim: int, of) -> None:
    draw = np.random.default_rng(count)
    with replaced(file) as path:
        array = np.lib.format.open_memmap(path, "w+", np.float32, (count, dim))
        for start in range(0, count, BLOCK):
            rows = np.arange(start, min(start + BLOCK, count))
            noise = draw.standard_normal((len(rows), dim), np.float32) / dim**0.5
            array[rows] = _unit(of(rows, noise))
        array.flush()


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure(command: list[str]) -> dict[str, float]:
    """Run `fastprob` with these arguments: seconds and the peaks of memory in GB."""
    start, peaks = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen([sys.executable, "-P", "-m", "fastprob", *command])
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it ended in between
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name, size in re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status):
                peaks[name] = max(peaks[name], int(size))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"fastprob {' '.join(command)} ended with {process.returncode}")
    own, mapped = (round(peaks[name] * 1024 / 1e9, 2) for name in ("RssAnon", "VmHWM"))
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": own, "peak_gb_with_mapped_pages": mapped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("large"), help="directory of arrays, store and runs")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures (default: {OUT})")
    args = parser.parse_args()
    given = arrays(args.work, args.images, args.texts, args.dim)
    of = ["--store", str(args.work / "store"), "--checkpoint", str(args.work / "run")]
    commands = {
        "embed": ["embed", *given, "--out", of[1]],
        "fit": ["fit", *of[:2], "--out", of[3], "--epochs", "1", "--batch-size", "1024"],
        "predict": ["predict", *of, "--out", str(args.work / "predictions"), "--overwrite"],
        "eval": ["eval", *of, "--out", str(args.work / "report")],
    }
    found = {
        "fastprob": fastprob.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})",
        "images": args.images, "texts": args.texts, "dim": args.dim,
    }  # fmt: skip
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    if before.items() >= found.items():
        found = before
    for name, command in commands.items():
        if name not in found:
            found[name] = measure(command)
            print(name, found[name])
            write_atomically(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
