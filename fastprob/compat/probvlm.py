"""The class and function names of the released ProbVLM code, with its signatures, values and checkpoints.

Change `from losses import ...`, `from networks import ...`, `from utils import ...` to

    from fastprob.compat.probvlm import GenGaussLoss, TempCombLoss, BayesCap_for_CLIP, multi_fwpass_ProbVLM

What differs: a NaN in a loss is returned as NaN (released: a printed line and None), an unknown reduction raises, and
nothing changes the module that it is given. New work is better served by `fastprob.nn.ProbVLMLoss`,
`fastprob.adapters.ProbVLM` and `fastprob.adapters.predict`, which follow the paper.

Source: the code released with Upadhyay et al., "ProbVLM: Probabilistic Adapter for Frozen Vision-Language Models",
ICCV 2023: losses.py, networks.py and utils.py as of 21 December 2023. `release="first"` of `get_GGuncer` and
`multi_fwpass_ProbVLM` names utils.py as it was before that day.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastprob._op import one_of
from fastprob.adapters.adapter import GGDAdapter, Parameters
from fastprob.ops.ggd_nll import ggd_nll

__all__ = [
    "BayesCap_MLP",
    "BayesCap_for_CLIP",
    "GenGaussLoss",
    "TempCombLoss",
    "get_GGuncer",
    "multi_fwpass_ProbVLM",
]

_FORCED_DROPOUT = 0.3

_DIVISOR = {"current": 1.0, "first": 2.8}
"""Of `get_GGuncer`, by release: Gamma(1/b) since 21 December 2023, as in the paper, and Gamma(2.8/b) before."""

Moments = tuple[Tensor, Tensor, Tensor, Tensor]


class GenGaussLoss(nn.Module):
    """`fastprob.ggd_nll` of form "released".

    With a = one_over_alpha + alpha_eps and b = beta + beta_eps:

        clamp(|mean - target| a b, resi_min, resi_max) - log a + lgamma(1/b) - log b

    Tensors of several dtypes are promoted as in PyTorch's arithmetic; integers become floating.

    Raises:
        ValueError: for a reduction other than "mean" and "sum".
    """

    def __init__(self, reduction="mean", alpha_eps=1e-4, beta_eps=1e-4, resi_min=1e-4, resi_max=1e3):
        super().__init__()
        one_of(type(self).__name__, "reduction", reduction, ("mean", "sum"))
        self.reduction = reduction
        self.alpha_eps, self.beta_eps = alpha_eps, beta_eps
        self.resi_min, self.resi_max = resi_min, resi_max

    def forward(self, mean: Tensor, one_over_alpha: Tensor, beta: Tensor, target: Tensor) -> Tensor:
        """Four tensors of one shape, or that broadcast to one -> a scalar."""
        mean, one_over_alpha, beta, target = _promoted(mean, one_over_alpha, beta, target)
        eps = self.alpha_eps
        if self.alpha_eps != self.beta_eps:  # the operator has one for both
            one_over_alpha, beta, eps = one_over_alpha + self.alpha_eps, beta + self.beta_eps, 0.0
        bounds = {"eps": eps, "clamp_min": self.resi_min, "clamp_max": self.resi_max}
        return ggd_nll(mean, one_over_alpha, beta, target, form="released", reduction=self.reduction, **bounds)


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """mean, one_over_alpha, beta and target in the dtype of the released loss of them."""
    if len({t.dtype for t in tensors}) == 1 and tensors[0].is_floating_point():
        return tensors
    mean, a, b, target = (t if t.dim() == 0 else t.new_empty(0) for t in tensors)  # what promotion looks at
    dtype = ((mean - target) * (a + 1.0) * (b + 1.0)).dtype
    return tuple(t.to(dtype) for t in tensors)


class TempCombLoss(GenGaussLoss):
    """T1 * L1 + T2 * GenGauss; arguments as for `GenGaussLoss`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.L_GenGauss = GenGaussLoss(*args, **kwargs)
        self.L_l1 = nn.L1Loss(reduction=self.reduction)

    def forward(
        self, mean: Tensor, one_over_alpha: Tensor, beta: Tensor, target: Tensor, T1: float, T2: float
    ) -> Tensor:
        """Four tensors of one shape and two weights -> a scalar."""
        return T1 * self.L_l1(mean, target) + T2 * self.L_GenGauss(mean, one_over_alpha, beta, target)


