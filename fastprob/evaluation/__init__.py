"""How good predictions are, whatever predicts: retrieval, calibration, statistics, tables and figures."""

from fastprob.evaluation.calibration import (
    Calibration,
    Evaluation,
    calibrate,
    evaluate,
    expected_calibration_error,
    uncertainty_levels,
)
from fastprob.evaluation.comparison import Comparison, Judged, compare
from fastprob.evaluation.conformal import Sets, conformal_threshold, retrieval_sets
from fastprob.evaluation.figures import recall_by_level, risk_coverage, uncertainty_by_ambiguity
from fastprob.evaluation.grid import picture_grid
from fastprob.evaluation.retrieval import Found, Match, find_matches, match_rank, nearest, recall_at_k
from fastprob.evaluation.selective import Bootstrap, Estimate, Ranked, aurc, auroc, estimate
from fastprob.evaluation.statistics import mean_std, pearson, spearman

__all__ = [
    "Bootstrap",
    "Calibration",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Found",
    "Judged",
    "Match",
    "Ranked",
    "Sets",
    "aurc",
    "auroc",
    "calibrate",
    "compare",
    "conformal_threshold",
    "estimate",
    "evaluate",
    "expected_calibration_error",
    "find_matches",
    "match_rank",
    "mean_std",
    "nearest",
    "pearson",
    "picture_grid",
    "recall_at_k",
    "recall_by_level",
    "retrieval_sets",
    "risk_coverage",
    "spearman",
    "uncertainty_by_ambiguity",
    "uncertainty_levels",
]
