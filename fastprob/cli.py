"""The `fastprob` command: embed -> fit -> eval, and info, demo.

A user's mistake (a missing file, an unknown model, sizes that don't fit) prints one line and exits with 2; Ctrl-C
prints how to resume and exits with 130. Option names follow open_clip's.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from fastprob.adapters import ProbVLM
    from fastprob.data.store import EmbeddingStore

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
CHECKPOINT = "best.safetensors"
ENCODER = "encoder.json"  # in a run's directory: the encoder whose embeddings it was trained on


# --------------------------------------------------------------------------------------------- embed


def embed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="data set: digitscenes:train, :val, :test, or a path")
    parser.add_argument("--out", required=True, type=Path, help="directory of the store")
    parser.add_argument("--model", default="tiny", help="open_clip model, or the built-in one (default: tiny)")
    parser.add_argument("--pretrained", help="open_clip tag or checkpoint file")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where there is a store already")


def embed(args: argparse.Namespace) -> None:
    from fastprob.data.captions import open_dataset
    from fastprob.data.store import embed
    from fastprob.encoders import load_encoder

    dataset = open_dataset(args.data)
    device = _device(args.device)
    try:
        encoder = load_encoder(args.model, pretrained=args.pretrained, device=device)
    except RuntimeError as error:  # open_clip's, of weights that it can't download
        raise ValueError(f"--model {args.model}: {error}") from error
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "overwrite": args.overwrite}
    print(embed(dataset, encoder, args.out, **options))


# ----------------------------------------------------------------------------------------------- fit

FIT_HELP = {
    "epochs": "passes over the images",
    "batch_size": "images of a step",
    "lr": "initial learning rate of Adam",
    "cross_weight": "weight of the cross-modal likelihood",
    "l1_weight": "weight of the L1 terms",
    "nll_weight": "weight of the likelihood terms",
    "form": "residual term of the loss: paper or released",
    "hidden": "width of the adapter's hidden layers",
    "dropout": "probability of its dropout",
    "positive": "what ends its 1/alpha and beta heads: softplus or relu",
    "seed": "of weights, batches and dropout",
}


def fit_options(parser: argparse.ArgumentParser) -> None:
    from fastprob.adapters import TrainConfig

    parser.add_argument("--store", required=True, type=Path, help="embedding store to train on")
    parser.add_argument("--val-store", type=Path, help="embedding store to choose the best epoch by")
    parser.add_argument("--out", required=True, type=Path, help="directory of checkpoints and history")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", help="default: CUDA where there is one")
    for field in dataclasses.fields(TrainConfig):
        name = "--" + field.name.replace("_", "-")
        described = f"{FIT_HELP[field.name]} (default: {field.default})"
        parser.add_argument(name, type=type(field.default), default=field.default, help=described)


def fit(args: argparse.Namespace) -> None:
    from fastprob.adapters import TrainConfig, fit
    from fastprob.data.store import EmbeddingStore

    if not args.resume and (args.out / "last.pt").exists():
        raise ValueError(f"{args.out} holds a run already; go on with it by --resume, or choose another --out")
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    data = EmbeddingStore(args.store)
    validation = None if args.val_store is None else EmbeddingStore(args.val_store)
    if validation is not None:
        _check_same_encoder(_encoder_of(data), str(data.path), validation)
    if args.resume:
        _check_encoder(args.out / ENCODER, data)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ENCODER).write_text(json.dumps(_encoder_of(data), indent=1) + "\n", encoding="utf-8")
    options = {"validation": validation, "directory": args.out, "resume": args.resume, "device": _device(args.device)}
    result = fit(data, config=config, **options)
    print(f"{args.out / CHECKPOINT}: NLL {result.nll_before:.4f} -> {result.nll_after:.4f} nats per dimension")


# ---------------------------------------------------------------------------------------------- eval


def eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="embedding store to evaluate on")
    parser.add_argument("--checkpoint", required=True, type=Path, help=f"file, or run directory with {CHECKPOINT}")
    parser.add_argument("--out", type=Path, help="directory of report.json and figures (default: only print)")
    parser.add_argument("--passes", type=int, default=20, help="dropout passes (default: 20; 0: aleatoric only)")
    parser.add_argument("--levels", type=int, default=10, help="levels of uncertainty (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the dropout passes (default: 0)")
    parser.add_argument("--device", help="default: CUDA where there is one")


def evaluate(args: argparse.Namespace) -> None:
    from fastprob.data.store import EmbeddingStore
    from fastprob.uncertainty.report import evaluate_store

    store = EmbeddingStore(args.store)
    model = _load_checkpoint(args.checkpoint, store).to(_device(args.device))
    report = evaluate_store(model, store, passes=args.passes, levels=args.levels, seed=args.seed)
    print(store, f"\n\n{report.table()}", sep="")
    if args.out is not None:
        report.save(args.out)
        try:
            report.draw(args.out)
        except ImportError as error:
            print(f"fastprob eval: no figures: {error}", file=sys.stderr)


def _load_checkpoint(path: Path, store: "EmbeddingStore") -> "ProbVLM":
    """The model in a file or in a run's directory. Raises ValueError when it is none, or not for this store."""
    from fastprob.adapters import ProbVLM

    path = path / CHECKPOINT if path.is_dir() else path
    model = ProbVLM.load(path)
    _check_encoder(path.parent / ENCODER, store)
    if model.config["dim"] != store.dim:
        raise ValueError(f"{path} takes dimension {model.config['dim']}, {store.path} has {store.dim}")
    return model


