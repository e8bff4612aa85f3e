"""DSRL: steer a frozen policy by choosing the noise it denoises.

Source: Wagenmaker et al., "Steering Your Diffusion Policy with Latent Space Reinforcement Learning" (CoRL 2025). The
actor is a tanh-Gaussian on the box [-b, b]^d of initial noise. `sac` learns Q(s, w) of the noise. `na` (noise-aliased)
learns Q_A(s, a) of the action, for which recorded actions serve too, and distils it into Q_W(s, w), from which the
actor learns: no gradient ever goes through the policy.

Unlike the authors' code: time limits are bootstrapped through, the chunk stops when its episode ends, and the first
distillation comes before the first step of the actor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from dipole.diffusion.tensors import randn
from dipole.errors import DipoleError
from dipole.rl.actors import TanhGaussian
from dipole.rl.buffers import Groups, ReplayBuffer
from dipole.rl.critics import Activation, Critics, follow
from dipole.rl.experience import Decision
from dipole.rl.learner import Setting, descend
from dipole.rl.objectives import Temperature
from dipole.rl.off_policy import OffPolicy, recorded
from dipole.rl.steered import SteeredPolicy, spread


@dataclass(frozen=True)
class DSRLConfig:
    """Settings of DSRL; the defaults are the authors' for Robomimic.

    Attributes:
        variant: `na` or `sac`.
        noise_bound: b.
        noise_steps: Noise of the first so many chunk positions is chosen and repeated over the others; None for all.
        hidden: Hidden layers of actor and critics.
        activation: Their nonlinearity.
        critics: Heads of each critic.
        lr: Learning rate of everything.
        batch_size: Transitions per update.
        gamma: Discount of a decision.
        tau: Step of the target critics.
        updates: G, critic and actor updates per decision of all rows together.
        distill_updates: M, distillations after them.
        distill_noise: `normal`: as the policy was trained; `mixed`: a third each normal, uniform in the box, actor's.
        warmup: Decisions of all rows together with normal noise, before learning.
        decisions: Decisions of all rows together in an iteration (how often figures are reported).
        target_entropy: Of the action in [-1, 1]^d.
        alpha: First temperature; it should be small beside the rewards, or entropy is all that counts at the start.
        capacity: Of the replay buffer.
        offline_share: Share of each batch taken from recorded data, where given (`na` only).
    """

    variant: Literal["na", "sac"] = "na"
    noise_bound: float = 1.5
    noise_steps: int | None = None
    hidden: tuple[int, ...] = (2048, 2048, 2048)
    activation: Activation = "tanh"
    critics: int = 2
    lr: float = 3e-4
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    updates: int = 20
    distill_updates: int = 10
    distill_noise: Literal["normal", "mixed"] = "normal"
    warmup: int = 1500
    decisions: int = 25
    target_entropy: float = 0.0
    alpha: float = 1.0
    capacity: int = 1_000_000
    offline_share: float = 0.5


class DSRL(OffPolicy):
    """The learner; see `dipole.rl.learner.Learner`."""

    def __init__(self, setting: Setting, config: DSRLConfig) -> None:
        base, self.config, self.setting = setting.base, config, setting
        base.need_deterministic("dsrl")
        steps = base.pred_horizon if config.noise_steps is None else config.noise_steps
        if not 1 <= steps <= base.pred_horizon:
            raise DipoleError(f"noise_steps {steps}: the policy's chunk has {base.pred_horizon} positions")
        torch.manual_seed(setting.seed)
        self.noise_dim = steps * base.action_dim
        action_dim = base.action_horizon * base.action_dim
        features, hidden = base.feature_dim, config.hidden

        def critics(width: int) -> Critics:
            return Critics(features, width, hidden, config.critics, config.activation)

        self.actor = TanhGaussian(features, self.noise_dim, hidden, config.activation, layer_norm=True)
        self.temperature = Temperature(config.target_entropy, self.noise_dim, config.alpha)
        # `main` bootstraps: Q_A for na, Q of the noise for sac; the actor climbs `noise` (the same one for sac).
        main = critics(action_dim if config.variant == "na" else self.noise_dim)
        self.modules = nn.ModuleDict({"actor": self.actor, "temperature": self.temperature, "main": main})
        self.modules["target"] = copy.deepcopy(main).requires_grad_(False)
        learned = {"actor": self.actor, "temperature": self.temperature, "main": main}
        if config.variant == "na":
            learned["noise"] = self.modules["noise"] = critics(self.noise_dim)
        self.optimizers = {name: torch.optim.Adam(m.parameters(), lr=config.lr) for name, m in learned.items()}
        self.buffers = {"online": ReplayBuffer(config.capacity)}
        if setting.offline is not None and config.variant == "sac":
            raise DipoleError("dsrl with variant=sac learns from noise, which recorded data lack: use variant=na")
        self.offline = recorded(setting)
        self.values: dict[str, Any] = {"updates": 0, "vector_steps": 0}
        self.collector = setting.collector()

    def decide(self, features: Tensor, random: Generator) -> Decision:
        """Choose noise (normal during the warm-up), denoise it."""
        base = self.setting.base
        if self.values["vector_steps"] < self.config.warmup:
            noise = randn((len(features), self.noise_dim), random)
        else:
            with torch.no_grad():
                noise = self.config.noise_bound * self.actor(features, random)[0]
        chunk = self._denoise(features, noise, random)
        if not base.transparent and not torch.equal(chunk, self._denoise(features, noise, random)):
            raise DipoleError("the policy answers equal noise with different actions: dsrl needs a deterministic one")
        executed = base.executed(chunk)
        self.values["vector_steps"] += 1
        return Decision(base.physical(executed), {"action": executed.flatten(1), "noise": noise})

    def _denoise(self, features: Tensor, noise: Tensor, random: Generator | None = None) -> Tensor:
        base = self.setting.base
        return base.chunk(features, spread(noise, base.pred_horizon, base.action_dim), random)

    def learn(self) -> dict[str, float]:
        """Make the updates that follow a decision of all rows together."""
        figures: dict[str, float] = {}
        if self.config.variant == "na" and self.values["updates"] == 0:
            for _ in range(self.config.distill_updates):
                self.distil(self.batch())
        for _ in range(self.config.updates):
            batch = self.batch()
            figures |= self.update_critic(batch)
            figures |= self.update_actor(batch)
        if self.config.variant == "na":
            for _ in range(self.config.distill_updates):
                figures |= self.distil(self.batch())
        return figures

    def update_critic(self, batch: Groups) -> dict[str, float]:
        """Take a step of the soft Bellman error: of Q_A(s, a), or with `sac` of Q(s, w)."""
        config, main = self.config, self.modules["main"]
        with torch.no_grad():
            after = batch["next_features"]
            unit, log_prob = self.actor(after, self.random("critic"))
            noise = config.noise_bound * unit
            action = self._denoise(after, noise) if config.variant == "na" else noise
            if config.variant == "na":
                action = self.setting.base.executed(action).flatten(1)
            value = self.modules["target"](after, action).amin(0) - self.temperature.alpha * log_prob
            target = batch["reward"] + config.gamma * (~batch["terminated"]).float() * value
        taken = batch["action"] if config.variant == "na" else batch["noise"]
        q = main(batch["features"], taken)
        loss = 0.5 * (q - target).square().sum(0).mean()
        descend(loss, self.optimizers["main"])
        follow(self.modules["target"], main, config.tau)
        return {"critic_loss": float(loss.detach()), "q": float(q.detach().mean())}

    def update_actor(self, batch: Groups) -> dict[str, float]:
        """Take a step of the actor on the critic of the noise, and one of the temperature."""
        critic = self.modules["noise" if self.config.variant == "na" else "main"]
        unit, log_prob = self.actor(batch["features"], self.random("actor"))
        q = critic(batch["features"], self.config.noise_bound * unit).amin(0)
        descend((self.temperature.alpha * log_prob - q).mean(), self.optimizers["actor"])
        descend(self.temperature.loss(log_prob), self.optimizers["temperature"])
        return {"alpha": float(self.temperature.alpha), "entropy": -float(log_prob.detach().mean())}

    def distil(self, batch: Groups) -> dict[str, float]:
        """Take a step of Q_W(s, w) towards Q_A(s, pi(s, w)), head to head."""
        features = batch["features"]
        noise = self._distil_noise(features)
        with torch.no_grad():
            action = self.setting.base.executed(self._denoise(features, noise)).flatten(1)
            target = self.modules["main"](features, action)
        loss = 0.5 * (self.modules["noise"](features, noise) - target).square().sum(0).mean()
        descend(loss, self.optimizers["noise"])
        return {"distill_loss": float(loss.detach())}

    def _distil_noise(self, features: Tensor) -> Tensor:
        random = self.random("distil")
        noise = randn((len(features), self.noise_dim), random)
        if self.config.distill_noise == "mixed":
            third, bound = len(features) // 3, self.config.noise_bound
            noise[:third] = bound * (2 * torch.rand(third, self.noise_dim, generator=random) - 1)
            with torch.no_grad():
                noise[third : 2 * third] = bound * self.actor(features[third : 2 * third], random)[0]
        return noise

    def policy(self) -> Any:
        """Return the base with the actor's noise."""
        return SteeredPolicy.of(self.setting.base.policy, self.actor, self.config)


def make(setting: Setting, config: DSRLConfig) -> DSRL:
    """Return the learner."""
    return DSRL(setting, config)
