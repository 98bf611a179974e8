"""What the subcommands share: how one is described, options that come from dataclasses, the encoder and the device."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from fastprob.encoders import Encoder


GOOD_MODELS = (
    "as --model ViT-B-32 --pretrained laion2b_s34b_b79k (fast), ViT-B-16-SigLIP2 and webli, or ViT-L-14 and "
    "datacomp_xl_s13b_b90k"
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what it does, its options, its function, and how to go on after Ctrl-C."""

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    resume: str = "run it again"


def add_fields(
    parser: argparse.ArgumentParser, config: type, help: Mapping[str, str], but: Container[str] = ()
) -> None:
    """An option for every field of a dataclass, described by `help`, except those in `but`; not given, it is None where
    that is the field's default."""
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in but:
            continue
        name, described = "--" + field.name.replace("_", "-"), help[field.name].replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true", help=described)
        else:
            described += f" (default: {field.default!r})" if field.default not in ("", None) else ""
            kind = next((each for each in typing.get_args(types[field.name]) if each is not type(None)), None)
            parser.add_argument(name, type=kind or types[field.name], default=field.default, help=described)


def add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="open_clip model, or tiny, the built-in one and the default for built-in digits"
    )
    parser.add_argument("--pretrained", help="open_clip tag or checkpoint file")
    parser.add_argument("--device", help="default: CUDA where there is one")


def load_encoder_of(args: argparse.Namespace) -> Encoder:
    """The encoder that --model, --pretrained and --device name, for the --data. Raises ValueError without a --model for
    other data than digits, which are all that the built-in one reads."""
    from fastprob.encoders import load_encoder

    model = args.model or ("tiny" if args.data.split(":")[0] in ("digits", "digitscenes") else None)
    if model is None:
        raise ValueError(f"--model is needed for {args.data}, {GOOD_MODELS}; see open_clip.list_pretrained()")
    device = device_of(args.device)
    try:
        return load_encoder(model, pretrained=args.pretrained, device=device)
    except RuntimeError as error:  # open_clip's, of weights that it can't download
        raise ValueError(f"--model {model}: {error}") from error


def write_report(report: Any, directory: Path, command: str) -> None:
    """Save a report and draw its figures, or say on stderr that there are none without matplotlib."""
    report.save(directory)
    try:
        report.draw(directory)
    except ImportError as error:
        print(f"fastprob {command}: no figures: {error}", file=sys.stderr)


def device_of(name: str | None) -> str:
    """Raises ValueError for a device that torch can't use here."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
