"""M2IB: how much of each activation may pass a noisy bottleneck behind a block, if the match is to stay.

For one pair and one tower, with x [T, d] the hidden states behind block l, f the rest of the tower, g the other side's
features and a [T, d] what is learnt, from 5 on, by Adam:

    lambda = sigmoid(a),  t = lambda x + (1 - lambda) sigma eps,  eps ~ N(0, 1)
    minimise  beta mean KL(t | x, noise) - mean over samples of cos(f(t), g)

A token's value is its information, KL summed over d, in the last forward pass (`fastprob.bottleneck`).

x and g never change: they are computed once. In each step the blocks behind l run, the last one for the token that is
read alone, and gradients go back to t: weights get none. The last step is its KL alone. Pairs lie side by side, each
with Adam's trajectory as if alone; all of them see the same noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastprob.attribution.method import Method, Side, widened
from fastprob.encoders.towers import ImageTower, TextTower
from fastprob.ops.bottleneck import bottleneck
from fastprob.training import seed_of

START = 5.0
"""Of every a: almost all passes."""


class _Behind(Method):
    """A method that looks at the hidden states behind a block."""

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Tensor], layer: int | None):
        super().__init__(model, tokenizer)
        self.layer = layer
        for name, tower in (("image", self.image_tower), ("text", self.text_tower)):
            depth, who = len(tower.blocks), type(self).__name__
            if depth < 2:
                raise ValueError(f"{who}: model must have at least 2 blocks in a tower, got 1 in the {name} tower")
            if layer is not None and not 0 <= layer <= depth - 2:
                expected = f"from 0 to {depth - 2} for the {depth} blocks of the {name} tower, or None"
                raise ValueError(f"{who}: layer must be {expected}, got {layer}")

    def _first(self, tower: ImageTower | TextTower) -> int:
        return len(tower.blocks) * 10 // 12 if self.layer is None else self.layer + 1


class M2IB(_Behind):
    """Multi-modal information bottleneck attribution: maps of the information that the match needs.

    Args:
        model, tokenizer: as `Method`.
        layer: the bottleneck stands behind this block of either tower, counted from 0 as the released code does: the
            paper's 9 of 12 leaves two blocks behind it. None: there, or at the same share of a tower of another depth.
        beta: weight of the information.
        steps: of Adam; lr: its learning rate.
        samples: of the noise in every step; sigma: its standard deviation.
        seed: of the noise, a non-negative number. The same seed makes the same maps.

    Raises:
        ValueError: for a layer that a tower does not have, or other options out of range; else as `Method`.

    Source:
        Wang, Rudner and Wilson, Visual Explanations of Image-Text Representations via Multi-Modal Information
        Bottleneck Attribution, NeurIPS 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Tensor],
        *,
        layer: int | None = None,
        beta: float = 0.1,
        steps: int = 10,
        samples: int = 10,
        lr: float = 1.0,
        sigma: float = 1.0,
        seed: int = 0,
    ):
        super().__init__(model, tokenizer, layer)
        at_least = {"beta": (beta, 0), "steps": (steps, 1), "samples": (samples, 1), "lr": (lr, 0), "seed": (seed, 0)}
        for name, (value, least) in at_least.items():
            if not least <= value < float("inf"):
                raise ValueError(f"M2IB: {name} must be at least {least} and finite, got {value}")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"M2IB: sigma must be above 0 and finite, got {sigma}")
        self.beta, self.steps, self.samples, self.lr = beta, steps, samples, lr
        self.sigma, self.seed = sigma, seed

    def _tokens(self, side: Side) -> Tensor:
        x, seen = widened(side.states.x), side.states.seen()
        share = (seen / (seen.sum(1, keepdim=True) * x.shape[-1]))[..., None]  # [P, N, 1], of a pair's mean KL
        a = torch.full_like(x, START).requires_grad_()
        adam = torch.optim.Adam([a], lr=self.lr, fused=True)
        for step in range(self.steps - 1):
            with torch.enable_grad():
                options = {"seed": seed_of(self.seed, step), "samples": self.samples, "sigma": self.sigma}
                t, kl = bottleneck(x, a, batch_dims=1, **options)
                loss = self.beta * (share * kl).sum() - side.cosine(t).mean(0).sum()
                (a.grad,) = torch.autograd.grad(loss, a)
            adam.step()
        return bottleneck(x, a, seed=self.seed, samples=0, sigma=self.sigma)[1].sum(-1)


class NIB(_Behind):
    """The narrowing bottleneck: the hidden states behind a block let through from nothing to all, and what each step of
    that adds to the match:

        value of a token = sum over d of x mean_i grad cos(f(i x / n), g), i = 1..n

    which is integrated gradients from 0 at that block.

    Args:
        model, tokenizer: as `Method`.
        layer: as `M2IB`. The released code's 9 leaves three of twelve blocks behind it, which is 8 here.
        steps: n.

    Raises:
        ValueError: as `M2IB`.

    Source:
        Zhu et al., Narrowing Information Bottleneck Theory for Multimodal Image-Text Representations Interpretability,
        ICLR 2025.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Callable[..., Tensor], *, layer: int | None = None, steps: int = 10
    ):
        super().__init__(model, tokenizer, layer)
        if steps < 1:
            raise ValueError(f"NIB: steps must be at least 1, got {steps}")
        self.steps = steps

    def _tokens(self, side: Side) -> Tensor:
        x = widened(side.states.x)
        total = sum(side.gradient(x * (i / self.steps)) for i in range(1, self.steps + 1))
        return (x * total / self.steps).sum(-1)
