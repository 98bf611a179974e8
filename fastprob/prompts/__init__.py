"""Prompt tuning: a shared-prefix text encoder, and CoOp, CoCoOp, VPT and DAPT over it."""

from fastprob.prompts.encoder import PromptTextEncoder
from fastprob.prompts.methods import DAPT, VPT, CoCoOp, CoOp, prototypes

__all__ = ["DAPT", "VPT", "CoCoOp", "CoOp", "PromptTextEncoder", "prototypes"]
