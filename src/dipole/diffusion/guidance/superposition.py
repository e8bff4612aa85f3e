"""Superposition: AND and OR of several denoisers, by how likely the sample is under each (spec c4).

Source: Skreta et al., "The Superposition of Diffusion Models" (ICLR 2025), rewritten for denoisers of any Gaussian
process x = alpha x0 + sigma eps. With z = alpha x / sigma^2 and the signal-to-noise ratio lam = (alpha / sigma)^2, the
log-likelihood of x under parent i, relative to pure noise, is

    L_i(z, lam) = log E_i exp(z.x0 - lam |x0|^2 / 2),     dL_i/dz = D_i,     dL_i/dlam = -(|D_i|^2 + tr C_i) / 2,

C_i = (sigma^2 / alpha) dD_i/dx being the covariance of x0 given x. So L_i is known along any path by the chain rule,
and along the ancestral chain (dz = D dlam + dW) by Ito's formula without the trace: dL_i = D_i.dz - |D_i|^2 dlam / 2.
Both start at L_i = 0 where there is no signal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion.denoiser import Denoiser, prepare
from dipole.diffusion.process import Process
from dipole.diffusion.tensors import Level

# Below this much signal the likelihoods say nothing yet: the parents are averaged.
_NO_SIGNAL = 1e-6


@dataclass(frozen=True)
class And:
    """A sample that is as likely under every parent: along the probability-flow ODE all L_i rise equally.

    x0_hat = sum kappa_i D_i with sum kappa = 1 and, for all i, dL_i/dlam the same; of two parents
    kappa_1 = [(D_1 - D_2).(D_1 - x / alpha) + tr C_1 - tr C_2] / |D_1 - D_2|^2. For deterministic kernels and solvers.

    Attributes:
        denoisers: M parents, called with the same conditioning (see `Selected`).
        process: The process they are called in.
        probes: Random vectors for each trace (Hutchinson); 0: exact, one backward pass per component.
        limit: Largest |kappa_i - 1/M|: where parents hardly differ the system is ill-conditioned. None for none.
        seed: Of the probes, which are the same for all rows and levels.
    """

    denoisers: tuple[Denoiser, ...]
    process: Process
    probes: int = 1
    limit: float | None = None
    seed: int = 0

    def __call__(self, x: Tensor, t: float, cond: Any = None) -> Tensor:
        """Return x0_hat, shaped as `x`."""
        alpha = float(self.process.alpha(_number(t)))
        if alpha < _NO_SIGNAL:
            return torch.stack([denoiser(x, t, cond) for denoiser in self.denoisers]).mean(0)
        answers, traces = with_traces(self.denoisers, x, t, cond, self.process, self.probes, self.seed)
        kappa = self.weights(answers, traces, x / alpha)
        return _mixed(answers, kappa)

    def weights(self, answers: Tensor, traces: Tensor, y: Tensor) -> Tensor:
        """Return kappa `[M, B]` for x0_hats `[M, B, ...]`, traces `[M, B]` and y = x / alpha `[B, ...]`."""
        flat = answers.flatten(2).double()
        mean = flat.mean(0, keepdim=True)
        apart = flat - mean
        wanted = (flat * (flat - y.flatten(1).double())).sum(-1) + traces.double()
        wanted = wanted - wanted.mean(0, keepdim=True) - (apart * mean).sum(-1)
        gram = torch.einsum("ibn,jbn->bij", apart, apart)
        # Equal answers leave only rounding in the matrix, which must not be inverted.
        floor = 1e-12 * (1 + flat.square().sum(-1).amax(0))
        inverse = torch.linalg.pinv(gram, atol=floor, rtol=torch.full_like(floor, 1e-9), hermitian=True)
        shift = inverse @ wanted.T.unsqueeze(-1)
        shift = shift.squeeze(-1).T
        if self.limit is not None:
            shift = shift * (self.limit / shift.abs().amax(0, keepdim=True).clamp(min=self.limit))
        return 1 / len(self.denoisers) + shift

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Prepare every parent."""
        ready = tuple(prepare(denoiser, levels, cond) for denoiser in self.denoisers)
        return And(ready, self.process, self.probes, self.limit, self.seed)


