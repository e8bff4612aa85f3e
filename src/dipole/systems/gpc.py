"""GPC: two imperfect policies, mixed at the level of their scores, are better than either.

Source: Cao et al., "Compose Your Policies! Improving Diffusion-based or Flow-based Robot Policies via Test-time
Distribution-level Composition" (arXiv 2510.01068). In `micro/fork2d` demonstrations pass a disc on either side: the
mean of two good actions hits it, the mean of two good scores does not. Each parent sees its own half of few
demonstrations. The parents of the claims are alike, two diffusion policies, as in the paper's tables and in the spec's
surrogate: equal faults, found independently. A diffusion policy and a flow, composed at equal log-SNR, are the other
pair; with so few updates the flow is far ahead, where the paper expects no gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dipole.data import Windows
from dipole.diffusion.tensors import Random, randn
from dipole.envs import collect, make
from dipole.envs.seeds import COLLECT_SEED
from dipole.evaluation.weight_search import WeightSearch, search_weights
from dipole.networks import MLPConfig, full_config
from dipole.policies import ProcessConfig, SamplerConfig, make_config, make_policy
from dipole.policies.composed import compose
from dipole.policies.config import default_objective
from dipole.policies.policy import Observation, State
from dipole.serialization import to_dict
from dipole.systems.card import Card, Claim, Margin, Source
from dipole.systems.experiment import listed, play, rate, train
from dipole.systems.gpc_checks import checks
from dipole.systems.run import Run
from dipole.training.config import TrainConfig

CARD = Card(
    name="gpc",
    title="GPC: composing policies at test time",
    source=Source("General Policy Composition", 2025, "2510.01068"),
    axis="guidance",
    summary=(
        "The scores of several diffusion or flow policies are mixed with weights that are searched in the environment; "
        "nothing is trained. AND and OR of superposition mix by how likely a chunk is under each parent."
    ),
    claim="Average of Robomimic and PushT 86.4 against 78.8 of the better parent; no gain where one is far behind.",
    spec_section="c4",
)

ENV = "micro/fork2d"
SEEDS = (0, 1, 2)
DEMONSTRATIONS = 12  # of each parent
EPISODES = 1000
NETWORK = MLPConfig(width=128, num_blocks=2, context_width=64)
TRAINING: dict[str, Any] = {"steps": 1500, "batch_size": 64, "lr": 1e-3, "ema_decay": 0.995, "precision": "fp32"}
SAMPLER = SamplerConfig("ddim", 10, clip=1.0)
SEARCH = WeightSearch(divisions=10, first=50, rounds=3)
DIFFUSION, FLOW = ProcessConfig("vp-cosine", num_steps=100), ProcessConfig("flow")
# Chosen by what the parents can do alone: a diffusion policy reaches 0.74 to 0.81, a flow 0.99 and leaves no room.
PAIRS = {"alike": (DIFFUSION, DIFFUSION), "mixed": (DIFFUSION, FLOW)}


class _Parents(nn.Module):
    """A baseline made of whole chunks of the parents, not of their scores."""

    def __init__(self, parents: Sequence[Any]) -> None:
        super().__init__()
        self.parents, first = nn.ModuleList(parents), parents[0]
        self.config, self.action_dim = first.config, first.action_dim
        self.obs_horizon, self.pred_horizon = first.obs_horizon, first.pred_horizon
        self.action_horizon = first.action_horizon

    def initial_state(self, batch: int) -> State:
        """Return an empty state."""
        return {}

    def reset(self, state: State, mask: Tensor) -> State:
        """Return an empty state."""
        return {}

    def chunks(self, obs: Observation, noise: Tensor | None, generator: Random) -> Tensor:
        """Return the parents' chunks `[M, B, Ta, Da]`."""
        parents: Sequence[Any] = list(self.parents)
        return torch.stack([parent.act(obs, {}, noise, generator)[0] for parent in parents])


