"""Pretraining on images and texts: ALBEF and BLIP, and what their objectives are made of.

model = BLIP(visual, words_of(captions), BlipTextConfig())       # fastprob.pretraining.objectives: needs transformers
teacher = Teacher(model.towers, 57_600)
losses = model.losses(images, model.tokenize(captions), ids, teacher, alpha=0.4, seed=step)      # of one batch
captions = model.caption(images, num_beams=3)

Parts by themselves, which need no transformers: `ImageTextContrast`, `Queue`, `follow`, `twin_of`, `hard_negatives`.
"""

from fastprob.pretraining.contrast import ImageTextContrast
from fastprob.pretraining.momentum import Queue, follow, twin_of
from fastprob.pretraining.negatives import hard_negatives


def need_transformers(who: str) -> None:
    """Raises ImportError, as `who`, that says how to get transformers, where it is not there."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{who}: needs transformers; install it with `pip install fastprob[pretrain]`") from error


__all__ = ["ImageTextContrast", "Queue", "follow", "hard_negatives", "twin_of"]
