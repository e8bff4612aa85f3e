"""Search for the weights of a composed policy in the environment: successive halving on common seeds.

All weights are tried on the same episodes, so that luck with the episodes cancels; the worse half is given up and the
rest goes on to further ones. Weights are chosen on seeds of `SELECT_SEED`; the maximum of many noisy rates flatters, so
what is reported comes from evaluation seeds that the search never saw (spec c4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipole.envs.seeds import EVAL_SEED, SELECT_SEED
from dipole.envs.spec import VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.compare import Comparison, compare
from dipole.evaluation.episode import Episode
from dipole.evaluation.evaluate import Evaluation, evaluate
from dipole.evaluation.rollout import rollout

Weights = tuple[float, ...]
Progress = Callable[[Episode], None]


@dataclass(frozen=True)
class WeightSearch:
    """How weights are searched.

    Attributes:
        divisions: The grid: all weights that are multiples of 1 / divisions.
        first: Episodes of every weight in the first round.
        rounds: Rounds; each doubles the episodes of those that are left.
        keep: Share that goes on to the next round.
        seed: First seed of the episodes.
    """

    divisions: int = 10
    first: int = 20
    rounds: int = 3
    keep: float = 0.5
    seed: int = SELECT_SEED

    def __post_init__(self) -> None:
        if min(self.divisions, self.first, self.rounds) < 1 or not 0 < self.keep <= 1:
            raise DipoleError(
                "weight search: divisions, first episodes and rounds must be at least 1, keep in (0, 1]: "
                f"got {self.divisions}, {self.first}, {self.rounds}, {self.keep:g}"
            )
        if self.seed < EVAL_SEED < self.seed + self.most:
            raise DipoleError(f"{self.most} episodes per weight reach into the evaluation seeds: lower first or rounds")

    @property
    def most(self) -> int:
        """Return the episodes of a weight that is left in the last round."""
        return int(self.first * 2 ** (self.rounds - 1))


@dataclass(frozen=True)
class Trial:
    """What was seen of one choice of weights: the mean score of its episodes, which are the first of the search's."""

    weights: Weights
    score: float
    episodes: int
    success: float


@dataclass(frozen=True)
class SearchResult:
    """The outcome.

    Attributes:
        best: The weights with the best score among those tried longest; of equals, the most even.
        best_parent: The parent that is best on the same episodes, by number.
        trials: All weights, in the order of the grid.
        episodes: Episodes run in all.
        config: The search.
    """

    best: Weights
    best_parent: int
    trials: tuple[Trial, ...]
    episodes: int
    config: WeightSearch


def grid(parents: int, divisions: int) -> list[Weights]:
    """Return all weights of `parents` parents that are multiples of 1 / divisions and sum to 1."""
    found = []
    for bars in itertools.combinations(range(divisions + parents - 1), parents - 1):
        edges = (-1, *bars, divisions + parents - 1)
        found.append(tuple((b - a - 1) / divisions for a, b in itertools.pairwise(edges)))
    return found[::-1]


def one_hot(parents: int, parent: int) -> Weights:
    """Return all the weight on one parent."""
    return tuple(float(i == parent) for i in range(parents))


def planned(config: WeightSearch, parents: int) -> int:
    """Return how many episodes a search takes."""
    left, total, done = math.comb(config.divisions + parents - 1, parents - 1), 0, 0
    for k in range(config.rounds):
        wanted = config.first * 2**k
        total += left * (wanted - done)
        done = wanted
        left = _survivors(left - parents, config.keep) + parents
    return total


def _survivors(mixtures: int, keep: float) -> int:
    """Return how many mixtures go on; the parents always do, to be known as well as what is to beat them."""
    return max(1, math.ceil(mixtures * keep)) if mixtures > 0 else 0


