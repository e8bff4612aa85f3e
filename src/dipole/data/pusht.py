"""Push-T demonstrations in the observation that the simulator gives.

The published sets hold the agent's position and the block's pose. The policy should see at training time what gym-pusht
0.1.8 gives with `obs_type="environment_state_agent_pos"`:

    observation.state               [2]   agent x, y in pixels 0..512
    observation.environment_state   [16]  x, y of the eight corners of the T: four of the bar, four of the stem
    action                          [2]   target of the agent, pixels

Corner = R(angle) corner_in_block + block position: computed from the recorded pose, so no simulator is needed.
(The sets' own `keypoint` column is another one: nine points, in another order.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dipole.data.episodes import Episodes
from dipole.data.features import Feature
from dipole.errors import DipoleError

FPS = 10.0
TASK = "Push the T-shaped block onto the T-shaped outline."

# Corners of the T in its own frame, in the order of gym-pusht's physics shapes (scale 30: bar 120 x 30, stem 30 x 90).
CORNERS = np.array(
    [[-60, 0], [60, 0], [60, 30], [-60, 30], [-15, 30], [15, 30], [15, 120], [-15, 120]],
    dtype=np.float64,
)


def block_corners(pose: np.ndarray) -> np.ndarray:
    """Return the corners of the T, as gym-pusht's `environment_state`.

    Args:
        pose: `[..., 3]`: block x, y (pixels) and angle (radians).

    Returns:
        float32 `[..., 16]`: x0, y0, x1, y1 ...
    """
    pose = np.asarray(pose, dtype=np.float64)
    cos, sin = np.cos(pose[..., 2:3]), np.sin(pose[..., 2:3])
    x = cos * CORNERS[:, 0] - sin * CORNERS[:, 1] + pose[..., 0:1]
    y = sin * CORNERS[:, 0] + cos * CORNERS[:, 1] + pose[..., 1:2]
    return np.stack([x, y], axis=-1).reshape(*pose.shape[:-1], 16).astype(np.float32)


def is_pusht(columns: dict[str, np.ndarray]) -> bool:
    """Whether the columns are a published Push-T set: `state` [N, 5], `keypoint` [N, 9, 2], `action` [N, 2]."""
    wanted = {"state": (5,), "keypoint": (9, 2), "action": (2,)}
    return all(key in columns and columns[key].shape[1:] == shape for key, shape in wanted.items())


def from_raw(columns: dict[str, np.ndarray], ends: np.ndarray) -> Episodes:
    """Return the episodes of the raw columns `state`, `action` and, if present, `img` (see the module)."""
    state = np.asarray(columns["state"], dtype=np.float32)
    features = {
        "observation.state": Feature("float32", (2,), ("agent_x", "agent_y")),
        "observation.environment_state": Feature(
            "float32", (16,), tuple(f"{axis}{k}" for k in range(8) for axis in "xy")
        ),
        "action": Feature("float32", (2,), ("target_x", "target_y")),
        "task_index": Feature("int64", (1,)),
    }
    data = {
        "observation.state": state[:, :2].copy(),
        "observation.environment_state": block_corners(state[:, 2:5]),
        "action": np.asarray(columns["action"], dtype=np.float32),
        "task_index": np.zeros((len(state), 1), dtype=np.int64),
    }
    if "img" in columns:
        features["observation.image"] = Feature("image", columns["img"].shape[1:])
        data["observation.image"] = columns["img"]
    return Episodes(features, data, ends, FPS, (TASK,))


def with_images(episodes: Episodes, path: str | Path) -> Episodes:
    """Return the episodes with the column `observation.image` added.

    Args:
        episodes: Push-T episodes.
        path: A zarr array uint8 `[N, H, W, 3]`, one picture per frame (the pictures of the published sets are often
            kept apart from the numbers).
    """
    from dipole.data.formats import zarr_replay

    images = zarr_replay.read_array(Path(path))
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != episodes.num_frames:
        raise DipoleError(
            f"{path} is {images.dtype} {images.shape}: it must be uint8 [{episodes.num_frames}, H, W, 3], a picture "
            "per frame of the same episodes"
        )
    features = episodes.features | {"observation.image": Feature("image", images.shape[1:])}
    columns = episodes.columns | {"observation.image": images}
    return Episodes(features, columns, episodes.ends, episodes.fps, episodes.tasks)
