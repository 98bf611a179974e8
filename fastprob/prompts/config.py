"""What is tuned, how, and where it is kept: options, the method they make, and its checkpoint."""

from __future__ import annotations

import json
import math
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprob._files import read_tensors, write_tensors
from fastprob.data.labelled import CLASSES, TEMPLATE
from fastprob.encoders import Encoder, load_encoder
from fastprob.prompts.methods import DAPT, VPT, CoCoOp, CoOp
from fastprob.prompts.tokens import POSITIONS

METHODS = ("coop", "cocoop", "vpt", "dapt")
PRECISIONS = {"fp32": None, "amp": torch.float16, "amp_bf16": torch.bfloat16}  # open_clip's names
_FORMAT = "fastprob.prompts/1"
_OPTIONAL_COUNTS = ("epochs", "context_length", "chunk")


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PromptConfig:
    """What determines a run, with the images and the encoder. None: as released, or as the option says.

    Raises ValueError for a value out of its range.
    """

    method: str = _option("dapt", f"one of {', '.join(METHODS)}")
    shots: int = _option(16, "images of every class to train on, drawn by the seed; 0: all")
    classes: str = _option("all", "all, base (the first half) or new")
    epochs: int | None = _option(None, "passes over the images; as released: 50 for one shot, 100 up to 4, 200 above")
    batch_size: int = _option(32, "images of a step")
    lr: float = _option(2e-3, "learning rate of SGD; DAPT's released settings have 2 to 20, by data set")
    context_length: int | None = _option(None, "context vectors of the text; as released: 16, or 4 of CoCoOp's init")
    class_position: str = _option("end", "where the name stands: end, middle or front")
    class_specific: bool = _option(False, "CoOp: a context for every class")
    init: str | None = _option(None, "words to start the context from; CoCoOp without context_length: 'a photo of a'")
    visual_length: int = _option(16, "VPT, DAPT: vectors among an image's patches")
    deep: bool = _option(False, "VPT, DAPT: other vectors in every block")
    dropout: float = _option(0.0, "VPT, DAPT: probability that a number in these vectors is dropped")
    beta_t: float = _option(0.1, "DAPT: weight of the spread of class embeddings")
    beta_v: float = _option(0.1, "DAPT: weight of the distance of images to their class's prototype")
    template: str | None = _option(None, "VPT: prompt of its class embeddings; the data set's, as 'a photo of a {}.'")
    augment: bool = _option(False, "random crops and flips, as released; without, features are encoded once")
    precision: str = _option("fp32", f"one of {', '.join(PRECISIONS)}")
    chunk: int | None = _option(None, "most prompts to encode at once, to bound memory; all, on a CPU 512")
    recompute: bool = _option(False, "compute activations again in the backward pass, to save memory")
    seed: int = _option(1, "of the images drawn, initial vectors, batches, dropout and crops")

    def __post_init__(self):
        for name, choices in (
            ("method", METHODS),
            ("classes", CLASSES),
            ("precision", tuple(PRECISIONS)),
            ("class_position", POSITIONS),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"PromptConfig: {name} must be one of {expected}, got {getattr(self, name)!r}")
        for least, names in enumerate((("shots", "seed"), ("batch_size", "visual_length", *_OPTIONAL_COUNTS))):
            for name in names:
                value, optional = getattr(self, name), name in _OPTIONAL_COUNTS
                if not (optional if value is None else isinstance(value, int) and value >= least):
                    expected = f"an integer of at least {least}" + " or None" * optional
                    raise ValueError(f"PromptConfig: {name} must be {expected}, got {value!r}")
        for name in ("beta_t", "beta_v"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"PromptConfig: {name} must be finite and >= 0, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"PromptConfig: lr must be finite and > 0, got {self.lr}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"PromptConfig: dropout must be in [0, 1), got {self.dropout}")
        if self.init is not None and not self.init.strip():
            raise ValueError(f"PromptConfig: init must be words or None, got {self.init!r}")
        if self.template is not None:
            check_template("PromptConfig", self.template)
        if self.class_specific and self.method != "coop":
            raise ValueError(f"PromptConfig: class_specific must be False for {self.method!r}, got True")
        if self.init is not None and self.context_length is not None:
            raise ValueError(f"PromptConfig: context_length must be None with init, got {self.context_length}")

    @staticmethod
    def of(options: Mapping[str, Any]) -> PromptConfig:
        """The options that a file holds. Those of fastprob 0.1 say 0 and "" where None stands now."""
        unset = {name: None for name in (*_OPTIONAL_COUNTS, "init", "template") if options.get(name) in (0, "")}
        return PromptConfig(**{**options, **unset})

    @property
    def name(self) -> str:
        """What tables and directories call it: DAPT without its two terms is CoOp + VPT, other weights are named."""
        default = PromptConfig.beta_t, PromptConfig.beta_v
        if self.method != "dapt" or (self.beta_t, self.beta_v) == default:
            return self.method
        return f"dapt-t{self.beta_t:g}-v{self.beta_v:g}" if self.beta_t or self.beta_v else "coop+vpt"

    @property
    def directory(self) -> Path:
        """Where a run goes below that of many."""
        return Path(self.name, f"{self.shots}-shot", f"seed{self.seed}")

    @property
    def tunes_images(self) -> bool:
        return self.method in ("vpt", "dapt")


