"""Training windows per second on one core: 20-d observations (To = 2), 2-d actions (Tp = 16), batches of 4096.

    python benchmarks/window_loader.py

`run` measures `Windows.batch` as training calls it: random windows, all arrays copied. For comparison, the same batches
by plain numpy indexing (frame numbers computed and clipped per batch, then `column[frames]`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from dipole.data import Episodes, Windows

TARGET = 1e6
BATCH, REPEATS, BATCHES = 4096, 7, 40
TO, TP, TA = 2, 16, 8


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


def run() -> dict[str, object]:
    """Return the measurement: `value` windows per second, and the plain way's as `baseline`."""
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
        "passed": value >= TARGET,
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
