"""Successive halving finds the best weights of a policy whose score is known, and never looks at evaluation seeds."""

import numpy as np
import pytest
import torch

from dipole.data import Feature
from dipole.envs.seeds import EVAL_SEED, SELECT_SEED
from dipole.envs.spec import EnvSpec, StepResult
from dipole.errors import DipoleError
from dipole.evaluation.weight_search import WeightSearch, grid, judge, planned, search_weights

VECTOR = Feature("float32", (1,))


class Lottery:
    """One step per episode; it succeeds if the action exceeds a number in [0, 1) that the seed draws."""

    def __init__(self, num_envs=8):
        low, high = np.array([-2.0], np.float32), np.array([2.0], np.float32)
        self.spec = EnvSpec("lottery", {"observation.state": VECTOR}, VECTOR, low, high, 1, 10.0, "", "success")
        self.num_envs, self.seeds, self.used = num_envs, np.zeros(num_envs, int), []

    def reset(self, rows, seeds):
        self.used += list(seeds)
        self.seeds[list(rows)] = seeds
        return {"observation.state": np.zeros((len(rows), 1), np.float32)}

    def step(self, actions, rows):
        luck = np.array([np.random.default_rng(seed).uniform() for seed in self.seeds[list(rows)]])
        win, done = actions[:, 0] > luck, np.ones(len(rows), bool)
        obs = {"observation.state": np.zeros((len(rows), 1), np.float32)}
        return StepResult(obs, win.astype(np.float32), done, ~done, win, [{} for _ in rows])

    def close(self):
        pass


class Peaked:
    """Acts by its weights alone: best at `peak` on the first one."""

    obs_horizon = pred_horizon = action_horizon = action_dim = 1

    def __init__(self, weights, peak):
        self.weights, self.peak = weights, peak

    def with_weights(self, weights):
        return Peaked(weights, self.peak)

    def alone(self, parent):
        return self.with_weights(tuple(float(i == parent) for i in range(2)))

    def initial_state(self, batch):
        return {}

    def reset(self, state, mask):
        return state

    def act(self, obs, state, noise=None, generator=None):
        value = 0.9 - abs(self.weights[0] - self.peak)
        return torch.full((len(obs["observation.state"]), 1, 1), value), state


def test_grid_holds_all_multiples_and_the_parents():
    assert grid(2, 4) == [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    three = grid(3, 3)
    assert len(three) == len(set(three)) == 10
    assert all(sum(weights) == pytest.approx(1) for weights in three)
    assert {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)} <= set(three)


@pytest.mark.parametrize("peak", [0.3, 0.8, 1.0])
def test_the_best_weights_are_found_on_common_seeds(peak):
    env = Lottery()
    found = search_weights(Peaked((0.5, 0.5), peak), env, WeightSearch(10, 10, 3))
    # Episodes are common, so that a larger action never scores less: only ties can move the answer by a step.
    assert found.best[0] == pytest.approx(peak, abs=0.1001)
    assert found.best_parent == (0 if peak >= 0.5 else 1)
    assert found.episodes == len(env.used) == planned(WeightSearch(10, 10, 3), 2)
    assert set(env.used) == set(range(SELECT_SEED, SELECT_SEED + 40))
    tried = {trial.weights: trial.episodes for trial in found.trials}
    # half of 9 mixtures, then half of those; the parents always go on
    assert sorted(tried.values()) == [10] * 4 + [20] * 2 + [40] * 5
    assert tried[(1.0, 0.0)] == tried[(0.0, 1.0)] == 40


def test_each_round_only_adds_to_the_one_before():
    """Scores are over the first episodes of the search, whatever round a weight reached."""
    env = Lottery()
    found = search_weights(Peaked((0.5, 0.5), 0.4), env, WeightSearch(4, 5, 2))
    luck = [np.random.default_rng(SELECT_SEED + k).uniform() for k in range(10)]
    for trial in found.trials:
        action = np.float32(0.9 - abs(trial.weights[0] - 0.4))
        assert trial.score == pytest.approx(np.mean(action > np.array(luck[: trial.episodes])))


def test_the_verdict_is_on_other_seeds_and_against_the_parent_chosen_before():
    env = Lottery()
    policy = Peaked((0.3, 0.7), 0.3)
    verdict = judge(policy, env, 1, 60)
    assert set(env.used) == set(range(EVAL_SEED, EVAL_SEED + 60))
    assert verdict.against == 1
    assert verdict.composed.success.value > verdict.parents[1].success.value > verdict.parents[0].success.value
    assert verdict.comparison.better == "B"
    assert judge(policy, env, None, 10).against == 1


def test_bad_searches():
    with pytest.raises(DipoleError, match="at least 1"):
        WeightSearch(0)
    with pytest.raises(DipoleError, match="evaluation seeds"):
        WeightSearch(10, 20_000, 3)
    with pytest.raises(DipoleError, match="searched on"):
        judge(Peaked((0.5, 0.5), 0.5), Lottery(), 0, 5, SELECT_SEED)
