"""ALBEF and BLIP on the built-in scenes, and CapFilt where the truth of every caption is known.

The web's captions are one of each scene, and a share of them are false. A BLIP that trained on them is tuned on a few
clean scenes, once as a captioner and once as a filter; the captioner writes a caption of every scene of the web, and
the filter keeps of both captions what it takes for a match. BLIPs from the same start, of as many steps on each set of
captions, are judged on scenes that none has seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from fastprob._files import write_atomically
from fastprob.data.captions import Recaptioned
from fastprob.data.digitscenes import LEVELS, Caption, DigitScenes, truth
from fastprob.data.pixels import ImagesOf, Pixels
from fastprob.demo.pretrain_report import (
    BEAM,
    CAPTIONED,
    CAPTIONS,
    FILTERED,
    NUCLEUS,
    TRUE,
    WAYS,
    WEB,
    draw_captions,
    draw_web,
    write_report,
)
from fastprob.demo.study import each_on_a_thread, once
from fastprob.pretraining.capfilt import NUCLEUS as DRAWN
from fastprob.pretraining.capfilt import match_probabilities, write_captions
from fastprob.pretraining.config import PretrainConfig, Pretrained
from fastprob.pretraining.retrieval import recalls, retrieve
from fastprob.pretraining.training import fit
from fastprob.training import LAST

SAID = (0, 1, 2)
"""Levels of captions that are used: the others are "two digits" and "handwriting"."""

DECODING: dict[str, dict[str, Any]] = {BEAM: {"num_beams": 3, "min_new_tokens": 5}, NUCLEUS: {**DRAWN, "top_p": 0.8}}


@dataclass(frozen=True)
class Size:
    """Scenes of the web, clean ones to tune on and to set the filter's threshold by, ones to judge on; epochs on all of
    the web, and of tuning; the share of false captions."""

    web: int = 7000
    clean: int = 1200
    held: int = 300
    test: int = 300
    epochs: int = 5
    tuning: int = 12
    false: float = 0.4


class Setting(NamedTuple):
    """A model: of which seed, by which objective, trained on which captions."""

    seed: int
    objective: str
    captions: str


def run(out: Path, *, size: Size | None = None, seeds: Sequence[int] = (0,)) -> None:
    """Train, filter and judge; writes `out`/report.md, results.json and figures. Interrupted, the same call goes on
    with what is missing: `out`/runs holds models and what was measured."""
    size, runs = size or Size(), out / "runs"
    first = [Setting(seed, of, captions) for of in ("blip", "albef") for captions in (WEB, TRUE) for seed in seeds]
    then = [Setting(seed, "blip", captions) for captions in (FILTERED, CAPTIONED) for seed in seeds]
    judged = each_on_a_thread(partial(_judge, runs, size), first, "models of the web's captions and of true ones")
    filtered = each_on_a_thread(partial(_capfilt, runs, size), seeds, "captioners and filters")
    judged += each_on_a_thread(partial(_judge, runs, size), then, "models of filtered captions")
    judged.sort(key=lambda each: (each["of"]["objective"] != "blip", CAPTIONS.index(each["of"]["captions"])))
    trivial = [_trivial(size, seed) for seed in seeds]
    found = {"models": judged, "capfilt": [of["found"] for of in filtered], "trivial": trivial}
    results = {"size": asdict(size), "seeds": list(seeds), **found}
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    draw_web(out / "web.png", Web(size, seeds[0]).scenes, filtered[0])
    draw_captions(
        out / "captions.png", test_of(size, seeds[0]), [each for each in judged if each["of"]["seed"] == seeds[0]]
    )
    text = write_report(out, size, levels=len(SAID), **found)
    print(f"\n{text}\nWritten to {out / 'report.md'}")


class Web:
    """Scenes with a caption each, and which of these are true."""

    def __init__(self, size: Size, seed: int):
        self.scenes = DigitScenes("train", seed=seed, num_scenes=size.web)
        draw = torch.Generator().manual_seed(seed)
        level = torch.tensor(SAID)[torch.randint(len(SAID), (size.web,), generator=draw)]
        said = [self.scenes.statements[i] for i in (torch.arange(size.web) * LEVELS + level).tolist()]
        matches, shown = truth(said, self.scenes.grid), torch.arange(size.web)  # [N, N]
        for scene in (torch.rand(size.web, generator=draw) < size.false).nonzero()[:, 0].tolist():
            false = (~matches[:, scene]).nonzero()[:, 0]
            shown[scene] = false[torch.randint(len(false), (), generator=draw)]
        self.true = matches[shown, torch.arange(size.web)]  # [N] bool
        self.true_captions = [caption.text for caption in said]
        self.captions = [self.true_captions[i] for i in shown.tolist()]


def test_of(size: Size, seed: int) -> DigitScenes:
    return DigitScenes("test", seed=seed, num_scenes=size.test)


def is_true(captions: Sequence[str], scenes: DigitScenes) -> Tensor:
    """[N] bool, whether each scene's caption is one, and true of it."""
    read = map(Caption.read, captions)
    return torch.tensor([of is not None and bool(of.true_of(grid[None])) for of, grid in zip(read, scenes.grid)])


