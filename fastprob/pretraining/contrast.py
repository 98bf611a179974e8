"""Image-text contrast with momentum: ALBEF's and BLIP's first objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprob.ops.queue_contrastive_loss import queue_contrastive_loss
from fastprob.pretraining.momentum import Queue
from fastprob.training import gathered

LEAST, MOST = 0.001, 0.5
"""Of the temperature."""


class ImageTextContrast(nn.Module):
    """The mean of both directions' `queue_contrastive_loss`, with one learnt temperature:

        loss = (L(image; text', queue of texts) + L(text; image', queue of images)) / 2

    x' are the momentum encoders' features, which are the keys and the teacher.

    Args:
        temperature: where tau begins. It is kept in 0.001..0.5.

    Raises:
        ValueError: for a temperature out of that range.

    Source:
        ALBEF (Li et al., NeurIPS 2021), eq. 1, 2 and 6; BLIP (Li et al., ICML 2022).
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        if not LEAST <= temperature <= MOST:
            raise ValueError(f"ImageTextContrast: temperature must be in {LEAST}..{MOST}, got {temperature}")
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(
        self, image: Tensor, text: Tensor, of_momentum: tuple[Tensor, Tensor], ids: Tensor, queue: Queue, alpha: Tensor
    ) -> Tensor:
        """A scalar in nats. The queue stays as it is: the batch is added to it after the step (`Queue.add`).

        Args:
            image, text: [B, D], features of unit norm.
            of_momentum: (image', text'), [B, D] each, of unit norm. Under torchrun those of all ranks are keys.
            ids: [B] int64, from 0 up; equal ones are of one image.
            alpha: a scalar, the teacher's weight, in 0..1.
        """
        with torch.no_grad():
            self.temperature.clamp_(LEAST, MOST)
        image_twin, text_twin = of_momentum
        to_text = self._towards("text", image, image_twin, text_twin, ids, queue, alpha)
        return (to_text + self._towards("image", text, text_twin, image_twin, ids, queue, alpha)) / 2

    def _towards(
        self, side: str, queries: Tensor, teacher: Tensor, others: Tensor, ids: Tensor, queue: Queue, alpha: Tensor
    ) -> Tensor:
        keys, key_ids = queue.keys(side, gathered(others), gathered(ids))
        queries, teacher, tau, alpha = (t.to(keys.dtype) for t in (queries, teacher, self.temperature, alpha))
        return queue_contrastive_loss(queries, keys, ids, key_ids, tau, teacher, tau.detach(), alpha)
