"""`fastprob prompt fit`, `eval` and `predict`: few-shot tuning of prompts, by method, shots and seed."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from fastprob.cli._command import Command, add_encoder, add_fields, device_of, load_encoder_of, write_report

if TYPE_CHECKING:
    from fastprob.prompts import PromptConfig

DATA = "digits:<shift>, CoOp's split_zhou_*.json[@images], or a directory with train/ and test/"


def fit_options(parser: argparse.ArgumentParser) -> None:
    from fastprob.prompts import PromptConfig

    help = {field.name: field.metadata["help"] for field in dataclasses.fields(PromptConfig)}
    parser.add_argument("--data", required=True, help=DATA)
    parser.add_argument("--out", required=True, type=Path, help="directory: <method>/<shots>-shot/seed<seed>/ in it")
    parser.add_argument("--method", nargs="+", default=["dapt"], help="one or more of coop, cocoop, vpt, dapt")
    parser.add_argument("--shots", nargs="+", type=int, default=[16], help=f"{help['shots']} (default: 16)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help=f"{help['seed']} (default: 1 2 3)")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out; finished ones are kept")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    add_encoder(parser)
    add_fields(parser, PromptConfig, help, but=("method", "shots", "seed"))


def fit(args: argparse.Namespace) -> None:
    from fastprob.data.labelled import open_splits
    from fastprob.prompts import fit
    from fastprob.prompts.training import CHECKPOINT
    from fastprob.training import LAST

    configs = _configs(args)
    runs = {args.out / config.directory: config for config in configs}
    for directory in runs:
        if not args.resume and ((directory / LAST).exists() or (directory / CHECKPOINT).exists()):
            raise ValueError(f"{directory} holds a run already; go on with it by --resume, or choose another --out")
    train, encoder = open_splits(args.data)["train"], load_encoder_of(args)
    for number, (directory, config) in enumerate(runs.items(), start=1):
        print(f"[{number}/{len(runs)}] {directory}")
        resume = args.resume and (directory / LAST).exists()
        tuned = fit(train, encoder, config=config, directory=directory, resume=resume, workers=args.workers)
        print(f"{directory / CHECKPOINT}: loss {tuned.history['train_loss'][-1]:.4f}")


def _configs(args: argparse.Namespace) -> list[PromptConfig]:
    """By method, shots and seed. All are checked before the first one runs."""
    from fastprob.prompts import PromptConfig

    fields = {field.name for field in dataclasses.fields(PromptConfig)} - {"method", "shots", "seed"}
    options = {name: getattr(args, name) for name in fields}
    return [
        PromptConfig(method=method, shots=shots, seed=seed, **options)
        for method, shots, seed in itertools.product(args.method, args.shots, args.seeds)
    ]


def eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help=DATA)
    parser.add_argument("--runs", required=True, type=Path, help="directory with runs of `prompt fit`, at any depth")
    parser.add_argument("--split", default="test", help="test, val or train (default: test)")
    parser.add_argument("--template", help="prompt of the zero-shot predictions (default: the data set's)")
    parser.add_argument("--no-linear-probe", action="store_true", help="no linear probe of each run's images")
    parser.add_argument("--out", type=Path, help="directory of report.md, results.json and figures")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", help="default: CUDA where there is one")


def evaluate(args: argparse.Namespace) -> None:
    from fastprob.data.labelled import open_splits
    from fastprob.prompts.report import evaluate_runs

    splits = open_splits(args.data)
    if args.split not in splits:
        raise ValueError(f"--split must be one of {sorted(splits)}, got {args.split!r}")
    options = {"split": args.split, "template": args.template, "workers": args.workers}
    options |= {"probe": not args.no_linear_probe, "device": device_of(args.device)}
    report = evaluate_runs(args.runs, splits, **options)
    print(report.table())
    if args.out is not None:
        write_report(report, args.out, "prompt eval")


def predict_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--checkpoint", required=True, type=Path, help="prompt.safetensors, or the run that holds it")
    parser.add_argument("--top", type=int, default=3, help="classes to print, likeliest first (default: 3)")
    parser.add_argument("--device", help="default: CUDA where there is one")


def predict(args: argparse.Namespace) -> None:
    import torch

    from fastprob.data.labelled import LabelledImages
    from fastprob.prompts import Inputs, Tuned, predict
    from fastprob.prompts.training import CHECKPOINT

    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    path = args.checkpoint / CHECKPOINT if args.checkpoint.is_dir() else args.checkpoint
    tuned = Tuned.load(path, device=device_of(args.device))
    labels = torch.zeros(len(args.images), dtype=torch.long)  # unknown
    data = LabelledImages("images", args.images, labels, tuned.classnames)
    top = predict(tuned, Inputs(data, tuned.encoder, progress=False)).topk(min(args.top, len(tuned.classnames)))
    for image, values, classes in zip(args.images, top.values.tolist(), top.indices.tolist()):
        print(image, *(f"{tuned.classnames[c]} {value:.3f}" for value, c in zip(values, classes)), sep="\t")


COMMANDS = {
    "prompt fit": Command(
        "tune the prompts of CoOp, CoCoOp, VPT or DAPT on a few images of every class",
        fit_options,
        fit,
        "the same command with --resume goes on from there",
    ),
    "prompt eval": Command("accuracy, macro-F1 and calibration of tuned prompts, and figures", eval_options, evaluate),
    "prompt predict": Command("the likeliest classes of image files", predict_options, predict),
}
