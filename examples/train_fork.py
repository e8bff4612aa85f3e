"""From demonstrations to an evaluated policy, on the smallest task where averaging two good answers is a crash.

`micro/fork2d`: go round a disc, left or right; the demonstrators do either. A policy that regresses to the mean walks
into the disc; one that samples does not. Run it:  python examples/train_fork.py
"""

import argparse
import tempfile
from pathlib import Path

import torch

from dipole.envs import collect, make
from dipole.evaluation import evaluate, rollout
from dipole.evaluation.seeds import episode_seeds
from dipole.policies import SamplerConfig, load_policy, make_config, make_policy
from dipole.training import TrainConfig, train

ENV = "micro/fork2d"


def main() -> None:
    """Collect, train, load, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a shorter training")
    parser.add_argument("--out", type=Path, help="run folder (default: a temporary one)")
    args = parser.parse_args()
    steps, episodes = (100, 16) if args.fast else (800, 100)
    torch.set_num_threads(1)

    # 1. Demonstrations: a scripted expert takes either side with probability 1/2.
    demos = collect(ENV, num_episodes=200, seed=0)
    print(f"{demos.num_episodes} demonstrations, {demos.num_frames} frames")

    # 2. A policy: a small FiLM-MLP that predicts the velocity of a flow. Weights come from torch's seed.
    torch.manual_seed(0)
    config = make_config(demos, network={"name": "mlp", "width": 128, "num_blocks": 2}, process="flow")
    policy = make_policy(config, demos)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary) / "fork"
        options = TrainConfig(steps=steps, batch_size=256, lr=2e-3, ema_decay=0.99, precision="fp32")
        result = train(policy, demos, options, out)
        print(f"{result.steps} updates in {result.seconds:.1f} s, loss {result.loss:.3f}")
        trained = load_policy(out)

    # 3. Unseen episodes: their seeds are disjoint from those of the demonstrations. Same seeds for every sampler.
    env_rows = min(50, episodes)
    for sampler in (SamplerConfig("euler", 1), SamplerConfig("euler", 5), SamplerConfig("dpmpp-2m", 5)):
        found = evaluate(
            trained.with_sampler(sampler), ENV, episodes=episodes, num_envs=env_rows, block=env_rows, latency_calls=0
        )
        rate = found.success
        print(
            f"{sampler.name:9s} {sampler.num_steps} steps: success {rate.value:.0%} "
            f"({rate.confidence:.0%} interval {rate.low:.0%} to {rate.high:.0%}, {found.num_episodes} episodes), "
            f"fingerprint {found.fingerprint}"
        )

    # 4. Which side did it take? The observations of every episode can be kept.
    env = make(ENV, num_envs=env_rows)
    runs = rollout(trained, env, episode_seeds(episodes=episodes), block=env_rows, keep_trajectories=True)
    env.close()
    paths = [episode.trajectory.observations["observation.state"] for episode in runs.episodes]
    right = sum(float(path[abs(path[:, 1]).argmin(), 0]) > 0 for path in paths)
    print(f"passed the disc on the right in {right} of {episodes} episodes, on the left in {episodes - right}")


if __name__ == "__main__":
    main()
