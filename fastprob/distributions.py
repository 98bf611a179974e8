"""Distributions in the manner of torch.distributions, over the fused operators.

`GeneralizedNormal` has density, with z = (x - loc) / scale and b = power,

    p(x) = exp(-|z|^b) / (2 scale Gamma(1 + 1/b))

and |z|^b follows Gamma(1/b, 1), which gives its distribution function through the incomplete gamma functions.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, Laplace, Normal, constraints, register_kl
from torch.distributions.utils import broadcast_all

from fastprob.ops._maths import wide
from fastprob.ops.ggd_nll import ggd_nll
from fastprob.ops.ggd_variance import ggd_variance

__all__ = ["GeneralizedNormal"]


class GeneralizedNormal(Distribution):
    """Generalised normal (exponential power) distribution; power 2 is Normal(loc, scale / sqrt 2), power 1 Laplace.

    Args:
        loc: mean, median and mode.
        scale: > 0, in units of loc; 1/scale must be a normal number of the dtype.
        power: > 0, the shape; towards infinity the distribution becomes uniform on loc +- scale.
        validate_args: as for every torch distribution.

    loc, scale and power are numbers or tensors that broadcast to the batch shape; they are kept in their common dtype,
    integers in torch's default one. A value of `log_prob`, `cdf` or `icdf` may be a number where arguments are not
    validated. Parameters are named as in TensorFlow Probability.

    Raises:
        ValueError: a parameter or value outside of its domain, if arguments are validated.

    Source:
        Nadarajah, A generalized normal distribution, J. Appl. Stat. 32 (2005).
    """

    arg_constraints = {  # noqa: RUF012 (torch's own way)
        "loc": constraints.real,
        "scale": constraints.positive,
        "power": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        power: Tensor | float,
        validate_args: bool | None = None,
    ):
        self.loc, self.scale, self.power = _parameters(loc, scale, power)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None) -> GeneralizedNormal:
        new = self._get_checked_instance(GeneralizedNormal, _instance)
        new.loc, new.scale, new.power = (t.expand(batch_shape) for t in (self.loc, self.scale, self.power))
        super(GeneralizedNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """scale^2 Gamma(3/power) / Gamma(1/power), by `fastprob.ggd_variance`."""
        scale, power = wide(self.scale, self.power)
        return ggd_variance(1 / scale, power).to(self.loc.dtype)

    @property
    def stddev(self) -> Tensor:
        """scale sqrt(Gamma(3/power) / Gamma(1/power)), also where the variance overflows or underflows."""
        scale, power = wide(self.scale, self.power)
        return (scale * ggd_variance(torch.ones_like(power), power).sqrt()).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """1/power + log(2 scale Gamma(1 + 1/power)), in nats."""
        scale, power = wide(self.scale, self.power)
        return (1 / power + _log_normaliser(scale, power)).to(self.loc.dtype)

    def log_prob(self, value: Tensor | float) -> Tensor:
        """-|z|^power - log(2 scale Gamma(1 + 1/power)), by `fastprob.ggd_nll`.

        |z|^power is bounded to half of the largest number of the dtype: far outside, log_prob is finite and its
        gradient zero. At value = loc the gradients of |z|^power are zero.
        """
        if self._validate_args:
            self._validate_sample(value)  # type: ignore[arg-type]  # which refuses a number
        dtype, (value, loc, scale, power) = self._widened(value)
        bounds = {"eps": 0.0, "clamp_min": 0.0, "clamp_max": torch.finfo(loc.dtype).max / 2}
        nll = ggd_nll(loc, 1 / scale, power, value, form="paper", reduction="none", **bounds)
        return (-math.log(2) - nll).to(dtype)

    def cdf(self, value: Tensor | float) -> Tensor:
        """P(X <= value), to full relative precision below loc.

        Its gradients for value, loc and scale are exact. torch has none of the incomplete gamma function for its
        parameter: asking for power's raises NotImplementedError.
        """
        if self._validate_args:
            self._validate_sample(value)  # type: ignore[arg-type]  # which refuses a number
        dtype, (value, loc, scale, power) = self._widened(value)
        return _CDF.apply(*torch.broadcast_tensors((value - loc) / scale, _without_gradient(power))).to(dtype)

    def icdf(self, value: Tensor | float) -> Tensor:
        """The quantile of a probability in [0, 1], computed in float64; NaN outside of [0, 1]. Gradients: see `cdf`."""
        dtype, (value, loc, scale, power) = self._widened(value)
        wide = torch.broadcast_tensors(value.double(), _without_gradient(power).double())
        return (loc + scale * _Quantile.apply(*wide).to(value.dtype)).to(dtype)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 (torch's own way)
        """loc + scale U G^(1/power) with U ~ Uniform(-1, 1) and G ~ Gamma(1 + 1/power, 1).

        A mixture of uniform distributions: it needs neither a random sign nor, as Gamma(1/power) would, small shape
        parameters. Gradients flow to loc, scale and, through torch's implicit gradient of G, to power; that one
        is good to about 1e-3.
        """
        dtype = self.loc.dtype
        loc, scale, power = wide(self.loc, self.scale, self.power)
        shape = self._extended_shape(sample_shape)
        gamma = Gamma(1 + 1 / power, torch.ones_like(power), validate_args=False).rsample(sample_shape)
        never_0 = torch.finfo(loc.dtype).eps / 2 - 1  # 0 times a power of G that overflows would be NaN
        uniform = 2 * torch.rand(shape, dtype=loc.dtype, device=loc.device) + never_0
        return (loc + scale * uniform * gamma.pow(1 / power)).to(dtype)

    def _widened(self, value: Tensor | float) -> tuple[torch.dtype, tuple[Tensor, ...]]:
        """The dtype of a result for `value`; value, loc, scale and power in it, half types widened to float32."""
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=self.loc.dtype, device=self.loc.device)
        dtype = torch.promote_types(self.loc.dtype, value.dtype)
        return dtype, wide(*(t.to(dtype) for t in (value, self.loc, self.scale, self.power)))


def _parameters(*values: Tensor | float) -> tuple[Tensor, ...]:
    """The values broadcast to one shape, in their common floating dtype."""
    dtype = functools.reduce(torch.promote_types, [v.dtype for v in values if isinstance(v, Tensor)], torch.bool)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    return broadcast_all(*(v.to(dtype) if isinstance(v, Tensor) else v for v in values))


def _log_normaliser(scale: Tensor, power: Tensor) -> Tensor:
    return math.log(2) + scale.log() + torch.lgamma(1 + 1 / power)


def _density(z: Tensor, power: Tensor) -> Tensor:
    return torch.exp(-z.abs().pow(power) - torch.lgamma(1 + 1 / power)) / 2


def _without_gradient(power: Tensor) -> Tensor:
    return _NoGradient.apply(power) if power.requires_grad else power


class _NoGradient(torch.autograd.Function):
    """The identity; its backward pass, which runs only if someone asks for the power's gradient, refuses it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(power):
        return power.view_as(power)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("GeneralizedNormal: cdf and icdf have no gradient for power")


