"""ReinFlow and Flow-SDE: policy gradients for flow policies, whose ODE steps have no density.

Two ways to give them one. `sde` (Flow-GRPO: Liu et al. 2025) takes stochastic steps with the ODE's marginals, and one
ratio per denoising step. `learned` (ReinFlow: Zhang et al. 2025) adds noise of a learned standard deviation to the ODE
steps, so that a decision's whole chain is one action; the noise is dropped at deployment. Both deploy the ODE.

Unlike the authors' code: sampler and scorer share their levels; samples are not clipped before they are scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dipole.diffusion import DDIM, Flow, FlowSDE
from dipole.errors import DipoleError
from dipole.rl.critics import mlp
from dipole.rl.dppo import DPPO, DPPOConfig
from dipole.rl.learner import Setting


@dataclass(frozen=True)
class ReinFlowConfig(DPPOConfig):
    """Settings of ReinFlow and Flow-SDE; those of DPPO, and the noise.

    Attributes:
        mode: `sde` or `learned`.
        eta: Amount of noise of `sde`.
        noise_range: Smallest and largest standard deviation of `learned`.
        noise_decay: Share of the largest that remains after a third of `noise_iterations`.
        noise_iterations: Iterations over which the largest decays; None for no decay.
        noise_hidden: Hidden layers of the noise network.
        entropy_weight: Weight of the chain's entropy per component (`learned`).
        mean_bound: Bound on the mean of a step (`learned`).
    """

    min_std: float = 0.0
    clip_x0: float | None = None
    lr: float = 4.5e-5
    critic_lr: float = 6.5e-4
    mode: Literal["sde", "learned"] = "learned"
    eta: float = 0.7
    noise_range: tuple[float, float] = (0.1, 0.24)
    noise_decay: float = 0.7
    noise_iterations: int | None = None
    noise_hidden: tuple[int, ...] = (64, 64)
    entropy_weight: float = 0.0
    mean_bound: float | None = None


class NoiseNet(nn.Module):
    """Standard deviations within bounds, from features and step: the log-variance is a tanh between its bounds.

    Args:
        feature_dim: F.
        steps: K'.
        shape: (Tp, Da).
        bounds: Smallest and largest standard deviation.
        hidden: Hidden layers.
    """

    ceiling: Tensor

    def __init__(
        self, feature_dim: int, steps: int, shape: tuple[int, int], bounds: tuple[float, float], hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        low, high = bounds
        if not 0 < low <= high:
            raise DipoleError(f"noise_range {low:g}, {high:g}: two positive numbers, the smaller first")
        self.shape, self.low, self.steps = shape, low, steps
        self.register_buffer("ceiling", torch.tensor(high))
        self.net = mlp([feature_dim + steps, *hidden, math.prod(shape)], "tanh")

    def forward(self, features: Tensor, k: Tensor) -> Tensor:
        """Return `[n, Tp, Da]` for features `[n, F]` and steps `[n]`."""
        code = nn.functional.one_hot(k, self.steps).to(features.dtype)
        share = (torch.tanh(self.net(torch.cat([features, code], dim=1))) + 1) / 2
        low, high = 2 * math.log(self.low), 2 * self.ceiling.log()
        return torch.exp(0.5 * (low + (high - low) * share)).view(len(features), *self.shape)


class ReinFlow(DPPO):
    """The learner with learned noise: DPPO's, with a bonus for entropy and the decay of the largest noise."""

    def iterate(self, iteration: int) -> dict[str, float]:
        """Collect and update once."""
        config = self.config
        assert isinstance(config, ReinFlowConfig)
        if config.noise_iterations is not None:
            done = min(1.0, iteration / max(1.0, config.noise_iterations / 3))
            low, high = config.noise_range
            ceiling = self.modules["noise"].get_buffer("ceiling")
            ceiling.fill_(max(low, high * (1 - (1 - config.noise_decay) * done)))
        return super().iterate(iteration)

    def bonus(self, row: dict[str, Tensor]) -> Tensor | None:
        """Return the entropy of the executed noise per component, weighted."""
        config = self.config
        assert isinstance(config, ReinFlowConfig)
        if not config.entropy_weight:
            return None
        steps = self.chains.steps
        features = row["features"].repeat_interleave(steps, 0)
        std = self.modules["noise"](features, torch.arange(steps).repeat(len(row["features"])))
        entropy: Tensor = (0.5 * math.log(2 * math.pi * math.e) + std[:, self.chains.dims].log()).mean()
        return config.entropy_weight * entropy


def make(setting: Setting, config: ReinFlowConfig) -> DPPO:
    """Return the learner.

    Raises:
        DipoleError: The policy does not sample in a flow.
    """
    base = setting.base
    if not base.transparent or not isinstance(base.process, Flow):
        raise DipoleError("reinflow is for flow policies: use dppo, or sample this one in a flow")
    if config.mode == "sde":
        return DPPO(setting, config, kernel=FlowSDE(eta=config.eta, clip=config.clip_x0))
    torch.manual_seed(setting.seed)
    total = config.num_steps or base.policy.sampler.num_steps
    steps = total if config.tuned_steps is None else config.tuned_steps
    noise = NoiseNet(
        base.feature_dim, steps, (base.pred_horizon, base.action_dim), config.noise_range, config.noise_hidden
    )
    kernel = DDIM(eta=0.0, clip=config.clip_x0)
    return ReinFlow(setting, config, kernel=kernel, noise=noise, bound=config.mean_bound, chain_ratio=True)
