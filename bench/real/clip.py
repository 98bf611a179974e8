"""A small CLIP of pictures: a vision and a text transformer, trained on `teacher.lessons` and saved for open_clip.

    python -m bench.real.clip [--cache DIRECTORY]    trains it, or goes on, and says where it is

The loss of a batch is open_clip's contrastive loss of the captioned pictures and their captions, and the distances of
all pictures and all texts from their targets:

    L = ClipLoss(image, text, scale) + weight * (mean(1 - cos(image, target)) + mean(1 - cos(text, target)))

Pictures are turned, moved, scaled and mirrored at random; of some, the colours or all but the outlines are taken away.
The directory it prints is read by open_clip, and by every command here, as `local-dir:DIRECTORY`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, ClipLoss, SimpleTokenizer
from torch import Tensor
from torchvision.transforms import Normalize

from fastprob._files import write_atomically, write_tensors
from fastprob.training import LAST, Run, cosine, own_random_state, seed_all, seed_of

from .fetch import cache_directory, work_directory
from .teacher import SIDE, Lessons, lessons

CONFIG: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 128, "head_width": 32, "layers": 3},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


@dataclass(frozen=True)
class Recipe:
    """How it is trained. A batch is `pairs` pictures with a caption, `photos` without, and `words` other texts."""

    epochs: int = 6
    steps: int = 150  # of an epoch
    pairs: int = 64
    photos: int = 48
    words: int = 16
    weight: float = 8.0  # of the distances from the targets
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    gray: float = 0.1  # shares of the pictures
    outlined: float = 0.2
    seed: int = 0


def directory_of(cache: Path) -> Path:
    """Where what the few-shot tasks need is kept."""
    return work_directory(cache) / "few-shot"


def clip(cache: Path) -> Path:
    """The directory of the trained CLIP, made on the first call."""
    directory = directory_of(cache)
    model = directory / "clip"
    if not (model / "open_clip_model.safetensors").exists():
        save(train(lessons(cache, directory), Recipe(), directory / "clip-run"), model)
    return model


def save(model: CLIP, directory: Path) -> None:
    """Write it for open_clip's `local-dir:`, in half precision; the weights, by which it is there, come last."""
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}}
    write_atomically(directory / "open_clip_config.json", json.dumps(config, indent=1))
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    write_tensors(directory / "open_clip_model.safetensors", weights, {})


def train(data: Lessons, recipe: Recipe, directory: Path | None = None, progress: bool = True) -> CLIP:
    """Trained by `recipe`; with a directory, it goes on from what an interrupted training left there."""
    cpu = torch.device("cpu")
    with own_random_state(cpu):
        seed_all(recipe.seed, cpu)
        run = _Run(data, recipe, directory)
        run.train(resume=directory is not None and (directory / LAST).exists(), progress=progress)
    return run.model.eval()


class _Run(Run):
    def __init__(self, data: Lessons, recipe: Recipe, directory: Path | None):
        self.data, self.recipe = data, recipe
        self.tokens = SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])(data.texts)  # [U, L]
        self.normalize, self.contrast = Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD), ClipLoss()
        model = CLIP(**CONFIG)
        super().__init__(
            format="fastprob.bench.clip/1",
            model=model,
            optimizer=_optimizer(model, recipe),
            rate=lambda step: _rate(step / (recipe.epochs * recipe.steps), recipe.warmup),
            epochs=recipe.epochs,
            steps=recipe.steps,
            directory=directory,
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the pictures [B], the captioned first, and of the texts [T], their captions first."""
        recipe, draw = self.recipe, torch.Generator().manual_seed(seed_of(self.recipe.seed, self.epoch))
        owner, text = self.data.pairs
        counts = torch.bincount(owner)
        first = counts.cumsum(0) - counts
        captions = int(text.max()) + 1
        for step in range(recipe.steps):
            which = torch.randperm(len(counts), generator=draw)[: recipe.pairs]
            caption = first[which] + (torch.rand(len(which), generator=draw) * counts[which]).long()
            photo = torch.randint(len(counts), len(self.data.pixels), (recipe.photos,), generator=draw)
            words = torch.randint(captions, len(self.tokens), (recipe.words,), generator=draw)
            if step >= self.step:
                yield torch.cat([which, photo]), torch.cat([text[caption], words])

    def loss(self, pictures: Tensor, texts: Tensor) -> Tensor:
        pixels = augment(self.data.pixels[pictures].float() / 255, self.recipe)
        image = self.model.encode_image(self.normalize(pixels), normalize=True)  # [B, D]
        text = self.model.encode_text(self.tokens[texts], normalize=True)  # [T, D]
        pairs = self.recipe.pairs
        contrast = self.contrast(image[:pairs], text[:pairs], self.model.logit_scale.exp())
        far = 2 - (image * self.data.image[pictures]).sum(1).mean() - (text * self.data.text[texts]).sum(1).mean()
        return contrast + self.recipe.weight * far

    def identity(self) -> dict[str, Any]:
        return {**asdict(self.recipe), "config": CONFIG, "pictures": len(self.data.pixels)}


def augment(pixels: Tensor, recipe: Recipe) -> Tensor:
    """Pictures in [0, 1], [B, 3, S, S], turned by up to 0.2 rad, scaled by 0.7 to 1.1, moved, half of them mirrored."""
    count = len(pixels)
    angle, scale = 0.4 * torch.rand(count) - 0.2, 0.7 + 0.4 * torch.rand(count)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    mirror = 1 - 2 * (torch.rand(count) < 0.5).float()
    turn = torch.stack([mirror * cos, -sin, mirror * sin, cos], 1).view(count, 2, 2)
    move = 0.3 * torch.rand(count, 2, 1) - 0.15
    rows = torch.cat([turn, move], 2)
    grid = F.affine_grid(rows, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    gray = pixels.mean(1, keepdim=True).expand_as(pixels)
    chance = torch.rand(count)[:, None, None, None]
    plain = torch.where(chance < recipe.gray, gray, pixels)
    return torch.where(chance > 1 - recipe.outlined, outlines(gray), plain)


def outlines(gray: Tensor) -> Tensor:
    """Dark lines on white where the lightest and the darkest of 3 x 3 pixels differ. [B, C, S, S] in [0, 1]."""
    lightest, darkest = F.max_pool2d(gray, 3, 1, 1), -F.max_pool2d(-gray, 3, 1, 1)
    return 1 - (2 * (lightest - darkest)).clamp(max=1)


def _optimizer(model: CLIP, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices only, as open_clip's own training does."""
    groups = [[p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
    decayed = [{"params": params, "weight_decay": wd} for params, wd in zip(groups, (recipe.weight_decay, 0.0))]
    return torch.optim.AdamW(decayed, lr=recipe.lr, betas=(0.9, 0.98), fused=True)


def _rate(done: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    return (done + 1e-3) / (warmup + 1e-3) if done < warmup else cosine((done - warmup) / (1 - warmup))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where what was fetched and made of it is kept")
    print(clip(cache_directory(parser.parse_args().cache)))


if __name__ == "__main__":
    main()
