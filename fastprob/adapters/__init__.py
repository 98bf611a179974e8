"""ProbVLM: adapters that turn frozen embeddings into distributions, their training and their uncertainty."""

from fastprob.adapters.adapter import GGDAdapter, ProbVLM
from fastprob.adapters.pairs import PairedEmbeddings
from fastprob.adapters.training import FitResult, TrainConfig, fit, nll
from fastprob.adapters.uncertainty import Uncertainty, predict

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
