"""ProbVLM: adapters that turn frozen embeddings into distributions, their training and their uncertainty."""

from fastprob.adapters.adapter import GGDAdapter, ProbVLM
from fastprob.adapters.training import FitResult, TrainConfig, fit, nll
from fastprob.adapters.uncertainty import Uncertainty, predict
from fastprob.data.pairs import PairedEmbeddings

__all__ = [
    "FitResult",
    "GGDAdapter",
    "PairedEmbeddings",
    "ProbVLM",
    "TrainConfig",
    "Uncertainty",
    "fit",
    "nll",
    "predict",
]
