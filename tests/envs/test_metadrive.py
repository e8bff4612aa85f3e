"""MetaDrive: runs without assets or a window, deterministic; its driver arrives. Skipped where it is not installed."""

import numpy as np
import pytest
from envs_helpers import needs

from dipole.data.poses import to_frame
from dipole.envs import has_expert, make, make_expert
from dipole.envs.adapters import metadrive_view as view
from dipole.errors import DipoleError

installed = needs("metadrive")


def test_the_view_shows_what_is_where():
    points = np.stack(np.meshgrid(np.arange(0, 60, 0.5), np.arange(-3, 3.1, 0.5)), axis=-1).reshape(-1, 2)
    road = view.Road(points, points[:, 1] >= 0)
    ahead = np.array([[20.0, 2.0, 0.0, 2.0, 1.0]])
    seen = view.draw(road, np.zeros(3), ahead)
    cell = tuple(((np.array([20.0, 2.0]) - view.VIEW_LOW) / view.VIEW_CELL).astype(int))
    assert seen[cell].tolist() == [1, 1, 1]
    right = tuple(((np.array([20.0, -2.0]) - view.VIEW_LOW) / view.VIEW_CELL).astype(int))
    assert seen[right].tolist() == [1, 0, 0]
    assert seen[:6].sum() == 0  # behind the road's beginning
    # Turned round, the road lies behind, and the box with it.
    turned = view.draw(road, np.array([40.0, 0.0, np.pi]), ahead)
    at = tuple(((np.array([20.0, -2.0]) - view.VIEW_LOW) / view.VIEW_CELL).astype(int))
    assert turned[at][2] == 1
    picture = view.picture(seen)
    assert picture.shape == (256, 256, 3)
    assert picture.dtype == np.uint8


def test_frames_agree_with_those_of_plans():
    import torch

    rng = np.random.default_rng(0)
    points, pose = rng.normal(size=(20, 2)), np.array([1.0, -2.0, 0.7])
    ours = view.to_ego(points, pose)
    theirs = to_frame(torch.from_numpy(np.c_[points, np.zeros(20)]), torch.from_numpy(pose))[:, :2]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)


def test_names_and_experts_are_known_without_the_simulator():
    assert has_expert("metadrive/Drive")
    assert has_expert("metadrive/Plan")


@installed
@pytest.mark.slow
def test_the_driver_arrives_by_either_kind_of_action():
    for name in ("metadrive/Drive", "metadrive/Plan"):
        with make(name) as env:
            expert = make_expert(env)
            obs = env.reset([0], [1])
            expert.reset([0], [1], obs)
            for key, feature in env.spec.observation.items():
                assert feature.accepts(obs[key])
            done = False
            while not done:
                result = env.step(expert.act(obs, [0]), [0])
                obs, done = result.obs, bool(result.done[0])
            assert result.success[0], result.info
            assert env.render(0).shape == (256, 256, 3)


@installed
@pytest.mark.slow
def test_episodes_follow_their_seed_and_one_is_allowed():
    with make("metadrive/Plan") as env:
        with pytest.raises(DipoleError, match="one environment per process"):
            make("metadrive/Plan")
        records = []
        for earlier in (5, 3):
            env.reset([0], [earlier])
            env.step(np.array([[2.0, 0.0, 0.0]]), [0])
            obs = [env.reset([0], [2])]
            obs += [env.step(np.array([[3.0, 0.0, 0.0]]), [0]).obs for _ in range(8)]
            records.append(np.concatenate([o["observation.state"] for o in obs]))
            scene = obs[0]["observation.scene"][0]
            assert scene[..., 0].mean() > 0.1  # there is a road
            assert (scene[..., 1] <= scene[..., 0]).all()  # the route is on it
        np.testing.assert_array_equal(*records)
        assert records[0][-1, 0] > 3  # it has gathered speed
    make("metadrive/Plan").close()  # after closing, another one may be made


@installed
@pytest.mark.slow
def test_planned_poses_are_reached():
    """At an even speed the pose asked for is the pose half a second later, within a few decimetres."""
    with make("metadrive/Plan", traffic=0.0) as env:
        env.reset([0], [0])
        single = env.envs[0]
        for _ in range(12):
            env.step(np.array([[3.5, 0.0, 0.0]]), [0])
        before = single.pose()
        env.step(np.array([[3.5, 0.1, 0.02]]), [0])
        moved = view.to_ego(single.pose()[None, :2], before)[0]
        assert moved[0] == pytest.approx(3.5, abs=0.6)
        assert moved[1] == pytest.approx(0.1, abs=0.15)
