"""What every training shares: a run that is saved, restored and interrupted between steps."""

from fastprob.training.distributed import average, gathered, joined, mean_over_all, rank, ranks, share
from fastprob.training.random import own_random_state, seed_all, seed_of
from fastprob.training.run import LAST, Run, cosine

__all__ = [
    "LAST",
    "Run",
    "average",
    "cosine",
    "gathered",
    "joined",
    "mean_over_all",
    "own_random_state",
    "rank",
    "ranks",
    "seed_all",
    "seed_of",
    "share",
]
