"""Prompt tuning: a shared-prefix text encoder, CoOp, CoCoOp, VPT and DAPT over it, their training and evaluation."""

from fastprob.prompts.config import PromptConfig, Tuned
from fastprob.prompts.encoder import PromptTextEncoder
from fastprob.prompts.evaluation import Scores, linear_probe, predict, scores, zero_shot
from fastprob.prompts.inputs import Inputs
from fastprob.prompts.methods import DAPT, VPT, CoCoOp, CoOp, prototypes
from fastprob.prompts.report import Report, Result, evaluate_runs
from fastprob.prompts.training import fit

__all__ = [
    "DAPT",
    "VPT",
    "CoCoOp",
    "CoOp",
    "Inputs",
    "PromptConfig",
    "PromptTextEncoder",
    "Report",
    "Result",
    "Scores",
    "Tuned",
    "evaluate_runs",
    "fit",
    "linear_probe",
    "predict",
    "prototypes",
    "scores",
    "zero_shot",
]
