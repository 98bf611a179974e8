"""The tiny CLIP: an open_clip model of 1.4 million parameters that ships with its weights.

Its config (`digitscenes-tiny.json`) and vocabulary (`digitscenes-merges.txt.gz`) are open_clip's own formats, and its
weights a local checkpoint as of any other model, in half precision. This made them, with open_clip's `ClipLoss` on
DigitScenes, in about six minutes of one core:

    python -m fastprob.encoders.tiny
"""

import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fastprob.data.digitscenes import EMPTY, LEVELS, PLACES, Caption, DigitScenes
from fastprob.training import cosine, own_random_state, seed_all

NAME = "digitscenes-tiny"  # the model's name for open_clip
TAG = "digitscenes"  # stands for the shipped weights, as a `pretrained` tag
HERE = Path(__file__).parent
CONFIG, MERGES = HERE / f"{NAME}.json", HERE / "digitscenes-merges.txt.gz"
WEIGHTS = HERE / f"{NAME}.safetensors"


@dataclass(frozen=True)
class Recipe:
    """How the tiny CLIP is trained.

    What is hard is to bind a digit to its place: in a random batch the digits alone tell the captions apart, so
    that "above" is never needed. Hence three stages, each of them only a choice of scenes and captions: `lone`
    steps on single digits; `place` steps on captions like "a three at the top left" of scenes of any number of
    digits; then batches of which a share of `rivals` comes in runs of `run` scenes with the same digits,
    captioned at level 0, and the rest is drawn at random, with levels by `level_weights`.
    """

    scenes: int = 20000
    steps: int = 3000
    lone: int = 100
    place: int = 400
    batch: int = 128
    rivals: float = 0.8
    run: int = 4
    level_weights: tuple[float, ...] = (0.5, 3, 2, 2, 0.3)
    lr: float = 1e-3
    weight_decay: float = 0.02
    warmup: float = 0.1
    position_gain: float = 4.0  # on the initial position embeddings, which open_clip draws far below the content
    max_grad_norm: float = 1.0
    seed: int = 0


RECIPE = Recipe()


@cache
def register() -> None:
    """Make `digitscenes-tiny` known to open_clip: its factory and its `get_tokenizer` then need nothing of ours.

    The shipped config names the vocabulary relative to itself and open_clip relative to the working directory,
    hence the resolved copy; open_clip keeps what it read, the file is not needed afterwards.
    """
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = str(MERGES)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / CONFIG.name
        path.write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(path)


# ------------------------------------------------------------------------------------------- the training


def train(recipe: Recipe = RECIPE, progress: bool = True) -> dict[str, Tensor]:
    """Train on DigitScenes with open_clip's ClipLoss; return the state dict. The caller's random state is kept.

    The loss stays as it is; `Recipe` says how batches are drawn. A text that occurs several times in a batch is
    encoded once.
    """
    register()
    with own_random_state(torch.device("cpu")):
        seed_all(recipe.seed, torch.device("cpu"))
        return _train(recipe, progress)


