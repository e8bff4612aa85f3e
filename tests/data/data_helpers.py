"""Small datasets for the tests of this folder."""

from pathlib import Path

import numpy as np
import pytest

from dipole.data import Episodes

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SHARED = ROOT.parent / "shared" / "data"


def shared(path):
    """Return a file of the shared real data, or skip the test visibly."""
    if not (SHARED / path).exists():
        pytest.skip(f"real data {path} is not beside the repository")
    return SHARED / path


def make_episodes(lengths=(5, 1, 9), seed=0, cameras=(), tasks=("reach", "push")):
    """Return random episodes with state [4], action [2], reward, done, tasks and, if wanted, 16 x 18 pictures."""
    rng = np.random.default_rng(seed)
    episodes = []
    for number, n in enumerate(lengths):
        episode = {
            "observation.state": rng.normal(size=(n, 4)).astype(np.float32),
            "action": rng.normal(size=(n, 2)).astype(np.float32),
            "next.reward": rng.normal(size=(n, 1)).astype(np.float32),
            "next.done": np.arange(n)[:, None] == n - 1,
            "task_index": np.full((n, 1), number % len(tasks)),
        }
        for camera in cameras:
            episode[f"observation.images.{camera}"] = rng.integers(0, 256, (n, 16, 18, 3), dtype=np.uint8)
        episodes.append(episode)
    return Episodes.from_list(episodes, fps=10, tasks=tasks)
