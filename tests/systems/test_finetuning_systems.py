"""The fine-tuning experiments run from end to end, and their figures mean what they say."""

import math

import pytest

from dipole.networks import MLPConfig
from dipole.systems import dppo, dsrl, expo, finetuning, reinflow, reproduce, resip
from dipole.systems.finetuning import area, samples_to


@pytest.fixture
def tiny(monkeypatch, one_worker):
    """Experiments too small to show anything, that run every line."""
    monkeypatch.setattr(finetuning, "TRAINING", {**finetuning.TRAINING, "steps": 2, "batch_size": 8})
    monkeypatch.setattr(finetuning, "NETWORK", MLPConfig(width=16, num_blocks=1, context_width=8))
    few = {finetuning.TWO_GOAL: 6, finetuning.SLOT_PEG: 2, finetuning.PENDULUM: 2}
    for module in (finetuning, expo):
        monkeypatch.setattr(module, "DEMONSTRATIONS", few)
    short = {"env_steps": 100, "num_envs": 3, "eval_episodes": 2}
    for module in (dppo, dsrl, expo, reinflow, resip):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
        monkeypatch.setattr(module, "EPISODES", 3)
    for module in (dppo, dsrl, reinflow, resip):
        monkeypatch.setattr(module, "RUN", short)
    monkeypatch.setattr(expo, "TWO_GOAL_RUN", short)
    monkeypatch.setattr(expo, "PENDULUM_RUN", {**short, "eval_every": 100})  # its episodes are long
    monkeypatch.setattr(dsrl, "ATTEMPTS", 2)
    monkeypatch.setattr(dsrl, "episode_seeds", lambda first, count: list(range(first, first + 3)))
    less = {"hidden": [8, 8], "warmup": 2, "updates": 1, "decisions": 4, "batch_size": 8}
    monkeypatch.setattr(dsrl, "METHOD", {**dsrl.METHOD, **less})
    monkeypatch.setattr(expo, "TWO_GOAL_METHOD", {**expo.TWO_GOAL_METHOD, **less})
    monkeypatch.setattr(expo, "VARIANTS", {name: {**values, **less} for name, values in expo.VARIANTS.items()})
    monkeypatch.setattr(resip, "METHOD", {**resip.METHOD, "steps": 8, "epochs": 1})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dppo", "dsrl", "expo", "reinflow", "resip"])
def test_small_experiment_runs_and_resumes(name, tiny, tmp_path):
    report = reproduce(name, "small", tmp_path)
    assert {claim.verdict for claim in report.claims} <= {"passed", "failed", "measured"}
    assert len(report.claims) >= 3
    lines = []
    again = reproduce(name, "small", tmp_path, progress=lines.append)
    assert all("finished earlier" in line or "no plot" in line for line in lines)
    assert [claim.as_dict() for claim in again.claims] == [claim.as_dict() for claim in report.claims]


def test_samples_to_a_level():
    curve = [[0, 0.2], [100, 0.4], [200, 0.8], [300, 0.7]]
    assert samples_to(curve, 0.6) == pytest.approx(150)
    assert samples_to(curve, 0.4) == pytest.approx(100)
    assert samples_to(curve, 0.1) == 0
    assert samples_to(curve, 0.9) == math.inf


def test_area_under_a_curve():
    assert area([[0, 0.0], [100, 1.0], [300, 1.0]]) == pytest.approx((50 + 200) / 300)
