"""The tiny CLIP: an open_clip model small enough to be trained where it is used, on two cores in about a minute.

Its config (`digitscenes-tiny.json`) and vocabulary (`digitscenes-merges.txt.gz`) are open_clip's own formats, it
is trained by open_clip's `ClipLoss` on DigitScenes, and its weights are a local checkpoint as of any other model.
They are kept in $XDG_CACHE_HOME/fastprob (~/.cache/fastprob) in a directory named after a digest of config,
vocabulary and recipe, so that another version of fastprob trains its own; `sha256sum -c` checks them.
"""

import gzip
import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from fastprob.data.digitscenes import LEVELS, DigitScenes

NAME = "digitscenes-tiny"  # the model's name for open_clip
TAG = "digitscenes"  # stands for the cached weights, as a `pretrained` tag
HERE = Path(__file__).parent
CONFIG, MERGES = HERE / f"{NAME}.json", HERE / "digitscenes-merges.txt.gz"


@dataclass(frozen=True)
class Recipe:
    """How the tiny CLIP is trained; about 4 minutes on one core, 1.5 on two."""

    scenes: int = 20000
    steps: int = 1800
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    level_weights: tuple[float, ...] = (4, 4, 3, 1, 0.3)
    seed: int = 0


RECIPE = Recipe()


# ------------------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """The directory of this version's tiny CLIP; not created."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(CONFIG.read_bytes() + MERGES.read_bytes() + json.dumps(asdict(RECIPE)).encode())
    return root / "fastprob" / f"{NAME}-{digest.hexdigest()[:12]}"


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


def checkpoint() -> Path:
    """The cached weights, verified; trained first if there are none or they differ from their checksum."""
    path = cache_dir() / f"{NAME}.safetensors"
    if path.is_file() and _verified(path):
        return path
    if path.is_file():
        warnings.warn(f"{path} does not agree with its checksum; training the tiny CLIP again", stacklevel=3)
    weights = save(train(RECIPE))
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path.with_name(CONFIG.name), CONFIG.read_bytes())
    _replace(path, weights)
    _replace(_checksum(path), f"{hashlib.sha256(weights).hexdigest()}  {path.name}\n".encode())
    return path


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _verified(path: Path) -> bool:
    try:
        expected = _checksum(path).read_text(encoding="utf-8").split()[:1]
    except (OSError, UnicodeDecodeError):
        return False
    return expected == [hashlib.sha256(path.read_bytes()).hexdigest()]


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step: readers see the old one or the whole new one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ------------------------------------------------------------------------------------------- the training


def train(recipe: Recipe = RECIPE, progress: bool = True) -> dict[str, Tensor]:
    """Train on DigitScenes with open_clip's ClipLoss; return the state dict. The caller's random state is kept.

    Many captions fit many scenes, so a batch holds false negatives. The loss stays as it is; specific captions
    are drawn more often than general ones (`level_weights`), and a text that occurs several times in a batch is
    encoded once.
    """
    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return _train(recipe, progress)


def _train(recipe: Recipe, progress: bool) -> dict[str, Tensor]:
    model, _, preprocess = open_clip.create_model_and_transforms(NAME)
    scenes = DigitScenes("train", num_scenes=recipe.scenes)
    images = _Images(scenes, preprocess)
    texts = {text: row for row, text in enumerate(dict.fromkeys(scenes.captions))}
    tokens = open_clip.get_tokenizer(NAME)(list(texts))  # [U, L]
    text_of = torch.tensor([texts[text] for text in scenes.captions]).view(-1, LEVELS)  # [N, 5]
    loss_fn, optimizer = open_clip.ClipLoss(), _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step / recipe.steps, recipe.warmup))
    weights = torch.tensor(recipe.level_weights)
    model.train()
    batches = _batches(len(scenes), recipe.batch, recipe.steps)
    for batch in tqdm(batches, desc="training the tiny CLIP (once)", unit="step", disable=not progress):
        level = torch.multinomial(weights, len(batch), replacement=True)  # [B]
        text, which = text_of[batch, level].unique(return_inverse=True)
        image_features = model.encode_image(images[batch], normalize=True)  # [B, D]
        text_features = model.encode_text(tokens[text], normalize=True)[which]  # [B, D]
        loss = loss_fn(image_features, text_features, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: weight.detach().clone().contiguous() for name, weight in model.state_dict().items()}


def _batches(size: int, batch: int, steps: int) -> list[Tensor]:
    """`steps` batches [B] of indices below `size`, epoch after epoch, each epoch shuffled."""
    epochs = math.ceil(steps / (size // batch))
    return [indices for _ in range(epochs) for indices in torch.randperm(size).split(batch)[: size // batch]][:steps]


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
    return done / warmup if done < warmup else 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))


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
    """The file's bytes, equal wherever they are made. No last newline: it would count as a merge."""
    lines = ["#version: fastprob digitscenes", *(" ".join(merge) for merge in merges)]
    return gzip.compress("\n".join(lines).encode(), mtime=0)
