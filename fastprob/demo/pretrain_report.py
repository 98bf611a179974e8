"""The report of ALBEF, BLIP and CapFilt on the built-in scenes: tables, what they say in words, and figures."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastprob
from fastprob._files import write_atomically
from fastprob.attribution.figures import Tile, draw_tiles
from fastprob.data.digitscenes import Caption, DigitScenes
from fastprob.evaluation.statistics import mean_std
from fastprob.evaluation.tables import markdown

CAPTIONS = WEB, FILTERED, CAPTIONED, TRUE = "web", "filtered", "captioned + filtered", "true"
"""Captions that models are trained on."""

BEAM, NUCLEUS = "beam", "nucleus"
"""How captions are written."""

Found = Sequence[dict[str, Any]]
"""What was measured, of every model or seed."""

SHOWN, COLUMNS = 8, 4
"""Scenes of the web that are shown; those of the test in a row."""

WAYS = "image -> text", "text -> image"
RETRIEVAL = [f"{way}, {rule}" for way in WAYS for rule in ("own", "true")]
TOLD = {"true": "captions: true ↑", "different": "different", "digits": "digits named ↑"}
CAPFILT = {
    "true": "true",
    "auroc": "AUROC of the filter ↑",
    "kept": "kept",
    "precision": "true of the kept ↑",
    "recall": "kept of the true ↑",
}


def write_report(out: Path, size: Any, *, levels: int, models: Found, capfilt: Found, trivial: Found) -> str:
    """Write `out`/report.md; return its text.

    size: of `fastprob.demo.pretrain`; levels: captions of a test scene; trivial: what chance and a constant caption
    give.
    """
    seeds = len(capfilt)
    over = "1 seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    text = f"""# ALBEF, BLIP and CapFilt on DigitScenes

fastprob {fastprob.__version__}, torch {torch.__version__}, {platform.machine()} CPU. Percent, {over} of \
scenes, captions and weights. One data set of small scenes: nothing here says what real pictures give.

The web: {size.web} scenes with a caption each, {100 * size.false:.0f} % of which are of another scene and false. \
Image towers begin as the tiny CLIP's, which has seen true captions; text towers from nothing; {size.epochs} epochs \
of all scenes, and as many steps where captions are left out. Captioner and filter: the BLIP of the web's captions, \
tuned apart on {size.clean} clean scenes; the filter's threshold is set by {size.held} others, their own captions \
against the next scene's.

## What the filter keeps

{_capfilt_table(capfilt)}

Different: of 100 captions; digits: that one names, the truth has 1 to 3.

![scenes of the web, their captions and written ones](web.png)

Below a scene its caption of the web, then the one that was drawn; orange ones are false, in brackets the filter's \
probability of a match.

## What the models are worth

On {size.test} scenes that none has seen, and their {levels * size.test} captions. Recall@1, by matching the first 32 \
that contrast finds; "own": the query's own scene or caption, "true": any that is true. Captions by three beams.

{_models_table(models, trivial)}

{_verdict(models)}

![captions of test scenes by model](captions.png)
"""
    write_atomically(out / "report.md", text)
    return text


def _cell(values: Sequence[float], scale: float = 100, digits: int = 1, sign: str = "") -> str:
    """Mean and deviation; of one value itself."""
    mean, std = mean_std([scale * value for value in values])
    return f"{mean:{sign}.{digits}f}" + (f" ± {std:.{digits}f}" if len(values) > 1 else "")


def _capfilt_table(capfilt: Found) -> str:
    header = ("captions", *CAPFILT.values(), "different", "digits named")
    rows = [
        (
            {WEB: "the web's", NUCLEUS: "drawn (nucleus)", BEAM: "three beams"}[side],
            *(_cell([of[side][name] for of in capfilt]) for name in (*CAPFILT, "different")),
            _cell([of[side]["digits"] for of in capfilt], 1, 2),
        )
        for side in (WEB, NUCLEUS, BEAM)
    ]
    return markdown(header, rows)


def _by_model(models: Found) -> dict[str, Found]:
    """What is said of it -> of every seed."""
    result: dict[str, list[dict[str, Any]]] = {}
    for each in models:
        result.setdefault(f"{each['of']['objective'].upper()}, {each['of']['captions']}", []).append(each)
    return dict(result)


def _models_table(models: Found, trivial: Found) -> str:
    def row(name: str, found: Found) -> list[str]:
        values = {key: [each[key] for each in found] for key in found[0]}
        told = [_cell(values[key], *((1, 2) if key == "digits" else ())) if key in values else "" for key in TOLD]
        return [name, *(_cell(values[f"{key}, matching"]) for key in RETRIEVAL), *told]

    header = ("", *(f"{name} ↑" for name in RETRIEVAL), *TOLD.values())
    rows = [row(name, found) for name, found in _by_model(models).items()]
    return markdown(header, [*rows, row("chance; the best constant caption", trivial)])


def _verdict(models: Found) -> str:
    """The gain over training on the web's captions, paired by seed."""
    by_model = _by_model(models)
    base = by_model[f"BLIP, {WEB}"]
    parts = []
    for captions in (FILTERED, CAPTIONED, TRUE):
        of = by_model[f"BLIP, {captions}"]
        gains = [
            f"{title} {_cell([a[key] - b[key] for a, b in zip(of, base, strict=True)], sign='+')}"
            for key, title in (*((f"{name}, matching", name) for name in RETRIEVAL), ("true", "true captions"))
        ]
        parts.append(f"- {captions}: {', '.join(gains)}")
    return "Over the BLIP of the web's captions, in points, paired by seed:\n\n" + "\n".join(parts)


# ---- figures --------------------------------------------------------------------------------------------------------


def _words(caption: str, scenes: DigitScenes, number: int, after: str = "") -> list[tuple[str, float]]:
    """Words to draw: those of a caption that is not true are marked."""
    read = Caption.read(caption)
    true = read is not None and bool(read.true_of(scenes.grid[number][None]))
    return [(word, 0.0 if true else 1.0) for word in caption.split()] + [(word, 0.0) for word in after.split()]


def draw_web(path: Path, scenes: DigitScenes, capfilt: dict[str, Any]) -> None:
    """The first scenes: the caption of the web, and the drawn one, with the filter's probability of a match."""
    rows = []
    for start in range(0, SHOWN, COLUMNS):
        row = []
        for number in range(start, start + COLUMNS):
            for side in (WEB, NUCLEUS):
                caption, match = capfilt["scenes"][number][side]
                words = _words(caption, scenes, number, f"({match:.2f})")
                row.append(Tile(scenes[number][0], "" if start else side, words))
        rows.append(row)
    draw_tiles(rows, path, width=1.1)


def draw_captions(path: Path, scenes: DigitScenes, models: Found) -> None:
    """The first test scenes, a row a model: what it says of them."""
    rows = []
    for each in models:
        if "captions" in each:
            of = each["of"]["captions"]
            rows.append(
                [
                    Tile(scenes[number][0], "" if number else of, _words(each["captions"][number], scenes, number))
                    for number in range(SHOWN)
                ]
            )
    draw_tiles(rows, path, width=1.1)
