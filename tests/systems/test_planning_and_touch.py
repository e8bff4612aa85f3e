"""The experiments of DiffusionDrive and RDP: their rivals, their scores, and the small tiers from end to end."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dipole import systems
from dipole.evaluation.episode import Episode, Rollouts, Trajectory
from dipole.systems import diffusiondrive, rdp
from dipole.systems.rdp_baselines import Chunked


@dataclass(frozen=True)
class CountingConfig:
    action_horizon: int = 8


class Counting(torch.nn.Module):
    """A policy whose chunk counts up from what it observed."""

    obs_horizon, pred_horizon, action_dim = 1, 8, 1

    def __init__(self):
        super().__init__()
        self.config = CountingConfig()

    def act(self, obs, state, noise=None, generator=None):
        steps = torch.arange(self.config.action_horizon, dtype=torch.float32)
        return obs["x"][:, -1:, :] + steps[None, :, None], state


def test_chunks_are_replanned_at_the_same_ticks_row_by_row():
    policy = Chunked(Counting(), period=5, offset=2)
    state, found = policy.initial_state(2), []
    for tick in range(12):
        if tick == 4:
            state = policy.reset(state, torch.tensor([False, True]))
        chunk, state = policy.act({"x": torch.full((2, 1, 1), 100.0 * tick)}, state)
        found.append(chunk[:, 0, 0].tolist())
    rows = np.array(found).T
    # Plans at ticks 0, 2, 7, 12; the second row begins again at tick 4.
    assert rows[0].tolist() == [0, 1, 200, 201, 202, 203, 204, 700, 701, 702, 703, 704]
    assert rows[1].tolist() == [0, 1, 200, 201, 400, 401, 600, 601, 602, 603, 604, 1100]


def test_shares_tell_before_and_after_the_shift_apart():
    from dipole.envs import make

    env = make("micro/wipe")
    env.reset([0], [11])
    tick = int(env.state([0])["tick"][0])
    force = np.full((129, 1), 1.0)
    force[tick : tick + 10] = 3.0  # ten ticks of the part after the shift, the one of the shift included
    force[1] = 0.0
    trajectory = Trajectory({rdp.FORCE: force}, np.zeros((128, 2)), np.zeros(128))
    episode = Episode(0, 11, True, 0.0, 0.0, 128, False, True, 1, trajectory)
    found = rdp.shares(Rollouts((episode,), 0.0), "micro/wipe")
    assert found["before"] == pytest.approx(1 - 1 / (tick - 1))
    assert found["after"] == pytest.approx(1 - 10 / (129 - tick))


def test_the_demonstrator_of_lanes_plans_without_fault():
    scenes = diffusiondrive.held_out(40)
    scores = diffusiondrive.judge(scenes.demonstrated, scenes)
    assert scores["ade"] == 0
    assert scores["collision"] == scores["off_road"] == 0
    assert scores["no_collision"] == scores["drivable"] == 1
    straight = np.zeros_like(scenes.demonstrated)
    straight[..., 0] = 20 * np.arange(1, 9)  # 40 m/s
    assert diffusiondrive.judge(straight, scenes)["comfort"] == 0


@pytest.fixture
def tiny(monkeypatch, one_worker):
    """Experiments too small to show anything, that run every line."""
    for name, value in {"SEEDS": (0, 1), "SCENES": 60, "HELD_OUT": 6, "CALLS": 6}.items():
        monkeypatch.setattr(diffusiondrive, name, value)
    monkeypatch.setattr(diffusiondrive, "TRAINING", {**diffusiondrive.TRAINING, "steps": 2, "batch_size": 8})
    for name, value in {"SEEDS": (0, 1), "DEMONSTRATIONS": 4, "CODEC_STEPS": 2, "STEPS": 2, "CALLS": 2}.items():
        monkeypatch.setattr(rdp, name, value)
    monkeypatch.setattr(rdp, "EPISODES", dict.fromkeys(rdp.EPISODES, 2))
    monkeypatch.setattr(rdp, "TRAINING", {**rdp.TRAINING, "batch_size": 8})
    for cached in (diffusiondrive.training_data, diffusiondrive.held_out, rdp.demonstrations):
        cached.cache_clear()
    yield
    for cached in (diffusiondrive.training_data, diffusiondrive.held_out, rdp.demonstrations):
        cached.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusiondrive", "rdp", "rdp-contact"])
def test_small_experiment_runs_and_resumes(name, tiny, tmp_path):
    if name == "rdp-contact":
        pytest.importorskip("mujoco")
    report = systems.reproduce(name, "small", tmp_path)
    assert len(report.claims) >= 8
    assert len({claim.claim for claim in report.claims}) == len(report.claims)
    lines = []
    again = systems.reproduce(name, "small", tmp_path, progress=lines.append)
    assert all("finished earlier" in line or "no plot" in line for line in lines)
    assert [claim.as_dict() for claim in again.claims] == [claim.as_dict() for claim in report.claims]
