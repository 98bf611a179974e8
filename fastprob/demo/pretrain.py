"""ALBEF and BLIP from nothing on the built-in scenes, and CapFilt where the truth of every caption is known.

Web captions are one of each scene, of which 40 % are of another scene and false. A BLIP that trained on them goes on on
a few clean scenes, writes a caption of every web scene, and filters both. BLIPs from nothing on each of what comes out
are judged on scenes that none has seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprob._files import write_atomically
from fastprob.data.captions import Recaptioned
from fastprob.data.digitscenes import LEVELS, Caption, DigitScenes
from fastprob.data.pixels import ImagesOf, Pixels
from fastprob.pretraining.capfilt import NUCLEUS, match_probabilities, write_captions
from fastprob.pretraining.config import MODEL, PretrainConfig, Pretrained
from fastprob.pretraining.retrieval import recalls, retrieve
from fastprob.pretraining.training import fit
from fastprob.training import LAST

FALSE = 0.4
SAID = 3
"""Levels of captions that say something: the others are "two digits" and "handwriting"."""
BEAM = {"num_beams": 3}


@dataclass(frozen=True)
class Size:
    """Scenes of the web, clean ones, ones to judge on; epochs from nothing, and on the clean ones."""

    web: int = 3000
    clean: int = 600
    test: int = 300
    epochs: int = 15
    clean_epochs: int = 15
    batch_size: int = 64


class Web:
    """Scenes with a caption each, and which of these are true."""

    def __init__(self, size: Size, seed: int):
        self.scenes = DigitScenes("train", num_scenes=size.web)
        draw = torch.Generator().manual_seed(seed)
        own = torch.arange(size.web) * LEVELS + torch.randint(SAID, (size.web,), generator=draw)
        self.true_captions = [self.scenes.captions[i] for i in own.tolist()]
        matches, shown = self.scenes.matches(), own.clone()
        for scene in (torch.rand(size.web, generator=draw) < FALSE).nonzero()[:, 0].tolist():
            false = own[~matches[own, scene]]
            shown[scene] = false[torch.randint(len(false), (), generator=draw)]
        self.captions = [self.scenes.captions[i] for i in shown.tolist()]
        self.true = matches[shown, torch.arange(size.web)]  # [N] bool


def is_true(captions: Sequence[str], scenes: DigitScenes) -> Tensor:
    """[N] bool, whether each scene's caption is one, and true of it."""
    read = [Caption.read(caption) for caption in captions]
    return torch.stack(
        [
            torch.tensor(False) if caption is None else caption.true_of(grid[None])[0]
            for caption, grid in zip(read, scenes.grid)
        ]
    )


def run(out: Path, *, size: Size | None = None, seeds: Sequence[int] = (0,)) -> None:
    """Train, filter and judge; writes `out`/report.md, results.json and a figure. Interrupted, the same call goes on
    where it was: `out`/runs holds the models."""
    size = size or Size()
    results = [Study(out / "runs" / f"seed{seed}", size, seed).results() for seed in seeds]
    write_atomically(out / "results.json", json.dumps({"size": asdict(size), "seeds": results}, indent=1) + "\n")


class Study:
    """One seed's."""

    def __init__(self, directory: Path, size: Size, seed: int):
        self.directory, self.size, self.seed = directory, size, seed
        self.web = Web(size, seed)
        self.clean = DigitScenes("val", num_scenes=size.clean)
        self.test = DigitScenes("test", num_scenes=size.test)

    def results(self) -> dict[str, Any]:
        web = self.web
        noisy = self.trained("noisy", web.captions)
        tuned = self.tuned(noisy)
        pixels = Pixels(ImagesOf(web.scenes), tuned.preprocess)
        written = write_captions(tuned.model, pixels, seed=self.seed, **NUCLEUS)
        matches = match_probabilities(tuned.model, pixels, [list(both) for both in zip(web.captions, written)])
        keep = torch.tensor(matches) >= 0.5  # [N, 2]
        true = torch.stack([web.true, is_true(written, web.scenes)], dim=1)
        of_web, of_both = (
            [[text for text, kept in zip(both, row) if kept] for both, row in zip(zip(*texts), keep.tolist())]
            for texts in ((web.captions,), (web.captions, written))
        )
        models = {
            "noisy": noisy,
            "filtered": self.trained("filtered", of_web),
            "captioned and filtered": self.trained("capfilt", of_both),
            "clean": self.trained("clean", web.true_captions),
        }
        return {
            "filter": {name: _kept(true[:, i], keep[:, i]) for i, name in enumerate(("web", "written"))},
            "models": {name: self.judged(made) for name, made in models.items()},
        }

    def trained(self, name: str, captions: Sequence[Any], **changes: Any) -> Pretrained:
        """A model from nothing on the web scenes with these captions, one or several of each."""
        lists = [[own] if isinstance(own, str) else own for own in captions]
        return self._fit(name, Recaptioned(self.web.scenes, lists), self.size.epochs, None, **changes)

    def tuned(self, start: Pretrained) -> Pretrained:
        """The captioner and filter."""
        said = [self.clean.captions[i : i + SAID] for i in range(0, len(self.clean.captions), LEVELS)]
        return self._fit("tuned", Recaptioned(self.clean, said), self.size.clean_epochs, start)

    def _fit(self, name: str, data: Any, epochs: int, start: Pretrained | None, **changes: Any) -> Pretrained:
        directory = self.directory / name
        if (directory / MODEL).exists():
            return Pretrained.load(directory)
        config = PretrainConfig(epochs=epochs, batch_size=self.size.batch_size, seed=self.seed)
        return fit(
            data,
            config=replace(config, **changes),
            start=start,
            directory=directory,
            resume=(directory / LAST).exists(),
        )[0]

    def judged(self, made: Pretrained) -> dict[str, float]:
        """Retrieval of the test scenes and their captions, and the captions that the model writes for them."""
        scenes, pixels = self.test, Pixels(ImagesOf(self.test), made.preprocess)
        said = [i for i in range(len(scenes.captions)) if i % LEVELS < SAID]
        found = retrieve(made.model, pixels, [scenes.captions[i] for i in said], first=32)
        true = scenes.matches()[said]  # [M, N]
        own = scenes.caption_image[said][:, None] == torch.arange(len(scenes))
        judged = {}
        for rule, truth in (("own", own), ("true", true)):
            for way, each, of in zip(("image -> text", "text -> image"), found, (truth.T, truth)):
                for by in ("contrast", "matching"):
                    judged[f"{way}, {rule}, {by}"] = recalls(getattr(each, f"by_{by}"), of, at=(1,))[1]
        for name, options in (("beam", BEAM), ("nucleus", NUCLEUS)):
            captions = write_captions(made.model, pixels, seed=self.seed, **options)
            judged[f"true, {name}"] = float(is_true(captions, scenes).double().mean())
            judged[f"distinct, {name}"] = len(set(captions)) / len(captions)
        return judged


def _kept(true: Tensor, keep: Tensor) -> dict[str, float]:
    """Share of true captions before and after, and of the true ones that are kept."""
    return {
        "true before": float(true.double().mean()),
        "precision": float(true[keep].double().mean()),
        "recall": float(keep[true].double().mean()),
        "kept": float(keep.double().mean()),
    }
