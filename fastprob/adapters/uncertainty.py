"""Aleatoric, epistemic and total uncertainty of an adapter's predictions.

    aleatoric = alpha^2 Gamma(3/beta) / Gamma(1/beta)     the variance of the predicted distribution, no dropout
    epistemic = population variance of mu over M passes with dropout
    total     = aleatoric + epistemic                      all in squared units of the embedding

A pass is one thinned network, applied to every row (Gal & Ghahramani, "Dropout as a Bayesian
approximation", ICML 2016): its mask over the H hidden units comes from the seed alone. So a row's result
does not depend on the other rows, their order or the batch size, and rows are compared under the same
networks, which takes the noise of the draw out of their ranking.

What a pass does not change is computed once. With h the hidden layer before the only dropout and d(h) its
dropped copy, the linear layer after it and the first one of the mu head have no nonlinearity in between:

    W_1 (W_3 d(h) + b_3 + x) + b_1 = F d(h) + c,    F = W_1 W_3  [D, H],    c = W_1 (b_3 + x) + b_1  [B, D]

and F is computed once, c once a row. The passes are `fastprob.mc_dropout`'s. Source: Upadhyay et al., ProbVLM,
ICCV 2023, section 3.3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastprob
from fastprob._arguments import as_tensor
from fastprob.adapters.adapter import EPS, GGDAdapter

ROWS = 16384
"""Rows of [D] predictions that are held at a time where all are needed: 130 MB in four tensors at D = 512."""


@dataclass(frozen=True)
class Uncertainty:
    """Predicted mean and variances, each [N, D] on the device of the input; `total` = aleatoric + epistemic."""

    mu: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    total: Tensor


@torch.no_grad()
def predict(adapter: GGDAdapter, x: Tensor, *, passes: int = 0, seed: int = 0, batch_size: int = 1024) -> Uncertainty:
    """Predict embeddings and their uncertainty.

    Args:
        adapter: `ProbVLM().image` or `.text`. Neither it nor its training mode changes.
        x: embeddings [N, D], N may be 0, on any device; batches move to the adapter's.
        passes: M, the number of dropout passes, 0 (no epistemic part) or at least 2.
        seed: determines the masks, the same on every device.
        batch_size: rows at a time; memory grows with it and not with `passes`.

    Returns:
        An `Uncertainty`. Where 1/alpha or beta is nearly 0 the aleatoric part can be infinite.

    Raises:
        ValueError: an argument out of its range or of the wrong shape.
    """
    x = as_tensor("predict: x", x)
    if x.dim() != 2 or x.shape[1] != adapter.dim or not x.is_floating_point():
        raise ValueError(f"predict: x must be floating-point [N, {adapter.dim}], got {tuple(x.shape)} {x.dtype}")
    if passes != 0 and passes < 2:
        raise ValueError(f"predict: passes must be 0 or >= 2, got {passes}")
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be >= 1, got {batch_size}")
    weight, bias = adapter.after_dropout.weight, adapter.after_dropout.bias  # [D, H], [D]
    first, _, last = adapter.block_mu
    fold = first.weight @ weight  # [D, H]
    products = "bfloat16" if torch.get_float32_matmul_precision() == "medium" else "float32"
    mu, aleatoric, epistemic = (torch.zeros(x.shape, dtype=weight.dtype, device=x.device) for _ in range(3))
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        batch = x[rows].to(weight.device, weight.dtype)  # [B, D]
        hidden = adapter.before_dropout(batch)  # [B, H]
        mean, inv_alpha, beta = adapter.heads(adapter.after_dropout(hidden) + batch)
        mu[rows] = mean
        aleatoric[rows] = fastprob.ggd_variance(inv_alpha + EPS, beta + EPS)
        if passes:
            constant = F.linear(batch + bias, first.weight, first.bias)  # [B, D]
            epistemic[rows] = fastprob.mc_dropout(
                hidden, constant, fold, last.weight, passes=passes, p=adapter.dropout, seed=seed, products=products
            )[1]
    return Uncertainty(mu, aleatoric, epistemic, aleatoric + epistemic)
