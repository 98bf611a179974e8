"""`fastprob select` and `noisy`: what to label next, and which captions are wrong."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastprob.cli._command import Command, check_new, device_of
from fastprob.cli.probvlm import load_checkpoint, open_store

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from fastprob.adapters import ProbVLM
    from fastprob.data.store import EmbeddingStore


def select_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="embedding store of the pool")
    parser.add_argument("--checkpoint", type=Path, help="file, or directory of a run; for total and p_wrong")
    parser.add_argument("--count", required=True, type=int, help="images to choose")
    parser.add_argument("--by", default="coreset", help="total, p_wrong, coreset or random (default: coreset)")
    parser.add_argument("--out", required=True, type=Path, help="file of the chosen images' ids, or rows, a line each")
    parser.add_argument("--passes", type=int, default=20, help="dropout passes of total (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of passes, random, and coreset's first (default: 0)")
    parser.add_argument("--device", help="default: CUDA where there is one")


def select(args: argparse.Namespace) -> None:
    from fastprob._files import write_atomically
    from fastprob.adapters.error import beside, file_beside
    from fastprob.adapters.selection import choose

    check_new(args.out)
    store = open_store(args.store)
    adapter, errors = _adapter(args, store), None
    if args.by == "p_wrong" and args.checkpoint is not None:
        errors = beside(args.checkpoint)
        if errors is None:
            raise ValueError(f"--by p_wrong needs {file_beside(args.checkpoint)}, which fastprob calibrate writes")
    options = {"by": args.by, "passes": args.passes, "seed": args.seed, "captions": store.captions}
    rows = choose(store, args.count, adapter=adapter, errors=errors, **options).tolist()
    write_atomically(args.out, "".join(f"{store.ids[row] if store.ids else row}\n" for row in rows))
    print(f"{args.out}: {len(rows)} of {len(store.image)} images by {args.by}")


def noisy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="embedding store")
    parser.add_argument("--checkpoint", type=Path, help="file, or directory of a run: adds likelihood and match")
    by = "doubt, cosine, siblings, likelihood or match (default: doubt)"
    parser.add_argument("--by", default="doubt", help=f"what orders the captions: {by}")
    parser.add_argument("--out", required=True, type=Path, help="CSV file of the captions, the most suspicious first")
    parser.add_argument("--device", help="default: CUDA where there is one")


def noisy(args: argparse.Namespace) -> None:
    from fastprob.adapters.noisy import write_suspects

    check_new(args.out)
    store = open_store(args.store)
    print(write_suspects(store, args.out, adapter=_adapter(args, store), by=args.by))


def _adapter(args: argparse.Namespace, store: EmbeddingStore) -> ProbVLM | None:
    if args.checkpoint is None:
        return None
    return load_checkpoint(args.checkpoint, store).to(device_of(args.device))


COMMANDS = {
    "select": Command("images of a pool to label next", select_options, select),
    "noisy": Command("captions of a store, the likely wrong ones first", noisy_options, noisy),
}
