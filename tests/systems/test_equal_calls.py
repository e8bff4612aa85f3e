"""The comparison at equal network calls: its statistics, where its data comes from, and a run in miniature."""

import json

import numpy as np
import pytest

from dipole.errors import DipoleError
from dipole.networks import MLPConfig, TransformerConfig, UNet1DConfig
from dipole.networks.moe import MoDEConfig
from dipole.systems import equal_calls, equal_calls_bases, equal_calls_bf16, equal_calls_ways, reproduce
from dipole.systems.card import Measure
from dipole.systems.equal_calls import LINES, mean_of, outcome
from dipole.systems.equal_calls_bases import Task
from dipole.systems.equal_calls_ways import PAIRS, WAYS


def test_interval_has_the_spread_of_seeds_and_of_episodes():
    same = mean_of(np.full((3, 5), 0.25))
    assert (same.value, same.low, same.high) == (0.25, 0.25, 0.25)
    # Episodes of a seed are alike, seeds are not: the interval is that of three numbers, whose mean is as low as the
    # lowest in 1 of 27 draws, more often than the 1 in 40 of its lower end.
    apart = mean_of(np.repeat([[0.0], [0.5], [1.0]], 100, axis=1))
    assert (apart.value, apart.low, apart.high) == (0.5, 0.0, 1.0)
    # Alike seeds of independent episodes: 1.96 standard errors of a mean of 300, within a tenth for 4000 resamples
    # and one more for what the draw of the seeds adds.
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 100))
    values -= values.mean(axis=1, keepdims=True)
    mean = mean_of(values)
    assert mean.high == pytest.approx(1.96 * values.std() / np.sqrt(300), rel=0.2)


def test_outcome():
    assert outcome(Measure(0.2, 0.1, 0.3)) == "wins"
    assert outcome(Measure(-0.2, -0.3, -0.1)) == "loses"
    assert outcome(Measure(0.1, -0.1, 0.3)) == outcome(Measure(0.0, 0.0, 0.0)) == "ties"


def test_every_way_is_compared_and_drawn():
    compared = {name for pair in (*PAIRS, *(pair[:2] for pair in equal_calls.CACHE_PAIRS)) for name in pair}
    assert set(WAYS) - compared == {"ddpm-100"}
    drawn = {name for names in LINES.values() for name in names}
    assert set(WAYS) - drawn == {"rti 2, 1, 0 every step"}  # it would hide behind the calibrated one


def test_missing_demonstrations_say_where_they_come_from(monkeypatch, tmp_path):
    monkeypatch.setattr(equal_calls_bases, "HUMAN", "none.npz")
    with pytest.raises(DipoleError, match=r"none\.npz.*pusht_cchi_v7_replay"):
        reproduce("equal-calls", "gpu", tmp_path)
    assert not (tmp_path / "parts").exists()


@pytest.mark.slow
def test_experiment_runs_and_resumes(monkeypatch, one_worker, tmp_path):
    task = Task("micro/fork2d", 2, demonstrations=3, options={})
    reach = Task("micro/track2d", 2, demonstrations=3, options={})
    small = {
        "mlp": MLPConfig(width=16, num_blocks=1, context_width=8),
        "transformer": TransformerConfig(width=8, num_layers=1, num_heads=2),
        "mode": MoDEConfig(embed_dim=8, num_layers=1, num_heads=2),
        "unet": UNet1DConfig(down_dims=(8, 8), step_embed_dim=8),
    }
    monkeypatch.setattr(equal_calls_bases, "NETWORKS", small)
    for module, names in (
        (equal_calls_bases, {"TASKS": (task,), "REACH": reach, "SEEDS": (0, 1)}),
        (equal_calls, {"TASKS": (task,), "REACH": reach, "SEEDS": (0, 1), "EPISODES": 2}),
        (equal_calls_ways, {"EPISODES": 2, "OTHER_ROWS": 2}),
        (equal_calls_bf16, {"EPISODES": 2, "REACH": reach}),
    ):
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
    report = reproduce("equal-calls", "gpu", tmp_path)
    assert len(report.claims) == len(PAIRS) + 1 + len(equal_calls.CACHE_PAIRS) + 2
    assert (tmp_path / "fork2d.png").is_file()
    solvers = json.loads((tmp_path / "parts" / "fork2d-solvers-1.json").read_text())["result"]
    assert solvers["ddim-8"]["counted"] == [8, 8, 8]
    assert solvers["ddim-8"]["calls"] == 8 * solvers["ddim-8"]["chunks"] / solvers["ddim-8"]["steps"]
    lines = []
    again = reproduce("equal-calls", "gpu", tmp_path, progress=lines.append)
    assert all("finished earlier" in line for line in lines)
    assert [claim.as_dict() for claim in again.claims] == [claim.as_dict() for claim in report.claims]