class AveragedActions(_Parents):
    """The mean of the parents' actions."""

    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk, state)`."""
        return self.chunks(obs, noise, generator).mean(0), state


class RandomParent(_Parents):
    """The chunk of one of two parents, drawn anew for every chunk."""

    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk, state)`."""
        first, second = self.chunks(obs, noise, generator)
        heads = randn((len(first), 1, 1), generator, like=first) > 0
        return torch.where(heads, first, second), state


def train_parents(pair: str, seed: int) -> list[Any]:
    """Return the two policies of `PAIRS`, each trained on its own half of the demonstrations.

    Normalised with the statistics of all of them: parents in different units cannot be composed.
    """
    episodes = collect(ENV, 2 * DEMONSTRATIONS, seed=COLLECT_SEED + 1000 * seed)
    parents = []
    for k, process in enumerate(PAIRS[pair]):
        torch.manual_seed(10 * seed + k)
        config = make_config(
            episodes,
            network=full_config(NETWORK),
            process=process,
            objective=default_objective(process),
            sampler=SAMPLER,
        )
        half = episodes.select(list(range(k * DEMONSTRATIONS, (k + 1) * DEMONSTRATIONS)))
        horizons = config.obs_horizon, config.pred_horizon, config.action_horizon
        windows = Windows(half, list(config.observation), "action", *horizons)
        parents.append(train(make_policy(config, episodes), windows, TrainConfig(seed=seed, **TRAINING)))
    return parents


def experiment(pair: str, seed: int) -> dict[str, Any]:
    """Train two parents, search the weights, and let everybody drive on episodes the search never saw."""
    parents = train_parents(pair, seed)
    policy = compose(parents, sampler=SAMPLER)
    env = make(ENV, num_envs=SEARCH.first)
    try:
        found = search_weights(policy, env, SEARCH, block=SEARCH.first)
    finally:
        env.close()

    def success(chosen: Any) -> float:
        return float(play(chosen, ENV, EPISODES).column("success").mean())

    alone = [success(policy.alone(i)) for i in range(2)]
    return {
        "weight": found.best[0],
        "composed": success(policy.with_weights(found.best)),
        "even": success(policy.with_weights((0.5, 0.5))),
        "alone": alone,
        "validated": alone[found.best_parent],
        "averaged": success(AveragedActions(parents)),
        "random": success(RandomParent(parents)),
        "and": success(compose(parents, sampler=SAMPLER, operator="and")),
        "or": success(compose(parents, sampler=SAMPLER, operator="or")),
        "curve": [[trial.weights[0], trial.score] for trial in found.trials],
    }


def small(run: Run) -> list[Claim]:
    """Compose three pairs of parents that are alike, and three that are not."""
    settings = {"demonstrations": DEMONSTRATIONS, "training": TRAINING, "search": to_dict(SEARCH), "episodes": EPISODES}
    found = run.grid(tuple(PAIRS), SEEDS, settings, experiment)
    for pair, parts in found.items():
        with run.plot(f"search-{pair}") as axes:
            for seed, part in zip(SEEDS, parts, strict=True):
                axes.plot(*zip(*part["curve"], strict=True), ".-", label=f"seed {seed}")
            axes.set_xlabel("weight of the first parent")
            axes.set_ylabel("success (validation)")
            axes.legend()
    return _alike(found["alike"]) + _mixed(found["mixed"])


def _values(parts: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [part[name] for part in parts]


def _alike(parts: Sequence[dict[str, Any]]) -> list[Claim]:
    values = partial(_values, parts)
    best = [max(part["alone"]) for part in parts]
    weights = "weights of the first parent " + ", ".join(f"{weight:g}" for weight in values("weight"))
    composed = rate(values("composed"))
    return [
        Claim(
            "composition beats the parent chosen by validation",
            "+2 to +5 points (surrogate of the spec)",
            composed,
            rate(values("validated")),
            Margin("difference", low=0.02),
            f"{weights}; {EPISODES} held-out episodes; {listed(values('composed'))}",
        ),
        Claim(
            "composition against the better parent in hindsight",
            "+7.55 (Robomimic, PushT)",
            composed,
            rate(best),
            Margin("difference", low=0.0),
            "baseline chosen on the held-out episodes themselves; " + listed(best),
        ),
        Claim(
            "averaging actions fails where there are two ways",
            "composition is better",
            composed,
            rate(values("averaged")),
            Margin("difference", low=0.1),
            listed(values("averaged")),
        ),
        Claim("against a random parent per chunk", "", composed, rate(values("random")), Margin("difference", low=0.0)),
        Claim("even weights, no search", "", rate(values("even")), rate(values("validated")), None),
        Claim("AND of both", "", rate(values("and")), composed, None, "baseline: convex; one probe, 10 steps"),
        Claim("OR of both", "", rate(values("or")), composed, None, "baseline: convex; one probe, 10 steps"),
    ]


def _mixed(parts: Sequence[dict[str, Any]]) -> list[Claim]:
    """A diffusion parent far behind a flow."""
    first, second = ([part["alone"][i] for part in parts] for i in range(2))
    weights = "weights of the diffusion parent " + ", ".join(f"{weight:g}" for weight in _values(parts, "weight"))
    parents = f"parents alone {rate(first).value:.3f} (diffusion) and {rate(second).value:.3f} (flow)"
    return [
        Claim(
            "diffusion and flow, one far behind: composition against the parent chosen by validation",
            "no gain (finding 2)",
            rate(_values(parts, "composed")),
            rate(_values(parts, "validated")),
            None,
            f"{weights}; {parents}",
        )
    ]


def ci(run: Run) -> list[Claim]:
    """Check the identities of the spec."""
    return checks()


TIERS = {"ci": ci, "small": small}
