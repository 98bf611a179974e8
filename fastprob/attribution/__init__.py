"""Attribution: which pixels and which words the match of an image and a text rests on, by M2IB and its rivals."""

from fastprob.attribution.m2ib import M2IB, NIB
from fastprob.attribution.method import Attribution, Method
from fastprob.attribution.methods import RISE, AttentionRollout, GradCAM, GradientInput, Random, RawAttention
from fastprob.attribution.words import Word

__all__ = [
    "M2IB",
    "NIB",
    "RISE",
    "AttentionRollout",
    "Attribution",
    "GradCAM",
    "GradientInput",
    "Method",
    "Random",
    "RawAttention",
    "Word",
]
