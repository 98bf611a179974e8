"""`fastprob calibrate`: the probability that the first match is wrong, fitted once and kept beside an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastprob.cli._command import Command, device_of

if TYPE_CHECKING:
    from torch import Tensor


def calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="embedding store that the adapter was not trained on")
    parser.add_argument("--checkpoint", required=True, type=Path, help="file, or directory of a run")
    parser.add_argument("--truth", type=Path, help=TRUTH)
    parser.add_argument("--passes", type=int, default=20, help="dropout passes (default: 20; 0: aleatoric only)")
    parser.add_argument("--seed", type=int, default=0, help="of the dropout passes and the parts (default: 0)")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace what was fitted before")


TRUTH = ".npy of bool [texts, images], which are true of which (default: a text of the image it was written for)"


def calibrate(args: argparse.Namespace) -> None:
    from fastprob.adapters.error import FILE, SIDES, fit_error
    from fastprob.cli.probvlm import load_checkpoint, open_store

    file = (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent) / FILE
    if file.exists() and not args.overwrite:
        raise ValueError(f"{file} exists already; replace it by --overwrite")
    store = open_store(args.store)
    adapter = load_checkpoint(args.checkpoint, store).to(device_of(args.device))
    truth = None if args.truth is None else read_truth(args.truth, len(store.text), len(store.image))
    options = {"truth": truth, "passes": args.passes, "seed": args.seed}
    model = fit_error(store, captions=store.captions, adapter=adapter, **options)
    model.save(file)
    p = model(store, captions=store.captions, adapter=adapter)
    for side in SIDES:
        print(f"{side}s: the first match is wrong with a mean probability of {float(p[side].mean()):.3f}")
    print(f"{file}: eval, predict and rank use it")


def read_truth(path: Path, texts: int, images: int) -> Tensor:
    """Raises ValueError unless the file has a bool [texts, images]."""
    import numpy as np
    import torch

    from fastprob.data.arrays import read_array

    truth = read_array("truth", path)
    if truth.dtype != np.bool_ or truth.shape != (texts, images):
        raise ValueError(f"{path}: truth must be bool {[texts, images]}, got {truth.dtype} {list(truth.shape)}")
    return torch.from_numpy(np.array(truth))


COMMANDS = {
    "calibrate": Command(
        "fit the probability that the first match is wrong, beside an adapter", calibrate_options, calibrate
    )
}
