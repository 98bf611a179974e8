"""M2IB's maps of ViT-B-32, the released way and ours.

    python bench/attribution.py [--device cuda] [--out bench/results/attribution-cpu.json]

The released way runs both towers in every step, with the gradients of all weights, a pair at a time; of a caption it
takes the tokens up to end-of-text alone, as ours does. The weights are random: the time does not depend on them. Every
measurement is a process of its own, so that its peak memory is its own; the ways take turns. They get the same noise,
and their maps are compared. Needs open_clip.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from prompts import machine, synchronize  # the bench beside this one
from torch.nn import functional as F

TARGETS = {"image": 15, "text": 40}
PAIRS = {"released": 1, "a pair": 1, "16 pairs": 16}
ROUNDS = 3
LAYER, STEPS, SAMPLES, BETA, SEED = 9, 10, 10, 0.1, 0
CAPTIONS = [
    "a man holds what is believed to be some of the debris that caused damage to vehicles",
    "the kites flown at festival turned the sky into a kaleidoscope of color",
    "two dogs play in the snow",
    "a red fire engine in front of an old brick building",
]


def measure_one(side: str, way: str, device: str) -> dict:
    """Seconds a map, peak memory, and the map of the first pair."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval().to(device)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    pairs = PAIRS[way]
    images, texts = torch.randn(pairs, 3, 224, 224).to(device), (CAPTIONS * 4)[:pairs]
    make = released(model, tokenizer, side) if way == "released" else ours(model, tokenizer, side)
    times = []
    for _ in range(10 if device == "cuda" else 1 if way == "released" else 2):  # its many steps warm each other up
        synchronize()
        start = time.perf_counter()
        result = make(images, texts)
        synchronize()
        times.append((time.perf_counter() - start) / pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": min(times), "peak_mb": round(peak), "map": result.flatten().tolist()}


def ours(model, tokenizer, side: str):
    """M2IB for one side: of the other there are the features alone."""
    from fastprob.attribution import M2IB

    class OneSide(M2IB):
        def _tokens(self, explained):
            if (explained.tower is self.image_tower) == (side == "image"):
                return super()._tokens(explained)
            return torch.zeros_like(explained.states.x[..., 0])

    method = OneSide(
        model.requires_grad_(False), tokenizer, layer=LAYER, steps=STEPS, samples=SAMPLES, beta=BETA, seed=SEED
    )

    def make(images, texts):
        result = method(images, texts)
        if side == "image":
            return result.image[0]
        return torch.tensor([value for _, value in result.of_words(0)])

    return make


def released(model, tokenizer, side: str):
    """The released code's steps around open_clip's model, a pair's words at the end."""
    from fastprob.attribution.words import membership, words_of

    visual, width = model.visual, (model.visual if side == "image" else model).transformer.width

    def image_features(images, bottleneck):
        x = visual._embeds(images)
        for i, block in enumerate(visual.transformer.resblocks):
            x = block(x)
            x = bottleneck(x) if i == LAYER and side == "image" else x
        return visual.ln_post(x[:, 0]) @ visual.proj

    def text_features(ids, bottleneck):
        length = ids.shape[1]
        x = model.token_embedding(ids) + model.positional_embedding[:length]
        for i, block in enumerate(model.transformer.resblocks):
            x = block(x, attn_mask=model.attn_mask[:length, :length])
            x = bottleneck(x) if i == LAYER and side == "text" else x
        return model.ln_final(x[:, -1]) @ model.text_projection

    def make(images, texts):
        ids = tokenizer(texts).to(images.device)
        ids = ids[:, : ids[0].argmax() + 1]
        tokens = ids.shape[1] if side == "text" else visual.positional_embedding.shape[0]
        a = torch.full((1, tokens, width), 5.0, device=images.device, requires_grad=True)
        adam, eps, kl = torch.optim.Adam([a], lr=1.0), None, None

        def bottleneck(x):
            nonlocal kl
            passing = a.sigmoid().expand_as(x)
            mean, variance = x * passing, (1 - passing) ** 2
            kl = -0.5 * (1 + variance.log() - mean**2 - variance)
            return mean + variance.sqrt() * eps

        images, ids = images.expand(SAMPLES, -1, -1, -1), ids.expand(SAMPLES, -1)
        for eps in noise(tokens, width, images.device):  # noqa: B007  (the bottleneck's)
            adam.zero_grad()
            outputs = text_features(ids, bottleneck), image_features(images, bottleneck)
            loss = BETA * kl.mean() - F.cosine_similarity(*outputs, eps=1e-6).mean()
            loss.backward()
            adam.step()
        saliency = kl.detach().mean(0).nansum(-1)
        if side == "image":
            grid = saliency[1:].view(1, 1, *visual.grid_size)
            return scaled(F.interpolate(grid, size=visual.image_size, mode="bilinear")[0, 0])
        words = membership(words_of(tokenizer, texts)[1], tokens)[0].float().to(images.device)
        return scaled(words @ saliency)

    return make


def scaled(x: torch.Tensor) -> torch.Tensor:
    return (x - x.min()) / (x.max() - x.min())


def noise(tokens: int, width: int, device) -> list[torch.Tensor]:
    """Of every step, [samples, tokens, width]: a bottleneck through which nothing passes."""
    from fastprob import bottleneck
    from fastprob.training import seed_of

    x = torch.zeros(tokens, width, device=device)
    seeds = [seed_of(SEED, step) for step in range(STEPS)]
    return [bottleneck(x, torch.full_like(x, -1e3), seed=seed, samples=SAMPLES)[0] for seed in seeds]


def measure(side: str, device: str) -> dict[str, dict]:
    """Way -> seconds a map, times as many maps a second as the released way, peak memory, difference of the map."""
    runs: dict[str, list[dict]] = {way: [] for way in PAIRS}
    for _ in range(ROUNDS if device == "cpu" else 1):
        for way, each in runs.items():
            command = [sys.executable, __file__, "--device", device, "--one", side, way]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            each.append(json.loads(run.stdout.splitlines()[-1]))
    expected = torch.tensor(runs["released"][0]["map"])
    seconds = {way: statistics.median(r["seconds"] for r in each) for way, each in runs.items()}
    return {
        way: {
            "seconds": round(seconds[way], 4), "maps_per_second": float(f"{1 / seconds[way]:.3g}"),
            "times_released": round(seconds["released"] / seconds[way], 2), "peak_mb": each[0]["peak_mb"],
            "difference": float(f"{(torch.tensor(each[0]['map']) - expected).abs().max():.1e}"),
        }
        for way, each in runs.items()
    }  # fmt: skip


def table(side: str, results: dict[str, dict]) -> str:
    lines = [f"{side} map"]
    for way, r in results.items():
        line = f"  {way:9} {r['seconds']:9.3f} s {r['maps_per_second']:8} maps/s {r['times_released']:7.2f}x"
        line += f" {r['peak_mb']:6} MB   map differs by {r['difference']:.0e}"
        verdict = "met" if r["times_released"] >= TARGETS[side] else "missed"
        lines.append(line + (f"   target {TARGETS[side]}x: {verdict}" if way != "released" else ""))
    return "\n".join(lines)


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure_one(*args.one, args.device)))
    results = {}
    for side in TARGETS:
        results[side] = measure(side, args.device)
        print(table(side, results[side]), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": machine(args.device), "results": results}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    sys.exit(main())
