"""ProbVLM: adapters that turn frozen embeddings into distributions, their training and their uncertainty."""

from fastprob.adapters.adapter import GGDAdapter, ProbVLM
from fastprob.adapters.diffusion import Decoder
from fastprob.adapters.draws import Draws, draw
from fastprob.adapters.error import ErrorModels, fit_error
from fastprob.adapters.noisy import suspicion, write_suspects
from fastprob.adapters.pages import write_report_page
from fastprob.adapters.predictions import Ranking, rank, write_predictions
from fastprob.adapters.report import Report, evaluate_store, training_curves
from fastprob.adapters.selection import Candidate, choose, coreset, rank_models
from fastprob.adapters.training import FitResult, TrainConfig, fit, nll
from fastprob.adapters.uncertainty import Uncertainty, predict
from fastprob.data.pairs import PairedEmbeddings

__all__ = [
    "Candidate",
    "Decoder",
    "Draws",
    "ErrorModels",
    "FitResult",
    "GGDAdapter",
    "PairedEmbeddings",
    "ProbVLM",
    "Ranking",
    "Report",
    "TrainConfig",
    "Uncertainty",
    "choose",
    "coreset",
    "draw",
    "evaluate_store",
    "fit",
    "fit_error",
    "nll",
    "predict",
    "rank",
    "rank_models",
    "suspicion",
    "training_curves",
    "write_predictions",
    "write_report_page",
    "write_suspects",
]
