"""`fastprob calibrate`: the probability that the first match is wrong, and how near a set's items have to be that the
right one is among them, fitted once and kept beside an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastprob.cli._command import TRUTH, Command, device_of, read_truth


def calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="embedding store that the adapter was not trained on")
    parser.add_argument("--checkpoint", required=True, type=Path, help="file, or directory of a run")
    parser.add_argument("--truth", type=Path, help=TRUTH)
    parser.add_argument("--passes", type=int, default=20, help="dropout passes (default: 20; 0: aleatoric only)")
    parser.add_argument("--seed", type=int, default=0, help="of the dropout passes and the parts (default: 0)")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace what was fitted before")


def calibrate(args: argparse.Namespace) -> None:
    from fastprob.adapters.error import SIDES, file_beside, fit_error
    from fastprob.cli.probvlm import load_checkpoint, open_store

    file = file_beside(args.checkpoint)
    if file.exists() and not args.overwrite:
        raise ValueError(f"{file} exists already; replace it by --overwrite")
    store = open_store(args.store)
    adapter = load_checkpoint(args.checkpoint, store).to(device_of(args.device))
    options = {"passes": args.passes, "seed": args.seed}
    if args.truth is not None:
        options |= {"match": read_truth(args.truth, len(store.text), len(store.image)).T, "rule": "true"}
    elif store.labels is not None:
        options |= {"match": (store.labels, store.labels[store.caption_image]), "rule": "class"}
    model = fit_error(store, captions=store.captions, adapter=adapter, **options)
    model.save(file)
    p = model(store, captions=store.captions, adapter=adapter)
    for side in SIDES:
        print(f"{side}s: the first match is wrong with a mean probability of {float(p[side].mean()):.3f}")
    for coverage, least in model.conformal.items():
        print(f"texts: their own image has a cosine of {least:.3f} or more with a probability of {coverage}")
    print(f"{file}: eval, predict and rank use it")


COMMANDS = {
    "calibrate": Command(
        "fit the probability that the first match is wrong, beside an adapter", calibrate_options, calibrate
    )
}
