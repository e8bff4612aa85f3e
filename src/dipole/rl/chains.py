"""The denoising chain as a Markov decision process: every tuned denoising step is an action with a density.

Chain x_0 .. x_K from noise to chunk: the first K - K' steps are taken by the frozen network, the last K' by the tuned
one. Sampler and scorer share one step distribution, `Chains.dist`: same levels, same clipping, same floor of the
standard deviation. A stored chain holds samples as they were drawn; only the environment clips actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dipole.diffusion import NetworkDenoiser, sample
from dipole.diffusion.kernels import Coefficients, Kernel
from dipole.diffusion.normal import Normal, Reduce
from dipole.diffusion.process import LevelLike, Process
from dipole.diffusion.process_view import ProcessView
from dipole.diffusion.samplers import initial_noise
from dipole.errors import DipoleError
from dipole.rl.base import Base

NoiseModel = Callable[[Tensor, Tensor], Tensor]
"""Features `[n, F]` and step indices `[n]` to standard deviations `[n, Tp, Da]`."""


@dataclass(frozen=True, kw_only=True)
class MinStd(Kernel):
    """A kernel whose steps have at least some noise; the means are the kernel's own (DPPO's exploration floor).

    Attributes:
        kernel: The kernel; its clip is used.
        floor: Smallest standard deviation.
    """

    kernel: Kernel
    floor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", self.kernel.clip)

    def _coefficients(self, process: Process, t: LevelLike, s: LevelLike) -> Coefficients:
        value = self.kernel._coefficients(process, t, s)
        return value._replace(std=value.std.clamp(min=self.floor))


class Chains:
    """Draws and scores denoising chains of a policy that is being tuned.

    Args:
        base: The policy.
        tuned: Copy of its network that learns.
        kernel: Kernel of every step.
        levels: `[K + 1]` levels.
        steps: K', how many of the last steps the tuned network takes.
        noise: Standard deviation of the tuned steps in place of the kernel's (a learned one).
        bound: Bound on the mean of a tuned step; None for none.

    Raises:
        DipoleError: The policy's network is not at hand, or K' is not in 0..K.
    """

    def __init__(
        self,
        base: Base,
        tuned: nn.Module,
        kernel: Kernel,
        levels: Tensor,
        steps: int,
        noise: NoiseModel | None = None,
        bound: float | None = None,
    ) -> None:
        self.base, self.kernel, self.levels = base, kernel, levels.double()
        self.process, self.bound, self.noise = base.process, bound, noise
        self.total = len(levels) - 1
        if not 0 <= steps <= self.total:
            raise DipoleError(f"{steps} denoising steps to tune, but the sampler takes {self.total}: give 0 to that")
        self.steps = steps
        self.frozen = _denoiser(base)
        self.tuned = _denoiser(base, tuned)
        self.dims = slice(base.first, base.first + base.action_horizon)

    def dist(self, x: Tensor, k: int | Tensor, features: Tensor, denoiser: Any = None) -> Normal:
        """Return the distribution of step K - K' + k, from x `[n, Tp, Da]`.

        Args:
            x: Sample before the step.
            k: Tuned step, 0..K'-1: a number, or one per row `[n]`.
            features: `[n, F]`.
            denoiser: The frozen one, for a distance; default the tuned one.
        """
        at = k + self.total - self.steps
        t: Any = self.levels[at] if isinstance(at, Tensor) else float(self.levels[at])
        s: Any = self.levels[at + 1] if isinstance(at, Tensor) else float(self.levels[at + 1])
        x0 = (denoiser or self.tuned)(x, t, self.base.cond(features))
        step: Normal = self.kernel.step(x, x0, t, s, self.process)
        mean = step.mean if self.bound is None else step.mean.clamp(-self.bound, self.bound)
        if self.noise is None:
            return Normal(mean, step.std)
        index = k if isinstance(k, Tensor) else torch.full((len(x),), k)
        return Normal(mean, self.noise(features, index))

    @torch.no_grad()
    def draw(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        """Return chains of the tuned part, `[n, K' + 1, Tp, Da]`: before the first tuned step .. final chunk."""
        shape = (len(features), self.base.pred_horizon, self.base.action_dim)
        x: Any = initial_noise(self.process, self.levels, shape, generator, like=features)
        head = self.levels[: self.total - self.steps + 1]
        if len(head) > 1:
            cond = self.base.cond(features)
            x = sample(self.frozen, self.process, head, self.kernel, cond=cond, init=x, generator=generator)
        chain = [x]
        for k in range(self.steps):
            chain.append(self.dist(chain[-1], k, features).sample(generator))
        return torch.stack(chain, dim=1)

    def dists(self, chain: Tensor, features: Tensor, denoiser: Any = None) -> Normal:
        """Return the distributions of all tuned steps of chains `[n, K' + 1, ...]`, rows by steps: `[n K', Tp, Da]`."""
        x = chain[:, :-1].flatten(0, 1)
        k = torch.arange(self.steps).repeat(len(chain))
        return self.dist(x, k, features.repeat_interleave(self.steps, 0), denoiser)

    def log_prob(
        self, chain: Tensor, features: Tensor, reduce: Reduce, bounds: tuple[float, float] | None = None
    ) -> Tensor:
        """Return the log-probability of every tuned step over the executed actions, `[n, K']`.

        Args:
            chain: `[n, K' + 1, Tp, Da]`.
            features: `[n, F]`.
            reduce: `sum` or `mean` over the executed actions' components.
            bounds: Clamp of each component's log-density (DPPO's code: -5, 2); None for none.
        """
        values = self.dists(chain, features).log_prob(chain[:, 1:].flatten(0, 1), "none")[:, self.dims].flatten(1)
        if bounds is not None:
            values = values.clamp(*bounds)
        reduced = values.sum(1) if reduce == "sum" else values.mean(1)
        return reduced.view(len(chain), self.steps)

    def kl_to_frozen(self, chain: Tensor, features: Tensor) -> Tensor:
        """Return KL(tuned || frozen) of the steps, summed over the executed actions: `[n, K']`."""
        ours = self.dists(chain, features)
        with torch.no_grad():
            theirs = self.dists(chain, features, self.frozen)
        std = torch.as_tensor(ours.std, dtype=ours.mean.dtype).expand_as(ours.mean)[:, self.dims]
        other = torch.as_tensor(theirs.std, dtype=ours.mean.dtype).expand_as(ours.mean)[:, self.dims]
        value = Normal(ours.mean[:, self.dims], std).kl(Normal(theirs.mean[:, self.dims], other), "sum")
        return value.view(len(chain), self.steps)


def _denoiser(base: Base, network: nn.Module | None = None) -> Any:
    """Return the policy's denoiser in the process it samples in, with another network if given."""
    denoiser = getattr(base.policy, "denoiser", None)
    if not isinstance(denoiser, NetworkDenoiser):
        raise DipoleError(
            "this method trains the denoising network, and the policy does not show its own: use dsrl or resip, which "
            "need none"
        )
    if network is not None:
        denoiser = replace(denoiser, network=network)
    if base.process is base.policy.process:
        return denoiser
    return ProcessView(denoiser, base.policy.process, base.process)
