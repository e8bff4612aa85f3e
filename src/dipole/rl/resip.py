"""ResiP: a residual learnt by PPO that corrects a frozen chunked policy at every step.

Source: Ankile et al., "From Imitation to Refinement: Residual RL for Precise Assembly" (2024). The base plans a chunk;
the residual sees each new observation and the base's next action, and adds a small Gaussian correction of fixed
exploration noise. Only the residual and its critic learn.

Unlike the authors' code: a queue per environment, time limits are bootstrapped through, environments are reset only
when their episodes end, and the residual may see its position in the chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dipole.diffusion.normal import Normal
from dipole.diffusion.tensors import randn
from dipole.rl.advantages import RewardScale, gae, normalise
from dipole.rl.critics import Value
from dipole.rl.experience import Decision, Rollout
from dipole.rl.learner import Setting, descend, set_rate
from dipole.rl.objectives import ppo_loss, ratio_figures
from dipole.rl.residual import Queues, Residual, ResidualPolicy
from dipole.training.seeding import generator


@dataclass(frozen=True)
class ResiPConfig:
    """Settings of ResiP; the defaults are the authors'.

    Attributes:
        scale: Of the residual, in normalised action units.
        log_std: Of the exploration noise, before scaling; it is not learnt.
        show_phase: Let the residual see its position in the chunk.
        hidden: Hidden layers of residual and critic.
        steps: Env steps per row and iteration.
        epochs: Passes over them.
        minibatches: Updates per pass.
        lr: Learning rate of the residual.
        critic_lr: Of the critic.
        iterations: Length of the cosine of both rates; None for constant rates.
        actor_warmup: Iterations in which only the critic learns.
        gamma: Discount of an env step.
        lam: GAE's lambda.
        clip: Clip range; log-densities are summed over the action's components.
        target_kl: Stop an iteration's updates beyond this divergence.
        penalty: Weight of the squared mean.
        grad_clip: Largest gradient norm.
    """

    scale: float = 0.1
    log_std: float = -1.0
    show_phase: bool = False
    hidden: tuple[int, ...] = (256, 256)
    steps: int = 64
    epochs: int = 50
    minibatches: int = 1
    lr: float = 3e-4
    critic_lr: float = 5e-3
    iterations: int | None = None
    actor_warmup: int = 5
    gamma: float = 0.999
    lam: float = 0.95
    clip: float = 0.2
    target_kl: float | None = 0.1
    penalty: float = 0.0
    grad_clip: float = 1.0


class ResiP:
    """The learner; see `dipole.rl.learner.Learner`."""

    def __init__(self, setting: Setting, config: ResiPConfig) -> None:
        base, self.setting, self.config = setting.base, setting, config
        torch.manual_seed(setting.seed)
        self.queues = Queues(base, setting.num_envs, config.show_phase)
        width = self.queues.feature_dim
        self.residual, critic = Residual(width, base.action_dim, config.hidden), Value(width, config.hidden, "relu")
        last = critic.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.orthogonal_(last.weight, 0.25)
        nn.init.constant_(last.bias, 0.25)
        scale = RewardScale(setting.num_envs, config.gamma, bound=5.0)
        self.modules = nn.ModuleDict({"actor": self.residual, "critic": critic, "scale": scale})
        options: dict[str, Any] = {"eps": 1e-5, "weight_decay": 1e-6}
        self.optimizers = {
            "actor": torch.optim.AdamW(self.residual.parameters(), lr=config.lr, **options),
            "critic": torch.optim.AdamW(critic.parameters(), lr=config.critic_lr, **options),
        }
        self.buffers = {"queues": self.queues}
        self.values: dict[str, Any] = {}
        self.collector = setting.collector(self.queues)

    def dist(self, seen: Tensor) -> Normal:
        """Return the distribution of the residual r, before scaling."""
        return Normal(self.residual(seen), math.exp(self.config.log_std))

    def decide(self, seen: Tensor, random: Generator) -> Decision:
        """Draw a residual per row and add it to the base's action."""
        with torch.no_grad():
            dist = self.dist(seen)
        residual = dist.sample(noise=randn(tuple(dist.mean.shape), random, like=dist.mean))
        action = self.queues.base_action(seen) + self.config.scale * residual
        return Decision(self.setting.base.physical(action)[:, None], {"residual": residual})

    def iterate(self, iteration: int) -> dict[str, float]:
        """Collect `steps` per row, then update for some epochs."""
        config = self.config
        if config.iterations is not None:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / config.iterations)))
            for name, rate in (("actor", config.lr), ("critic", config.critic_lr)):
                set_rate(self.optimizers[name], rate * cosine)
        rollout = self.collector.collect(self.decide, config.steps)
        return self._update(rollout, iteration)

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return advantages and value targets `[T, N]`."""
        reward = self.modules["scale"](rollout.reward, rollout.terminated | rollout.truncated)
        critic = self.modules["critic"]
        value, after = critic(rollout.features), critic(rollout.next_features)
        ends = (rollout.terminated, rollout.truncated)
        return gae(reward, value, after, *ends, self.config.gamma, self.config.lam)

    def _update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        config = self.config
        advantage, target = (value.flatten() for value in self.advantages(rollout))
        seen, residual = rollout.features.flatten(0, 1), rollout.data["residual"].flatten(0, 1)
        with torch.no_grad():
            old = self.dist(seen).log_prob(residual, "sum")
        random = generator(self.setting.seed, "minibatches", iteration)
        sums: dict[str, list[float]] = {}
        size = -(-len(seen) // config.minibatches)
        for _ in range(config.epochs):
            for chosen in torch.split(torch.randperm(len(seen), generator=random), size):
                part = {"seen": seen[chosen], "residual": residual[chosen], "old": old[chosen]}
                figures = self._minibatch(part, normalise(advantage[chosen]), target[chosen], iteration)
                sums.setdefault("first_ratio_error", [figures["ratio_error"]])
                for key, value in figures.items():
                    sums.setdefault(key, []).append(value)
            if config.target_kl is not None and sums["kl"][-1] > config.target_kl:
                break
        return {key: sum(values) / len(values) for key, values in sums.items()}

    def _minibatch(
        self, part: dict[str, Tensor], advantage: Tensor, target: Tensor, iteration: int
    ) -> dict[str, float]:
        config = self.config
        error = (self.modules["critic"](part["seen"]) - target).square().mean()
        descend(0.5 * error, self.optimizers["critic"], config.grad_clip)
        dist = self.dist(part["seen"])
        log_prob = dist.log_prob(part["residual"], "sum")
        loss = ppo_loss(log_prob, part["old"], advantage, config.clip) + config.penalty * dist.mean.square().mean()
        if iteration >= config.actor_warmup:
            descend(loss, self.optimizers["actor"], config.grad_clip)
        figures = ratio_figures(log_prob, part["old"], config.clip)
        return {"policy_loss": float(loss.detach()), "value_error": float(error.detach()), **figures}

    def policy(self) -> Any:
        """Return the base with the mean of the residual."""
        config = self.config
        return ResidualPolicy.of(self.setting.base, self.residual, config.hidden, config.scale, config.show_phase)


def make(setting: Setting, config: ResiPConfig) -> ResiP:
    """Return the learner."""
    return ResiP(setting, config)
