"""Rivals of M2IB on the same towers, from gradients, from attention, from masks and from chance.

Captum would not save any: its gradient times input is the line that stands here, its Grad-CAM takes the axis of tokens
for that of channels, and it has no attention rollout, no raw attention and no RISE.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastprob.attribution.method import Method, Side, widened
from fastprob.encoders.towers import Entered, ImageTower, TextTower, attention_weights
from fastprob.training import seed_of

AT_ONCE = 128
"""Masked images or texts at once."""


class GradientInput(Method):
    """Gradient times input: sum over channels of x dcos/dx, x the pixels, or the token embeddings.

    Source:
        Shrikumar et al., Not Just a Black Box: Learning Important Features Through Propagating Activation Differences,
        2016.
    """

    def _image(self, side: Side) -> Tensor:
        return self._product(side, side.inputs, self.image_tower.enter).sum(1)

    def _text(self, side: Side) -> Tensor:
        ids, tower = side.inputs, self.text_tower
        return self._product(side, tower.embed(ids), lambda x: tower.enter(x, ids)).sum(-1)

    def _product(self, side: Side, inputs: Tensor, enter: Callable[[Tensor], Entered]) -> Tensor:
        with torch.enable_grad():
            inputs = widened(inputs).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(side.cosine(enter(inputs).x[None]).sum(), inputs)
        return (inputs * gradient).detach()


class GradCAM(Method):
    """Grad-CAM on the tokens x that the last block takes: relu(sum over channels of x g), g the mean over patches, or
    over the tokens of words, of dcos/dx.

    Source:
        Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017.
    """

    def _first(self, tower: ImageTower | TextTower) -> int:
        return len(tower.blocks) - 1

    def _tokens(self, side: Side) -> Tensor:
        x = widened(side.states.x)
        weights = (side.gradient(x) * side.content[..., None]).sum(1, keepdim=True)  # [P, 1, d], the mean but for scale
        return torch.relu((x * weights).sum(-1))


class _Attention(Method):
    """A method that looks at what the token that a tower reads attends to."""

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Tensor]):
        super().__init__(model, tokenizer)
        for name, tower in (("image", self.image_tower), ("text", self.text_tower)):
            if not tower.by_parts:
                who = type(self).__name__
                raise ValueError(
                    f"{who}: model must have open_clip's plain blocks, got custom ones in the {name} tower"
                )

    def _weights(self, block: nn.Module, states: Entered) -> Tensor:
        """[P, N, N], the mean over heads."""
        return widened(attention_weights(block, states)).mean(1)

    def _read(self, side: Side, flow: Tensor) -> Tensor:
        """[P, N, N] -> [P, N], the row of the token that is read, or the mean of the patches' rows."""
        at = side.states.at
        return flow[:, 1:].mean(1) if at is None else flow[torch.arange(len(at), device=at.device), at]


class RawAttention(_Attention):
    """The attention of the last block, from the token that the tower reads, the mean over heads.

    Where a tower reads the mean of all patches, or pools them by attention, from the patches, on average. It does not
    depend on the other side.

    Source:
        The baseline of Chefer, Gur and Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021.
    """

    def _first(self, tower: ImageTower | TextTower) -> int:
        return len(tower.blocks) - 1

    def _tokens(self, side: Side) -> Tensor:
        return self._read(side, self._weights(side.tower.blocks[-1], side.states))


class AttentionRollout(_Attention):
    """Attention through all blocks: the product of (A + 1) / 2, A a block's attention, the mean over heads; from the
    token that the tower reads, as `RawAttention`. It does not depend on the other side.

    Source:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
    """

    def _tokens(self, side: Side) -> Tensor:
        states = side.states
        length = states.x.shape[1]
        rollout = one = torch.eye(length, device=states.x.device, dtype=widened(states.x).dtype)
        for block in side.tower.blocks:
            rollout = (self._weights(block, states) + one) / 2 @ rollout
            states = side.tower.run(states, [block])
        return self._read(side, rollout)


