"""`fastprob explain`: which pixels and words a match rests on, as a picture or as a page."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprob.cli._command import (
    READING,
    Command,
    add_encoder,
    add_reading,
    check_new,
    load_encoder_of,
    open_data,
    refuse,
)

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from fastprob.attribution import Method
    from fastprob.encoders import Encoder

WHAT = "an image file or a directory of them, with TEXT; or a data set with texts of its own, as embed --data takes it"
METHODS = {
    "m2ib": "M2IB",
    "nib": "NIB",
    "gradcam": "GradCAM",
    "gradient": "GradientInput",
    "attention": "RawAttention",
    "rollout": "AttentionRollout",
    "rise": "RISE",
    "random": "Random",
}
OPTIONS = {
    "layer": (int, "of m2ib, nib: the block behind which they look, from 0 (default: 9 of 12, or at the same share)"),
    "beta": (float, "of m2ib: weight of the information; greater ones make smaller maps (default: 0.1)"),
    "steps": (int, "of m2ib, nib (default: 10)"),
    "samples": (int, "of m2ib: of the noise in a step (default: 10)"),
    "masks": (int, "of rise (default: 1000)"),
    "seed": (int, "of m2ib, rise, random (default: 0)"),
}
LIMIT = 24
"""Pictures on a page, if no other number is asked for."""


def explain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", help=WHAT)
    parser.add_argument("text", nargs="?", help="what to match the images with")
    parser.add_argument("--out", required=True, type=Path, help="new file: a PNG of an image, else an HTML page")
    parser.add_argument("--method", choices=METHODS, default="m2ib", help="default: m2ib")
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    add_encoder(parser)
    add_reading(parser.add_argument_group(f"of a data set or a directory; --limit is {LIMIT} unless it is given"))


def explain(args: argparse.Namespace) -> None:
    check_new(args.out)
    if args.text is None or Path(args.what).is_dir():
        _explain_all(args)
    else:
        _explain_one(args)


def _explain_one(args: argparse.Namespace) -> None:
    from fastprob.attribution.figures import Tile, draw_tiles, overlay
    from fastprob.attribution.pages import explained, shaded
    from fastprob.data.images import open_rgb

    refuse(args, READING, "an image")
    picture = open_rgb(Path(args.what))
    encoder, method = _tools(args)
    seen, found = explained(method, encoder.preprocess, picture, [args.text])
    words = shaded(found, 0, args.text)
    tiles = [Tile(seen), Tile(overlay(seen, found.image[0]), words=words)]
    draw_tiles([tiles], args.out, width=3.0)
    print(f"cosine {found.scores[0]:.3f}", *(f"{value:.2f} {word}" for word, value in words), args.out, sep="\n")


def _explain_all(args: argparse.Namespace) -> None:
    from fastprob.attribution.pages import write_explained

    args.limit = LIMIT if args.limit is None else args.limit
    dataset = open_data_of(args)
    encoder, method = _tools(args)
    options = (f"{name} {value}" for name, value in _given(args).items())
    model = f"{encoder.name}, {encoder.pretrained}" if encoder.pretrained else encoder.name
    facts = [("Model", model), ("Method", ", ".join([args.method, *options]))]
    print(write_explained(method, encoder.preprocess, dataset, args.out, facts=facts))


def open_data_of(args: argparse.Namespace) -> Any:
    """The images of a directory, all with TEXT; or, without one, a data set."""
    from fastprob.data.captions import ImageCaptions
    from fastprob.data.formats.folders import SUFFIXES
    from fastprob.data.images import unreadable

    path = Path(args.what)
    if args.text is None:
        if path.is_file() and unreadable(path) is None:
            raise ValueError(f"TEXT is needed for an image, {path}: what to match it with")
        args.data = args.what
        return open_data(args)
    refuse(args, [name for name in READING if name != "limit"], "a directory with TEXT")
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    images = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)[: args.limit]
    if not images:
        raise ValueError(f"{path}: expected images in it, got none")
    return ImageCaptions(path.resolve().name, images, [[args.text]] * len(images), rows=[str(each) for each in images])


def _tools(args: argparse.Namespace) -> tuple[Encoder, Method]:
    """The encoder and the method that the options name. Raises ValueError for an option that is not the method's."""
    import fastprob.attribution

    method = getattr(fastprob.attribution, METHODS[args.method])
    takes, given = inspect.signature(method).parameters, _given(args)
    odd = [name for name in given if name not in takes]
    if odd:
        raise ValueError(f"--{odd[0]} is not for --method {args.method}")
    args.data = args.what
    encoder = load_encoder_of(args)
    return encoder, method(encoder.model, encoder.tokenizer, **given)


def _given(args: argparse.Namespace) -> dict[str, int | float]:
    """The method's options that are not left to it."""
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}


COMMANDS = {
    "explain": Command("which pixels and words a match rests on, as a picture or a page", explain_options, explain),
}
