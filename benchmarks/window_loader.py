"""Training windows per second on one core: 20-d observations (To = 2), 2-d actions (Tp = 16), batches of 4096.

    python benchmarks/window_loader.py [--device cuda]

`run` measures `Windows.batch` as training calls it: random windows, all arrays copied. For comparison, the same batches
by plain numpy indexing (frame numbers computed and clipped per batch, then `column[frames]`). `data_wait` is the share
of the time that training (batch 64) waits for its data: the most that the CPU or the GPU idles for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dipole.data import Episodes, Windows
from dipole.policies import make_config, make_policy
from dipole.training import TrainConfig, read_metrics, train

TARGET = 1e6
BATCH, REPEATS, BATCHES = 4096, 7, 40
TO, TP, TA = 2, 16, 8
UPDATES = 200
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp"},
    "U-Net of 4.6 M parameters": {"name": "unet1d", "down_dims": [64, 128, 256]},
}


def make_windows() -> Windows:
    """Return the windows of 206 random episodes of Push-T's lengths (49 to 246 frames)."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(49, 247, size=206)
    episodes = [
        {
            "observation.state": rng.normal(size=(n, 20)).astype(np.float32),
            "action": rng.normal(size=(n, 2)).astype(np.float32),
        }
        for n in lengths
    ]
    return Windows(Episodes.from_list(episodes), ["observation.state"], "action", TO, TP, TA)


def plain_batch(windows: Windows, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return the same batch by plain indexing."""
    data = windows.episodes
    now = windows.frames[indices]
    episode = np.searchsorted(data.ends, now, side="right")
    first, last = data.starts[episode][:, None], data.ends[episode][:, None] - 1
    wanted = now[:, None] + np.arange(1 - TO, TP - TO + 1)
    frames = np.clip(wanted, first, last)
    seen = np.clip(now[:, None] + np.arange(1 - TO, 1), first, last)
    return {
        "observation.state": data.columns["observation.state"][seen],
        "action": data.columns["action"][frames],
        "action_is_pad": frames != wanted,
    }


def per_second(batch: Callable[[np.ndarray], dict[str, np.ndarray]], windows: Windows) -> float:
    """Return windows per second: the best of a few repeats, as other processes share the machine."""
    rng = np.random.default_rng(1)
    order = [rng.integers(0, len(windows), BATCH) for _ in range(BATCHES)]
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for indices in order:
            batch(indices)
        best = min(best, time.perf_counter() - start)
    return BATCH * BATCHES / best


def data_wait(episodes: Episodes, network: dict[str, Any], device: str) -> float:
    """Return the share of the time that training waits for data: the median over intervals, without the first."""
    options: dict[str, Any] = {"device": "cpu"} if device == "cpu" else {}
    config = TrainConfig(steps=UPDATES, batch_size=64, val_fraction=0.0, log_every=20, **options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(make_policy(make_config(episodes, network=network), episodes), episodes, config, out, progress=False)
        return median([row["data_wait"] for row in read_metrics(out) if "data_wait" in row][1:])


def run(device: str = "cpu") -> dict[str, object]:
    """Return the measurement: `value` windows per second, the plain way's as `baseline`, and waits by network."""
    windows = make_windows()
    indices = np.random.default_rng(2).integers(0, len(windows), 512)
    ours, plain = windows.batch(indices), plain_batch(windows, indices)
    if not all(np.array_equal(ours[key], plain[key]) for key in plain):
        raise AssertionError("Windows.batch and plain indexing differ")
    value = per_second(windows.batch, windows)
    baseline = per_second(lambda indices: plain_batch(windows, indices), windows)
    return {
        "name": "window_loader",
        "value": value,
        "unit": "windows/s",
        "target": TARGET,
        "baseline": baseline,
        "data_wait": {name: data_wait(windows.episodes, network, device) for name, network in NETWORKS.items()},
        "passed": value >= TARGET,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    print(json.dumps(run(parser.parse_args().device), indent=1))