def told(captions: Sequence[str], scenes: DigitScenes) -> dict[str, Any]:
    """What captions of scenes are worth: the share of true ones, of different ones, and digits named by one."""
    read = [Caption.read(caption) for caption in captions]
    return {
        "true": _mean(is_true(captions, scenes)),
        "different": len(set(captions)) / len(captions),
        "digits": sum(len(of.digits) for of in read if of is not None) / len(captions),
    }


# ---- models ---------------------------------------------------------------------------------------------------------


def _trained(runs: Path, size: Size, setting: Setting) -> Pretrained:
    """From the tiny CLIP's image tower and a text tower of nothing, on scenes of the web, as many steps on all sets."""
    web = Web(size, setting.seed)
    data = Recaptioned(web.scenes, _captions(runs, size, setting, web))
    name = f"{setting.objective}-{setting.captions.replace(' ', '-')}"
    epochs = round(size.epochs * size.web / max(len(data), 1))
    return _fit(runs / f"seed{setting.seed}" / name, data, _config(setting, epochs, 1e-3), None)


def _captions(runs: Path, size: Size, setting: Setting, web: Web) -> list[list[str]]:
    """Of every scene of the web, perhaps none."""
    if setting.captions in (WEB, TRUE):
        return [[caption] for caption in (web.captions if setting.captions == WEB else web.true_captions)]
    found = _capfilt(runs, size, setting.seed)
    sides = (WEB,) if setting.captions == FILTERED else (WEB, NUCLEUS)
    return [[scene[side][0] for side in sides if scene[side][1] >= found["threshold"]] for scene in found["scenes"]]


def _config(setting: Setting, epochs: int, lr: float, losses: str = "all") -> PretrainConfig:
    options = {"size": "tiny", "model": "tiny", "batch_size": 32, "queue": 1024, "seed": setting.seed}
    return PretrainConfig(setting.objective, **options, epochs=epochs, lr=lr, losses=losses)


def _fit(directory: Path, data: Any, config: PretrainConfig, start: Pretrained | None) -> Pretrained:
    options = {"directory": directory, "resume": (directory / LAST).exists(), "device": "cpu", "progress": False}
    return fit(data, config=config, start=start, **options)[0]


# ---- what is measured -----------------------------------------------------------------------------------------------


def _judge(runs: Path, size: Size, setting: Setting) -> dict[str, Any]:
    """A model's retrieval among the test scenes and their captions, and the captions that it writes."""

    def measure() -> dict[str, Any]:
        made, scenes = _trained(runs, size, setting), test_of(size, setting.seed)
        found = _retrieval(made, scenes)
        if setting.objective == "blip":
            pixels = Pixels(ImagesOf(scenes), made.preprocess)
            written = _write(made, pixels, BEAM, setting.seed)
            found |= {"captions": written, **told(written, scenes)}
        return found

    of = {**setting._asdict(), "size": asdict(size)}
    name = f"{setting.objective}-{setting.captions.replace(' ', '-')}-seed{setting.seed}"
    return once(runs / f"{name}.json", of, measure)


def _said(scenes: DigitScenes) -> tuple[list[str], dict[str, Tensor]]:
    """M captions, and by either rule which of N scenes each matches, [M, N] bool."""
    said = [i for i in range(len(scenes.captions)) if i % LEVELS in SAID]
    own = scenes.caption_image[said][:, None] == torch.arange(len(scenes))
    return [scenes.captions[i] for i in said], {"own": own, "true": scenes.matches()[said]}


