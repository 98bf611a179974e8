"""Attribution: which pixels and which words the match of an image and a text rests on, by M2IB and its rivals.

    explain = M2IB(encoder.model, encoder.tokenizer)
    found = explain(images, texts)  # [P, 3, H, W] as `encoder.preprocess` makes them, and P texts
    found.image[0]                  # [H, W], from 0 to 1
    found.of_words(0)               # [("a", 0.05), ("dog", 1.0), ...]

Every method is called so, on open_clip's vision and text transformers, and returns an `Attribution`.
"""

from fastprob.attribution.figures import overlay
from fastprob.attribution.m2ib import M2IB, NIB
from fastprob.attribution.method import Attribution, Method
from fastprob.attribution.methods import RISE, AttentionRollout, GradCAM, GradientInput, Random, RawAttention
from fastprob.attribution.metrics import (
    Confidence,
    Pairs,
    Sanity,
    confidence,
    deletion,
    insertion,
    mass_in_box,
    pointing_game,
    sanity_check,
)
from fastprob.attribution.pages import write_explained
from fastprob.attribution.roar import roar_loss
from fastprob.attribution.words import Word

__all__ = [
    "M2IB",
    "NIB",
    "RISE",
    "AttentionRollout",
    "Attribution",
    "Confidence",
    "GradCAM",
    "GradientInput",
    "Method",
    "Pairs",
    "Random",
    "RawAttention",
    "Sanity",
    "Word",
    "confidence",
    "deletion",
    "insertion",
    "mass_in_box",
    "overlay",
    "pointing_game",
    "roar_loss",
    "sanity_check",
    "write_explained",
]
