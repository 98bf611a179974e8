"""CoOp, CoCoOp, VPT and DAPT: a few vectors are tuned in front of a frozen open_clip model.

All predict p(y | x) = softmax over classes of scale * cos(f(x), g(t_y)) and are called alike: a batch of images
[B, 3, H, W], or of image features [B, D] where the image side is not tuned, gives logits [B, C]. Their state dict holds
what is tuned and nothing else, under the names of the released code.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprob._files import is_state_dict, read_pickle
from fastprob.encoders.towers import ImageTower, TextTower
from fastprob.ops.gaussian_potential import gaussian_potential
from fastprob.ops.prototype_dispersion import prototype_dispersion
from fastprob.prompts.encoder import PromptTextEncoder


class _Ignored:
    """Stands for the objects beside the weights of a released checkpoint: its schedule and optimiser."""

    def __setstate__(self, state):
        pass


_IN_RELEASED = [
    (_Ignored, "torch.optim.lr_scheduler.CosineAnnealingLR"),
    (_Ignored, "torch.optim.sgd.SGD"),
    (lambda *_: {}, "collections.defaultdict"),
    dict,
]


class _Prompted(nn.Module):
    """What the methods share: the frozen model, which is the caller's and not in the state dict."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.__dict__["model"] = model

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] images, or features [B, D] as they are, to [B, D] of unit norm. ValueError for another shape."""
        if images.dim() == 2:
            return F.normalize(images, dim=-1)
        if images.dim() != 4 or images.shape[1] != 3:
            name, got = type(self).__name__, list(images.shape)
            raise ValueError(f"{name}: images must be [B, 3, H, W], or features [B, D], got {got}")
        with torch.no_grad():
            return F.normalize(self.model.encode_image(images), dim=-1)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B, D], text [C, D] or [B, C, D] -> [B, C], in float32 also under autocast: times a scale of 100, the
        steps of a bfloat16 cosine would be a tenth."""
        dtype = torch.promote_types(image.dtype, torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            image, text = image.to(dtype), text.to(dtype)
            product = image @ text.T if text.dim() == 2 else (text @ image[:, :, None])[:, :, 0]
            return self.model.logit_scale.to(dtype).exp() * product

    def load_released(self, file: str | os.PathLike) -> None:
        """Loads a checkpoint of the released code: `state_dict` of its prompt learner.

        Its buffers token_prefix and token_suffix, the frozen model's embeddings, are left out. Raises ValueError for a
        file with other weights.
        """
        who = type(self).__name__
        with torch.serialization.safe_globals(_IN_RELEASED):
            state = read_pickle(who, file)
        state = state.get("state_dict", state) if isinstance(state, dict) else None
        if not is_state_dict(state):
            raise ValueError(f"{who}: {file} must be a checkpoint with a state dict")
        state = {name.removeprefix("prompt_learner."): weight for name, weight in state.items()}
        state = {name: weight for name, weight in state.items() if not name.startswith("token_")}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{who}: {file} must hold what it tunes: {error}") from error


def _text_side(
    model: nn.Module,
    tokenizer: Callable[..., Tensor],
    classnames: Sequence[str],
    context_length: int,
    init: str | None,
    class_specific: bool = False,
    **encoder,
) -> tuple[PromptTextEncoder, nn.Parameter]:
    """The encoder and its context, [L, d] or [C, L, d]: from N(0, 0.02), or a phrase's embeddings."""
    phrase = None if init is None else phrase_embeddings(model, tokenizer, init.replace("_", " "))
    length = context_length if phrase is None else len(phrase)
    text = PromptTextEncoder(model, tokenizer, classnames, context_length=length, **encoder)
    shape = (len(classnames),) * class_specific + (length, text.width)
    context = torch.randn(shape) * 0.02 if phrase is None else phrase.expand(shape).clone()
    return text, nn.Parameter(context.to(text.tower.device))


def phrase_embeddings(model: nn.Module, tokenizer: Callable[..., Tensor], phrase: str) -> Tensor:
    """[n, d] token embeddings of a phrase ("a photo of a"), to start a context from."""
    tower = TextTower(model)
    empty, ids = tokenizer([""])[0], tokenizer([phrase])[0]
    start = int(empty[0] == ids[0])  # behind the start-of-text token, if there is one
    length = int((ids == empty[start]).int().argmax()) - start
    return tower.embed(ids[start : start + length].to(tower.device)).detach()


class CoOp(_Prompted):
    """Context vectors in place of "a photo of a", learnt by all classes together or (class_specific) each its own.

    Args:
        model, tokenizer, classnames: as `PromptTextEncoder`, which `encoder` options go to as well
            (class_position, path, chunk, recompute).
        context_length: L, 16 as released; init: a phrase to start from, whose length then counts.

    Source: Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        classnames: Sequence[str],
        *,
        context_length: int = 16,
        class_specific: bool = False,
        init: str | None = None,
        **encoder,
    ):
        super().__init__(model)
        self.encoder, self.ctx = _text_side(
            model, tokenizer, classnames, context_length, init, class_specific, **encoder
        )

    def text_features(self) -> Tensor:
        """[C, D] class embeddings of unit norm."""
        return self.encoder(self.ctx)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.image_features(images), self.text_features())


class CoCoOp(_Prompted):
    """CoOp with a context of each image's own: v_m(x) = v_m + pi(x), pi a small network on the image feature.

    B images of C classes are B C prompts; `chunk` and `recompute` of `PromptTextEncoder` bound the memory.

    Source: Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        classnames: Sequence[str],
        *,
        context_length: int = 4,
        init: str | None = "a photo of a",
        **encoder,
    ):
        super().__init__(model)
        self.encoder, self.ctx = _text_side(model, tokenizer, classnames, context_length, init, **encoder)
        dim = self.encoder.tower.dim
        layers = {"linear1": nn.Linear(dim, max(dim // 16, 1)), "relu": nn.ReLU(inplace=True)}
        layers["linear2"] = nn.Linear(max(dim // 16, 1), self.encoder.width)
        self.meta_net = nn.Sequential(OrderedDict(layers)).to(self.ctx.device)

    def text_features(self, image_features: Tensor) -> Tensor:
        """[B, D] image features of unit norm -> [B, C, D] class embeddings of unit norm."""
        return self.encoder((self.ctx + self.meta_net(image_features)[:, None])[:, None])

    def forward(self, images: Tensor) -> Tensor:
        image = self.image_features(images)
        return self.logits(image, self.text_features(image))


def visual_context(tower: ImageTower, length: int, deep: bool) -> nn.Parameter:
    """[1, L, d], as released, or [layers, L, d] if deep; uniform in +-sqrt(6 / (3 p^2 + d)) for patches of p x p."""
    weight = tower.patch_weight
    bound = math.sqrt(6 / (weight[0].numel() + weight.shape[0]))
    shape = (len(tower.blocks) if deep else 1, length, weight.shape[0])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound).to(weight.device))


def prompted_image_features(tower: ImageTower, images: Tensor, prompts: Tensor) -> Tensor:
    """Image features with vectors between class token and patches, behind the first norm and without positions.

    images: [B, 3, H, W]; prompts: [1, B, L, d], or [layers, B, L, d] for other ones in every block, in place of those
    that come out of the block before. Returns [B, D], not normalised.
    """
    x = tower.embed(images)
    length, layers = prompts.shape[-2], prompts.to(x.dtype)
    x = torch.cat([x[:, :1], layers[0], x[:, 1:]], dim=1)
    for i, block in enumerate(tower.blocks):
        if 0 < i < len(layers):
            x = torch.cat([x[:, :1], layers[i], x[:, 1 + length :]], dim=1)
        x = block(x)
    return tower.read(torch.cat([x[:, :1], x[:, 1 + length :]], dim=1))


class _VisuallyPrompted(_Prompted):
    """Image features with prompts `vis_ctx`, dropped out while training."""

    def __init__(self, model: nn.Module, length: int, deep: bool, dropout: float):
        super().__init__(model)
        self.tower = ImageTower(model)
        self.vis_ctx = visual_context(self.tower, length, deep)
        self.dropout = nn.Dropout(dropout)

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D] of unit norm. Raises ValueError for another shape."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{type(self).__name__}: images must be [B, 3, H, W], its prompts stand among an image's patches, "
                f"got {list(images.shape)}"
            )
        prompts = self.dropout(self.vis_ctx[:, None].expand(-1, len(images), -1, -1))
        return F.normalize(prompted_image_features(self.tower, images, prompts), dim=-1)


class VPT(_VisuallyPrompted):
    """Visual prompt tuning: vectors among the image's patches; the classes keep their embeddings.

    Args:
        model: an open_clip model with a vision transformer.
        text: [C, D], the classes' embeddings, computed once.
        length: L; deep: other vectors in every block; dropout: of the vectors, while training.

    Source: Jia et al., Visual Prompt Tuning, ECCV 2022.
    """

    def __init__(self, model: nn.Module, text: Tensor, *, length: int = 16, deep: bool = False, dropout: float = 0.0):
        super().__init__(model, length, deep, dropout)
        self.register_buffer("text", F.normalize(text.detach(), dim=-1), persistent=False)

    def text_features(self) -> Tensor:
        """[C, D] class embeddings of unit norm."""
        return self.text

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.image_features(images), self.text)


