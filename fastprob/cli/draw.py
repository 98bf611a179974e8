"""`fastprob draw`: pictures of the distribution that an adapter predicts for a query."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastprob.cli._command import READING, Command, add_reading, device_of, open_data, refuse
from fastprob.cli.probvlm import QUERY, add_checkpoint, find_query, open_adapter

if TYPE_CHECKING:  # what a command needs is imported when it runs: `fastprob --help` should not wait for it
    from PIL.Image import Image

    from fastprob.adapters.diffusion import Decoder
    from fastprob.data.store import EmbeddingStore

    Pictures = Callable[[int], Image]

DIFFUSION = "decode the draws instead, by a StableUnCLIPImg2ImgPipeline of diffusers: directory, or name on the hub"


def draw_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", help=QUERY)
    add_checkpoint(parser)
    parser.add_argument("--draws", type=int, default=16, help="embeddings to draw (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, and of --diffusion's noise (default: 0)")
    parser.add_argument("--out", type=Path, help="PNG file of a grid of at most 24 pictures (default: only print)")
    parser.add_argument("--diffusion", metavar="PIPELINE", help=DIFFUSION)
    parser.add_argument("--data", help="data set of the store, as embed took it, for its pictures")
    add_reading(parser.add_argument_group("with --data"))


def draw(args: argparse.Namespace) -> None:
    from fastprob.adapters.draws import decoded, draw, lines, neighbours
    from fastprob.evaluation.grid import picture_grid

    _check_options(args)
    store, model = open_adapter(args)
    pictures = _pictures(args, store)
    decoder = _decoder(args, store, pictures)
    side, row, query = find_query(args, store)
    found = draw(getattr(model, side), query, store.image, draws=args.draws, seed=args.seed)
    print(*lines(store, found), sep="\n")
    if args.out is not None:
        of_draws = decoded(found, decoder, seed=args.seed) if decoder else neighbours(store, found, pictures)
        tiles = [(_shown(args, store, pictures, side, row), "query"), *of_draws]
        print(f"\nWritten to {picture_grid(tiles, str(found), args.out)}")


def _check_options(args: argparse.Namespace) -> None:
    if args.out is None:
        refuse(args, ["data", "diffusion"], "draw without --out")
    elif args.data is None and args.diffusion is None:
        raise ValueError("--out is not for draw without --data or --diffusion, which give pictures")
    if args.data is None:
        refuse(args, READING, "draw without --data")


def _pictures(args: argparse.Namespace, store: EmbeddingStore) -> Pictures | None:
    from fastprob.data.store import pictures_of

    return None if args.data is None else pictures_of(store, open_data(args))


def _decoder(args: argparse.Namespace, store: EmbeddingStore, pictures: Pictures | None) -> Decoder | None:
    from fastprob.adapters.diffusion import Decoder

    if args.diffusion is None:
        return None
    decoder = Decoder(args.diffusion, dim=store.dim, device=device_of(args.device))
    if pictures is not None:
        decoder.check(pictures(0), store.image[0])
    return decoder


def _shown(
    args: argparse.Namespace, store: EmbeddingStore, pictures: Pictures | None, side: str, row: int | None
) -> Image | str:
    """The query's picture, or its text; of an image whose picture is not at hand its name."""
    from fastprob.adapters.predictions import image_name
    from fastprob.data.images import open_rgb

    if side == "text":
        return args.query if row is None else store.captions[row]
    if row is None:
        return open_rgb(Path(args.query))
    return image_name(store, row) if pictures is None else pictures(row)


COMMANDS = {
    "draw": Command("draws from a query's distribution: the images nearest to them, as a grid", draw_options, draw),
}
