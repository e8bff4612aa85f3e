"""Every system has a sound card, passes its exact checks, and its small experiment runs from end to end."""

import math
from functools import partial

import pytest

from dipole import systems
from dipole.cli.systems import Args, run
from dipole.systems import bc_diffusion, beso, experiment, mode
from dipole.systems.card import TIERS
from dipole.systems.experiment import over_seeds

NAMES = systems.names()


@pytest.mark.parametrize("name", NAMES)
def test_card(name):
    card = systems.card(name)
    assert card.name == name
    assert all((card.title, card.summary, card.claim, card.spec_section, card.source.paper))
    assert 2015 < card.source.year < 2030
    assert "ci" in systems.tiers(name)
    assert set(systems.tiers(name)) <= set(TIERS)


@pytest.mark.parametrize("name", NAMES)
def test_exact_checks_pass(name, tmp_path):
    report = systems.reproduce(name, "ci", tmp_path)
    assert [claim.claim for claim in report.claims if claim.verdict == "failed"] == []
    assert report.verdict == "passed"
    assert len({claim.claim for claim in report.claims}) == len(report.claims)


def test_list_of_systems_is_printed(capsys):
    run(Args())
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)


@pytest.fixture
def tiny(monkeypatch, one_worker):
    """Experiments too small to show anything, that run every line."""
    for module in (bc_diffusion, beso, mode):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
        monkeypatch.setattr(module, "DEMONSTRATIONS", 6)
        monkeypatch.setattr(module, "EPISODES", 3)
        monkeypatch.setattr(module, "TRAINING", {**module.TRAINING, "steps": 2, "batch_size": 8})
    monkeypatch.setattr(experiment, "rollout", partial(experiment.rollout, max_steps=9))
    monkeypatch.setattr(beso, "NFES", (3, 30))
    monkeypatch.setattr(mode, "HELD_OUT", 2)
    monkeypatch.setattr(mode, "CALLS", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bc-diffusion", "beso", "mode"])
def test_small_experiment_runs_and_resumes(name, tiny, tmp_path):
    report = systems.reproduce(name, "small", tmp_path)
    assert {claim.verdict for claim in report.claims} <= {"passed", "failed", "measured"}
    assert len(report.claims) >= 4
    lines = []
    again = systems.reproduce(name, "small", tmp_path, progress=lines.append)
    assert all("finished earlier" in line or "no plot" in line for line in lines)
    assert [claim.as_dict() for claim in again.claims] == [claim.as_dict() for claim in report.claims]


def test_interval_over_seeds():
    measure = over_seeds([0.9, 1.0, 0.95], 0.0, 1.0)
    # mean 0.95, standard deviation 0.05, t(2) = 4.303
    assert measure.value == pytest.approx(0.95)
    assert measure.low == pytest.approx(0.95 - 4.303 * 0.05 / math.sqrt(3))
    assert measure.high == 1.0
    assert over_seeds([0.5]).low is None