def search_weights(
    policy: Any,
    env: VectorEnv,
    config: WeightSearch | None = None,
    *,
    max_steps: int | None = None,
    block: int = 16,
    progress: Progress | None = None,
) -> SearchResult:
    """Search the weights of a composed policy.

    Args:
        policy: A `ComposedPolicy`.
        env: The environment, already made; it is not closed.
        config: How.
        max_steps: Longest episode; default the environment's.
        block: Rows per call of the policy (see `rollout`).
        progress: Called with each finished episode.

    Raises:
        DipoleError: Policy and environment do not fit.
    """
    config = WeightSearch() if config is None else config
    parents = len(policy.weights)
    every = grid(parents, config.divisions)
    corners = [one_hot(parents, i) for i in range(parents)]
    seen: dict[Weights, list[Episode]] = {weights: [] for weights in every}
    left = list(every)
    for k in range(config.rounds):
        done, wanted = len(seen[left[0]]), config.first * 2**k
        seeds = range(config.seed + done, config.seed + wanted)
        for weights in left:
            chosen = policy.with_weights(weights)
            runs = rollout(chosen, env, seeds, block=block, max_steps=max_steps, progress=progress)
            seen[weights] += runs.episodes
        ranked = _ranked(left, seen, env)
        if k + 1 < config.rounds:
            mixtures = [weights for weights in ranked if weights not in corners]
            best = {*mixtures[: _survivors(len(mixtures), config.keep)], *corners}
            left = [weights for weights in every if weights in best]
    trials = tuple(
        Trial(
            weights,
            float(_scores(seen[weights], env).mean()),
            len(seen[weights]),
            float(np.mean([episode.success for episode in seen[weights]])),
        )
        for weights in every
    )
    best_corner = next(weights for weights in ranked if weights in corners)
    total = sum(trial.episodes for trial in trials)
    return SearchResult(ranked[0], corners.index(best_corner), trials, total, config)


def _scores(episodes: Sequence[Episode], env: VectorEnv) -> np.ndarray:
    name = {"success": "success", "max_reward": "max_reward", "return": "return_"}[env.spec.score]
    return np.array([float(getattr(episode, name)) for episode in episodes])


def _ranked(left: Sequence[Weights], seen: dict[Weights, list[Episode]], env: VectorEnv) -> list[Weights]:
    """Return weights by falling score; of equals the most even first, whose neighbours are likeliest to be as good."""
    return sorted(left, key=lambda w: (-_scores(seen[w], env).mean(), max(w) - min(w), w))


@dataclass(frozen=True)
class Verdict:
    """Composition and parents on the same held-out episodes.

    Attributes:
        composed: The composition.
        parents: Each parent alone.
        comparison: The parent that the search found best (A) against the composition (B).
        against: Number of that parent.
    """

    composed: Evaluation
    parents: tuple[Evaluation, ...]
    comparison: Comparison
    against: int


def judge(
    policy: Any,
    env: VectorEnv,
    best_parent: int | None,
    episodes: int,
    seed: int = EVAL_SEED,
    *,
    max_steps: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Evaluate a composed policy and its parents on evaluation seeds.

    Args:
        policy: The composed policy, with the weights to judge.
        env: The environment.
        best_parent: The parent to compare with, chosen without these episodes; None: the best on them, which favours
            the parent.
        episodes: How many.
        seed: Their first seed.
        max_steps: Longest episode.
        progress: Called with each finished episode.

    Raises:
        DipoleError: The seeds are not those of evaluations.
    """
    if seed < EVAL_SEED:
        raise DipoleError(f"seed {seed} may have been searched on: judge on seeds from {EVAL_SEED}")

    def run(chosen: Any) -> Evaluation:
        return evaluate(chosen, env, episodes, seed, max_steps=max_steps, latency_calls=0, progress=progress)

    composed = run(policy)
    parents = tuple(run(policy.alone(i)) for i in range(len(policy.weights)))
    against = int(np.argmax([each.score.value for each in parents])) if best_parent is None else best_parent
    return Verdict(composed, parents, compare(parents[against], composed), against)
