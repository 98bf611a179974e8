"""BLIP the released way (`blip.py`) and ours: a step of training, matching of all pairs, and captions.

    python bench/pretraining.py [--device cuda] [--out bench/results/pretraining-cpu.json]

Both ways have the same towers, weights, negatives and texts, and what comes out is compared. Every measurement is a
process of its own, so that its peak memory is its own; the ways take turns. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blip import captioner, plain, released, states_of  # the file beside this one
from torch import Tensor
from transformers import BlipTextConfig

from fastprob.pretraining.objectives import BLIP
from fastprob.pretraining.retrieval import match
from fastprob.pretraining.text import Texts
from fastprob.pretraining.towers import Teacher

CASES = {  # images, texts of each; towers
    "small, 64 pairs": (64, 1, "small"),
    "small, 32 images of 5 texts": (32, 5, "small"),
    "ViT-B shapes, 3 of 12 layers, 8 pairs": (8, 1, "wide"),
    "ViT-B shapes, 3 of 12 layers, 4 images of 5 texts": (4, 5, "wide"),
}
TOWERS = {  # pixels, patch, states, layers, heads, tokens of a text, words, D, queue
    "small": (32, 8, 128, 4, 4, 14, 200, 64, 4096),
    "wide": (224, 16, 768, 3, 12, 30, 30_522, 256, 57_600),
}
RERANKED, PER_IMAGE, CAPTIONED, WORDS = 64, 32, 8, 16
TASKS = {**{f"step: {case}": "step" for case in CASES}, "match 64 x 32": "match", "captions, 3 beams": "caption"}
TARGETS = {"match": 3, "caption": 3}
ROUNDS = 3


def model_of(towers: str) -> tuple[BLIP, int, int]:
    """A BLIP of random weights, the length of texts, and the size of its queue."""
    from open_clip.transformer import VisionTransformer
    from transformers import BertTokenizer

    pixels, patch, width, layers, heads, length, words, dim, queue = TOWERS[towers]
    torch.manual_seed(0)
    visual = VisionTransformer(pixels, patch, width, layers, heads, 4.0)
    visual.proj = None
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = [*special, *(f"w{i}" for i in range(words - len(special)))]
    config = BlipTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
    )
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    return BLIP(visual, tokenizer, config, dim=dim), length, queue


class Rows:
    """Images that are made already, one by one."""

    batch_size = 1

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, batches: list[Tensor]) -> Any:
        return (self.pixels[rows] for rows in batches)


def texts_of(count: int, length: int, words: int) -> Texts:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, words, (count, length), generator=draw)
    lengths = torch.randint(length // 2, length + 1, (count,), generator=draw)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return Texts(ids * mask, mask)


def measure_one(task: str, way: str, device: str) -> dict[str, Any]:
    """Seconds, peak memory, and what came out."""
    kind = TASKS[task]
    images, each, towers = CASES.get(task.removeprefix("step: "), (RERANKED, PER_IMAGE, "wide"))
    images = CAPTIONED if kind == "caption" else images
    model, length, queue = model_of(towers)
    model = model.to(device).train(kind == "step")
    size = TOWERS[towers][0]
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(2)).to(device)
    texts = texts_of(images * each, length, TOWERS[towers][6]).map(lambda rows: rows.to(device))
    run = {"step": _step, "match": _match, "caption": _caption}[kind](model, pixels, texts, way, queue)
    times, results = [], []
    for _ in range(3):
        start = time.perf_counter()
        results.append(run())
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak
    return {"seconds": min(times), "peak_mb": round(peak), "result": results[0]}


def _step(model: BLIP, pixels: Tensor, texts: Texts, way: str, queue: int) -> Callable[[], list[float]]:
    teacher = Teacher(model.towers, queue).to(pixels.device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=True)  # weights stay as they are
    ids = torch.arange(len(pixels), device=pixels.device)

    def run() -> list[float]:
        if way == "released":
            losses = released(model, pixels, texts, ids, teacher, alpha=0.4, seed=3)
        else:
            losses = list(model.losses(pixels, texts, ids, teacher, alpha=0.4, seed=3).values())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        return torch.stack(losses).tolist()

    return run


def _match(model: BLIP, pixels: Tensor, texts: Texts, way: str, _: int) -> Callable[[], list[float]]:
    model.eval()
    images = torch.arange(len(texts)) // PER_IMAGE

    @torch.no_grad()
    def run() -> list[float]:
        if way == "ours":
            return match(model, Rows(pixels), texts, images, torch.arange(len(texts)), False)[:, 1].tolist()
        scores = []
        for number, image in enumerate(pixels):
            own = texts[number * PER_IMAGE : (number + 1) * PER_IMAGE].starting_with(model.towers.enc)
            states = states_of(model.towers, image[None]).repeat(PER_IMAGE, 1, 1)
            fused = plain(model.towers.text, own.ids, attention_mask=own.mask, encoder_hidden_states=states)
            scores.append(model.matching(fused[:, 0])[:, 1])
        return torch.cat(scores).tolist()

    return run


def _caption(model: BLIP, pixels: Tensor, _: Texts, way: str, __: int) -> Callable[[], list[str]]:
    model.eval()
    options = {"num_beams": 3, "min_new_tokens": WORDS, "max_new_tokens": WORDS}
    decoder, begin = captioner(model).to(pixels.device), torch.full((len(pixels), 1), model.tokenizer.bos_token_id)

    @torch.no_grad()
    def run() -> list[str]:
        if way == "ours":
            return model.caption(pixels, **options)
        states = states_of(model.towers, pixels)
        told = decoder.generate(begin.to(pixels.device), encoder_hidden_states=states, **options)
        return model.tokenizer.batch_decode(told[:, 1:], skip_special_tokens=True)

    return run


def measure(task: str, device: str) -> dict[str, Any]:
    """Way -> seconds and peak memory; by how much ours is faster, and how far what came out is from theirs."""
    runs: dict[str, list[dict[str, Any]]] = {"released": [], "ours": []}
    for _ in range(ROUNDS if device == "cpu" else 1):
        for way, each in runs.items():
            command = [sys.executable, __file__, "--device", device, "--one", task, way]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            each.append(json.loads(run.stdout.splitlines()[-1]))
    results = {way: each[0].pop("result") for way, each in runs.items()}
    for each in (run for way in runs.values() for run in way[1:]):
        del each["result"]
    found: dict[str, Any] = {
        way: {"seconds": round(statistics.median(r["seconds"] for r in each), 3), "peak_mb": each[0]["peak_mb"]}
        for way, each in runs.items()
    }
    if TASKS[task] == "caption":
        same = sum(a == b for a, b in zip(*results.values())) / CAPTIONED
        found["same captions"] = round(same, 3)
    else:
        found["difference"] = max(abs(a - b) for a, b in zip(*results.values()))
    return found | {"times released": round(found["released"]["seconds"] / found["ours"]["seconds"], 2)}


def line(task: str, found: dict[str, Any]) -> str:
    both = "   ".join(
        f"{way} {found[way]['seconds']:.3f} s, {found[way]['peak_mb']} MB" for way in ("released", "ours")
    )
    target = TARGETS.get(TASKS[task])
    verdict = "" if target is None else f", target {target}: {'met' if found['times released'] >= target else 'missed'}"
    agree = next(f"{name} {found[name]:.2g}" for name in ("difference", "same captions") if name in found)
    return f"{task}\n  {both}   {found['times released']:.2f}x{verdict}   ({agree})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(*args.one, args.device)))
        return
    results = {}
    for task in TASKS:
        results[task] = measure(task, args.device)
        print(line(task, results[task]), flush=True)
    if args.out:
        from prompts import machine  # the bench beside this one

        args.out.write_text(json.dumps({"device": machine(args.device), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
