"""The `fastprob` command: embed -> fit -> eval, prompt fit -> eval -> predict, explain, pretrain, and info, demo.

A user's mistake (a missing file, an unknown model, sizes that don't fit) prints one line and exits with 2; Ctrl-C
prints how to resume and exits with 130. Option names follow open_clip's.

A command imports what it needs beyond torch when it runs; the three that fit for their options too.
"""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastprob.cli import calibrate, draw, explain, pretrain, probvlm, prompt, selection
from fastprob.cli._command import Command

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)


def no_options(parser: argparse.ArgumentParser) -> None:
    pass


def info(args: argparse.Namespace) -> None:
    import fastprob

    print(fastprob.info())


DEMOS = ("probvlm", "prompts", "explain", "pretrain")


def demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=DEMOS, default="probvlm", help="default: probvlm")
    parser.add_argument("--out", type=Path, default=Path("fastprob-demo"), help="directory (default: fastprob-demo)")


def demo(args: argparse.Namespace) -> None:
    importlib.import_module(f"fastprob.demo.{args.what}").run(args.out)


COMMANDS = {
    **probvlm.COMMANDS,
    **calibrate.COMMANDS,
    **draw.COMMANDS,
    **selection.COMMANDS,
    **prompt.COMMANDS,
    **explain.COMMANDS,
    **pretrain.COMMANDS,
    "info": Command("which backend serves which operator, and why", no_options, info),
    "demo": Command("the whole way on real handwritten digits, without a download", demo_options, demo),
}
GROUPS = {
    group: f"{what}: {', '.join(name.split()[1] for name in commands)}"
    for group, what, commands in (
        ("prompt", "few-shot prompt tuning", prompt.COMMANDS),
        ("pretrain", "ALBEF and BLIP", pretrain.COMMANDS),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code: 0, 2 or 130.

    Wrong options end in argparse's SystemExit(2).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(argv[: 2 if argv[:1] and argv[0] in GROUPS else 1])
    try:
        args, unknown = _parser(name).parse_known_args(argv)
        if unknown:
            args.subparser.error(f"unrecognized arguments: {' '.join(unknown)}")  # with this command's usage
        COMMANDS[name].run(args)
    except KeyboardInterrupt:
        resume = f": {COMMANDS[name].resume}" if name in COMMANDS else ""
        print(f"\nfastprob {name}: interrupted{resume}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"fastprob {name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser(called: str) -> argparse.ArgumentParser:
    """Only the command that is called gets its options: some come from modules that take long to import."""
    parser = argparse.ArgumentParser(
        prog="fastprob",
        description="Uncertainty for frozen vision-language encoders (embed, fit, eval), prompt tuning and pretraining",
        allow_abbrev=False,
    )
    options = {"dest": "command", "required": True, "metavar": "command"}
    parser.add_argument("--version", action="version", version=f"fastprob {importlib.metadata.version('fastprob')}")
    parents = {"": parser.add_subparsers(**options)}
    for group, text in GROUPS.items():
        parents[group] = parents[""].add_parser(group, help=text, description=text).add_subparsers(**options)
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        text = command.help
        subparser = parents[group].add_parser(last, help=text, description=text, allow_abbrev=False)
        subparser.set_defaults(subparser=subparser)
        if name == called:
            command.options(subparser)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if "Original Traceback" in text:  # how DataLoader passes on the error of a worker process
        text = text.splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__
