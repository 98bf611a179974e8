"""What the tests of prompt training and evaluation share: small runs of every method on thickened digits."""

import pytest
import torch

pytest.importorskip("open_clip")

from fastprob.prompts import PromptConfig, fit

METHODS = {
    "coop": {"init": "a lone"},
    "cocoop": {"context_length": 2},
    "vpt": {"visual_length": 2, "deep": True, "dropout": 0.1},
    "dapt": {"init": "a lone", "visual_length": 2},
}
DATA = "digits:thickened"


def config(method="coop", **options):
    return PromptConfig(**{"method": method, "shots": 2, "epochs": 3, "batch_size": 8, **METHODS[method], **options})


def run(splits, encoder, config, directory=None, **options):
    return fit(splits["train"], encoder, config=config, directory=directory, progress=False, **options)


def same(one, other):
    states = one.method.state_dict(), other.method.state_dict()
    return one.history == other.history and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
