"""Training speed, dipole against LeRobot: same data, same U-Net, same batch, on this machine's CPU or GPU.

    python benchmarks/training_speed.py --peer-python PATH_TO_A_PYTHON_WITH_LEROBOT_0.4 [--device cuda]

Both train a 1-D U-Net, a small and a large one, on random state demonstrations written as one LeRobotDataset v3.0,
batch 64, and count windows per second of the whole loop (loading, forward, backward, optimizer) after a start. Each
runs with its defaults (LeRobot in fp32 with data loader workers, two on a CPU, eight beside a GPU; dipole chooses bf16
where that is measured to be faster, and records the update as a CUDA graph on a GPU), and with what it offers to be
faster: a compiled network, for LeRobot bf16, for both together. `ratio` is between the fastest of either side,
`ratio, defaults` between the defaults. What our parts are worth is measured too: fp32, and on a GPU without the graph.
They run one after the other, never at once, in several rounds, because a machine's speed wanders: figures are medians,
ratios medians of each round's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

SIZES = {"4.6 M": [64, 128, 256], "63.5 M": [256, 512, 1024]}
BATCH = 64
SECONDS = {"4.6 M": 15.0, "63.5 M": 40.0}
# Where something is compiled, and on a GPU, a number of updates: compiling would take its share of the seconds.
STEPS = {"cpu": {"4.6 M": 300, "63.5 M": 60}, "cuda": {"4.6 M": 1500, "63.5 M": 1500}}
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_fp32": {"precision": "fp32"},
    "ours_compiled": {"compile": True},
    "ours_fp32_without_graph": {"precision": "fp32", "cuda_graph": False},
}
PEER_VARIANTS: dict[str, list[str]] = {
    "peer": [],
    "peer_compiled": ["compiled"],
    "peer_bf16": ["bf16"],
    "peer_bf16_compiled": ["bf16", "compiled"],
}
PEER = Path(__file__).parent / "peers" / "lerobot_training_speed.py"


def run(peer_python: str | None = None, device: str = "cpu", rounds: int = 3) -> dict[str, Any]:
    """Return windows per second of both (`ours`, `peer`), their ratio, and of the variants; every size under `all`."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(data)
        sizes = [_measure(data, Path(folder), name, peer_python, device, rounds) for name in SIZES]
    return {**sizes[0], "name": "training_speed", "all": sizes}


def _measure(data: Path, folder: Path, name: str, peer_python: str | None, device: str, rounds: int) -> dict[str, Any]:
    found: list[dict[str, float]] = []
    for number in range(rounds):
        found.append(_round(data, folder / f"{name} {number}", name, peer_python, device))
        print(name, {variant: round(speed) for variant, speed in found[-1].items()}, file=sys.stderr, flush=True)
    figures = {key: median([speeds[key] for speeds in found]) for key in found[0]}
    if peer_python is not None:
        figures["ratio"] = median([_fastest(speeds, "ours") / _fastest(speeds, "peer") for speeds in found])
        figures["ratio, defaults"] = median([speeds["ours"] / speeds["peer"] for speeds in found])
    return {
        "name": f"U-Net of {name} parameters",
        **figures,
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "unit": "windows/s",
        "target": "ratio >= 5",
        "threads": torch.get_num_threads(),
        "rounds": found,
    }


def _cpu() -> str:
    """Return the name of the CPU, and whether it multiplies matrices of bfloat16 in tiles."""
    from dipole.evaluation.machine import machine

    return f"{machine()['processor']}{', AMX' if torch.cpu._is_amx_tile_supported() else ''}"


def _round(data: Path, folder: Path, name: str, peer_python: str | None, device: str) -> dict[str, float]:
    speeds = {}
    for variant, options in VARIANTS.items():
        if device == "cuda" or "cuda_graph" not in options:
            speeds[variant] = our_speed(data, folder / variant, device, name, **options)
    for variant, words in PEER_VARIANTS.items():
        if peer_python is not None:
            speeds[variant] = peer_speed(peer_python, data, device, name, words)
    return speeds


def _fastest(speeds: dict[str, float], side: str) -> float:
    return max(speed for variant, speed in speeds.items() if variant.startswith(side))


def write_data(folder: Path) -> None:
    """Write 50 episodes of 200 frames, as large as PushT's states."""
    from dipole.data import Episodes, Feature
    from dipole.data.formats import lerobot

    rng = np.random.default_rng(0)
    sizes = {"observation.state": 2, "observation.environment_state": 16, "action": 2}
    features = {key: Feature("float32", (size,)) for key, size in sizes.items()}
    episodes = [{key: rng.random((200, size), dtype=np.float32) for key, size in sizes.items()} for _ in range(50)]
    lerobot.write(Episodes.from_list(episodes, features, 10.0, ()), folder)


def our_speed(data: Path, out: Path, device: str, size: str, **options: Any) -> float:
    """Return dipole's windows per second: the median over intervals of the log, without the first, which compiles."""
    from dipole.data import load
    from dipole.policies import make_config, make_policy
    from dipole.training import TrainConfig, read_metrics, train

    episodes = load(data)
    policy = make_policy(make_config(episodes, network={"name": "unet1d", "down_dims": SIZES[size]}), episodes)
    if device == "cuda" or options.get("compile"):
        options["steps"] = STEPS[device][size]
    else:
        options.update(steps=None, minutes=SECONDS[size] / 60)
    if device == "cpu":
        options["device"] = "cpu"
    config = TrainConfig(batch_size=BATCH, val_fraction=0.0, save_every=10**9, log_every=10, **options)
    train(policy, episodes, config, out, progress=False)
    return median([row["samples_per_s"] for row in read_metrics(out) if "samples_per_s" in row][1:])


def peer_speed(python: str, data: Path, device: str, size: str, options: list[str]) -> float:
    """Return LeRobot's windows per second."""
    words = [python, str(PEER), str(data), str(BATCH), str(SECONDS[size]), json.dumps(SIZES[size]), device, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"the peer failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["windows_per_s"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(run(args.peer_python, args.device, args.rounds), indent=1))
