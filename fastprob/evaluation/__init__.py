"""How good predictions are, whatever predicts: retrieval, calibration, statistics, tables and figures."""

from fastprob.evaluation.calibration import (
    Calibration,
    Evaluation,
    calibrate,
    evaluate,
    expected_calibration_error,
    uncertainty_levels,
)
from fastprob.evaluation.figures import recall_by_level, uncertainty_by_ambiguity
from fastprob.evaluation.retrieval import Match, match_rank, match_ranks, recall_at_k
from fastprob.evaluation.selective import Bootstrap, Estimate, Ranked, aurc, auroc, estimate
from fastprob.evaluation.statistics import mean_std, pearson, spearman

__all__ = [
    "Bootstrap",
    "Calibration",
    "Estimate",
    "Evaluation",
    "Match",
    "Ranked",
    "aurc",
    "auroc",
    "calibrate",
    "estimate",
    "evaluate",
    "expected_calibration_error",
    "match_rank",
    "match_ranks",
    "mean_std",
    "pearson",
    "recall_at_k",
    "recall_by_level",
    "spearman",
    "uncertainty_by_ambiguity",
    "uncertainty_levels",
]