class RISE(Method):
    """Random masks: what it adds to the match, on average, that a pixel or a token is kept.

        value = sum_i m_i (cos_i - mean cos) / (n keep)

    Images are multiplied by masks as RISE draws them: a grid of cells, kept or not, made smooth and moved at random. Of
    texts, tokens of words are kept, or their embeddings set to 0.

    Args:
        model, tokenizer: as `Method`.
        masks: n; as many images and texts go through the towers.
        cells: of the grid, each way.
        keep: the probability to keep a cell or a token.
        seed: of the masks, a non-negative number; they are the same for all pairs.

    Raises:
        ValueError: for options out of range; else as `Method`.

    Source:
        Petsiuk, Das and Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, BMVC 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        *,
        masks: int = 1000,
        cells: int = 7,
        keep: float = 0.5,
        seed: int = 0,
    ):
        super().__init__(model, tokenizer)
        for name, value, least in (("masks", masks, 1), ("cells", cells, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"RISE: {name} must be at least {least}, got {value}")
        if not 0 < keep < 1:
            raise ValueError(f"RISE: keep must be between 0 and 1, got {keep}")
        self.masks, self.cells, self.keep, self.seed = masks, cells, keep, seed

    def _image(self, side: Side) -> Tensor:
        generator, images = torch.Generator().manual_seed(self.seed), side.inputs
        cells = (torch.rand(self.masks, self.cells, self.cells, generator=generator) < self.keep).float()
        shifts = torch.rand(self.masks, 2, generator=generator)

        def masked(some: slice) -> tuple[Tensor, Tensor]:
            masks = _smooth(cells[some], shifts[some], images.shape[2:]).to(images.device)
            each = images * masks[:, None, None].to(images.dtype)  # [n, P, 3, H, W]
            return masks, self.image_tower.enter(each.flatten(0, 1)).x

        return self._mean(side, masked)

    def _text(self, side: Side) -> Tensor:
        generator, ids, tower = torch.Generator().manual_seed(self.seed), side.inputs, self.text_tower
        kept = (torch.rand(self.masks, ids.shape[1], generator=generator) < self.keep).to(ids.device)
        embedded, fixed = tower.embed(ids), ~F.pad(side.content, (0, ids.shape[1] - side.content.shape[1]))

        def masked(some: slice) -> tuple[Tensor, Tensor]:
            each = embedded * (kept[some, None] | fixed)[..., None]  # [n, P, T, d]
            return kept[some].float(), tower.enter(each.flatten(0, 1), ids.repeat(len(each), 1)).x

        return self._mean(side, masked)

    def _mean(self, side: Side, masked: Callable[[slice], tuple[Tensor, Tensor]]) -> Tensor:
        """[P, ...], of what `masked` makes of some of the masks: themselves, [n, ...], and the states [n P, N, d]."""
        pairs = len(side.inputs)
        at_once = max(AT_ONCE // pairs, 1)
        of_kept = kept = cosines = 0
        for at in range(0, self.masks, at_once):
            masks, states = masked(slice(at, at + at_once))
            cosine = side.cosine(states.unflatten(0, (-1, pairs)))  # [n, P]
            of_kept += torch.einsum("np,n...->p...", cosine, masks.to(cosine.dtype))
            kept, cosines = kept + masks.sum(0), cosines + cosine.sum(0)
        mean = (cosines / self.masks).view(-1, *[1] * kept.dim())
        return (of_kept - mean * kept) / (self.masks * self.keep)


def _smooth(cells: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, H, W] masks of cells [n, c, c], moved by a share of a cell, [n, 2]."""
    cell = [math.ceil(length / cells.shape[1]) for length in size]
    wide = [(cells.shape[1] + 1) * length for length in cell]
    smooth = F.interpolate(cells[:, None], wide, mode="bilinear")[:, 0]
    corners = (shifts * torch.tensor(cell)).long().tolist()
    return torch.stack([mask[y : y + size[0], x : x + size[1]] for mask, (y, x) in zip(smooth, corners)])


class Random(Method):
    """Chance: normal numbers for patches and tokens, drawn by the seed and by the image or the text.

    Args:
        model, tokenizer: as `Method`.
        seed: a non-negative number.

    Raises:
        ValueError: for a negative seed; else as `Method`.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Tensor], *, seed: int = 0):
        super().__init__(model, tokenizer)
        if seed < 0:
            raise ValueError(f"Random: seed must be at least 0, got {seed}")
        self.seed = seed

    def _image(self, side: Side) -> Tensor:
        return self._drawn(side.inputs, *self.image_tower.grid)

    def _text(self, side: Side) -> Tensor:
        return self._drawn(side.inputs, side.inputs.shape[1])

    def _drawn(self, inputs: Tensor, *shape: int) -> Tensor:
        """[P, *shape]"""
        seeds = [seed_of(self.seed, zlib.crc32(each.contiguous().view(torch.uint8).numpy())) for each in inputs.cpu()]
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(inputs.device)
