import pytest
import torch

from dipole.evaluation.weight_search import WeightSearch
from dipole.networks import MLPConfig
from dipole.systems import gpc, reproduce


def test_exact_checks_hold():
    claims = gpc.checks()
    assert [claim.claim for claim in claims if claim.verdict != "passed"] == []
    assert len({claim.claim for claim in claims}) == len(claims) >= 10


@pytest.mark.slow
def test_small_experiment_runs(tmp_path, monkeypatch, one_worker):
    """An experiment too small to show anything, that runs every line."""
    monkeypatch.setattr(gpc, "SEEDS", (0, 1))
    monkeypatch.setattr(gpc, "DEMONSTRATIONS", 3)
    monkeypatch.setattr(gpc, "EPISODES", 3)
    monkeypatch.setattr(gpc, "NETWORK", MLPConfig(width=16, num_blocks=1, context_width=8))
    monkeypatch.setattr(gpc, "TRAINING", {**gpc.TRAINING, "steps": 2, "batch_size": 8})
    monkeypatch.setattr(gpc, "SEARCH", WeightSearch(2, 2, 2))
    report = reproduce("gpc", "small", tmp_path)
    assert len(report.claims) == 8


@pytest.mark.parametrize(("cls", "values"), [(gpc.AveragedActions, {0.5}), (gpc.RandomParent, {0.0, 1.0})])
def test_baselines_use_whole_chunks(cls, values, monkeypatch):
    both = torch.stack([torch.zeros(200, 1, 1), torch.ones(200, 1, 1)])
    monkeypatch.setattr(cls, "__init__", lambda self: torch.nn.Module.__init__(self))
    monkeypatch.setattr(cls, "chunks", lambda self, *_: both)
    action, _ = cls().act({}, {}, generator=torch.Generator().manual_seed(0))
    assert set(action.flatten().tolist()) == values
    assert 0.35 < float(action.mean()) < 0.65  # 200 fair draws: standard deviation 0.035
