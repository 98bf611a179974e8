"""The ProbVLM adapter: a frozen embedding in, a generalised Gaussian per dimension out.

For an embedding x in R^D (one adapter per modality):

    h = relu(W2 relu(W1 x + b1) + b2)                     [B, H]
    f = x + W3 dropout(h) + b3                            [B, D]
    mu = head_mu(f),  1/alpha = positive(head_alpha(f)),  beta = positive(head_beta(f))

with head = Linear(D, H), ReLU, Linear(H, D). Submodules carry the released names, so released
checkpoints load. Source: Upadhyay et al., "ProbVLM: Probabilistic Adapter for Frozen Vision-Language
Models", ICCV 2023, section 3.2 and its released code.
"""

import json
import math
import os

import torch
from torch import Tensor, nn

from fastprob._files import is_state_dict, read_pickle, read_tensors, write_tensors

EPS = 1e-4
"""Added to 1/alpha and to beta before either is used, in the losses and in the uncertainty alike."""

POSITIVE = {"relu": nn.ReLU, "softplus": nn.Softplus}
"""What keeps the 1/alpha and beta heads non-negative; "relu" is the released one."""

DEFAULT_POSITIVE = "softplus"

_START_AT_ONE = {"relu": 1.0, "softplus": math.log(math.expm1(1))}
"""Last bias of those heads, so that an untrained adapter predicts a unit Laplace. From PyTorch's biases near 0
half of the ReLUs start dead: the first NLL was 1.6e5 a dimension and every trained sample had infinite variances."""

_FORMAT = "fastprob.ProbVLM/1"
_CONFIG, _OPTIONAL = ["dim", "dropout", "hidden", "positive"], ["power"]
_RELEASED = {"img_BayesCap.": "image.", "txt_BayesCap.": "text."}

Parameters = tuple[Tensor, Tensor, Tensor]