def build(config: PromptConfig, encoder: Encoder, classnames: Sequence[str]) -> nn.Module:
    """The method of `config` for these classes, untrained, on the encoder's device. Raises ValueError as it does."""
    visual = {"deep": config.deep, "dropout": config.dropout}
    if config.method == "vpt":
        text = class_embeddings(encoder, classnames, config.template or TEMPLATE)
        return VPT(encoder.model, text, length=config.visual_length, **visual)
    options = {"class_position": config.class_position, "chunk": config.chunk, "recompute": config.recompute}
    if config.context_length is not None:
        options |= {"context_length": config.context_length, "init": None}
    if config.init is not None:
        options["init"] = config.init
    parts = encoder.model, encoder.tokenizer, classnames
    if config.method == "coop":
        return CoOp(*parts, class_specific=config.class_specific, **options)
    if config.method == "cocoop":
        return CoCoOp(*parts, **options)
    weights = {"beta_t": config.beta_t, "beta_v": config.beta_v}
    return DAPT(*parts, visual_length=config.visual_length, **visual, **weights, **options)


def check_template(who: str, template: str) -> str:
    """The template; ValueError unless it has one place for a name."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError:
        fields = None
    if fields != [""]:
        raise ValueError(f"{who}: template must hold one {{}} for the name, got {template!r}")
    return template


def class_embeddings(encoder: Encoder, classnames: Sequence[str], template: str) -> Tensor:
    """[C, D] of unit norm: the embeddings of `template` with every name in it ("_" counts as a space)."""
    return encoder.encode_text(encoder.tokenizer([template.format(name.replace("_", " ")) for name in classnames]))


def autocast(config: PromptConfig, device: torch.device) -> torch.autocast:
    dtype = PRECISIONS[config.precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class Tuned:
    """A method in evaluation mode with what it was tuned by; `history` has the losses, where it comes from `fit`."""

    method: nn.Module
    config: PromptConfig
    encoder: Encoder
    classnames: list[str]
    history: dict[str, Any] = field(default_factory=dict)

    def for_classes(self, classnames: Sequence[str]) -> Tuned:
        """The same vectors in front of other classes' names. Raises ValueError where every class has its own."""
        if list(classnames) == self.classnames:
            return self
        if self.config.class_specific:
            raise ValueError("for_classes: class_specific must be False for other classes, got a context for each")
        method = build(self.config, self.encoder, classnames)
        method.load_state_dict(self.method.state_dict())
        return Tuned(method.eval(), self.config, self.encoder, list(classnames))

    def save(self, path: str | os.PathLike) -> None:
        """Writes what is tuned and how, as safetensors, in one step."""
        encoder = {"model": self.encoder.name, "pretrained": self.encoder.pretrained}
        encoder["fingerprint"] = self.encoder.fingerprint()
        about = {"config": asdict(self.config), "classnames": self.classnames, "encoder": encoder}
        metadata = {_FORMAT: json.dumps(about)}  # one entry: safetensors writes several in random order
        write_tensors(path, self.method.state_dict(), metadata)

    @staticmethod
    def load(
        path: str | os.PathLike,
        encoder: Encoder | None = None,
        device: str | torch.device = "cpu",
        *,
        fingerprint: str | None = None,
    ) -> Tuned:
        """What `save` wrote, on `encoder` or on the one it was tuned with, loaded anew.

        fingerprint: `encoder.fingerprint()`, for who loads many files and need not read all weights for each. Raises
        ValueError for another file and for another encoder.
        """
        weights, metadata = read_tensors("Tuned", path)
        if _FORMAT not in metadata:
            raise ValueError(f"Tuned: {path} must be of format {_FORMAT!r}, got {sorted(metadata)}")
        about = _read_about(path, metadata[_FORMAT])
        classnames, of = about["classnames"], about["encoder"]
        try:
            config = PromptConfig.of(about["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"Tuned: {path} must have the options of this version: {error}") from error
        if encoder is None:
            try:
                encoder = load_encoder(of["model"], pretrained=of["pretrained"], device=device)
            except RuntimeError as error:  # open_clip's, of weights that it can't download
                raise ValueError(f"Tuned: the encoder of {path}, {of['model']}: {error}") from error
        if (fingerprint or encoder.fingerprint()) != of["fingerprint"]:
            raise ValueError(f"Tuned: {path} must be for {encoder}, got one for {of['model']}, {of['pretrained']}")
        try:
            method = build(config, encoder, classnames)
            method.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"Tuned: {path} must hold what its options tune: {error}") from error
        return Tuned(method.eval(), config, encoder, classnames)


def _read_about(path: str | os.PathLike, text: str) -> dict[str, Any]:
    """What `Tuned.save` says of itself. Raises ValueError for anything else."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Tuned: {path} must say in JSON how it was tuned, got: {error}") from error
    found = about if isinstance(about, dict) else {}
    classnames, config, encoder = found.get("classnames"), found.get("config"), found.get("encoder")
    whole = isinstance(config, dict) and isinstance(encoder, dict) and isinstance(classnames, list)
    texts = whole and all(isinstance(each, str) for each in [*classnames, encoder.get("model")])
    if not texts or not {"pretrained", "fingerprint"} <= encoder.keys():
        raise ValueError(f"Tuned: {path} must say its classnames, config and encoder, got {about!r}")
    return about
