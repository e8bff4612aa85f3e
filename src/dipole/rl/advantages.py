"""Generalised advantage estimation over environment time and denoising time, with truncation told from termination.

Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016), eq. 16;
denoising discount: Ren et al., "Diffusion Policy Policy Optimization" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Return advantages and value targets.

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - terminated_t) (1 - truncated_t) A_{t+1}

    s'_t is the observation that followed decision t, also when the episode ended there (never the first one of the next
    episode): a time limit is bootstrapped through and cuts the sum, a termination is worth 0.

    Args:
        reward: `[T, N]`.
        value: `[T, N]`, V(s_t).
        next_value: `[T, N]`, V(s'_t).
        terminated: `[T, N]` bool.
        truncated: `[T, N]` bool.
        gamma: Discount of a decision.
        lam: Lambda.

    Returns:
        Advantages and `advantages + value`, both `[T, N]`.
    """
    delta = reward + gamma * torch.where(terminated, torch.zeros_like(next_value), next_value) - value
    go_on = gamma * lam * (~(terminated | truncated)).to(delta.dtype)
    advantage = torch.zeros_like(delta)
    running = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        running = delta[t] + go_on[t] * running
        advantage[t] = running
    return advantage, advantage + value


def over_denoising(advantage: Tensor, steps: int, gamma: float) -> Tensor:
    """Return the advantage of every denoising step of a decision.

    A denoising step earns nothing and no value is learned in between, so its advantage is the decision's, discounted by
    the number of denoising steps still to come: A gamma^(K' - 1 - i), i = 0 being the noisiest tuned step.

    Args:
        advantage: `[...]`.
        steps: K'.
        gamma: Discount of a denoising step.

    Returns:
        `[..., K']`.
    """
    left = torch.arange(steps - 1, -1, -1, dtype=advantage.dtype, device=advantage.device)
    return advantage.unsqueeze(-1) * gamma**left


def normalise(advantage: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1; all zero where they do not differ."""
    centred = advantage - advantage.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)


class RewardScale(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return, as PPO implementations do.

    Args:
        num_envs: N.
        gamma: Discount.
        bound: Scaled rewards are clipped to this size.
    """

    running: Tensor
    moments: Tensor

    def __init__(self, num_envs: int, gamma: float, bound: float = 10.0) -> None:
        super().__init__()
        self.gamma, self.bound = gamma, bound
        self.register_buffer("running", torch.zeros(num_envs, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))  # count, mean, sum of squared deviations

    @torch.no_grad()
    def forward(self, reward: Tensor, done: Tensor) -> Tensor:
        """Take in rewards and ends `[T, N]` and return the rewards scaled."""
        for r, end in zip(reward.double(), done, strict=True):
            self.running.mul_(self.gamma).add_(r)
            self._merge(self.running)
            self.running.masked_fill_(end, 0.0)
        std = (self.moments[2] / self.moments[0].clamp(min=1)).sqrt()
        scaled = reward / (std.to(reward.dtype) + 1e-8) if std > 0 else reward
        return scaled.clamp(-self.bound, self.bound)

    def _merge(self, values: Tensor) -> None:
        """Merge a batch into the moments (Chan et al. 1979)."""
        count, mean, squares = self.moments.unbind()
        n, m = len(values), values.mean()
        total, gap = count + n, m - mean
        s = (values - m).square().sum()
        self.moments.copy_(torch.stack([total, mean + gap * n / total, squares + s + gap**2 * count * n / total]))
