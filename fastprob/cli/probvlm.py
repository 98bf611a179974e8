"""`fastprob embed`, `fit`, `eval`, `predict` and `rank`: ProbVLM on an embedding store."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprob.cli._command import (
    DATA,
    READING,
    TRUTH,
    Command,
    add_encoder,
    add_fields,
    add_options,
    add_reading,
    device_of,
    load_encoder_of,
    open_data,
    read_truth,
    refuse,
    write_report,
)

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from torch import Tensor

    from fastprob.adapters import ProbVLM
    from fastprob.data.store import EmbeddingStore


def open_store(path: Path) -> EmbeddingStore:
    """The store, every byte of it checked."""
    from fastprob.data.store import EmbeddingStore

    store = EmbeddingStore(path)
    store.verify()
    return store


# --------------------------------------------------------------------------------------------- embed


MAX_LOST = "largest share of captions that the tokenizer may cut off, and of unknown tokens (default: 0.1)"
ARRAY_OPTIONS = {
    "pairs": ".npy of integers, the image of each text (default: text i is image i's)",
    "captions": "what the texts are: a file with a line for each, or .parquet",
    "ids": "what the images are called: a file with a line for each, or .parquet",
    "encoder_name": "what made the arrays; stores of different names are kept apart",
}


def embed_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help=DATA)
    what.add_argument("--from-arrays", nargs=2, metavar=("IMAGE", "TEXT"), help="embeddings: .npy [N, D] and [M, D]")
    parser.add_argument("--out", required=True, type=Path, help="directory of the store")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where there is a store already")
    of_data = parser.add_argument_group("with --data")
    add_encoder(of_data)
    of_data.add_argument("--batch-size", type=int, default=256)
    of_data.add_argument("--shard-size", type=int, default=4096, help="images secured at a time (default: 4096)")
    of_data.add_argument("--workers", type=int, default=0, help="processes that load images")
    of_data.add_argument("--max-lost", type=float, default=0.1, help=MAX_LOST)
    add_reading(of_data)
    add_options(parser.add_argument_group("with --from-arrays"), ARRAY_OPTIONS)


def embed(args: argparse.Namespace) -> None:
    if args.data is None:
        refuse(args, [*READING, "model", "pretrained"], "--from-arrays")
        _embed_arrays(args)
    else:
        refuse(args, ARRAY_OPTIONS, "--data")
        _embed_data(args)


def _embed_data(args: argparse.Namespace) -> None:
    from fastprob.data.store import embed
    from fastprob.data.store_format import SKIPPED

    dataset = open_data(args)
    options = {name: getattr(args, name) for name in ("batch_size", "shard_size", "max_lost", "overwrite")}
    store = embed(dataset, load_encoder_of(args), args.out, num_workers=args.workers, **options)
    print(store, store.lost or "", sep="\n")
    skipped = getattr(dataset, "skipped", ())
    if skipped:
        what = f"{len(skipped)} bad rows, listed in {args.out / SKIPPED}"
        first = f"first {skipped[0]['row']}: {skipped[0]['reason']}"
        print(f"fastprob embed: left out {what}; {first}", file=sys.stderr)


def _embed_arrays(args: argparse.Namespace) -> None:
    from fastprob.data.arrays import embed_arrays, read_lines

    given = {
        name: None if getattr(args, name) is None else read_lines(getattr(args, name), name)
        for name in ("captions", "ids")
    }
    options = {"pairs": args.pairs, "encoder_name": args.encoder_name, "overwrite": args.overwrite}
    store = embed_arrays(*args.from_arrays, args.out, **options, **given)
    print(store)
    divided = store.metadata["source"]["normalised"]
    if divided:
        what = " and ".join(divided)
        print(f"fastprob embed: rows of {what} were divided by their norms, which were not all 1", file=sys.stderr)


# ----------------------------------------------------------------------------------------------- fit

FIT_HELP = {
    "epochs": "passes over the images",
    "batch_size": "images of a step",
    "lr": "initial learning rate of Adam",
    "cross_weight": "weight of the cross-modal likelihood",
    "l1_weight": "weight of the L1 terms",
    "nll_weight": "weight of the likelihood terms",
    "form": "residual term of the loss: paper or released",
    "cross": "cross-modal likelihood: delta, the paper's two terms, or exact, what they approximate (slower)",
    "hidden": "width of the adapter's hidden layers",
    "dropout": "probability of its dropout",
    "positive": "what ends its 1/alpha and beta heads: softplus or relu",
    "power": "beta of all distributions: 2 for Gaussians, 1 for Laplace distributions (default: predicted)",
    "seed": "of weights, batches and dropout",
}


def fit_options(parser: argparse.ArgumentParser) -> None:
    from fastprob.adapters import TrainConfig

    parser.add_argument("--store", required=True, type=Path, help="embedding store to train on")
    parser.add_argument("--val-store", type=Path, help="embedding store to choose the best epoch by")
    parser.add_argument("--out", required=True, type=Path, help="directory of checkpoints and history")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", help="default: CUDA where there is one")
    add_fields(parser, TrainConfig, FIT_HELP)


def fit(args: argparse.Namespace) -> None:
    from fastprob.adapters import TrainConfig, fit
    from fastprob.adapters.training import CHECKPOINT, ENCODER
    from fastprob.data.store import check_same_encoder

    if not args.resume and (args.out / "last.pt").exists():
        raise ValueError(f"{args.out} holds a run already; go on with it by --resume, or choose another --out")
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    data = open_store(args.store)
    validation = None if args.val_store is None else open_store(args.val_store)
    if validation is not None:
        check_same_encoder(data.encoder, str(data.path), validation)
    if args.resume:
        _check_encoder(args.out / ENCODER, data)
    options = {"validation": validation, "directory": args.out, "resume": args.resume, "device": device_of(args.device)}
    result = fit(data, config=config, **options)
    print(f"{args.out / CHECKPOINT}: NLL {result.nll_before:.4f} -> {result.nll_after:.4f} nats per dimension")


# ---------------------------------------------------------------------------------------------- eval


OUTSIDE = "another store of this encoder, whose images and texts have no match in --store: which score tells them?"


def eval_options(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser)
    parser.add_argument("--levels", type=int, default=10, help="levels of uncertainty (default: 10)")
    parser.add_argument("--truth", type=Path, help=TRUTH)
    parser.add_argument("--outside", type=Path, help=OUTSIDE)
    parser.add_argument(
        "--out", type=Path, help="directory of report.json, report.html and figures (default: only print)"
    )
    _add_page(parser)


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shown", type=int, default=8, help="most certain ones on the page, and least (default: 8)")
    parser.add_argument("--data", help="data set of the store, as embed took it, for pictures on the page")
    add_reading(parser.add_argument_group("with --data"))


def _of_page(args: argparse.Namespace, store: EmbeddingStore) -> dict[str, Any]:
    """What the page is told. Raises ValueError where --data is not the store's."""
    from fastprob.data.store import pictures_of

    if args.data is None:
        refuse(args, READING, f"{args.command} without --data")
    pictures = None if args.data is None else pictures_of(store, open_data(args))
    return {"shown": args.shown, "pictures": pictures, "checkpoint": args.checkpoint}


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--passes", type=int, default=20, help="dropout passes (default: 20; 0: aleatoric only)")
    parser.add_argument("--seed", type=int, default=0, help="of the dropout passes (default: 0)")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="embedding store")
    parser.add_argument("--checkpoint", required=True, type=Path, help="file, or directory of a run")
    parser.add_argument("--device", help="default: CUDA where there is one")


