"""What models are trained and judged on: captioned and labelled pictures, embedding stores, pairs, built-in scenes."""

from fastprob.data.arrays import embed_arrays
from fastprob.data.captions import ImageCaptions, open_dataset
from fastprob.data.digitscenes import DigitScenes
from fastprob.data.images import open_rgb
from fastprob.data.labelled import LabelledImages, open_splits
from fastprob.data.pairs import Paired, PairedEmbeddings
from fastprob.data.store import EmbeddingStore, embed, pictures_of
from fastprob.data.tokens import Lost, lost

__all__ = [
    "DigitScenes",
    "EmbeddingStore",
    "ImageCaptions",
    "LabelledImages",
    "Lost",
    "Paired",
    "PairedEmbeddings",
    "embed",
    "embed_arrays",
    "lost",
    "open_dataset",
    "open_rgb",
    "open_splits",
    "pictures_of",
]