def _retrieval(made: Pretrained, scenes: DigitScenes) -> dict[str, float]:
    """Recall@1 by either step and either rule of what a match is."""
    captions, truths = _said(scenes)
    found = retrieve(made.model, Pixels(ImagesOf(scenes), made.preprocess), captions, first=32, progress=False)
    return {
        f"{way}, {rule}, {by}": recalls(getattr(each, f"by_{by}"), of, at=(1,))[1]
        for rule, truth in truths.items()
        for way, each, of in zip(WAYS, found, (truth.T, truth))
        for by in ("contrast", "matching")
    }


def _trivial(size: Size, seed: int) -> dict[str, float]:
    """Retrieval by chance, and of the captions used the one that is true of most test scenes, for all of them."""
    scenes = test_of(size, seed)
    captions, truths = _said(scenes)
    chance = {f"{way}, {rule}, matching": _mean(truth) for rule, truth in truths.items() for way in WAYS}
    best = captions[int(truths["true"].sum(1).argmax())]
    return chance | told([best] * len(scenes), scenes)


def _capfilt(runs: Path, size: Size, seed: int) -> dict[str, Any]:
    """Of every scene of the web its caption and the written ones, each with the probability of a match; the filter's
    threshold; and how good it all is."""
    setting = Setting(seed, "blip", WEB)

    def measure() -> dict[str, Any]:
        web, val = Web(size, seed), DigitScenes("val", seed=seed, num_scenes=size.clean + size.held)
        said = [[val.captions[i + level] for level in SAID] for i in range(0, len(val.captions), LEVELS)]
        clean, start = Recaptioned(val, [*said[: size.clean], *[[]] * size.held]), _trained(runs, size, setting)
        captioner, judge = (
            _fit(runs / f"seed{seed}" / name, clean, _config(setting, size.tuning, 3e-4, losses), start)
            for name, losses in (("captioner", "lm"), ("filter", "itc,itm"))
        )
        pixels = Pixels(ImagesOf(web.scenes), start.preprocess)
        every = {WEB: web.captions, **{way: _write(captioner, pixels, way, seed) for way in DECODING}}
        matches = match_probabilities(judge.model, pixels, list(zip(*every.values())), progress=False)
        threshold, found = _threshold(judge, Pixels(ImagesOf(val), start.preprocess), said, size.clean), {}
        for (name, captions), probability in zip(every.items(), torch.tensor(matches).T):
            true, kept = is_true(captions, web.scenes), probability >= threshold
            found[name] = {
                **told(captions, web.scenes),
                "auroc": float(roc_auc_score(true, probability)),
                "kept": _mean(kept),
                "precision": _mean(true[kept]),
                "recall": _mean(kept[true]),
            }
        scenes = [dict(zip(every, zip(captions, of))) for captions, of in zip(zip(*every.values()), matches)]
        return {"found": found, "threshold": threshold, "scenes": scenes}

    return once(runs / f"capfilt-seed{seed}.json", {"seed": seed, "size": asdict(size)}, measure)


def _threshold(judge: Pretrained, pixels: Pixels, said: Sequence[list[str]], first: int) -> float:
    """The least probability of captions that are kept: what tells the scenes' from `first` on own captions from the
    next scene's best, by the share of own ones that are kept less that of the others."""
    own = said[first:]
    pairs = [[]] * first + [[*mine, *others] for mine, others in zip(own, [*own[1:], own[0]])]
    matches = torch.tensor(match_probabilities(judge.model, pixels, pairs, progress=False)[first:])  # [N, both]
    is_own = torch.arange(matches.shape[1]) < len(SAID)
    others, kept, thresholds = roc_curve(is_own.expand_as(matches).flatten(), matches.flatten())
    return float(thresholds[(kept - others).argmax()])


def _write(made: Pretrained, pixels: Pixels, way: str, seed: int) -> list[str]:
    return write_captions(made.model, pixels, seed=seed, progress=False, **DECODING[way])


def _mean(of: Tensor) -> float:
    return float(of.double().mean())
