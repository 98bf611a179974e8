"""How good a tuned method is: accuracy, macro-F1 and calibration, beside zero-shot predictions and a linear probe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprob.evaluation.calibration import expected_calibration_error
from fastprob.prompts.config import Tuned, autocast, class_embeddings
from fastprob.prompts.inputs import Inputs
from fastprob.prompts.methods import CoCoOp

_PROMPTS = 4096
"""Prompts that CoCoOp encodes at once: images of a batch times classes."""


@dataclass(frozen=True)
class Scores:
    """Of N predictions: accuracy, macro-F1 (the mean over classes) and expected calibration error, all in [0, 1]."""

    accuracy: float
    macro_f1: float
    ece: float


def scores(probabilities: Tensor, labels: Tensor) -> Scores:
    """Accuracy, macro-F1 and ECE of probabilities [N, C] for labels [N].

    F1_c = 2 tp_c / (2 tp_c + fp_c + fn_c), for every class that occurs or is predicted
    ECE as in `expected_calibration_error`
    """
    probabilities, labels = probabilities.double().cpu(), labels.cpu()
    classes = probabilities.shape[1]
    confidence, predicted = probabilities.max(dim=1)
    right = predicted == labels
    hits = torch.bincount(labels[right], minlength=classes)
    twice = torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes)
    f1 = (2 * hits / twice)[twice > 0]
    ece = expected_calibration_error(confidence, right)
    return Scores(float(right.double().mean()), float(f1.mean()), ece)


@torch.no_grad()
def predict(tuned: Tuned, inputs: Inputs) -> Tensor:
    """Probabilities [N, C] of the images, float32. Class embeddings are computed once, but by CoCoOp."""
    method, config, features = tuned.method, tuned.config, not tuned.config.tunes_images
    own = isinstance(method, CoCoOp)  # an image has its own class embeddings
    rows = max(_PROMPTS // len(tuned.classnames), 1) if own else inputs.batch_size
    batches = list(torch.arange(len(inputs)).split(rows))
    with autocast(config, inputs.encoder.device):
        text = None if own else method.text_features()
        images = (inputs.features[rows] for rows in batches) if features else inputs.images(batches)
        logits = [method(x) if own else method.logits(method.image_features(x), text) for x in images]
    return torch.cat(logits).float().softmax(dim=1)


def zero_shot(inputs: Inputs, template: str) -> Tensor:
    """Probabilities [N, C] by the embeddings of `template` with every class name in it."""
    text = class_embeddings(inputs.encoder, inputs.data.classnames, template)
    return (inputs.encoder.model.logit_scale.exp() * inputs.features @ text.T).softmax(dim=1)


def linear_probe(train: Inputs, test: Inputs) -> Tensor:
    """Probabilities [N, C] by a logistic regression on the training images' features.

    The features count times CLIP's logit scale, so that a weight of unit norm is one more class embedding; with this
    unit the penalty |w|^2 / 2 (scikit-learn's default) needs no tuning. Raises ImportError without scikit-learn.
    """
    require_scikit_learn()
    from sklearn.linear_model import LogisticRegression

    scale = train.encoder.model.logit_scale.exp()
    model = LogisticRegression(max_iter=1000).fit((scale * train.features).cpu().numpy(), train.labels.cpu().numpy())
    return torch.from_numpy(model.predict_proba((scale * test.features).cpu().numpy()))


def require_scikit_learn() -> None:
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ImportError("the linear probe needs scikit-learn: pip install 'fastprob[demo]'") from error