def open_adapter(args: argparse.Namespace) -> tuple[EmbeddingStore, ProbVLM]:
    store = open_store(args.store)
    return store, load_checkpoint(args.checkpoint, store).to(device_of(args.device))


def evaluate(args: argparse.Namespace) -> None:
    from fastprob.adapters.error import beside
    from fastprob.adapters.pages import check_shown, write_report_page
    from fastprob.adapters.report import evaluate_store

    if args.out is None:
        refuse(args, ["data"], "eval without --out")
    check_shown("eval", args.shown)
    store, model = open_adapter(args)
    of_page = _of_page(args, store)
    truth = None if args.truth is None else read_truth(args.truth, len(store.text), len(store.image))
    outside = None if args.outside is None else open_store(args.outside)
    known = {"truth": truth, "error": beside(args.checkpoint), "outside": outside}
    report = evaluate_store(model, store, passes=args.passes, levels=args.levels, seed=args.seed, **known)
    print(store, f"\n\n{report.table()}", sep="")
    if args.out is not None:
        figures = write_report(report, args.out, "eval")
        page = write_report_page(report, store, args.out / "report.html", figures=figures, **of_page)
        print(f"\nWritten to {page}")


def load_checkpoint(path: Path, store: EmbeddingStore) -> ProbVLM:
    """The model in a file or in a run's directory. Raises ValueError when it is none, or not for this store."""
    from fastprob.adapters import ProbVLM
    from fastprob.adapters.training import CHECKPOINT, ENCODER

    path = path / CHECKPOINT if path.is_dir() else path
    model = ProbVLM.load(path)
    _check_encoder(path.parent / ENCODER, store)
    if model.config["dim"] != store.dim:
        raise ValueError(f"{path} takes dimension {model.config['dim']}, {store.path} has {store.dim}")
    return model


