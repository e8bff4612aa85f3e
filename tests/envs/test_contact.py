"""The MuJoCo wiping task: its force is the servo's, it is late and shifts as told, its demonstrator copes."""

import numpy as np
import pytest
from envs_helpers import needs

from dipole.envs import collect, make
from dipole.envs.micro.wipe import BAND, SLOW_EVERY, SLOW_LATE, TICKS

pytestmark = needs("mujoco")


def test_at_rest_the_touch_sensor_tells_the_force_of_the_servo():
    with make("contact/Wipe") as env:
        for seed in range(5):
            env.reset([0], [seed])
            single = env.envs[0]
            x, z = single.command
            for depth in (0.01, 0.03):
                for _ in range(12):
                    result = env.step(np.array([[x, z + 0.02 - depth]]), [0])
                # The servo pulls with 50 N/m along z; the surface answers at a right angle to its slope.
                slope = np.gradient(single._height(np.array([-0.001, 0.001])), 0.002)[0]
                pull = 50 * (single.data.qpos[1] - single.command[1])
                # friction 0.1 takes some of it
                assert result.obs["observation.force"][0, 0] == pytest.approx(pull * np.hypot(1, slope), rel=0.15)


def test_looks_are_rare_and_late_and_force_is_not():
    with make("contact/Wipe") as env:
        obs = env.reset([0], [0])
        single, seen, forces = env.envs[0], [obs["observation.state"][0]], []
        for tick in range(40):
            result = env.step(np.array([[(tick + 1) / TICKS, single.command[1]]]), [0])
            seen.append(result.obs["observation.state"][0])
            forces.append(float(result.obs["observation.force"][0, 0]))
            assert forces[-1] == pytest.approx(single.force)
        changes = [k for k in range(1, 41) if not np.array_equal(seen[k], seen[k - 1])]
        assert changes == [SLOW_EVERY + SLOW_LATE, 2 * SLOW_EVERY + SLOW_LATE]
        assert len(set(forces)) > 20


def test_the_surface_shifts_when_it_is_said_to():
    with make("contact/Wipe") as env:
        env.reset([0], [1])
        single = env.envs[0]
        before = single.model.geom("surface").pos[2]
        while single._tick < single.shift_tick:
            env.step(single.command[None], [0])
            assert single.model.geom("surface").pos[2] == before
        for _ in range(3):
            env.step(single.command[None], [0])
        assert abs(single.model.geom("surface").pos[2] - before) == pytest.approx(0.06)
        env.reset([0], [1])
        assert single.model.geom("surface").pos[2] == before


def test_episodes_follow_their_seed_whatever_ran_before():
    records = []
    with make("contact/Wipe", 2) as env:
        for row, earlier in ((0, 7), (1, None)):
            if earlier is not None:
                env.reset([row], [earlier])
                env.step(np.array([[0.5, 0.1]]), [row])
            obs = [env.reset([row], [3])]
            obs += [env.step(np.array([[k / 50, 0.0]]), [row]).obs for k in range(20)]
            records.append(np.concatenate([np.concatenate([o[key] for o in obs]) for key in sorted(obs[0])], axis=1))
    np.testing.assert_array_equal(*records)


def test_the_demonstrator_keeps_the_force():
    episodes = collect("contact/Wipe", 6)
    assert episodes.lengths.tolist() == [TICKS] * 6
    force = episodes.columns["observation.force"][:, 0].reshape(6, TICKS)
    fine = (force >= BAND[0]) & (force <= BAND[1])
    # 0.99 before the shift and 0.83 after it, over twelve episodes
    assert fine.mean() > 0.8
    assert fine[:, :30].mean() > 0.9
    assert np.abs(np.diff(episodes.columns["action"].reshape(6, TICKS, 2)[..., 0]) * TICKS - 1).max() < 1e-3