class _CDF(torch.autograd.Function):
    """Distribution function of z at loc 0 and scale 1. Its gradient, the density, is finite at z = 0, where the
    incomplete gamma function's is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, power):
        t = z.abs().pow(power)
        q = torch.special.gammaincc(1 / power, t)
        is_flat = t < torch.finfo(t.dtype).eps  # the density; and for large powers t may underflow
        q = torch.where(is_flat, 1 - 2 * z.abs() * _density(torch.zeros_like(z), power), q)
        return torch.where(z < 0, q / 2, 1 - q / 2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * _density(*ctx.saved_tensors), None


class _Quantile(torch.autograd.Function):
    """Inverse of `_CDF`, in float64; its gradient is 1 / density.

    Casts stay outside: a forward that ends in a `.to` without effect gets zero gradients from torch.compile (2.11).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(probability, power):
        return _quantile(probability, power)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return grad / _density(*ctx.saved_tensors), None


_NEWTON_STEPS = 9
"""To full precision for powers of 0.01 to 1e4 and probabilities down to 1e-305; 4 steps are enough from power 1 on."""


def _quantile(probability: Tensor, power: Tensor) -> Tensor:
    """z with CDF(z) = probability, at loc 0 and scale 1; float64 in and out.

    Newton's method for y = log |z|^b on the log of P = P(|Z| < |z|), which is concave in y, or in the tail on that
    of Q = 1 - P, whose negative is convex: from the right end of a bracket either converges monotonically. Alzer's
    inequality (Math. Comp. 66 (1997) 771) is a bracket: |z|^b lies between t = -log(1 - P^b) and t Gamma(1 + 1/b)^b.
    """
    outer = 2 * torch.minimum(probability, 1 - probability)  # Q
    inner = (2 * probability - 1).abs()  # P
    in_tail = outer < 0.1
    target = torch.where(in_tail, outer, inner).log()
    log_power_of_p = power * torch.where(in_tail, torch.log1p(-outer), target)
    other_end = power * torch.lgamma(1 + 1 / power)
    y = _log_minus_log1m_exp(log_power_of_p) + torch.where(in_tail, other_end.clamp(min=0), other_end.clamp(max=0))
    for _ in range(_NEWTON_STEPS):
        y = y - _newton_step(y, 1 / power, in_tail, target)
    z = (y / power).exp()
    overflows = inner.log() + torch.lgamma(1 + 1 / power) > math.log(torch.finfo(z.dtype).max)  # z >= P Gamma(1 + 1/b)
    z = torch.where(inner == 0, 0, torch.where((outer == 0) | overflows, torch.inf, z))
    return torch.where(probability < 0.5, -z, z)


