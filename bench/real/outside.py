"""Which score tells queries that have no match? Each data set asked by the other:

    python -m bench.real.outside [--cache DIRECTORY] [--out FILE]

Pictures of openclipart are asked by scenes of digits, through openclipart's towers and heads; scenes of digits by
pictures of openclipart, through the tiny CLIP. For each an adapter by our defaults and p(wrong), three seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from statistics import fmean

import torch

import fastprob
from fastprob._files import write_atomically
from fastprob.adapters import PairedEmbeddings, TrainConfig, evaluate_store, fit, fit_error
from fastprob.data import EmbeddingStore, embed, embed_arrays
from fastprob.data.captions import ImageCaptions
from fastprob.encoders import load_encoder
from fastprob.evaluation.tables import markdown

from .fetch import cache_directory
from .openclipart import captions_of, split
from .parts import SCENES, SETS, Part, gather, outside

OUT = Path("bench/results/real/outside.json")
SEEDS = range(3)
CAPTIONS = 2  # of a picture that asks: its title, with and without keywords


def pictures(cache: Path, directory: Path) -> EmbeddingStore:
    """Test pictures of openclipart with their first captions, as the tiny CLIP sees them."""
    every = gather(cache)
    chosen = [every.pictures[row] for row in split(len(every.pictures))["test"][:SCENES]]
    captions = [[caption.text for caption in captions_of(each)][:CAPTIONS] for each in chosen]
    files = [each.path for each in chosen]
    data = ImageCaptions("openclipart", files, captions, ids=list(map(str, files)), rows=list(map(str, files)))
    return embed(data, load_encoder("tiny"), directory, max_lost=1.0)


def aurocs(parts: dict[str, Part], elsewhere: EmbeddingStore | Part, directory: Path) -> dict[str, dict[str, list]]:
    """Direction -> score -> [AUROC, low, high] of every seed."""
    captions = elsewhere.captions
    strangers = elsewhere.data if isinstance(elsewhere, Part) else elsewhere
    every = {name: (part.data, part.captions) for name, part in parts.items()} | {"outside": (strangers, captions)}
    stores = {name: _store(*of, directory / name) for name, of in every.items()}
    found: dict[str, dict[str, list]] = {}
    for seed in SEEDS:
        model = fit(stores["train"], config=TrainConfig(seed=seed), validation=stores["val"]).model
        error = fit_error(stores["val"], captions=stores["val"].captions, adapter=model, seed=seed)
        report = evaluate_store(model, stores["test"], error=error, outside=stores["outside"], seed=seed)
        for direction, scores in report.outside.items():
            for name, one in scores.items():
                found.setdefault(direction, {}).setdefault(name, []).append([one.value, one.low, one.high])
    return found


def _store(data: PairedEmbeddings | EmbeddingStore, captions: list[str], path: Path) -> EmbeddingStore:
    return embed_arrays(data.image, data.text, path, pairs=data.caption_image, captions=captions)


def table(found: dict[str, dict[str, dict[str, list]]]) -> str:
    """Mean of the seeds, a row a score, a column a data set and direction."""
    columns = [(name, direction) for name, of in found.items() for direction in of]
    names = next(iter(found["openclipart"].values()))
    rows = [[name, *(f"{fmean(each[0] for each in found[a][b][name]):.2f}" for a, b in columns)] for name in names]
    return markdown(("", *(f"{name}: {direction}" for name, direction in columns)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where what was fetched and made of it is kept")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures (default: {OUT})")
    args = parser.parse_args()
    cache = cache_directory(args.cache)
    with tempfile.TemporaryDirectory() as scratch:
        asking = {"openclipart": outside(cache), "digitscenes": pictures(cache, Path(scratch, "pictures"))}
        found = {name: aurocs(SETS[name](cache), asking[name], Path(scratch, name)) for name in asking}
    machine = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    about = {"fastprob": fastprob.__version__, "torch": torch.__version__, "machine": machine, "seeds": list(SEEDS)}
    write_atomically(args.out, json.dumps(about | {"AUROC": found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
