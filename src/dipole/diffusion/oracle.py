"""Exact denoisers of known distributions: what a perfectly trained network would answer.

    denoiser = GaussianDenoiser(mean, cov, process)
    x0 = sample(denoiser, process, process.levels(10), shape=(1000, 2), generator=g)

For data x0 ~ N(m, S) and x = alpha x0 + sigma eps, with M = alpha^2 S + sigma^2 I (S may be singular):

    E[x0 | x]   = m + J (x - alpha m)          J = alpha S M^-1, the Jacobian of the denoiser
    Cov[x0 | x] = S - alpha J S

A mixture is the sum of such answers, weighted by how likely each component is given x. So every claim about samplers,
guidance and fine-tuning can be tested without training anything. A linear label y = G x0 + N(0, R) keeps them closed:
`given` is the posterior, `label_score` the exact guidance that leads there, and a linear-Gaussian policy raised to a
power (`LinearLabel.from_policy`) is such a label. Samples `[B, D]` or `[B, T, D]` are flattened to vectors; levels are
numbers, `[B]` or `[B, T]`. All arithmetic is in float64. See `affine` for the exact result of a whole sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dipole.diffusion.guidance.gradient import Gradient, gradient_of
from dipole.diffusion.process import LevelLike, Process
from dipole.diffusion.tensors import expand, rows


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class LinearLabel:
    """An observation of the clean sample: value = matrix x0 + N(0, noise).

    Attributes:
        matrix: `[L, N]`, for flattened samples of N numbers.
        value: `[L]`.
        noise: `[L, L]`, positive definite.
    """

    matrix: Tensor
    value: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        value = _double(self.value).reshape(-1)
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "matrix", _double(self.matrix).reshape(len(value), -1))
        object.__setattr__(self, "noise", _double(self.noise).reshape(len(value), len(value)))

    @classmethod
    def from_policy(cls, gain: Any, offset: Any, cov: Any, power: float, action: Any, observation: Any) -> LinearLabel:
        """Return the label that tilts by pi(a | o)^power, for pi = N(gain o + offset, cov).

        Args:
            gain: `[A, O]`.
            offset: `[A]`.
            cov: `[A, A]`.
            power: Exponent, above 0.
            action: `[A, N]`: picks the action out of a flattened sample.
            observation: `[O, N]`: picks the observation.
        """
        matrix = _double(action) - _double(gain) @ _double(observation)
        return cls(matrix, _double(offset), _double(cov) / power)

    def log_prob(self, x0: Tensor, t: Any = None, cond: Any = None) -> Tensor:
        """Return log p(value | x0), `[B]`: what reconstruction guidance takes the gradient of, at x0_hat."""
        error = self.value - x0.reshape(len(x0), -1).double() @ self.matrix.mT
        return _log_normal(error, self.noise)


@dataclass(frozen=True, eq=False)
class MixtureDenoiser:
    """The exact denoiser of a mixture of Gaussians.

    Attributes:
        weights: `[K]`, positive; need not sum to 1.
        means: `[K, N]`, for samples of N numbers per row.
        covs: `[K, N, N]` covariances, or standard deviations: a number or `[K]`.
        process: The forward process.
    """

    weights: Tensor
    means: Tensor
    covs: Tensor
    process: Process

    def __post_init__(self) -> None:
        weights, means, covs = _double(self.weights), _double(self.means), _double(self.covs)
        means = means.reshape(len(weights), -1)
        if covs.dim() < 2:
            eye = torch.eye(means.shape[1], dtype=torch.float64)
            covs = covs.expand(len(weights))[:, None, None] ** 2 * eye
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "covs", covs)

    def __call__(self, x: Tensor, t: LevelLike, cond: Any = None) -> Tensor:
        """Return E[x0 | x], shaped as `x`. At a clean entry it is `x` there, if `x` is possible at all."""
        posterior = self.posterior(x, t)
        return (posterior.weights.unsqueeze(-1) * posterior.means).sum(1).reshape(x.shape).to(x)

    def posterior(self, x: Tensor, t: LevelLike) -> Posterior:
        """Return the distribution of x0 given `x` `[B, ...]` at level `t`: a mixture for each row."""
        alpha, sigma = self._coefficients(x, t)
        # [B, K, N, N] with B = 1 where all rows share the level
        signal = alpha[:, None, :, None] * self.covs
        marginal = signal * alpha[:, None, None, :] + torch.diag_embed(sigma**2).unsqueeze(1)
        inverse = torch.linalg.pinv(marginal, hermitian=True)
        error = x.reshape(len(x), 1, -1).double() - alpha.unsqueeze(1) * self.means
        weighted = (inverse @ error.unsqueeze(-1)).squeeze(-1)
        means = self.means + (signal.mT @ weighted.unsqueeze(-1)).squeeze(-1)
        if len(self.weights) == 1:  # and the density of a degenerate Gaussian is not needed
            weights = torch.ones(len(x), 1, dtype=torch.float64)
        else:
            likelihood = -0.5 * ((error * weighted).sum(-1) + torch.linalg.slogdet(marginal)[1])
            weights = torch.softmax(torch.log(self.weights) + likelihood, -1)
        jacobian = signal.mT @ inverse
        return Posterior(weights, means, self.covs - jacobian @ signal, jacobian)

    def posterior_cov(self, x: Tensor, t: LevelLike) -> Tensor:
        """Return Cov[x0 | x]: `[B, N, N]`."""
        posterior = self.posterior(x, t)
        mean = (posterior.weights.unsqueeze(-1) * posterior.means).sum(1, keepdim=True)
        spread = posterior.means - mean
        second = posterior.covs + spread.unsqueeze(-1) * spread.unsqueeze(-2)
        return (posterior.weights[..., None, None] * second).sum(1)

    def log_prob(self, x: Tensor, t: LevelLike) -> Tensor:
        """Return the log-density of noisy samples `x` `[B, ...]` at level `t`: `[B]`."""
        alpha, sigma = self._coefficients(x, t)
        marginal = alpha[:, None, :, None] * self.covs * alpha[:, None, None, :] + torch.diag_embed(sigma**2)[:, None]
        error = x.reshape(len(x), 1, -1).double() - alpha.unsqueeze(1) * self.means
        return torch.logsumexp(torch.log(self.weights) + _log_normal(error, marginal), -1)

    def draw(self, count: int, generator: Generator | None = None) -> Tensor:
        """Return `[count, N]` clean samples, float64."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        values, vectors = torch.linalg.eigh(self.covs)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[component] + (root[component] @ noise.unsqueeze(-1)).squeeze(-1)

    def given(self, label: LinearLabel) -> MixtureDenoiser:
        """Return the exact denoiser of x0 given the label: again a mixture."""
        means, covs, evidence = _conditioned(self.means, self.covs, label)
        weights = torch.softmax(torch.log(self.weights) + evidence, -1)
        return MixtureDenoiser(weights, means, covs, self.process)

    def label_log_prob(self, label: LinearLabel) -> Callable[..., Tensor]:
        """Return `f(x, t, cond=None) -> [B]`, the exact log p(label value | x_t): its gradient is exact guidance."""

        def log_prob(x: Tensor, t: LevelLike, cond: Any = None) -> Tensor:
            posterior = self.posterior(x, t)
            _, _, evidence = _conditioned(posterior.means, posterior.covs, label)
            return torch.logsumexp(torch.log(posterior.weights) + evidence, -1)

        return log_prob

    def label_score(self, label: LinearLabel) -> Gradient:
        """Return `gradient(x, t, cond)` of `label_log_prob`: with `where="x_t"`, guidance to exactly `given(label)`.

        For a Gaussian it is J' G' (R + G C G')^-1 (y - G E[x0 | x]), with C the posterior covariance. Leaving out
        G C G' is the usual reconstruction guidance.
        """
        return gradient_of(self.label_log_prob(label))

    def _coefficients(self, x: Tensor, t: LevelLike) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of every entry, `[B, N]`, or `[1, N]` where all rows share the level."""
        level = rows(t, x) if isinstance(t, Tensor) and t.dim() > 0 else _double(t).reshape(1)
        like = x.reshape(len(x), -1) if level.dim() == 1 else x
        shape = (len(level), *like.shape[1:])
        alpha, sigma = (expand(f(level), like).expand(shape) for f in (self.process.alpha, self.process.sigma))
        return alpha.reshape(len(level), -1), sigma.reshape(len(level), -1)


@dataclass(frozen=True, eq=False)
class Posterior:
    """A mixture of K Gaussians for each row; the first axis of `covs` and `jacobians` is 1 where rows are alike.

    Attributes:
        weights: `[B, K]`.
        means: `[B, K, N]`.
        covs: `[B or 1, K, N, N]`.
        jacobians: `[B or 1, K, N, N]`, derivatives of the means by `x`.
    """

    weights: Tensor
    means: Tensor
    covs: Tensor
    jacobians: Tensor


def _conditioned(means: Tensor, covs: Tensor, label: LinearLabel) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, covariance and log-evidence of Gaussians `[..., N]`, `[..., N, N]` given a label."""
    cross = covs @ label.matrix.mT
    variance = label.noise + label.matrix @ cross
    gain = torch.linalg.solve(variance, cross.mT).mT
    error = label.value - means @ label.matrix.mT
    moved = means + (gain @ error.unsqueeze(-1)).squeeze(-1)
    return moved, covs - gain @ cross.mT, _log_normal(error, variance)