# -------------------------------------------------------------------------------------- predict, rank


def predict_options(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser)
    parser.add_argument(
        "--out", required=True, type=Path, help="directory of images, texts, their predicted means and a page"
    )
    parser.add_argument("--format", default="csv", help="of the tables: csv, parquet or npy (default: csv)")
    parser.add_argument("--levels", type=int, default=10, help="levels of uncertainty (default: 10)")
    parser.add_argument("--overwrite", action="store_true", help="replace these files where they exist")
    _add_page(parser)


def predict(args: argparse.Namespace) -> None:
    from fastprob.adapters.error import beside
    from fastprob.adapters.predictions import write_predictions

    store, model = open_adapter(args)
    options = {name: getattr(args, name) for name in ("format", "passes", "levels", "seed", "overwrite")}
    options["error"] = beside(args.checkpoint)
    print(*write_predictions(model, store, args.out, **options, **_of_page(args, store)), sep="\n")


QUERY = "a text, an image file, or image:ROW or text:ROW of the store"


def rank_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", help=QUERY)
    _add_adapter(parser)
    parser.add_argument("--top", type=int, default=10, help="matches to print, best first (default: 10)")
    parser.add_argument("--by", default="cosine", help="what orders them: cosine or likelihood (default: cosine)")


def rank(args: argparse.Namespace) -> None:
    from fastprob.adapters.error import beside
    from fastprob.adapters.predictions import lines, rank

    store, model = open_adapter(args)
    side, _, query = find_query(args, store)
    other = "text" if side == "image" else "image"
    options = {name: getattr(args, name) for name in ("top", "by", "passes", "seed")}
    ranking = rank(getattr(model, side), query, getattr(model, other), getattr(store, other), **options)
    error, known = beside(args.checkpoint), {"captions": store.captions, "adapter": model, "seed": args.seed}
    wrong = error and error.of_query(query.cpu(), side, store, **known)
    print(*lines(store, other, ranking, wrong), sep="\n")


def find_query(args: argparse.Namespace, store: EmbeddingStore) -> tuple[str, int | None, Tensor]:
    """Whether the query is an image or a text, its row where it is one of the store's, and its embedding [D]."""
    named = re.fullmatch(r"(image|text):(\d+)", args.query)
    if named is not None:
        side, row = named[1], int(named[2])
        rows = getattr(store, side)
        if row >= len(rows):
            raise ValueError(f"{args.command}: {side} rows of {store.path} are 0..{len(rows) - 1}, got {row}")
        return side, row, rows[row]
    from fastprob.data.images import open_rgb
    from fastprob.encoders import load_encoder

    about = store.encoder
    if about["fingerprint"] is None:
        where = f"{args.command}: {store.path} was made from arrays, no encoder is known"
        raise ValueError(f"{where}: query image:ROW or text:ROW")
    encoder = load_encoder(about["model"], pretrained=about["pretrained"], device=device_of(args.device))
    if encoder.fingerprint() != about["fingerprint"]:
        raise ValueError(f"{args.command}: {encoder} is not the one that made {store.path}: its weights are others")
    if Path(args.query).is_file():
        return "image", None, encoder.encode_image(encoder.preprocess(open_rgb(Path(args.query)))[None])[0]
    return "text", None, encoder.encode_text(encoder.tokenizer([args.query]))[0]


# ------------------------------------------------------------------- the encoder that a run belongs to


def _check_encoder(file: Path, store: EmbeddingStore) -> None:
    """Raises ValueError when a run's encoder file is damaged or names another encoder. No file, no check."""
    from fastprob.data.store import check_same_encoder

    if not file.exists():
        return
    try:
        encoder = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected the JSON of an encoder, got: {error}") from error
    if not isinstance(encoder, dict) or not {"model", "fingerprint"} <= encoder.keys():
        raise ValueError(f"{file}: expected an encoder's model and fingerprint, got {encoder!r}")
    check_same_encoder(encoder, str(file.parent), store)


COMMANDS = {
    "embed": Command(
        "encode a data set once into an embedding store",
        embed_options,
        embed,
        "the same command, without --overwrite, resumes",
    ),
    "fit": Command(
        "train a ProbVLM adapter on a store", fit_options, fit, "the same command with --resume goes on from there"
    ),
    "eval": Command("recall, likelihood and calibration of an adapter on a store", eval_options, evaluate),
    "predict": Command("the uncertainty of every image and text of a store, as files", predict_options, predict),
    "rank": Command("the matches of a text or image in a store, with their uncertainty", rank_options, rank),
}
