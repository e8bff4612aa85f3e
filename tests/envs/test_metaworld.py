"""The Meta-World adapter against the package itself."""

import numpy as np
import pytest
from envs_helpers import needs, needs_rendering

from dipole.envs.adapters.metaworld import TASKS, MetaWorld, build_expert
from dipole.envs.vector import SyncVector

pytestmark = needs("metaworld")


@pytest.fixture(scope="module")
def peg():
    env = MetaWorld("metaworld/peg-insert-side-v3", images=False)
    yield env
    env.close()


def test_every_task_of_the_package_has_a_sentence_and_an_expert():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    ours = {name.removeprefix("metaworld/") for name in TASKS}
    assert ours == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)


# One whose reward reads a live window on MuJoCo's memory, one that places by rejection, one that moves a body.
@pytest.mark.parametrize("task", ["soccer-v3", "peg-insert-side-v3", "door-lock-v3"])
def test_reset_is_the_packages_own_reset(task):
    """Given the same layout, a new environment of the package goes bitwise as ours does after another episode."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    ours = MetaWorld(f"metaworld/{task}")
    rng = np.random.default_rng(0)
    ours.reset(3)
    for _ in range(5):
        ours.step(rng.uniform(-1, 1, 4).astype(np.float32))
    obs = ours.reset(7)["observation.state"]

    theirs = ALL_V3_ENVIRONMENTS[task]()
    theirs._partially_observable = False
    del theirs.sawyer_observation_space
    theirs._set_task_called, theirs._freeze_rand_vec = True, True
    theirs._last_rand_vec = ours._env._last_rand_vec.copy()
    assert np.array_equal(obs, theirs.reset()[0].astype(np.float32))
    for _ in range(10):
        action = rng.uniform(-1, 1, 4).astype(np.float32)
        mine, (raw, reward, *_, info) = ours.step(action), theirs.step(action)
        assert np.array_equal(mine.obs["observation.state"], raw.astype(np.float32))
        assert (mine.reward, mine.success) == (reward, bool(info["success"]))
    ours.close()
    theirs.close()


def test_layouts_differ_and_the_goal_is_seen(peg):
    starts = np.stack([peg.reset(seed)["observation.state"] for seed in range(4)])
    assert len(np.unique(starts[:, -3:], axis=0)) == 4
    assert (starts[:, -3:] != 0).any(axis=1).all()
    # A step keeps the goal (the package clips it to zero when its bounds were cached too early).
    after = peg.step(np.zeros(4, dtype=np.float32)).obs["observation.state"]
    assert np.array_equal(after[-3:], starts[-1, -3:])


def test_the_expert_inserts_the_peg_and_the_episode_ends_there():
    env = SyncVector([lambda: MetaWorld("metaworld/peg-insert-side-v3")])
    expert = build_expert(env)
    obs = env.reset([0], [1])
    expert.reset([0], [1], obs)
    for _ in range(env.spec.max_steps):
        result = env.step(expert.act(obs, [0]), [0])
        obs = result.obs
        if result.done[0]:
            break
    assert result.success[0]
    assert result.terminated[0]
    assert not result.truncated[0]
    env.close()


def test_it_can_go_on_after_success_and_past_the_packages_limit():
    env = MetaWorld("metaworld/reach-v3", terminate_on_success=False)
    env.reset(0)
    for _ in range(501):  # the package itself refuses the 501st step
        transition = env.step(np.zeros(4, dtype=np.float32))
        assert not transition.terminated
    env.close()


def test_pictures_are_upright():
    needs_rendering()
    env = MetaWorld("metaworld/peg-insert-side-v3", images=True)
    picture = env.reset(0)["observation.image"]
    assert picture.shape == (96, 96, 3)
    assert picture.dtype == np.uint8
    assert env.render().shape == (256, 256, 3)
    # The green peg is drawn higher when it is lifted.
    heights = []
    for lift in (0.0, 0.2):
        env._env._set_obj_xyz(np.add(env._env.obj_init_pos, (0, 0, lift)))
        red, green, blue = np.moveaxis(env.render().astype(int), -1, 0)
        heights.append(np.argwhere((green > 150) & (red < 100) & (blue < 100))[:, 0].mean())
    assert heights[1] < heights[0] - 20  # px
    env.close()