def _log_normal(error: Tensor, cov: Tensor) -> Tensor:
    """Return log N(error; 0, cov) for `[..., N]` and `[..., N, N]` that broadcast."""
    distance = (error * torch.linalg.solve(cov, error.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return -0.5 * (distance + torch.linalg.slogdet(cov)[1] + error.shape[-1] * math.log(2 * math.pi))


class GaussianDenoiser(MixtureDenoiser):
    """The exact denoiser of a Gaussian N(mean, cov): an affine map of x.

    Args:
        mean: `[N]`, for samples of N numbers per row.
        cov: `[N, N]`, may be singular; or a standard deviation.
        process: The forward process.
    """

    def __init__(self, mean: Any, cov: Any, process: Process) -> None:
        cov = _double(cov)
        super().__init__(
            torch.ones(1), _double(mean).reshape(1, -1), cov if cov.dim() == 0 else cov.unsqueeze(0), process
        )

    @property
    def mean(self) -> Tensor:
        """Return `[N]`."""
        return self.means[0]

    @property
    def cov(self) -> Tensor:
        """Return `[N, N]`."""
        return self.covs[0]

    def given(self, label: LinearLabel) -> GaussianDenoiser:
        """Return the exact denoiser of x0 given the label: again a Gaussian."""
        mean, cov, _ = _conditioned(self.mean, self.cov, label)
        return GaussianDenoiser(mean, cov, self.process)
