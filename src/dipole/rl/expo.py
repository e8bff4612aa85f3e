"""EXPO: a base policy that goes on imitating, edits that climb the critic, and the best of both chosen on the fly.

Source: Dong et al., "EXPO: Stable Reinforcement Learning with Expressive Policies" (2025). Acting and the TD target
both use OTF(s): sample N chunks of the base, edit each, take the one the critics value most. The base is never
differentiated through the critic.

Unlike the authors' later code: all N samples are edited (2N candidates, as in the paper), and the entropy target is
that of the unscaled edit, which can be reached for every edit scale (the released one cannot for small scales).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from dipole.errors import DipoleError
from dipole.rl.actors import TanhGaussian
from dipole.rl.buffers import Groups, ReplayBuffer
from dipole.rl.critics import Critics, follow
from dipole.rl.edited import EditedPolicy, candidates, edited_config, values
from dipole.rl.experience import Decision
from dipole.rl.learner import Setting, descend
from dipole.rl.objectives import Temperature
from dipole.rl.off_policy import OffPolicy, recorded
from dipole.rl.wrapped import with_network


@dataclass(frozen=True)
class EXPOConfig:
    """Settings of EXPO; the defaults are the authors'.

    Attributes:
        samples: N.
        edit_scale: beta: edits lie in [-beta, beta] in normalised units; 0 for none (best of N).
        target_samples: N in the TD target; None for the same; with 1 and no edits it is SARSA on the base.
        separate_pairs: Value the chosen action with another random pair of heads than it was chosen with.
        edit_actions: Which actions the edit learns on: of the batch (`replay`) or fresh samples (`fresh`).
        hidden: Hidden layers of edit actor and critics.
        critics: Heads.
        pair: Heads whose smallest value counts.
        lr: Learning rate of everything.
        batch_size: Transitions per update.
        gamma: Discount of a decision.
        tau: Step of the target critics, and of the averaged base that acts.
        base_tau: Step of that average.
        updates: G, critic updates in a round; then one update of base and edit.
        rounds: Per decision of all rows together. The authors have one row: as many rounds as rows are theirs.
        warmup: Decisions of all rows together before learning.
        warmup_actions: Taken meanwhile: the base's, or uniform in the environment's bounds.
        decisions: Decisions of all rows together in an iteration.
        target_entropy: Of the unscaled edit; None for -d/2.
        alpha: First temperature.
        capacity: Of the replay buffer.
        offline_share: Share of each batch taken from recorded data, where given.
    """

    samples: int = 8
    edit_scale: float = 0.15
    target_samples: int | None = None
    separate_pairs: bool = False
    edit_actions: Literal["replay", "fresh"] = "replay"
    hidden: tuple[int, ...] = (256, 256, 256)
    critics: int = 10
    pair: int = 2
    lr: float = 3e-4
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005
    base_tau: float = 0.001
    updates: int = 20
    rounds: int = 1
    warmup: int = 5000
    warmup_actions: Literal["base", "uniform"] = "uniform"
    decisions: int = 100
    target_entropy: float | None = None
    alpha: float = 1.0
    capacity: int = 1_000_000
    offline_share: float = 0.5


class EXPO(OffPolicy):
    """The learner; see `dipole.rl.learner.Learner`."""

    def __init__(self, setting: Setting, config: EXPOConfig) -> None:
        base, self.setting, self.config = setting.base, setting, config
        if not hasattr(base.policy, "objective"):
            raise DipoleError("expo keeps training the base policy, which this one does not allow: use dsrl or resip")
        torch.manual_seed(setting.seed)
        d = base.action_horizon * base.action_dim
        network = copy.deepcopy(base.policy.network).requires_grad_(True)
        average = copy.deepcopy(network).eval().requires_grad_(False)
        self.edit = TanhGaussian(base.feature_dim + d, d, config.hidden)
        self.critics = Critics(base.feature_dim, d, config.hidden, config.critics)
        entropy = -d / 2 if config.target_entropy is None else config.target_entropy
        self.temperature = Temperature(entropy, d, config.alpha)
        learned = {"base": network, "edit": self.edit, "critics": self.critics, "temperature": self.temperature}
        self.modules = nn.ModuleDict({**learned, "average": average})
        self.modules["target"] = copy.deepcopy(self.critics).requires_grad_(False)
        self.optimizers = {name: torch.optim.Adam(m.parameters(), lr=config.lr) for name, m in learned.items()}
        self.online = base.with_policy(with_network(base.policy, network))
        self.acting = base.with_policy(with_network(base.policy, average))
        self.buffers = {"online": ReplayBuffer(config.capacity)}
        self.offline = recorded(setting, chunks=True)
        self.values: dict[str, Any] = {"updates": 0, "vector_steps": 0}
        self.collector = setting.collector()

    def heads(self, random: Generator) -> Tensor:
        """Return a random pair of heads."""
        return torch.randperm(self.config.critics, generator=random)[: self.config.pair]

    @torch.no_grad()
    def choose(self, features: Tensor, random: Generator, acting: bool) -> tuple[Tensor, Tensor]:
        """Return OTF(s): the chosen chunk `[n, Tp, Da]` (edited where executed) and its value `[n]`.

        Args:
            features: `[n, F]`.
            random: Source of randomness.
            acting: Sample from the averaged base (to act) or from the present one (for the TD target).
        """
        config, base = self.config, self.setting.base
        count = config.samples if acting or config.target_samples is None else config.target_samples
        source = self.acting if acting else self.online
        chunk = source.chunk(features.repeat_interleave(count, 0), generator=random)
        sampled = base.executed(chunk).reshape(len(features), count, -1)
        edits = config.edit_scale > 0 and (acting or config.target_samples != 1)
        offered = candidates(features, sampled, (lambda f, a: self.edited(f, a, random)[0]) if edits else None)
        heads = self.heads(random)
        value = values(self.modules["target"], features, offered, heads)
        best, rows = value.argmax(1), torch.arange(len(features))
        action = offered[rows, best]
        chosen = chunk.view(len(features), count, *chunk.shape[1:])[rows, best % count].clone()
        base.executed(chosen)[:] = action.view(len(features), base.action_horizon, -1)
        if config.separate_pairs:
            value = values(self.modules["target"], features, action[:, None], self.heads(random))
            return chosen, value[:, 0]
        return chosen, value[rows, best]

    def edited(self, features: Tensor, action: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
        """Return edits `[m, d]` of actions, and the log-probability of the unscaled ones `[m]`."""
        unit, log_prob = self.edit(torch.cat([features, action], dim=1), random)
        return self.config.edit_scale * unit, log_prob

    def decide(self, features: Tensor, random: Generator) -> Decision:
        """Act with OTF; during the warm-up as configured."""
        base, config = self.setting.base, self.config
        warm = self.values["vector_steps"] < config.warmup
        self.values["vector_steps"] += 1
        if not warm:
            chunk, _ = self.choose(features, random, acting=True)
        elif config.warmup_actions == "base":
            chunk = self.acting.chunk(features, generator=random)
        else:
            low, high = (torch.as_tensor(end) for end in (base.spec.action_low, base.spec.action_high))
            unit = torch.rand(len(features), base.pred_horizon, base.action_dim, generator=random)
            chunk = base.normalised(low + unit * (high - low))
        executed = base.executed(chunk)
        return Decision(base.physical(executed), {"action": executed.flatten(1), "chunk": chunk})

    def learn(self) -> dict[str, float]:
        """Make the updates that follow a decision of all rows together."""
        figures: dict[str, float] = {}
        for _ in range(self.config.rounds):
            for _ in range(self.config.updates):
                batch = self.batch()
                figures |= self.update_critics(batch)
            figures |= self.update_base(batch)
            if self.config.edit_scale > 0:
                figures |= self.update_edit(batch)
        return figures

    def update_critics(self, batch: Groups) -> dict[str, float]:
        """Take a step of the Bellman error with OTF in the target; there is no entropy in it."""
        _, value = self.choose(batch["next_features"], self.random("critic"), acting=False)
        target = batch["reward"] + self.config.gamma * (~batch["terminated"]).float() * value
        q = self.critics(batch["features"], batch["action"])
        loss = (q - target).square().mean()
        descend(loss, self.optimizers["critics"])
        follow(self.modules["target"], self.critics, self.config.tau)
        return {"critic_loss": float(loss.detach()), "q": float(q.detach().mean())}

    def update_base(self, batch: Groups) -> dict[str, float]:
        """Take a step of imitation of the batch's chunks."""
        policy, base = self.online.policy, self.setting.base
        random = self.random("base")
        loss = policy.objective(policy.network, batch["chunk"], base.cond(batch["features"]), generator=random)
        descend(loss, self.optimizers["base"])
        follow(self.modules["average"], self.modules["base"], self.config.base_tau)
        return {"base_loss": float(loss.detach())}

    def update_edit(self, batch: Groups) -> dict[str, float]:
        """Take a step of the edit actor on the mean over all critics, and one of the temperature."""
        random, features, action = self.random("edit"), batch["features"], batch["action"]
        if self.config.edit_actions == "fresh":
            action = self.setting.base.executed(self.online.chunk(features, generator=random)).flatten(1)
        edit, log_prob = self.edited(features, action, random)
        q = self.critics(features, action + edit).mean(0)
        descend((self.temperature.alpha * log_prob - q).mean(), self.optimizers["edit"])
        descend(self.temperature.loss(log_prob), self.optimizers["temperature"])
        return {"alpha": float(self.temperature.alpha), "entropy": -float(log_prob.detach().mean())}

    def policy(self) -> Any:
        """Return the averaged base with edits and critics."""
        base = self.acting.policy
        config = edited_config(base, self.setting.base.feature_dim, self.config)
        return EditedPolicy.of(base, self.edit, self.modules["target"], config)


def make(setting: Setting, config: EXPOConfig) -> EXPO:
    """Return the learner."""
    return EXPO(setting, config)
