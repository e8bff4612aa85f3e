"""An episode is determined by its seed: bitwise the same in a fresh environment and in one with a past."""

import numpy as np
import pytest
from envs_helpers import episode, needs, same

from dipole.envs import make, names
from dipole.envs.rendering import can_render

SIMULATORS = [
    pytest.param("pusht", marks=needs("gym_pusht")),
    pytest.param("metaworld/peg-insert-side-v3", marks=needs("metaworld")),
    pytest.param("metaworld/door-lock-v3", marks=needs("metaworld")),
    pytest.param("pointmaze/UMaze", marks=needs("gymnasium_robotics")),
    pytest.param("antmaze/UMaze", marks=needs("gymnasium_robotics")),
    pytest.param("fetch/PickAndPlace", marks=needs("gymnasium_robotics")),
    pytest.param("gym/Hopper-v5", marks=needs("mujoco")),
    pytest.param("gym/Humanoid-v5", marks=needs("mujoco")),
    pytest.param("ogbench/pointmaze-medium-v0", marks=needs("ogbench")),
    # Compiling the model twice takes most of ten seconds on a busy machine.
    pytest.param("ogbench/cube-single-v0", marks=[needs("ogbench"), pytest.mark.slow]),
]
MICRO = [name for name in names() if name.startswith("micro/")]


@pytest.mark.parametrize("name", SIMULATORS)
def test_simulator_episode_depends_on_its_seed_only(name):
    fresh, used = make(name), make(name, 2)
    try:
        # Drawing must not change the physics either.
        draw = 12 if name == "pusht" or can_render() else 0
        first = episode(fresh, 0, seed=7, steps=20)
        for seed in (1, 2):
            episode(used, 1, seed, steps=15, action_seed=seed, render_every=draw)
        assert same(first, episode(used, 1, seed=7, steps=20, render_every=draw))
        assert not same(first, episode(used, 1, seed=8, steps=20))
    finally:
        fresh.close()
        used.close()


@pytest.mark.parametrize("name", MICRO)
def test_micro_episode_depends_on_its_seed_only(name):
    fresh, used = make(name), make(name, 4)
    first = episode(fresh, 0, seed=7, steps=60)
    episode(used, 2, seed=3, steps=10, action_seed=1)
    assert same(first, episode(used, 2, seed=7, steps=60))
    assert not same(first, episode(used, 2, seed=8, steps=60))


@pytest.mark.parametrize("name", MICRO)
def test_micro_rows_do_not_see_each_other(name):
    """Stepping all rows together, or each alone, is the same to the bit."""
    together, alone = make(name, 3), make(name, 3)
    seeds = [5, 6, 7]
    rng = np.random.default_rng(0)
    together.reset([0, 1, 2], seeds)
    for row, seed in enumerate(seeds):
        alone.reset([row], [seed])
    rows = [0, 1, 2]
    for _ in range(12):
        actions = rng.uniform(together.spec.action_low, together.spec.action_high, (3, len(together.spec.action_low)))
        result = together.step(actions[rows], rows)
        single = [alone.step(actions[[row]], [row]) for row in rows]
        for key in result.obs:
            assert np.array_equal(result.obs[key], np.concatenate([s.obs[key] for s in single]))
        assert np.array_equal(result.reward, np.concatenate([s.reward for s in single]))
        rows = [row for row, done in zip(rows, result.done, strict=True) if not done]
        if not rows:
            break
