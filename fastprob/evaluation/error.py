"""The probability that a query's first match is wrong: a logistic model of signals, fitted where the truth is known.

    p(wrong) = 1 / (1 + exp(-(slope * (w . (x - mean) / deviation + w_0) + offset)))

for the signals x of a query (`fastprob.evaluation.signals`, and what an adapter adds). The weights w are fitted with an
L2 penalty; slope and offset (Platt's scaling) are fitted on logits that come from the other folds of queries, so that
the probability is calibrated on queries that the weights have not seen. scikit-learn fits both.

The first match of a larger gallery is wrong more often. So that the model knows how, it is to be fitted on galleries of
several sizes, and log G is one of the signals (`fastprob.adapters.error`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

C = 0.1  # inverse strength of the L2 penalty: of 0.01, 0.1 and 1 the least AURC on most of the study's eight questions
FOLDS = 5


@dataclass(frozen=True)
class ErrorModel:
    """p(wrong) of a direction of retrieval; `names` of the F signals, in the order of mean, deviation, weight [F]."""

    names: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: float

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Probability that each query's first match is wrong, [Q] float64, of signals [Q] by name.

        Raises ValueError where a signal that the model was fitted on is missing.
        """
        missing = [name for name in self.names if name not in values]
        if missing:
            raise ValueError(f"ErrorModel: signals must have {', '.join(missing)}, got {', '.join(values)}")
        rows = torch.stack([values[name].double() for name in self.names], 1)  # [Q, F]
        return torch.sigmoid((rows - self.mean) / self.deviation @ self.weight + self.bias)


def fit_error_model(values: Mapping[str, Tensor], wrong: Tensor, group: Tensor) -> ErrorModel:
    """Fit p(wrong) to signals.

    Args:
        values: signals of Q queries by name, [Q] each.
        wrong: whether each query's first match is wrong, [Q] bool.
        group: [Q] int64; queries of one group, such as the same text in several galleries, share a fold.

    Raises:
        ValueError: without wrong and right queries in `FOLDS` groups each, or a signal that is not finite.
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError as error:
        raise ImportError("fit_error_model needs scikit-learn: pip install 'fastprob[calibrate]'") from error
    for name, value in values.items():
        if not value.isfinite().all():
            raise ValueError(f"fit_error_model: {name} must be finite, {int((~value.isfinite()).sum())} values are not")
    for kind, members in (("wrong", wrong), ("right", ~wrong)):
        if len(group[members].unique()) < FOLDS:
            found = len(group[members].unique())
            raise ValueError(f"fit_error_model: {kind} queries must be of {FOLDS} groups or more, got {found}")
    rows = torch.stack([value.double() for value in values.values()], 1)  # [Q, F]
    mean, deviation = rows.mean(0), rows.std(0).clamp(min=1e-9)
    standard = ((rows - mean) / deviation).numpy()
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    model = CalibratedClassifierCV(
        LogisticRegression(C=C, max_iter=10_000),
        method="sigmoid",
        cv=list(folds.split(standard, wrong.numpy(), group.numpy())),
        ensemble=False,
    ).fit(standard, wrong.numpy())
    (fitted,) = model.calibrated_classifiers_
    (platt,) = fitted.calibrators  # p = 1 / (1 + exp(a logit + b))
    weight, bias = -platt.a_ * fitted.estimator.coef_[0], -platt.a_ * fitted.estimator.intercept_[0] - platt.b_
    return ErrorModel(tuple(values), mean, deviation, torch.from_numpy(np.ascontiguousarray(weight)), float(bias))
