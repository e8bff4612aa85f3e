"""Your own environment and your own demonstrator: collect, train and evaluate without registering anything.

The task: a point on a plane must reach a goal that is somewhere else in every episode. Two things are written here, an
environment (`SingleEnv`) and a demonstrator (`Expert`); everything else is dipole's.
Run it:  python examples/bring_your_own_env.py
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import count, islice

import numpy as np
import torch

from dipole.data import Episodes, Feature
from dipole.envs import EnvSpec, Transition
from dipole.envs.recording import Recipe, record
from dipole.envs.vector import SyncVector
from dipole.evaluation import evaluate
from dipole.policies import load_policy, make_config, make_policy
from dipole.training import TrainConfig, train

STEP, NEAR = 0.1, 0.08
SPEC = EnvSpec(
    name="reach2d",
    observation={"observation.state": Feature("float32", (4,), ("x", "y", "goal_x", "goal_y"))},
    action=Feature("float32", (2,), ("dx", "dy")),
    action_low=np.full(2, -STEP, np.float32),
    action_high=np.full(2, STEP, np.float32),
    max_steps=40,
    fps=10.0,
    task="Reach the goal.",
)


class Reach2D:
    """One environment. Time limits, clipping and batching are the vectoriser's business."""

    spec = SPEC

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Start the episode that `seed` names: the seed alone decides it."""
        rng = np.random.default_rng(seed)
        self.p, self.goal = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
        return self._observe()

    def step(self, action: np.ndarray) -> Transition:
        """Move the point."""
        self.p = self.p + action
        distance = float(np.linalg.norm(self.goal - self.p))
        return Transition(self._observe(), reward=-distance, terminated=False, success=distance < NEAR, info={})

    def _observe(self) -> dict[str, np.ndarray]:
        return {"observation.state": np.concatenate([self.p, self.goal]).astype(np.float32)}

    def render(self) -> np.ndarray:
        """Return a picture: the point on black."""
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[tuple(np.clip(32 + 30 * self.p[::-1], 0, 63).astype(int))] = 255
        return picture

    def close(self) -> None:
        """Nothing to free."""


class Expert:
    """Goes straight to the goal."""

    def reset(self, rows: Sequence[int], seeds: Sequence[int], obs: dict[str, np.ndarray]) -> None:
        """Nothing to remember."""

    def act(self, obs: dict[str, np.ndarray], rows: Sequence[int]) -> np.ndarray:
        """Return the clean actions `[len(rows), 2]`."""
        return np.clip(obs["observation.state"][:, 2:] - obs["observation.state"][:, :2], -STEP, STEP)


def main() -> None:
    """Collect, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a shorter training")
    steps, episodes = (100, 16) if parser.parse_args().fast else (800, 100)
    env = SyncVector([Reach2D] * 16)

    attempts = islice(record(env, Expert(), count(0), Recipe(noise=0.02, label="clean", steps_after_success=16)), 60)
    features = {**SPEC.observation, "action": SPEC.action}
    demos = Episodes.from_list([{key: a.columns[key] for key in features} for a in attempts], features, SPEC.fps)
    torch.manual_seed(0)
    network = {"name": "mlp", "width": 128, "num_blocks": 2}
    policy = make_policy(make_config(demos, network=network, pred_horizon=8, action_horizon=4), demos)
    with tempfile.TemporaryDirectory() as out:
        options = TrainConfig(steps=steps, batch_size=256, lr=2e-3, ema_decay=0.99, precision="fp32")
        train(policy, demos, options, f"{out}/run")
        found = evaluate(load_policy(f"{out}/run"), env, episodes=episodes, latency_calls=0)
    print(f"success {found.success.value:.0%} ({found.success.low:.0%} to {found.success.high:.0%})")


if __name__ == "__main__":
    main()