class GGDAdapter(nn.Module):
    """Predicts (mu, 1/alpha, beta) of a generalised Gaussian around an embedding.

    Args:
        dim: width D of the embedding.
        hidden: width H of the trunk's hidden layers; the heads' are D wide, as released.
        dropout: probability of the one dropout, in [0, 1).
        positive: last activation of the 1/alpha and beta heads, "softplus" or "relu" (released). A ReLU
            can end at exactly 0, where only `EPS` is left: such a dimension has a practically infinite
            variance. The released weights need "relu".
        power: the shape that all distributions have, 2 for Gaussians and 1 for Laplace distributions; None predicts it.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        dim: int = 512,
        hidden: int = 256,
        dropout: float = 0.1,
        *,
        positive: str = DEFAULT_POSITIVE,
        power: float | None = None,
    ):
        super().__init__()
        check_adapter("GGDAdapter", dim, hidden, dropout, positive, power)
        self.dim, self.hidden, self.dropout, self.positive = dim, hidden, dropout, positive
        self.mod = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
        )
        self.block_mu = _head(dim)
        self.block_alpha = self._positive_head()
        self.block_beta = self._positive_head() if power is None else _Constant(power - EPS)

    def forward(self, x: Tensor) -> Parameters:
        """[..., D] -> (mu, 1/alpha, beta), each [..., D]."""
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"GGDAdapter: x must be [..., {self.dim}], got {tuple(x.shape)}")
        return self.heads(self.mod(x) + x)

    @property
    def before_dropout(self) -> nn.Sequential:
        """The hidden layers, [..., D] -> h [..., H]."""
        return self.mod[:-2]

    @property
    def after_dropout(self) -> nn.Linear:
        """The linear layer W3, b3 from h, dropped or not, to the residual, [..., H] -> [..., D]."""
        return self.mod[-1]

    def heads(self, features: Tensor) -> Parameters:
        """The three heads on the residual sum f, [..., D] -> three of [..., D]."""
        return self.block_mu(features), self.block_alpha(features), self.block_beta(features)

    def _positive_head(self) -> nn.Sequential:
        return _positive_head(self.dim, self.positive)


class ProbVLM(nn.Module):
    """An adapter for image embeddings and one for text embeddings. Arguments as for `GGDAdapter`."""

    def __init__(
        self,
        dim: int = 512,
        hidden: int = 256,
        dropout: float = 0.1,
        *,
        positive: str = DEFAULT_POSITIVE,
        power: float | None = None,
    ):
        super().__init__()
        check_adapter("ProbVLM", dim, hidden, dropout, positive, power)
        self.config = {"dim": dim, "hidden": hidden, "dropout": dropout, "positive": positive}
        if power is not None:  # checkpoints without it are as they were before there was a choice
            self.config["power"] = power
        self.image = GGDAdapter(**self.config)
        self.text = GGDAdapter(**self.config)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Parameters, Parameters]:
        """Image [..., D] and text [..., D] embeddings -> their (mu, 1/alpha, beta)."""
        return self.image(image), self.text(text)

    def save(self, path: str | os.PathLike) -> None:
        """Write weights and config to one safetensors file, in one step."""
        write_tensors(path, self.state_dict(), {"format": _FORMAT, "config": json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ProbVLM":
        """Read what `save` wrote, in evaluation mode on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file written by `save`.
        """
        tensors, metadata = read_tensors("ProbVLM.load", path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"ProbVLM.load: {path} must have format {_FORMAT!r}, got {metadata.get('format')!r}")
        where = f"ProbVLM.load: {path}"
        return cls._from_state(_read_config(where, metadata.get("config")), tensors, where)

    @classmethod
    def from_released(cls, path: str | os.PathLike, *, dropout: float = 0.1) -> "ProbVLM":
        """Read a checkpoint of the released code (.pth, keys img_BayesCap.* and txt_BayesCap.*).

        Widths come from the weights; the dropout probability is not stored there and is given.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no such checkpoint, or keys or shapes of another model.
        """
        released = read_pickle("ProbVLM.from_released", path)
        where = f"ProbVLM.from_released: {path}"
        first = released.get("img_BayesCap.mod.0.weight") if is_state_dict(released) else None
        if first is None or first.dim() != 2:
            raise ValueError(f"{where} must hold img_BayesCap.* and txt_BayesCap.* weights")
        hidden, dim = first.shape
        state = {_our_name(name): tensor for name, tensor in released.items()}
        config = {"dim": dim, "hidden": hidden, "dropout": dropout, "positive": "relu"}
        return cls._from_state(config, state, where)

    @classmethod
    def _from_state(cls, config: dict, state: dict[str, Tensor], where: str) -> "ProbVLM":
        try:
            with torch.device("meta"):  # before memory is taken for widths that the weights don't have
                cls(**config).load_state_dict({name: tensor.to("meta") for name, tensor in state.items()})
            model = cls(**config)
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{where} does not fit a ProbVLM of {config}: {error}") from error
        return model.eval()


class _Constant(nn.Module):
    """A head that always predicts the same value."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


def check_adapter(name: str, dim: int, hidden: int, dropout: float, positive: str, power: float | None = None) -> None:
    """Raise ValueError, as `name`, unless the arguments describe an adapter."""
    for argument, value in (("dim", dim), ("hidden", hidden)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {argument} must be a positive integer, got {value!r}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout!r}")
    if not isinstance(positive, str) or positive not in POSITIVE:
        raise ValueError(f"{name}: positive must be one of {sorted(POSITIVE)}, got {positive!r}")
    if power is not None and (not isinstance(power, (int, float)) or not EPS < power < math.inf):
        raise ValueError(f"{name}: power must be None or finite and > {EPS}, got {power!r}")


def _read_config(where: str, text: str | None) -> dict:
    """Raises ValueError, as `where`, for what is no config of a ProbVLM."""
    if text is None:
        raise ValueError(f"{where} must have a config in JSON, got none")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must have a config in JSON, got: {error}") from error
    if not isinstance(config, dict) or set(config) - set(_OPTIONAL) != set(_CONFIG):
        raise ValueError(f"{where} must have a config of {_CONFIG}, got {config!r}")
    check_adapter(where, **config)
    return config


def _head(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


def _positive_head(dim: int, positive: str) -> nn.Sequential:
    *_, last = head = _head(dim)
    nn.init.constant_(last.bias, _START_AT_ONE[positive])
    return head.append(POSITIVE[positive]())


def _our_name(released: str) -> str:
    for theirs, ours in _RELEASED.items():
        if released.startswith(theirs):
            return ours + released[len(theirs) :]
    return released
