"""FIND: one Gaussian of initial noise per task, found by policy optimisation; the policy stays frozen.

Source: Chen et al., "FIND: Fine-tuning Initial Noise Distribution with Policy Optimization for Diffusion Models" (ACM
MM 2024), written from the equations. The action is the noise z ~ N(mu, s^2), the reward what its chunk earns:

    L = -mean min(rho A, clip(rho, 1 - c, 1 + c) A) + penalty,  rho = p_now(z) / p_drew(z),  A = r - g(mu, s, features)

g, the calibration, is regressed on rewards with the prior that drew each of them, and asked about the present prior:
so rewards of earlier priors, reused through rho, are calibrated for the present one.

Unlike the authors' code: the reference of rho is the prior a sample was drawn from (theirs: N(0, 1) for ever), the
clipping is PPO's (theirs stops the gradient where the advantage points back), and noise, reward and prior of a sample
stay together. Samplers must be deterministic. A prior knows no state: it cannot solve tasks in which the good mode
depends on it (see `dsrl`, of which this is the special case without a network).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from dipole.diffusion.tensors import randn
from dipole.errors import DipoleError
from dipole.rl.advantages import gae, normalise
from dipole.rl.buffers import Groups, ReplayBuffer
from dipole.rl.critics import mlp
from dipole.rl.directed import centred
from dipole.rl.experience import Decision, Rollout
from dipole.rl.learner import Setting, descend
from dipole.rl.normalized_gradient import DirectedOptimizer, preset
from dipole.rl.objectives import ppo_loss, ratio_figures
from dipole.rl.prior import NoisePrior, PriorPolicy
from dipole.training.seeding import generator


@dataclass(frozen=True)
class FINDConfig:
    """Settings of FIND.

    Attributes:
        decisions: Decisions per row and iteration.
        history: Iterations whose samples are reused, the present one included.
        updates: Steps of the prior per iteration.
        lr: Learning rate of the prior.
        clip: c.
        reduce: How log-densities of a chunk's noise are joined. Only with `sum` is rho a ratio of densities; with
            `mean` it stays near 1.
        penalty: Distance from the standard normal distribution: `kl`, or the authors' `squared` one.
        penalty_weight: Its weight, per component of noise.
        hidden: Hidden layers of the calibration.
        calibration_lr: Its learning rate.
        calibration_updates: Its steps per iteration.
        batch_size: Samples in each of these.
        gamma: Discount of a decision.
        direction: `adam`, or one step per iteration along a direction of `dipole.rl.normalized_gradient`, from its own
            samples alone.
        length: Length of the first such step.
    """

    decisions: int = 8
    history: int = 4
    updates: int = 4
    lr: float = 1e-2
    clip: float = 0.2
    reduce: Literal["sum", "mean"] = "sum"
    penalty: Literal["kl", "squared"] = "kl"
    penalty_weight: float = 1e-3
    hidden: tuple[int, ...] = (256, 256, 256)
    calibration_lr: float = 1e-3
    calibration_updates: int = 5
    batch_size: int = 256
    gamma: float = 0.99
    direction: Literal["adam", "npg", "npg-igt"] = "adam"
    length: float = 0.3

    def __post_init__(self) -> None:
        for name in ("decisions", "history", "updates"):
            if getattr(self, name) < 1:
                raise DipoleError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.clip <= 0:
            raise DipoleError(f"clip is {self.clip:g}: it must be positive")


class Calibration(nn.Module):
    """g(mu, s, features), in units of the rewards seen: what noise of a prior is worth at an observation."""

    centre: Tensor
    scale: Tensor

    def __init__(self, dim: int, feature_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = mlp([2 * dim + feature_dim, *hidden, 1])
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, reward: Tensor) -> bool:
        """Take the rewards' mean and standard deviation for units; return whether they differ beyond rounding."""
        std = reward.std(correction=0)
        differ = bool(std > 1e-5 * reward.abs().max())
        self.centre.copy_(reward.mean())
        self.scale.copy_(std if differ else torch.ones(()))
        return differ

    def standard(self, reward: Tensor) -> Tensor:
        """Return rewards in these units."""
        return (reward - self.centre) / self.scale

    def forward(self, prior: Tensor, features: Tensor) -> Tensor:
        """Return values `[n]`, in these units, for priors `[n, 2 d]` (mean, log std) and features `[n, F]`."""
        value: Tensor = self.net(torch.cat([prior, features], dim=1))
        return value.squeeze(1)