@dataclass(frozen=True)
class Or:
    """A sample of one parent or another: kappa = softmax(temperature L_i + bias_i).

    With temperature 1 and bias log pi_i this is the mixture sum pi_i p_i, up to the steps' length. It is used through
    `sample`, which calls `prepare`: the likelihoods are followed along the chain.

    Attributes:
        denoisers: M parents, called with the same conditioning (see `Selected`).
        process: The process they are called in.
        stochastic: The kernel is ancestral (DDPM, DDIM with eta = 1): no traces are needed. Else any kernel.
        temperature: Above 1 the choice is made sooner.
        bias: M numbers; empty for zeros.
        probes: As in `And`.
        seed: As in `And`.
    """

    denoisers: tuple[Denoiser, ...]
    process: Process
    stochastic: bool = False
    temperature: float = 1.0
    bias: tuple[float, ...] = ()
    probes: int = 1
    seed: int = 0

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Raise: an answer needs the chain so far."""
        raise ValueError("Or follows likelihoods along a chain: use it through `sample`, which prepares it")

    def prepare(self, levels: Level, cond: Any) -> Follower:
        """Return the denoiser for one chain, and one chain only."""
        return Follower(self, tuple(prepare(denoiser, levels, cond) for denoiser in self.denoisers))


@dataclass
class Follower:
    """`Or` along one chain; remembers the likelihoods.

    Attributes:
        rule: The `Or`.
        denoisers: Its parents, prepared.
        likelihood: L_i at the last level visited, `[M, B]`; None before the first.
        kappa: The last weights, `[M, B]`.
    """

    rule: Or
    denoisers: tuple[Denoiser, ...]
    likelihood: Tensor | None = None
    kappa: Tensor | None = None
    _last: tuple[Tensor, Tensor, Tensor, float] | None = field(default=None, repr=False)

    def __call__(self, x: Tensor, t: float, cond: Any = None) -> Tensor:
        """Return x0_hat, shaped as `x`, and bring the likelihoods up to date."""
        rule, process = self.rule, self.rule.process
        alpha, sigma = float(process.alpha(_number(t))), float(process.sigma(_number(t)))
        if rule.stochastic:
            answers = torch.stack([denoiser(x, t, cond) for denoiser in self.denoisers])
            traces = answers.new_zeros(answers.shape[:2])
        else:
            answers, traces = with_traces(self.denoisers, x, t, cond, process, rule.probes, rule.seed)
        z, snr = (alpha / sigma**2 * x).flatten(1).double(), (alpha / sigma) ** 2
        self._follow(answers.flatten(2).double(), traces.double(), z, snr)
        assert self.likelihood is not None
        bias = torch.tensor(rule.bias or (0.0,) * len(answers), dtype=torch.float64, device=x.device)
        self.kappa = torch.softmax(rule.temperature * self.likelihood + bias.unsqueeze(-1), 0)
        return _mixed(answers, self.kappa)

    def _follow(self, answers: Tensor, traces: Tensor, z: Tensor, snr: float) -> None:
        """Add what the step to `z` changed."""
        rate = 0.5 * (answers.square().sum(-1) + traces)
        if self._last is None:
            # The chain starts from noise that all parents find equally likely.
            self.likelihood = torch.zeros_like(rate)
        else:
            before, rate_before, z_before, snr_before = self._last
            if not self.rule.stochastic:  # the trapezoidal rule, which is Stratonovich's integral where there is noise
                before = (before + answers) / 2
                rate_before = rate if snr_before < _NO_SIGNAL**2 else (rate_before + rate) / 2
            gain = (before * (z - z_before)).sum(-1) - rate_before * (snr - snr_before)
            assert self.likelihood is not None
            self.likelihood = self.likelihood + gain
        self._last = (answers, rate, z, snr)


def with_traces(
    denoisers: tuple[Denoiser, ...], x: Tensor, t: float, cond: Any, process: Process, probes: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return x0_hats `[M, B, ...]` and tr Cov[x0 | x] `[M, B]` of several denoisers.

    Args:
        denoisers: They must be differentiable in `x`.
        x: `[B, ...]`.
        t: Level, a number.
        cond: Conditioning.
        process: Their process.
        probes: Random signs to estimate the trace with (Hutchinson); 0: exact.
        seed: Of the signs.
    """
    number = _number(t)
    alpha, sigma = float(process.alpha(number)), float(process.sigma(number))
    if alpha < _NO_SIGNAL:  # the covariance cannot be told from a denoiser that is constant there
        answers = torch.stack([denoiser(x, t, cond) for denoiser in denoisers])
        return answers, answers.new_zeros(answers.shape[:2])
    vectors = _vectors(x, probes, seed)
    answers_, traces = [], []
    for denoiser in denoisers:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            answer: Tensor = denoiser(point, t, cond)
            total = x.new_zeros(len(x))
            for vector in vectors:
                (row,) = torch.autograd.grad(answer, point, vector.expand_as(answer), retain_graph=True)
                total = total + (row * vector).flatten(1).sum(-1)
        answers_.append(answer.detach())
        traces.append(total.detach() / max(1, probes))
    return torch.stack(answers_), sigma**2 / alpha * torch.stack(traces)


def _vectors(x: Tensor, probes: int, seed: int) -> Tensor:
    """Return `[P, 1, ...]` vectors with which the trace is taken, the same for all rows."""
    size = x[0].numel()
    if probes == 0:
        return torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, 1, *x.shape[1:]), generator=generator) * 2 - 1
    return signs.to(x)


def _mixed(answers: Tensor, kappa: Tensor) -> Tensor:
    weights = kappa.to(answers).reshape(*kappa.shape, *[1] * (answers.dim() - 2))
    return (weights * answers).sum(0)


def _number(t: Any) -> float:
    if isinstance(t, Tensor) and t.dim() > 0:
        raise ValueError("AND and OR need one level for all rows and positions")
    return float(t)