def _train(recipe: Recipe, progress: bool) -> dict[str, Tensor]:
    model, _, preprocess = open_clip.create_model_and_transforms(NAME)
    scenes = DigitScenes("train", num_scenes=recipe.scenes)
    images = _Images(scenes, preprocess)
    texts = _texts(scenes)  # [N, 6]
    row = {text: i for i, text in enumerate(dict.fromkeys(text for of_scene in texts for text in of_scene))}
    tokens = open_clip.get_tokenizer(NAME)(list(row))  # [U, L]
    text_of = torch.tensor([[row[text] for text in of_scene] for of_scene in texts])  # [N, 6]
    with torch.no_grad():
        model.visual.positional_embedding *= recipe.position_gain
        model.positional_embedding *= recipe.position_gain
    loss_fn, optimizer = open_clip.ClipLoss(), _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step / recipe.steps, recipe.warmup))
    model.train()
    batches = islice(_batches(scenes.grid, recipe), recipe.steps)
    bar = tqdm(batches, "training the tiny CLIP", recipe.steps, unit="step", disable=not progress)
    for batch, level in bar:
        text, which = text_of[batch, level].unique(return_inverse=True)
        image_features = model.encode_image(images[batch], normalize=True)  # [B, D]
        text_features = model.encode_text(tokens[text], normalize=True)[which]  # [B, D]
        loss = loss_fn(image_features, text_features, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
    return {name: weight.detach().clone().contiguous() for name, weight in model.state_dict().items()}


PLACE = LEVELS  # the column after a scene's own captions: where one of its digits is


def _texts(scenes: DigitScenes) -> list[list[str]]:
    """Of every scene, its five captions and a true "a three at the top left"."""
    result = []
    for i, cells in enumerate(scenes.grid.tolist()):
        there = [cell for cell in range(4) if cells[cell] != EMPTY]
        cell = there[i % len(there)]
        place = next(name for name, at in PLACES.items() if at == cell)
        result.append([*scenes.captions[LEVELS * i : LEVELS * (i + 1)], Caption((cells[cell],), place).text])
    return result


def _batches(grid: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: indices of scenes [B] and of their captions (0..4, or PLACE) [B]. grid: [N, 4]."""
    total = (grid != EMPTY).sum(dim=1)  # [N]
    lone, every = (total == 1).nonzero()[:, 0], torch.arange(len(grid))
    for _ in range(recipe.lone):
        batch = lone[torch.randint(len(lone), (recipe.batch,))]
        yield batch, torch.zeros_like(batch)
    rivals = _rivals(grid, recipe.run)
    for _ in range(recipe.place):
        batch = torch.cat([next(rivals) for _ in range(recipe.batch // recipe.run)])
        yield batch, torch.full_like(batch, PLACE)
    runs, weights = round(recipe.rivals * recipe.batch / recipe.run), torch.tensor(recipe.level_weights)
    while True:
        close = torch.cat([next(rivals) for _ in range(runs)])
        others = every[torch.randint(len(every), (recipe.batch - len(close),))]
        level = torch.multinomial(weights, len(others), replacement=True)
        yield torch.cat([close, others]), torch.cat([torch.zeros_like(close), level])


def _rivals(grid: Tensor, run: int) -> Iterator[Tensor]:
    """Without end: `run` scenes that hold the same digits, by turns in any and in the same cells (then two or
    more digits differ in their order alone); but for a few runs at the seams, and in random order."""
    counts = torch.stack([(grid == digit).sum(dim=1) for digit in range(10)], dim=1)  # [N, 10]
    digits = (counts * 4 ** torch.arange(10)).sum(dim=1)  # [N], one number for each multiset
    cells = ((grid != EMPTY) * 2 ** torch.arange(4)).sum(dim=1)  # [N]
    cells[counts.sum(dim=1) == 1] = 0  # a single digit's cell is what its caption tells
    anywhere, same_cells = _runs(digits, run), _runs(digits * 16 + cells, run)
    while True:
        yield next(anywhere)
        yield next(same_cells)


def _runs(key: Tensor, run: int) -> Iterator[Tensor]:
    """Without end: `run` indices [run] of equal `key` [N]."""
    while True:
        order = torch.randperm(len(key))
        order = order[key[order].argsort(stable=True)]
        runs = order[: len(order) // run * run].view(-1, run)  # [R, run]
        yield from runs[torch.randperm(len(runs))]


class _Images:
    """Scenes as the model sees them, by the batch: [B] indices -> [B, 3, 32, 32].

    The transform's resize and crop do nothing at the scenes' own size, so that only its normalisation is left.
    """

    def __init__(self, scenes: DigitScenes, preprocess):
        self.pixels = torch.from_numpy(scenes.pixels).permute(0, 3, 1, 2)  # [N, 3, H, W] uint8
        self.normalize = preprocess.transforms[-1]
        if not torch.allclose(preprocess(scenes[0][0]), self[torch.tensor([0])][0]):
            raise ValueError(f"{NAME}: image_size must be the scenes' size {self.pixels.shape[-2:]}, got {preprocess}")

    def __getitem__(self, batch: Tensor) -> Tensor:
        return self.normalize(self.pixels[batch].float().div_(255))


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices only, as open_clip's own training does."""
    groups = [[p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
    decay = [recipe.weight_decay, 0.0]
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": wd} for params, wd in zip(groups, decay)],
        lr=recipe.lr,
        betas=(0.9, 0.98),
        fused=True,
    )


def _lr_share(done: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    return done / warmup if done < warmup else cosine((done - warmup) / (1 - warmup))


# ------------------------------------------------------------------------------------------- the vocabulary


def merges_of(texts: Iterable[str]) -> bytes:
    """A byte-pair file for open_clip's SimpleTokenizer in which every word of `texts` is one token."""
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word for text in texts for word in re.findall(r"[a-z]+", text)):
        parts = _parts(word, merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    return _merges_file(merges)


def _parts(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The tokens of `word` under `merges`."""
    if not merges:
        return [*word[:-1], f"{word[-1]}</w>"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "merges.gz"
        path.write_bytes(_merges_file(merges))
        return SimpleTokenizer(bpe_path=str(path)).bpe(word).split(" ")


def _merges_file(merges: list[tuple[str, str]]) -> bytes:
    """The file's bytes. No last newline: it would count as a merge."""
    lines = ["#version: fastprob digitscenes", *(" ".join(merge) for merge in merges)]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


if __name__ == "__main__":
    save_file({name: weight.half() for name, weight in train().items()}, WEIGHTS)
