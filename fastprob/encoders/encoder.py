"""A frozen encoder: any open_clip model, and the tiny built-in one, by the same path through open_clip."""

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from fastprob.data.images import described
from fastprob.encoders import tiny


class Encoder:
    """A frozen open_clip model in eval mode with its transform and tokenizer.

    name, pretrained: what `load_encoder` would need to load it again; dim: the embeddings' width D;
    preprocess: PIL image -> [3, H, W]; tokenizer: list of B texts -> [B, L]; model: the open_clip model itself.
    """

    def __init__(
        self, model: torch.nn.Module, preprocess: Callable, tokenizer: Callable, name: str, pretrained: str | None
    ):
        self.model = model.eval().requires_grad_(False)
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.name, self.pretrained = name, pretrained
        self.device = next(model.parameters()).device
        self.dim = self.encode_text(tokenizer([""])).shape[1]

    def __repr__(self) -> str:
        return f"Encoder({self.name}, {self.pretrained}, dim {self.dim}, {self.device})"

    @torch.no_grad()
    def encode_image(self, batch: Tensor) -> Tensor:
        """[B, 3, H, W] preprocessed images -> [B, D] of unit norm. Raises ValueError for another shape."""
        if batch.ndim != 4 or batch.shape[1] != 3:
            raise ValueError(f"encode_image: batch must be [B, 3, H, W], got {list(batch.shape)}")
        return F.normalize(self.model.encode_image(batch.to(self.device)), dim=-1)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, L] tokens -> [B, D] of unit norm. Raises ValueError for another shape."""
        if tokens.ndim != 2:
            raise ValueError(f"encode_text: tokens must be [B, L], got {list(tokens.shape)}")
        return F.normalize(self.model.encode_text(tokens.to(self.device)), dim=-1)

    def fingerprint(self) -> str:
        """sha256 over all weights (name, dtype, shape, bytes) and the transform: equal for equal embeddings."""
        digest = digest_of(self.model)
        digest.update(described(self.preprocess).encode())
        return digest.hexdigest()


def digest_of(model: torch.nn.Module) -> Any:
    """sha256 over all weights: name, dtype, shape, bytes; it takes more."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest


def load_encoder(
    model: str = "tiny", pretrained: str | Path | None = None, device: str | torch.device = "cpu"
) -> Encoder:
    """Load a frozen encoder by open_clip's names.

    Args:
        model: "tiny", which ships with its weights (`fastprob.encoders.tiny`); a name of `open_clip.list_models()`; or
            open_clip's "hf-hub:..." and "local-dir:..."; or ALBEF and BLIP: "run:..." and "released:...", see
            `fastprob.pretraining.encoder`.
        pretrained: one of open_clip's tags for the model or a local checkpoint file; None for those that bring their
            weights ("tiny", "hf-hub:", "local-dir:", "run:"); of "released:" its tokenizer.
        device: where its weights go.

    Raises:
        ValueError: an unknown model, or weights that are missing or don't fit.
    """
    if model.startswith(("run:", "released:")):
        from fastprob.pretraining import need_transformers

        need_transformers("load_encoder")
        from fastprob.pretraining import encoder

        return encoder.load(model, None if pretrained is None else str(pretrained), device)
    name = _known_model(model)
    weights = _known_weights(name, model, pretrained)
    try:
        net, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights, device=device)
    except Exception as error:
        if weights is None or not Path(weights).is_file():
            raise
        raise ValueError(f"load_encoder: pretrained must be weights of {model!r}, got {weights!r}: {error}") from error
    source = tiny.TAG if model == "tiny" and pretrained is None else pretrained
    return Encoder(net, preprocess, open_clip.get_tokenizer(name), model, None if source is None else str(source))


def _known_model(model: str) -> str:
    """open_clip's name for `model`, known to open_clip from here on."""
    tiny.register()
    if model == "tiny":
        return tiny.NAME
    if model.startswith(("hf-hub:", "local-dir:")):
        return model
    name = model.replace("/", "-")  # "ViT-B/32": create_model accepts it, get_tokenizer does not
    known = ["tiny", *open_clip.list_models()]
    if name not in known:
        lower = {each.lower(): each for each in known}
        close = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
        hint = f"close matches: {', '.join(close)}" if close else "see open_clip.list_models()"
        raise ValueError(f"load_encoder: model must be 'tiny' or one of open_clip's models, got {model!r}; {hint}")
    return name


def _known_weights(name: str, model: str, pretrained: str | Path | None) -> str | None:
    """What open_clip takes as `pretrained`: a tag, a file that exists, or None where the model has its own."""
    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise ValueError(f"load_encoder: pretrained must be None for {model!r}, got {str(pretrained)!r}")
        return None
    if model == "tiny" and pretrained in (None, tiny.TAG):
        return str(tiny.WEIGHTS)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        return str(pretrained)
    path = Path(pretrained).expanduser() if pretrained is not None else None
    if path is None or not path.is_file():
        options = f"one of {tags} or " if tags else ""
        raise ValueError(
            f"load_encoder: pretrained must be {options}a checkpoint file for {model!r}, got {pretrained!r}"
        )
    return str(path)