# ------------------------------------------------------------------- the encoder that a run belongs to


def _check_encoder(file: Path, store: "EmbeddingStore") -> None:
    """Raises ValueError when a run's encoder file names another encoder than the store's. No file, no check."""
    if file.exists():
        _check_same_encoder(json.loads(file.read_text(encoding="utf-8")), str(file.parent), store)


def _check_same_encoder(encoder: dict[str, Any], owner: str, store: "EmbeddingStore") -> None:
    """Equal widths are not enough: adapters do not transfer between encoders."""
    ours = _encoder_of(store)
    if encoder["fingerprint"] != ours["fingerprint"]:
        raise ValueError(f"{owner} and {store.path} are of different encoders: {encoder} and {ours}")


def _encoder_of(store: "EmbeddingStore") -> dict[str, Any]:
    return {key: store.metadata["source"][key] for key in ("model", "pretrained", "dim", "fingerprint")}


# --------------------------------------------------------------------------------------- info, demo


def no_options(parser: argparse.ArgumentParser) -> None:
    pass


def info(args: argparse.Namespace) -> None:
    import fastprob

    print(fastprob.info())


def demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("fastprob-demo"), help="directory (default: fastprob-demo)")


def demo(args: argparse.Namespace) -> None:
    from fastprob.demo import run

    run(args.out)


# ---------------------------------------------------------------------------------------------- main


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what it does, its options, its function, and how to go on after Ctrl-C."""

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    resume: str = "run it again"


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
    "info": Command("which backend serves which operator, and why", no_options, info),
    "demo": Command("the whole way on real handwritten digits, without a download", demo_options, demo),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code: 0, 2 or 130.

    Wrong options end in argparse's SystemExit(2).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(argv).parse_args(argv)
        COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        resume = f": {COMMANDS[argv[0]].resume}" if argv[0] in COMMANDS else ""
        print(f"\nfastprob {argv[0]}: interrupted{resume}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"fastprob {argv[0]}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Only the command that is called gets its options: those of fit come from a module that takes long to import."""
    parser = argparse.ArgumentParser(
        prog="fastprob",
        description="Uncertainty for frozen vision-language encoders: embed, fit, eval",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        if argv[:1] == [name]:
            command.options(subparser)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if "Original Traceback" in text:  # how DataLoader passes on the error of a worker process
        text = text.splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def _device(name: str | None) -> str:
    """Raises ValueError for a device that torch can't use here."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
