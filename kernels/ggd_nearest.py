"""ggd_nearest; its gradients, of N k pairs, are the reference's. See fastprob/ops/ggd_nearest.py."""

from fastprob.kernels._nearest import nearest
from fastprob.kernels._pairwise import Pairs


def ggd_nearest(mu, inv_alpha, beta, target, *, k, **options):
    return nearest(Pairs(mu, inv_alpha, beta, target, **options).values, mu, target.shape[0], k)