def _newton_step(y: Tensor, a: Tensor, in_tail: Tensor, target: Tensor) -> Tensor:
    """(f - target) / f' at y for f = log Q in the tail, log P elsewhere, of t = e^y under Gamma(a, 1).

    Where P or Q underflows the first term of its series stands in.
    """
    t, log_gamma = y.exp(), torch.lgamma(1 + a)
    is_small = y < -40  # t < eps / 50
    log_p = torch.where(is_small, a * y - log_gamma, torch.special.gammainc(a, t).log())
    q = torch.special.gammaincc(a, t)
    log_q = torch.where(q > 0, q.log(), (a - 1) * y - t - log_gamma + a.log())
    f = torch.where(in_tail, torch.where(is_small, torch.log1p(-log_p.exp()), log_q), log_p)
    log_slope = a * y - t - log_gamma + a.log() - f
    return (f - target) * torch.where(in_tail, -1, 1) * torch.exp(-log_slope)


def _log_minus_log1m_exp(x: Tensor) -> Tensor:
    """log(-log(1 - e^x)) for x <= 0; near enough to start from."""
    return torch.where(x < -30, x, (-(-x.expm1()).log()).log())


class _UnknownGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN where `is_unknown`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, is_unknown):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (is_unknown,) = ctx.saved_tensors
        return torch.where(is_unknown, torch.nan, grad), None


def _as_generalized(d: Distribution) -> GeneralizedNormal:
    if isinstance(d, Normal):
        return GeneralizedNormal(d.loc, math.sqrt(2) * d.scale, 2.0, validate_args=False)
    if isinstance(d, Laplace):
        return GeneralizedNormal(d.loc, d.scale, 1.0, validate_args=False)
    assert isinstance(d, GeneralizedNormal)
    return d


@register_kl(GeneralizedNormal, GeneralizedNormal)
@register_kl(GeneralizedNormal, Normal)
@register_kl(GeneralizedNormal, Laplace)
@register_kl(Normal, GeneralizedNormal)
@register_kl(Laplace, GeneralizedNormal)
def _kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(p || q) = E_p |(X - loc_q) / scale_q|^s + log normaliser of q - entropy of p, with s the power of q.

    E_p |X - loc_p|^s = scale_p^s Gamma((s + 1)/b) / Gamma(1/b) with b the power of p. It gives KL where the locs are
    equal, and where s = 2 with the square of their difference added. First derivatives are exact, and so are second
    ones but for s and a loc together.

    Raises:
        NotImplementedError: for any other element, which has no closed form; and for s = 2 and different locs if
            s asks for a gradient. Inside torch.compile and the transforms of torch.func, which cannot look at
            values, that element or gradient is NaN.
    """
    p, q = _as_generalized(p), _as_generalized(q)
    dtype = torch.promote_types(p.loc.dtype, q.loc.dtype)
    parameters = (t.to(dtype) for t in (p.loc, p.scale, p.power, q.loc, q.scale, q.power))
    loc, scale, b, other_loc, other_scale, s = wide(*parameters)
    shift = (loc - other_loc) / other_scale
    is_shifted = shift.abs() > 0  # not for NaN, whose KL is NaN
    is_unknown = is_shifted & (s != 2)
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()) and (
        is_unknown.any() or (s.requires_grad and is_shifted.any())
    ):
        raise NotImplementedError(
            "GeneralizedNormal: KL(p || q) has a closed form for equal loc, or for a q of constant power 2"
        )
    s = _UnknownGradient.apply(*torch.broadcast_tensors(s, is_shifted))
    log_ratio = scale.log() - other_scale.log()
    log_moment = torch.lgamma(1 + (s + 1) / b) - torch.log(s + 1) - torch.lgamma(1 + 1 / b)
    moment = torch.exp(s * log_ratio + log_moment) + _curvature(log_ratio, b, s) * shift.square()
    kl = moment + _log_normaliser(other_scale, s) - _log_normaliser(scale, b) - 1 / b
    return torch.where(is_unknown, torch.nan, kl).to(dtype)


def _curvature(log_ratio: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Half the second derivative of E_p |(X - loc_q) / scale_q|^s for (loc_p - loc_q) / scale_q at 0; 1 for s = 2.

    s/2 (scale_p / scale_q)^(s - 2) Gamma(1 + (s - 1)/b) / Gamma(1 + 1/b). For s + b <= 1 it is infinite; there, as
    where it overflows, a large number stands for it, whose product with a shift of 0 and its gradient is 0.
    """
    exists = s + b > 1
    log_moment = torch.lgamma(torch.where(exists, 1 + (s - 1) / b, 1)) - torch.lgamma(1 + 1 / b)
    large = math.log(torch.finfo(s.dtype).max) / 2
    return s / 2 * torch.where(exists, (s - 2) * log_ratio + log_moment, large).clamp(max=large).exp()
