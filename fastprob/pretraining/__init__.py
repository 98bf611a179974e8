"""Pretraining on images and texts: what ALBEF's and BLIP's objectives are made of.

queue, contrast = Queue(57_600, 256), ImageTextContrast()
follow(twin, model)                                             # twin = twin_of(model), before the twin's features
loss = contrast(image, text, (twin_image, twin_text), ids, queue, alpha)
which, found = hard_negatives(image @ text.T / contrast.temperature, ids, ids, seed=step)   # texts for matching
queue.add(twin_image, twin_text, ids)                           # after the loss
"""

from fastprob.pretraining.contrast import ImageTextContrast
from fastprob.pretraining.momentum import Queue, follow, twin_of
from fastprob.pretraining.negatives import hard_negatives

__all__ = ["ImageTextContrast", "Queue", "follow", "hard_negatives", "twin_of"]
