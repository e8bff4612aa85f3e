import numpy as np
import pytest
from data_helpers import shared

from dipole.data import load, pusht
from dipole.errors import DipoleError


def test_corners_of_an_upright_block():
    corners = pusht.block_corners(np.array([100.0, 200.0, 0.0])).reshape(8, 2)
    np.testing.assert_array_equal(corners[0], [40, 200])
    np.testing.assert_array_equal(corners[6], [115, 320])
    quarter = pusht.block_corners(np.array([100.0, 200.0, np.pi / 2])).reshape(8, 2)
    # a quarter turn takes (x, y) to (-y, x); float32 of numbers up to 320
    np.testing.assert_allclose(quarter[6], [-20, 215], atol=1e-4)
    assert pusht.block_corners(np.zeros((5, 4, 3))).shape == (5, 4, 16)


def test_corners_equal_those_of_the_simulator():
    pytest.importorskip("gym_pusht")
    from gym_pusht.envs.pusht import PushTEnv

    env = PushTEnv(obs_type="environment_state_agent_pos")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y, angle = rng.uniform(50, 450), rng.uniform(50, 450), rng.uniform(-7, 7)
        env.block.angle = angle
        env.block.position = x, y
        # float32 of numbers up to 512
        np.testing.assert_allclose(
            pusht.block_corners(np.array([x, y, angle])), env.get_obs()["environment_state"], atol=1e-4
        )


def test_real_human_demonstrations():
    path = shared("pusht/pusht_human_206_lowdim.npz")
    data = load(path)
    assert (data.num_episodes, data.num_frames, data.fps) == (206, 25650, 10)
    assert {key: feature.shape for key, feature in data.features.items()} == {
        "observation.state": (2,),
        "observation.environment_state": (16,),
        "action": (2,),
        "task_index": (1,),
    }
    assert data.task_of(0) == pusht.TASK
    with np.load(path, allow_pickle=False) as raw:
        np.testing.assert_array_equal(data.columns["observation.state"], raw["state"][:, :2])
        np.testing.assert_array_equal(data.columns["action"], raw["action"])
        # The sets' own nine keypoints, brought into the block's frame by the recorded pose, must not move, and must lie
        # on the T whose corners we use: the pose means the same to the people who recorded it and to the simulator.
        pose = raw["state"][:, 2:].astype(float)
        moved = raw["keypoint"] - pose[:, None, :2]
        cos, sin = np.cos(pose[:, 2:]), np.sin(pose[:, 2:])
        local = np.stack(
            [cos * moved[..., 0] + sin * moved[..., 1], cos * moved[..., 1] - sin * moved[..., 0]], axis=-1
        )
    # Measured 2.2 px in the worst frame (they were recorded a physics step apart), 0.02 px in the mean.
    assert np.abs(local - np.median(local, axis=0)).max() < 3
    x, y = np.median(local, axis=0).T
    # They were put on the T by hand: 3 px (measured 2.9).
    on_bar = (np.abs(x) <= 63) & (y >= -3) & (y <= 33)
    on_stem = (np.abs(x) <= 18) & (y >= 27) & (y <= 123)
    assert (on_bar | on_stem).all()


@pytest.mark.slow  # unpacks 700 MB of pictures
def test_pictures_are_added_from_their_own_file():
    data = load(shared("pusht/pusht_human_206_lowdim.npz"))
    pytest.importorskip("zarr")
    pictures = shared("pusht/pusht_human_206_img.zarr")
    part = pusht.with_images(data, pictures)
    assert part.columns["observation.image"].shape == (25650, 96, 96, 3)
    # the agent is drawn as a blue disc: the picture around it is blue, wherever it is
    for frame in (0, 5000, 25000):
        x, y = (part.columns["observation.state"][frame] / 512 * 96).astype(int)
        red, green, blue = part.columns["observation.image"][frame, y, x].astype(int)
        assert blue > red + 40
        assert blue > green + 20
    with pytest.raises(DipoleError, match="a picture per frame"):
        pusht.with_images(data.select([0]), pictures)
    with pytest.raises(DipoleError, match="single array and does not say where episodes end.*with_images"):
        load(pictures)
