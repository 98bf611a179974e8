"""What the subcommands share: how one is described, options that come from dataclasses, the encoder and the device."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from torch import Tensor

    from fastprob.encoders import Encoder

T = TypeVar("T")

GOOD_MODELS = (
    "as --model ViT-B-32 --pretrained laion2b_s34b_b79k (fast), ViT-B-16-SigLIP2 and webli, or ViT-L-14 and "
    "datacomp_xl_s13b_b90k"
)
MODEL = (
    "open_clip model; tiny, the built-in one and the default for built-in digits; run:DIRECTORY of `pretrain fit`; "
    "released:FILE of ALBEF or BLIP"
)
DATA = (
    "data set: a table of captions (.csv, .tsv, .parquet), COCO's or Karpathy's .json, Flickr30k's or Flickr8k's file, "
    "each with @DIRECTORY of its images where they are not beside it; a directory: of images by class, of images with "
    ".txt files, of webdataset's .tar, CUB's, Flowers'; hf:NAME:SPLIT; digitscenes:train, :val, :test"
)
DATA_OPTIONS = {
    "image_key": "column of the images' paths (default: image, filepath, file_name or image_path)",
    "caption_key": "column of the captions (default: caption, title or text)",
    "separator": "what separates columns (default: the one of , ; and tab that the header has)",
    "split": "of Karpathy's JSON: train, restval, val, test, or several joined by + (default: all)",
    "template": "captions of images by class (default: 'a photo of a {}.')",
}

READING = (*DATA_OPTIONS, "limit", "allow_outside", "skip_bad")
"""All that says how --data is read."""


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
    parser.add_argument("--model", help=MODEL)
    parser.add_argument("--pretrained", help="open_clip tag or checkpoint file; of released: its tokenizer")
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


def add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--limit", type=int, help="only the first images, so many of them")
    add_options(group, DATA_OPTIONS)
    group.add_argument("--allow-outside", action="store_true", help="take images outside of the directory of images")
    group.add_argument("--skip-bad", action="store_true", help="leave out rows that can't be used and list them")


def open_data(args: argparse.Namespace) -> Any:
    from fastprob.data.captions import open_dataset

    return open_dataset(args.data, **{name: getattr(args, name) for name in READING})


def refuse(args: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Raises ValueError for the first of these options that is given."""
    odd = ["--" + name.replace("_", "-") for name in names if getattr(args, name)]
    if odd:
        raise ValueError(f"{odd[0]} is not for {where}")


def check_new(path: Path | None, option: str = "--out") -> None:
    """Before anything long is done. Raises ValueError for a file that exists."""
    if path is not None and path.exists():
        raise ValueError(f"{option} must be a new file, {path} exists already")


def add_options(group: argparse._ArgumentGroup, options: dict[str, str]) -> None:
    for name, text in options.items():
        group.add_argument("--" + name.replace("_", "-"), help=text)


def write_report(report: Any, directory: Path, command: str) -> list[tuple[str, Path]]:
    """Save a report and draw its figures; return title and file of each."""
    report.save(directory)
    return drawn(command, lambda: report.draw(directory)) or []


def drawn(command: str, draw: Callable[[], T]) -> T | None:
    """What `draw` returns; None, said on stderr, where it finds no matplotlib."""
    try:
        return draw()
    except ImportError as error:
        print(f"fastprob {command}: no figures: {error}", file=sys.stderr)
        return None


def device_of(name: str | None) -> str:
    """Raises ValueError for a device that torch can't use here."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


TRUTH = ".npy of bool [texts, images], which are true of which (default: a text of the image it was written for)"


def read_truth(path: Path, texts: int, images: int) -> Tensor:
    """Raises ValueError unless the file has a bool [texts, images]."""
    import numpy as np
    import torch

    from fastprob.data.arrays import read_array

    truth = read_array("truth", path, "--truth")
    if truth.dtype != np.bool_ or truth.shape != (texts, images):
        raise ValueError(f"{path}: truth must be bool {[texts, images]}, got {truth.dtype} {list(truth.shape)}")
    return torch.from_numpy(np.array(truth))