class DAPT(_VisuallyPrompted):
    """CoOp's text prompts and VPT's visual ones, with two terms that spread classes and gather their images:

        L = cross-entropy + beta_t gaussian_potential(w, t=2) + beta_v mean((z_i - s_y_i)^2)

    w: [C, D] class embeddings; z: [B, D] image features; s: [C, D] prototypes, the means of each class's features
    before training (`prototypes`).

    Args:
        model, tokenizer, classnames, context_length, init, encoder options: as `CoOp`.
        visual_length, deep, dropout: as `VPT`.
        beta_t, beta_v: weights of the two terms.

    Source: Cho et al., Distribution-Aware Prompt Tuning for Vision-Language Models, ICCV 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        classnames: Sequence[str],
        *,
        context_length: int = 16,
        init: str | None = None,
        visual_length: int = 16,
        deep: bool = False,
        dropout: float = 0.0,
        beta_t: float = 0.1,
        beta_v: float = 0.1,
        **encoder,
    ):
        super().__init__(model, visual_length, deep, dropout)
        self.encoder, self.txt_ctx = _text_side(model, tokenizer, classnames, context_length, init, **encoder)
        self.beta_t, self.beta_v = beta_t, beta_v

    def text_features(self) -> Tensor:
        """[C, D] class embeddings of unit norm."""
        return self.encoder(self.txt_ctx)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.image_features(images), self.text_features())

    def loss(self, images: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
        """The three terms of a batch. images [B, 3, H, W], labels [B] long, prototypes [C, D] of any dtype."""
        image, text = self.image_features(images), self.text_features()
        inter = gaussian_potential(text, t=2.0)
        dtype = torch.promote_types(image.dtype, prototypes.dtype)
        intra = prototype_dispersion(image.to(dtype), prototypes.to(dtype), labels)
        return F.cross_entropy(self.logits(image, text), labels) + self.beta_t * inter + self.beta_v * intra


def prototypes(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of each class's features of unit norm, not normalised again. [N, D], [N] long -> [classes, D].

    Raises ValueError for a class without features.
    """
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) != classes or not counts.all():
        raise ValueError(f"prototypes: labels must name each of the {classes} classes, got counts {counts.tolist()}")
    members = F.one_hot(labels, classes).to(features.dtype)  # a product adds in the same order every time
    return members.T @ F.normalize(features, dim=-1) / counts[:, None]
