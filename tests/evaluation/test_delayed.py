"""Simulated latency. The toy environment runs at 10 Hz: a tick is 100 ms."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dipole.data import Feature
from dipole.data.normalizer import Normalizer
from dipole.errors import DipoleError
from dipole.evaluation import evaluate
from dipole.evaluation.rollout import rollout
from dipole.policies import DiffusionPolicy, PolicyConfig
from dipole.realtime.delay_sweep import DelayResult, parse_latencies, parse_modes, save_delays, sweep_delays
from dipole.realtime.delayed import Delay, Link, executed_policy, held
from dipole.realtime.execution import MODES
from dipole.realtime.runtime import Runtime, apply

SEEDS = range(100, 123)  # more than a block of 16, and no multiple of any number of rows below
PLAIN_MODES = [mode for mode in MODES if mode != "rtc"]


def facts(rollouts):
    return [
        (e.index, e.seed, e.success, e.return_, e.max_reward, e.length, e.terminated, e.truncated, e.chunks)
        for e in rollouts.episodes
    ]


def delayed(policy, env, delay, seeds=SEEDS, **options):
    return rollout(policy, env, seeds, runner=delay.runner, **options)


@pytest.fixture(scope="module")
def diffusion():
    """Return an untrained policy for the toy environment: To = 2, Tp = 8, Ta = 3."""
    state, action = Feature("float32", (3,)), Feature("float32", (2,))
    network = {"name": "mlp", "width": 24, "num_blocks": 1}
    config = PolicyConfig({"observation.state": state}, action, 2, 8, 3, network=network)
    stats = {
        "observation.state": {"min": np.full(3, -2.0), "max": np.full(3, 2.0)},
        "action": {"min": np.full(2, -1.5), "max": np.full(2, 1.5)},
    }
    torch.manual_seed(0)
    normalizer = Normalizer.fit(stats, dict.fromkeys(stats, "min_max"))
    return DiffusionPolicy(config, normalizer).eval()


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("num_envs", [1, 7, 16])
def test_sync_without_delay_is_the_normal_evaluation_to_the_last_bit(toys, memory, num_envs):
    policy = toys.Policy(memory=memory)
    plain = rollout(policy, toys.Env(num_envs), SEEDS, keep_trajectories=True)
    same = delayed(policy, toys.Env(num_envs), Delay("sync"), keep_trajectories=True)
    assert facts(same) == facts(plain)
    for one, other in zip(plain.episodes, same.episodes, strict=True):
        np.testing.assert_array_equal(one.trajectory.actions, other.trajectory.actions)
    assert all(e.execution["execution.fallback"] == 0 for e in same.episodes)


def test_the_document_is_that_of_the_normal_evaluation(diffusion, toys):
    plain = evaluate(diffusion, toys.Env(5), 20, latency_calls=0)
    same = evaluate(diffusion, toys.Env(5), 20, latency_calls=0, delay=Delay("sync"))
    extra = {key for key in same.episodes if key.startswith("execution.")}
    assert {key: value for key, value in same.episodes.items() if key not in extra} == plain.episodes
    assert (same.success, same.score, same.length) == (plain.success, plain.score, plain.length)
    assert len(extra) == 5
    assert same.settings["delay"]["mode"] == "sync"


@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_the_number_of_environments(diffusion, toys, mode):
    delay = Delay(mode, Link(150.0, 120.0, 0.2), timeout_ms=900.0)
    runs = [delayed(diffusion, toys.Env(n), delay) for n in (1, 3, 16)]
    assert facts(runs[1]) == facts(runs[0])
    assert facts(runs[2]) == facts(runs[0])
    assert [e.execution for e in runs[2].episodes] == [e.execution for e in runs[0].episodes]
    assert sum(e.execution["execution.lost"] for e in runs[0].episodes) > 0  # or nothing was tested


def test_modes_and_latencies_make_a_difference(diffusion, toys):
    seen = {
        (mode, latency): str(facts(delayed(diffusion, toys.Env(16), Delay(mode, Link(latency)))))
        for mode in ("sync", "async-naive", "async-drop", "async-blend", "rtc")
        for latency in (0.0, 200.0)
    }
    assert len({seen[mode, 200.0] for mode in ("sync", "async-naive", "async-drop", "async-blend", "rtc")}) == 5
    assert all(seen[mode, 0.0] != seen[mode, 200.0] for mode in ("sync", "async-naive", "async-drop"))
    assert seen["sync", 0.0] == seen["async-drop", 0.0] == seen["async-naive", 0.0]


class Counting:
    """A policy that answers with the number of the call and the place in the chunk, and an environment to match."""

    obs_horizon, pred_horizon, action_horizon, action_dim = 1, 8, 8, 2

    def initial_state(self, batch):
        return {"calls": torch.zeros(batch)}

    def reset(self, state, mask):
        return {"calls": torch.where(mask, 0.0, state["calls"])}

    def act(self, obs, state, noise=None, generator=None):
        place = torch.arange(8) / 100
        chunk = state["calls"][:, None] / 10 + place
        return torch.stack([chunk, obs["observation.state"][:, 0, :1].expand(-1, 8)], -1), {"calls": state["calls"] + 1}


class Clockwork:
    """An environment whose observation is the number of steps taken, in hundredths."""

    def __init__(self, toys):
        self.spec = toys.Env(1, max_steps=20).spec
        self.num_envs, self.clock = 1, 0

    def reset(self, rows, seeds):
        self.clock = 0
        return self._obs()

    def step(self, actions, rows):
        from dipole.envs.spec import StepResult

        self.clock += 1
        no = np.zeros(1, bool)
        return StepResult(self._obs(), np.zeros(1, np.float32), no, np.array([self.clock >= 20]), no, [{}])

    def _obs(self):
        return {"observation.state": np.full((1, 3), self.clock / 100, np.float32)}


def executed(toys, delay):
    """Return (call, place in the chunk, observed step) of every executed action of one episode."""
    run = delayed(Counting(), Clockwork(toys), delay, seeds=[0], keep_trajectories=True)
    return [(int(10 * a + 1e-4), round(100 * a) % 10, round(100 * o)) for a, o in run.episodes[0].trajectory.actions]


def test_an_episode_by_hand(toys):
    """150 ms are two ticks; the first chunk is waited for; Ta = 8."""
    sync = executed(toys, Delay("sync", Link(150.0)))
    # Eight actions, then the last one again for two ticks, until the chunk asked for at step 8 has come.
    expected = [(0, k, 0) for k in range(8)] + [(0, 7, 0)] * 2 + [(1, k, 8) for k in range(8)] + [(1, 7, 8)] * 2
    assert sync == expected
    drop = executed(toys, Delay("async-drop", Link(150.0)))
    # Asked for 8 ticks after the last time: at step 6, two ticks having passed before the first step.
    assert drop[:8] == [(0, k, 0) for k in range(8)]
    assert drop[8:14] == [(1, k, 6) for k in range(2, 8)]
    naive = executed(toys, Delay("async-naive", Link(150.0)))
    assert naive[8:16] == [(1, k, 6) for k in range(8)]


def test_a_delay_is_rounded_up_to_ticks(toys):
    for latency, ticks in ((0.0, 0), (1.0, 1), (100.0, 1), (100.1, 2), (300.0, 3)):
        repeated = executed(toys, Delay("sync", Link(latency)))[8:].count((0, 7, 0))
        assert repeated == ticks, latency


def test_the_zero_fallback_sends_zeros(toys):
    actions = executed(toys, Delay("sync", Link(150.0), fallback="zero"))
    assert actions[8:10] == [(0, 0, 0)] * 2


def test_holding_still_is_zero_for_increments_and_velocities_and_the_last_action_for_the_rest(toys):
    spec, last = toys.Env(1).spec, np.array([0.5, -0.5], np.float32)
    for names, expected in ((None, [0.5, -0.5]), (("dx", "gripper"), [0.0, -0.5]), (("target_x", "vy"), [0.5, 0.0])):
        named = replace(spec, action=Feature("float32", (2,), names))
        assert held(named, last).tolist() == expected
        assert held(named, None).tolist() == [0.0, 0.0]


def test_links_draw_the_same_whatever_their_settings():
    def draws(link):
        generator = np.random.default_rng(0)
        return [link.draw(generator) for _ in range(1000)]

    plain, late, lossy = draws(Link(100.0)), draws(Link(100.0, 50.0)), draws(Link(100.0, 50.0, 0.25))
    assert set(plain) == {0.1}
    assert [a for a, b in zip(late, lossy, strict=True) if b is not None] == [b for b in lossy if b is not None]
    # 1000 draws of probability 1/4: four standard deviations are 55.
    assert abs(lossy.count(None) - 250) < 55
    assert 0.05 <= min(late) < 0.052 < 0.148 < max(late) <= 0.15
    assert min(draws(Link(10.0, 50.0))) == 0.0


def test_rtc_hands_over_smoothly(diffusion, toys):
    # What is executed while waiting is the beginning of the new chunk, so that the hand-over is no jump.
    jumps = {}
    for mode in ("async-drop", "rtc"):
        run = delayed(diffusion, toys.Env(16), Delay(mode, Link(200.0)), keep_trajectories=True)
        actions = [e.trajectory.actions for e in run.episodes if e.length > 6]
        jumps[mode] = np.mean([np.abs(np.diff(values, axis=0)).mean() for values in actions])
    assert jumps["rtc"] < jumps["async-drop"]


def test_whole_chunks_where_they_are_needed(diffusion, toys):
    assert executed_policy(diffusion, "sync") is diffusion
    assert executed_policy(diffusion, "async-drop").action_horizon == 7  # Tp - To + 1
    assert executed_policy(diffusion, "rtc").action_horizon == 7
    assert diffusion.action_horizon == 3
    remembering = toys.Policy(memory=True)
    assert executed_policy(remembering, "async-drop") is remembering
    by_a_method = apply(diffusion, Runtime("ensemble"))
    assert executed_policy(by_a_method, "async-drop") is by_a_method
    for policy in (remembering, by_a_method):
        with pytest.raises(DipoleError, match="is run plainly"):
            executed_policy(policy, "rtc")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(-1.0), "not negative"),
        (lambda: Link(math.inf), "not negative"),
        (lambda: Link(0.0, 0.0, 1.0), "below 1"),
        (lambda: Delay("fast"), "unknown execution mode"),
        (lambda: Delay(fallback="stop").controller(1, 1, 1.0), "unknown fallback"),
        (lambda: Delay(timeout_ms=0.0), "timeout_ms"),
        (lambda: parse_latencies("0,soon"), "write milliseconds"),
        (lambda: parse_latencies("-1"), "must not be negative"),
        (lambda: parse_modes("sync,quick"), "unknown execution mode 'quick'"),
    ],
)
def test_wrong_settings_are_reported(make, message):
    with pytest.raises(DipoleError, match=message):
        make()


def test_a_sweep_is_a_table_and_a_picture(toys, tmp_path):
    policy, env = toys.Policy(), toys.Env(8)
    like = Delay(link=Link(jitter_ms=20.0, drop=0.1))
    results = list(sweep_delays(policy, env, ("sync", "async-drop"), (0.0, 200.0), like, episodes=10))
    assert [(row.mode, row.latency_ms) for row in results] == [
        (mode, latency) for mode in ("sync", "async-drop") for latency in (0.0, 200.0)
    ]
    assert results[1].fallback > results[3].fallback  # it stands still only in sync
    again = list(sweep_delays(policy, env, ("sync",), (200.0,), like, episodes=10))
    assert again == [results[1]]
    save_delays(tmp_path, "toy", results)
    stored = json.loads((tmp_path / "delays.json").read_text())
    assert [DelayResult(**row) for row in stored["results"]] == results
    pytest.importorskip("matplotlib")
    from dipole.realtime.delay_plot import plot_delays

    for name in ("a.svg", "b.svg"):
        plot_delays(tmp_path / name, results, "toy", "success")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "async-drop" in (tmp_path / "a.svg").read_text()
    plot_delays(tmp_path / "c.svg", results, "toy", "return")
