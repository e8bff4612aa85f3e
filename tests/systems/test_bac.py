import pytest

from dipole.systems import bac


@pytest.mark.parametrize("kind", bac.NETWORKS)
def test_the_small_tier_measures_every_way_to_sample(kind, monkeypatch):
    # 4 levels, a budget of 2 and untrained weights: the machinery, in seconds
    monkeypatch.setattr(bac, "EPISODES", 2)
    monkeypatch.setattr(bac, "LEVELS", 4)
    monkeypatch.setattr(bac, "PROBES", 2)
    monkeypatch.setattr(bac, "CALIBRATION", 2)
    monkeypatch.setattr(bac, "VARIANTS", {bac.CHOSEN: bac.ScheduleOptions(2, bubble=2)})
    episodes = bac.collect(bac.ENV, 3, seed=0)
    policy = bac.build(episodes, bac.NETWORKS[kind], 0, levels=12)
    found = bac.measure(policy, episodes, [bac.CHOSEN])
    assert found["full"]["macs"] > found[bac.CHOSEN]["macs"]
    assert found[bac.CHOSEN]["error"] > 0
    assert found["DDIM, equal cost"]["calls"] >= 2
    assert {"cached", "ddim", "calls"} == set(found["deterministic"])
    assert all(values["ms"] > 0 for name, values in found.items() if name != "deterministic")
