"""`fastprob pretrain fit`, `eval`, `caption` and `filter`: ALBEF and BLIP on captioned images."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprob.cli._command import DATA, Command, add_fields, add_reading, check_new, device_of, drawn, open_data

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from fastprob.data.pixels import Pixels
    from fastprob.pretraining.config import Pretrained


def fit_options(parser: argparse.ArgumentParser) -> None:
    from fastprob.pretraining import need_transformers

    need_transformers("pretrain")
    from fastprob.pretraining.config import PretrainConfig

    parser.add_argument("--data", required=True, help=DATA)
    parser.add_argument("--out", required=True, type=Path, help="directory of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--start", type=Path, help="directory of a run of the same objective and size, to go on from")
    parser.add_argument("--tokenizer", help="transformers' name or directory (default: the captions' own words)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", help="default: CUDA where there is one")
    add_fields(parser, PretrainConfig, {f.name: f.metadata["help"] for f in dataclasses.fields(PretrainConfig)})
    add_reading(parser.add_argument_group("of the data set"))


def fit(args: argparse.Namespace) -> None:
    from fastprob.pretraining.config import MODEL, PretrainConfig, Pretrained
    from fastprob.pretraining.pages import draw_losses
    from fastprob.pretraining.training import fit
    from fastprob.training import LAST, joined, rank

    config = PretrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(PretrainConfig)})
    if not args.resume and ((args.out / LAST).exists() or (args.out / MODEL).exists()):
        raise ValueError(f"{args.out} holds a run already; go on with it by --resume, or choose another --out")
    options: dict[str, Any] = {"resume": args.resume, "workers": args.workers}
    options["tokenizer"] = None if args.tokenizer is None else tokenizer_of(args.tokenizer)
    options["start"] = None if args.start is None else Pretrained.load(args.start)
    data = open_data(args)
    with joined(device_of(args.device)) as device:
        first = rank() == 0
        _, history = fit(data, config=config, directory=args.out, device=device, progress=first, **options)
    if first:
        each = ", ".join(f"{name} {values[-1]:.4f}" for name, values in history["losses"].items())
        print(f"{args.out / MODEL}: loss {history['train_loss'][-1]:.4f} ({each})")
        drawn("pretrain fit", lambda: draw_losses(history["losses"], args.out / "losses.png"))


def tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name}: {error}") from error


def use_options(parser: argparse.ArgumentParser) -> None:
    from fastprob.pretraining import need_transformers

    need_transformers("pretrain")
    parser.add_argument("--data", required=True, help=DATA)
    parser.add_argument("--checkpoint", required=True, type=Path, help="directory of a run of `pretrain fit`")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", help="default: CUDA where there is one")
    add_reading(parser.add_argument_group("of the data set"))


def opened(args: argparse.Namespace) -> tuple[Any, Pretrained, Pixels]:
    """The data set, the model, and the images as it takes them."""
    from fastprob.data.pixels import ImagesOf, Pixels
    from fastprob.pretraining.config import Pretrained

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    made = Pretrained.load(args.checkpoint, device_of(args.device))
    data = open_data(args)
    return data, made, Pixels(ImagesOf(data), made.preprocess, batch_size=args.batch_size, workers=args.workers)


# ----------------------------------------------------------------------------------------------- eval


def eval_options(parser: argparse.ArgumentParser) -> None:
    use_options(parser)
    parser.add_argument("--first", type=int, default=128, help="of each query, how many are matched (default: 128)")
    parser.add_argument("--out", type=Path, help="new file: the figures, as JSON")


def evaluate(args: argparse.Namespace) -> None:
    import json

    import torch

    from fastprob._files import write_atomically
    from fastprob.data.captions import captions_of
    from fastprob.evaluation.tables import aligned
    from fastprob.pretraining.retrieval import recalls, retrieve

    check_new(args.out)
    data, made, pixels = opened(args)
    captions = captions_of(data)
    image = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(own) for own in captions]))
    texts = [caption for own in captions for caption in own]
    found = retrieve(made.model, pixels, texts, first=args.first)
    own = image[:, None] == torch.arange(len(captions))  # [M, N]
    results = {
        f"{direction}, by {way}": recalls(getattr(each, f"by_{way}"), truth)
        for direction, each, truth in zip(("image -> text", "text -> image"), found, (own.T, own))
        for way in ("contrast", "matching")
    }
    at = sorted({n for each in results.values() for n in each})
    rows = [[name, *(f"{each[n]:.3f}" if n in each else "" for n in at)] for name, each in results.items()]
    print(aligned(["", *(f"recall@{n}" for n in at)], rows))
    if args.out is not None:
        write_atomically(args.out, json.dumps(results, indent=1) + "\n")


# ------------------------------------------------------------------------------------ caption, filter


PAGE = "new file: the first pictures over their captions, as one HTML file"

GENERATE = {
    "num_beams": (int, "beam search, greedy with 1 (default: words are drawn)"),
    "top_p": (float, "of drawn words: the likeliest that make up so much (default: 0.9)"),
    "top_k": (int, "of drawn words: the likeliest so many (default: all)"),
    "temperature": (float, "of drawn words (default: 1)"),
    "repetition_penalty": (float, "above 1, against words that have been (default: 1)"),
    "min_new_tokens": (int, "least length (default: 0)"),
    "max_new_tokens": (int, "greatest length (default: 20, or what the model has)"),
}


def caption_options(parser: argparse.ArgumentParser) -> None:
    use_options(parser)
    parser.add_argument("--out", required=True, type=Path, help="new file: COCO's JSON, for --data of other commands")
    parser.add_argument("--page", type=Path, help=PAGE)
    parser.add_argument("--with-own", action="store_true", help="beside the captions that the data has")
    parser.add_argument("--prompt", default="", help="how every caption begins; it is left out of them")
    parser.add_argument("--seed", type=int, default=0, help="of drawn words (default: 0)")
    for name, (kind, text) in GENERATE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=text)


def caption(args: argparse.Namespace) -> None:
    from fastprob.data.captions import captions_of
    from fastprob.pretraining.capfilt import save_captions, write_captions
    from fastprob.pretraining.objectives import BLIP
    from fastprob.pretraining.pages import write_captioned

    check_new(args.out)
    check_new(args.page, "--page")
    data, made, pixels = opened(args)
    if not isinstance(made.model, BLIP):
        raise ValueError(f"{args.checkpoint}: must be a run of blip to write captions, got {made.config.objective}")
    options = {name: getattr(args, name) for name in GENERATE if getattr(args, name) is not None}
    if "num_beams" not in options:
        options = {"do_sample": True, "top_p": 0.9, "top_k": 0} | options
    written = write_captions(made.model, pixels, prompt=args.prompt, seed=args.seed, **options)
    own = captions_of(data) if args.with_own else [[] for _ in written]
    captions = [[*before, text] if text else before for before, text in zip(own, written)]
    saved = save_captions(args.out, pixels.images, files_of(data), captions)
    print(f"{sum(map(bool, written))} captions of {len(written)} images, for --data {saved}")
    if args.page is not None:
        lines = [[*(f"its own: {text}" for text in before), text] for before, text in zip(own, written)]
        write_captioned(args.page, f"Captions of {data.name}", data, lines, [("Model", str(args.checkpoint))])


def files_of(data: Any) -> list[Any]:
    """Where each image is: a Path, if it is a file."""
    return list(getattr(data, "images", [None] * len(data)))


def filter_options(parser: argparse.ArgumentParser) -> None:
    use_options(parser)
    parser.add_argument("--out", required=True, type=Path, help="new file: COCO's JSON, for --data of other commands")
    parser.add_argument("--page", type=Path, help=PAGE)
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability of a match (default: 0.5)")


def filter(args: argparse.Namespace) -> None:
    from fastprob.data.captions import captions_of
    from fastprob.pretraining.capfilt import match_probabilities, save_captions
    from fastprob.pretraining.pages import write_captioned

    check_new(args.out)
    check_new(args.page, "--page")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be in 0..1, got {args.threshold}")
    data, made, pixels = opened(args)
    captions = captions_of(data)
    matches = match_probabilities(made.model, pixels, captions)
    kept = [
        [caption for caption, probability in zip(*both) if probability >= args.threshold]
        for both in zip(captions, matches)
    ]
    before, after = (sum(map(len, each)) for each in (captions, kept))
    if not after:
        raise ValueError(f"no caption of {before} is a match by --threshold {args.threshold}")
    saved = save_captions(args.out, pixels.images, files_of(data), kept)
    print(f"{after} of {before} captions, of {sum(map(bool, kept))} of {len(kept)} images, for --data {saved}")
    if args.page is not None:
        said = [("Model", str(args.checkpoint)), ("Kept", f"{after} of {before}, from {args.threshold:g} on")]
        lines = [
            [f"{match:.2f} {text}" + ("" if match >= args.threshold else ": left out") for text, match in zip(*both)]
            for both in zip(captions, matches)
        ]
        write_captioned(args.page, f"What matches in {data.name}", data, lines, said)


COMMANDS = {
    "pretrain fit": Command(
        "train ALBEF or BLIP on captioned images", fit_options, fit, "the same command with --resume goes on from there"
    ),
    "pretrain eval": Command("retrieval, by contrast and then by matching", eval_options, evaluate),
    "pretrain caption": Command("captions that a BLIP writes, as a data set", caption_options, caption),
    "pretrain filter": Command("the captions that a model takes for matches, as a data set", filter_options, filter),
}