class PriorSearch:
    """The optimisation itself, without environments: draw noise, be told its reward.

    Args:
        dim: d.
        feature_dim: F, which may be 0.
        batch: Samples per iteration.
        config: Settings.
        seed: Of everything random.
    """

    def __init__(self, dim: int, feature_dim: int, batch: int, config: FINDConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.config, self.seed = config, seed
        self.prior, self.calibration = NoisePrior(dim), Calibration(dim, feature_dim, config.hidden)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "prior": torch.optim.Adam(self.prior.parameters(), lr=config.lr)
            if config.direction == "adam"
            else DirectedOptimizer(self.prior.parameters(), preset(config.direction, length=config.length)),
            "calibration": torch.optim.AdamW(self.calibration.parameters(), lr=config.calibration_lr),
        }
        self.batch = batch
        self.history = ReplayBuffer(batch * (config.history if config.direction == "adam" else 1))

    @torch.no_grad()
    def draw(self, count: int, random: Generator) -> Groups:
        """Return noise `[n, d]`, and what has to be kept with it."""
        noise = self.prior(randn((count, self.prior.mean.numel()), random))
        log_prob = self.prior.log_prob(noise, self.config.reduce)
        return {"noise": noise, "log_prob": log_prob, "prior": self._present(count)}

    @torch.no_grad()
    def _present(self, count: int) -> Tensor:
        return torch.cat([self.prior.mean, self.prior.std.log()]).expand(count, -1).clone()

    @torch.no_grad()
    def value(self, features: Tensor) -> Tensor:
        """Return g of the present prior, in units of the reward."""
        calibration = self.calibration
        value: Tensor = calibration.centre + calibration.scale * calibration(self._present(len(features)), features)
        return value

    def learn(self, drawn: Groups, features: Tensor, reward: Tensor, iteration: int) -> dict[str, float]:
        """Learn from noise that was drawn and the reward `[n]` it earned at features `[n, F]`."""
        self.history.add({**drawn, "features": features, "reward": reward})
        samples = self.history.state()
        differ = self.calibration.fit(samples["reward"])
        figures = {"calibration_error": self._calibrate(iteration)}
        with torch.no_grad():
            worth = self.calibration(self._present(len(samples["reward"])), samples["features"])
            advantage = normalise(self.calibration.standard(samples["reward"]) - worth)
        steps = self.config.updates if self.config.direction == "adam" else 1
        for _ in range(steps if differ else 0):  # equal rewards say nothing about the noise
            figures |= self._step(samples, advantage)
        with torch.no_grad():
            figures |= {"prior_kl": float(self.prior.kl()), "prior_std": float(self.prior.std.mean())}
        return figures

    def _step(self, samples: Groups, advantage: Tensor) -> dict[str, float]:
        config, prior = self.config, self.prior
        log_prob = prior.log_prob(samples["noise"], config.reduce)
        loss = ppo_loss(log_prob, samples["log_prob"], advantage, config.clip)
        penalty = (prior.kl() if config.penalty == "kl" else prior.distance()) / prior.mean.numel()
        norm = descend(loss + config.penalty_weight * penalty, self.optimizers["prior"])
        return {**ratio_figures(log_prob, samples["log_prob"], config.clip), "grad_norm": norm}

    def _calibrate(self, iteration: int) -> float:
        errors = []
        for step in range(self.config.calibration_updates):
            chosen = self.history.sample(self.config.batch_size, generator(self.seed, "calibration", iteration, step))
            value = self.calibration(chosen["prior"], chosen["features"])
            error = (value - self.calibration.standard(chosen["reward"])).square().mean()
            descend(error, self.optimizers["calibration"])
            errors.append(float(error.detach()))
        return sum(errors) / max(1, len(errors))

    def found(self) -> NoisePrior:
        """Return the prior to deploy."""
        prior = centred(self.prior, self.optimizers["prior"])
        assert isinstance(prior, NoisePrior)
        return prior


class FIND:
    """The learner; see `dipole.rl.learner.Learner`.

    A decision's reward is its discounted return, with g beyond the end of a rollout or a time limit. Samples of earlier
    iterations keep the return that followed them then.
    """

    def __init__(self, setting: Setting, config: FINDConfig) -> None:
        base, self.config, self.setting = setting.base, config, setting
        base.need_deterministic("find")
        self.search = PriorSearch(
            base.pred_horizon * base.action_dim,
            base.feature_dim,
            config.decisions * setting.num_envs,
            config,
            setting.seed,
        )
        self.modules = nn.ModuleDict({"prior": self.search.prior, "calibration": self.search.calibration})
        self.optimizers = self.search.optimizers
        self.buffers = {"history": self.search.history}
        self.values: dict[str, Any] = {}
        self.collector = setting.collector()

    def decide(self, features: Tensor, random: Generator) -> Decision:
        """Draw noise from the prior and denoise it."""
        base, drawn = self.setting.base, self.search.draw(len(features), random)
        noise = drawn["noise"].view(-1, base.pred_horizon, base.action_dim)
        return Decision(base.physical(base.executed(base.chunk(features, noise, random))), drawn)

    def iterate(self, iteration: int) -> dict[str, float]:
        """Collect `decisions` per row and learn."""
        rollout = self.collector.collect(self.decide, self.config.decisions)
        drawn = {key: value.flatten(0, 1) for key, value in rollout.data.items()}
        return self.search.learn(drawn, rollout.features.flatten(0, 1), self.returns(rollout).flatten(), iteration)

    @torch.no_grad()
    def returns(self, rollout: Rollout) -> Tensor:
        """Return `[T, N]`: the discounted reward from each decision on."""
        shape = rollout.reward.shape
        value = self.search.value(rollout.features.flatten(0, 1)).view(shape)
        after = self.search.value(rollout.next_features.flatten(0, 1)).view(shape)
        ends = (rollout.terminated, rollout.truncated)
        return gae(rollout.reward, value, after, *ends, self.config.gamma, 1.0)[1]

    def policy(self) -> Any:
        """Return the base with the prior's noise."""
        return PriorPolicy.of(self.setting.base.policy, copy.deepcopy(self.search.found()))


def make(setting: Setting, config: FINDConfig) -> FIND:
    """Return the learner."""
    return FIND(setting, config)
