"""The experiments of npg-igt, harpg and find run from end to end, and say what they measured."""

import numpy as np
import pytest

from dipole.networks import MLPConfig
from dipole.rl.control import CartPole
from dipole.rl.policy_search import Problem
from dipole.systems import find, finetuning, harpg, npg_igt, reproduce


@pytest.fixture
def tiny(monkeypatch, one_worker):
    """Experiments too small to show anything, that run every line."""
    for module in (npg_igt, harpg):
        monkeypatch.setattr(module, "ASCENTS", 2)
        monkeypatch.setattr(module, "STEPS", 40)
    monkeypatch.setattr(npg_igt, "FIRST", 10)
    monkeypatch.setattr(npg_igt, "CLASSIC_ASCENTS", 2)
    monkeypatch.setattr(npg_igt, "CHOOSING", 2)
    monkeypatch.setattr(harpg, "LONG_ASCENTS", 2)
    monkeypatch.setattr(npg_igt, "CLASSIC", {"cartpole": (Problem(CartPole(), 10, 0.99, hidden=(4,)), 1, 10)})
    monkeypatch.setattr(harpg, "LONG_STEPS", 10)
    monkeypatch.setattr(finetuning, "TRAINING", {**finetuning.TRAINING, "steps": 2, "batch_size": 8})
    monkeypatch.setattr(finetuning, "NETWORK", MLPConfig(width=16, num_blocks=1, context_width=8))
    monkeypatch.setattr(finetuning, "DEMONSTRATIONS", {finetuning.TWO_GOAL: 6, finetuning.SLOT_PEG: 2})
    monkeypatch.setattr(find, "SEEDS", (0, 1))
    monkeypatch.setattr(find, "EPISODES", 3)
    monkeypatch.setattr(find, "UPDATES", 15)
    monkeypatch.setattr(find, "RUN", {"env_steps": 100, "num_envs": 3, "eval_episodes": 2})
    monkeypatch.setattr(find, "METHOD", {**find.METHOD, "hidden": [8], "batch_size": 8})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["npg-igt", "harpg", "find"])
def test_small_experiment_runs_and_resumes(name, tiny, tmp_path):
    report = reproduce(name, "small", tmp_path)
    assert len(report.claims) >= 4
    assert all(np.isfinite(claim.ours.value) for claim in report.claims)
    lines = []
    again = reproduce(name, "small", tmp_path, progress=lines.append)
    assert all("finished earlier" in line or "no plot" in line for line in lines)
    assert [claim.as_dict() for claim in again.claims] == [claim.as_dict() for claim in report.claims]


def test_rare_component_is_as_rare_as_said():
    import torch

    task = find.RareMode()
    share = float(task.reward(torch.randn(2000, find.DIM, generator=torch.Generator().manual_seed(0))).mean())
    # three standard errors of 2000 samples, and ten steps of the flow
    assert share == pytest.approx(find.RARE, abs=0.03)
