"""ROAR+: what a model can't learn from pairs without the parts that maps point to."""

from __future__ import annotations

import copy

import torch
from open_clip import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from fastprob._arguments import one_of
from fastprob.attribution.method import Attribution
from fastprob.attribution.metrics import SIDES, Pairs, order


def roar_loss(
    model: nn.Module,
    train: Pairs,
    test: Pairs,
    found: Attribution | None,
    *,
    side: str = "both",
    share: float = 0.5,
    steps: int = 100,
    batch_size: int = 64,
    lr: float = 1e-4,
    seed: int = 0,
) -> float:
    """CLIP's loss on whole test pairs, in nats, of a model fine-tuned on pairs without what their maps point to.

        ROAR+ of a method = roar_loss with its maps - roar_loss with None

    Higher is better: the model missed more of what matters. A loss is from 0 up, that of chance log(batch_size).

    Args:
        model: an open_clip model. A copy of it is tuned, in float32, by AdamW with a constant rate.
        train: the pairs to tune on; test: the pairs that the loss is of, its mean over whole batches.
        found: maps of the train pairs. The most important pixels turn blank, and the tokens of the most important words
            padding. None tunes on the pairs as they are.
        side: whose parts are left out: image, text or both.
        share: of the pixels and of the words that is left out.
        steps, batch_size, lr: of the tuning.
        seed: of the order of the pairs.

    Raises:
        ValueError: for another side, a share out of range, or pairs that are fewer than a batch.

    Source:
        Hooker et al., A benchmark for interpretability methods in deep neural networks, NeurIPS 2019 (ROAR); Wang,
        Rudner and Wilson (M2IB), NeurIPS 2023, who tune and then score on whole inputs.
    """
    one_of("roar_loss", "side", side, SIDES)
    if not 0 <= share <= 1:
        raise ValueError(f"roar_loss: share must be from 0 to 1, got {share}")
    for name, pairs in (("train", train), ("test", test)):
        if len(pairs) < batch_size:
            raise ValueError(f"roar_loss: {name} must be at least a batch of {batch_size} pairs, got {len(pairs)}")
    images, ids = (train.images, train.ids) if found is None else _without(train, found, side, share)
    tuned = copy.deepcopy(model).float().requires_grad_(True)
    loss, optimizer = ClipLoss(), torch.optim.AdamW(tuned.parameters(), lr, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = _batches(torch.randperm(len(train), generator=generator), batch_size)
        batch = batches.pop().to(ids.device)
        optimizer.zero_grad()
        _loss(tuned, loss, images[batch], ids[batch]).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        batches = _batches(torch.arange(len(test), device=ids.device), batch_size)
        return float(sum(_loss(tuned, loss, test.images[batch], test.ids[batch]) for batch in batches) / len(batches))


def _without(train: Pairs, found: Attribution, side: str, share: float) -> tuple[Tensor, Tensor]:
    """Images and token ids without what the maps point to."""
    image, text = order(found)
    images = train.images if side == "text" else train.images_of(image >= share)
    return images, train.ids if side == "image" else train.ids_of((text >= share) | text.isnan())


def _batches(rows: Tensor, size: int) -> list[Tensor]:
    """Whole ones alone: the loss grows with the size of a batch."""
    return [batch for batch in rows.split(size) if len(batch) == size]


def _loss(model: nn.Module, loss: ClipLoss, images: Tensor, ids: Tensor) -> Tensor:
    image, text = F.normalize(model.encode_image(images.float()), dim=-1), F.normalize(model.encode_text(ids), dim=-1)
    return loss(image, text, model.logit_scale.exp())