class BayesCap_MLP(GGDAdapter):
    """The released adapter: an embedding [..., D] -> (mu, 1/alpha, beta), each [..., D].

    A `GGDAdapter` with PyTorch's initial weights throughout, drawn in the released order. The number of layers does
    not change it: from 3 on the released code builds these three.

    Raises:
        ValueError: unless inp_dim == out_dim (the input is added to the output) and num_layers >= 3 (with fewer the
            released trunk lacks its last layer).
    """

    def __init__(self, inp_dim, out_dim, hid_dim=512, num_layers=1, p_drop=0):
        if inp_dim != out_dim:
            raise ValueError(f"BayesCap_MLP: inp_dim and out_dim must be equal, got {inp_dim} and {out_dim}")
        if num_layers < 3:
            raise ValueError(f"BayesCap_MLP: num_layers must be at least 3, got {num_layers}")
        super().__init__(inp_dim, hid_dim, p_drop, positive="relu")

    def _positive_head(self) -> nn.Sequential:
        """As drawn by PyTorch, where `GGDAdapter` sets a bias."""
        return nn.Sequential(nn.Linear(self.dim, self.dim), nn.ReLU(), nn.Linear(self.dim, self.dim), nn.ReLU())


class BayesCap_for_CLIP(nn.Module):
    """One `BayesCap_MLP` for image embeddings and one for text embeddings.

    `model.load_state_dict(torch.load(path, weights_only=True))` loads a released checkpoint.
    """

    def __init__(self, inp_dim=512, out_dim=512, hid_dim=256, num_layers=3, p_drop=0.1):
        super().__init__()
        self.img_BayesCap = BayesCap_MLP(inp_dim, out_dim, hid_dim, num_layers, p_drop)
        self.txt_BayesCap = BayesCap_MLP(inp_dim, out_dim, hid_dim, num_layers, p_drop)

    def forward(self, i_features: Tensor, t_features: Tensor) -> tuple[Parameters, Parameters]:
        """Image and text embeddings, each [..., D] -> their (mu, 1/alpha, beta)."""
        return self.img_BayesCap(i_features), self.txt_BayesCap(t_features)


def get_GGuncer(x_alpha: Tensor, x_beta: Tensor, c1: float = 3, c2: float = 2.8, *, release: str = "current") -> Tensor:
    """The released aleatoric uncertainty, elementwise; the paper's, without bounds, is `fastprob.ggd_variance`.

        a^2 Gamma(3/b) / Gamma(c/b),  a = clip(1 / (x_alpha + 1e-5), 1e-4, 5),  b = clip(x_beta + 0.1, 0.1, 5)

    Args:
        x_alpha: 1/alpha. x_beta: beta. Of one shape.
        c1, c2: without effect, as in the released code.
        release: "current" has c = 1, as the released code since 21 December 2023; "first" has c = 2.8, as before.

    Raises:
        ValueError: for another release.
    """
    one_of("get_GGuncer", "release", release, tuple(_DIVISOR))
    a = (1 / (x_alpha + 1e-5)).clip(1e-4, 5)
    b = (x_beta + 0.1).clip(0.1, 5)
    return a.square() * torch.exp(torch.lgamma(3 / b) - torch.lgamma(_DIVISOR[release] / b))


def multi_fwpass_ProbVLM(
    BayesCap_Net: nn.Module, xfI: Tensor, xfT: Tensor, n_fw: int = 15, *, release: str = "current"
) -> tuple[Moments, Moments]:
    """The released Monte-Carlo passes: dropout on and its probability forced to 0.3, all else in evaluation mode.

    The same masks as the released code draws from the same random state; `BayesCap_Net` does not change.

    Args:
        BayesCap_Net: a `BayesCap_for_CLIP`, or any module with its forward.
        xfI, xfT: image and text embeddings, each [B, D].
        n_fw: number of passes, at least 2.
        release: see `get_GGuncer`.

    Returns:
        For image and text each: the means over the passes of mu, 1/alpha and beta, and sqrt(var(u) var(mu)), all
        [B, D]. var(mu) is over the passes; var(u), of `get_GGuncer`, is over the passes and the B rows together
        ([D]), so this uncertainty depends on the batch. Both are unbiased.
    """
    net = _with_dropout(BayesCap_Net)
    passes = [net(xfI, xfT) for _ in range(n_fw)]
    image, text = zip(*passes)
    return _moments(image, release), _moments(text, release)


def _with_dropout(net: nn.Module) -> nn.Module:
    """A copy of the modules in evaluation mode but for dropout, sharing the weights."""
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    net = copy.deepcopy(net, shared).eval()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = _FORCED_DROPOUT
            module.train()
    return net


def _moments(passes: tuple[Parameters, ...], release: str) -> Moments:
    mu, inv_alpha, beta = (torch.stack(rows) for rows in zip(*passes))  # [n_fw, B, D] each
    uncertainty = get_GGuncer(inv_alpha, beta, release=release).flatten(0, 1)  # [n_fw * B, D]
    return mu.mean(0), inv_alpha.mean(0), beta.mean(0), (uncertainty.var(0) * mu.var(0)).sqrt()
