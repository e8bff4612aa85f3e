"""Load: 64 clients for a minute, every reply checked; and what batching gains at 16 clients.

    python benchmarks/server/load.py [--seconds 60] [--short 15]

A client sends its next request as soon as it has the reply. Every request names one of its client's own observations
and a seed for the noise, and carries an id; the reply must have that id, and the actions that the policy, called here
alone, gives for that observation and seed. A reply of another client, another request or another state would differ.
The other server answers one request at a time (`--max-batch 1`); same policy, same clients.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import STATE, quantiles, rss_mb, save, save_small, server_process, small_policy
from websockets.asyncio.client import connect

from dipole.evaluation.seeds import policy_generator
from dipole.serving.codec import pack, unpack

VARIANTS = 3
TOLERANCE = (
    1e-3  # of actions within -1 and 1: batches round differently through 5 network calls; strangers differ by 1e-1
)


def cases(clients: int) -> list[list[tuple[dict[str, Any], np.ndarray]]]:
    """Return for each client its requests and the actions they must be answered with."""
    policy, rng = small_policy(), np.random.default_rng(0)
    found: list[list[tuple[dict[str, Any], np.ndarray]]] = []
    for client in range(clients):
        own = []
        for variant in range(VARIANTS):
            history, seed = rng.uniform(-1, 1, (2, 18)).astype(np.float32), 10 * client + variant
            rows = {STATE: torch.from_numpy(history)[None]}
            chunk, _ = policy.act(rows, {}, generator=[policy_generator(seed)])
            own.append(({STATE: history, "dipole/seed": seed}, chunk[0].numpy()))
        found.append(own)
    return found


def nearest_strangers(expected: list[list[tuple[dict[str, Any], np.ndarray]]]) -> float:
    """Return how far apart the two most similar answers are: it must be far beyond the tolerance."""
    answers = np.stack([actions.ravel() for own in expected for _, actions in own])
    distances = np.abs(answers[:, None] - answers[None]).max(-1)
    return float(distances[~np.eye(len(answers), dtype=bool)].min())


class Tally:
    """What the clients saw."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.sent = self.answered = self.mixed_up = self.refused = 0
        self.worst = 0.0


async def talk(url: str, name: int, own: list[Any], until: float, tally: Tally) -> None:
    async with connect(url, compression=None, max_size=None) as ws:
        await ws.recv()
        k = 0
        while time.monotonic() < until:
            request, expected = own[k % VARIANTS]
            fingerprint = f"{name}-{k}"
            begin = time.perf_counter()
            tally.sent += 1
            await ws.send(pack({**request, "dipole/id": fingerprint}))
            reply = unpack(await ws.recv())
            tally.latencies.append(1000 * (time.perf_counter() - begin))
            if "dipole/error" in reply:
                tally.refused += 1
            else:
                error = float(np.abs(reply["actions"] - expected).max())
                tally.answered += 1
                tally.mixed_up += reply["dipole/id"] != fingerprint or error > TOLERANCE
                tally.worst = max(tally.worst, error)
            k += 1


async def attack(url: str, expected: list[Any], seconds: float) -> tuple[Tally, float]:
    tally, begin = Tally(), time.monotonic()
    await asyncio.gather(*(talk(url, n, own, begin + seconds, tally) for n, own in enumerate(expected)))
    return tally, time.monotonic() - begin


def measure(folder: Path, expected: list[Any], seconds: float, *words: Any) -> dict[str, Any]:
    audit = folder / f"audit-{len(list(folder.iterdir()))}"
    limits = ("--rate", 1e6, "--max-sessions", 80, "--threads", 1, "--audit", audit)
    with server_process(folder / "policy", *limits, *words) as (process, url):
        asyncio.run(attack(url, expected, 1.0))
        before = rss_mb(process.pid)
        tally, elapsed = asyncio.run(attack(url, expected, seconds))
        after = rss_mb(process.pid)
    return {
        "clients": len(expected),
        "seconds": round(elapsed, 1),
        "requests": tally.sent,
        "lost": tally.sent - tally.answered - tally.refused,
        "mixed_up": tally.mixed_up,
        "refused": tally.refused,
        "worst_difference": tally.worst,
        "requests_per_s": round(tally.answered / elapsed, 1),
        "latency_ms": quantiles(tally.latencies),
        "rss_mb": [round(before, 1), round(after, 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--short", type=float, default=15.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    expected = cases(64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_small(folder / "policy")
        # One after the other, twice, so that a change of the machine's load shows.
        runs = [(16, "batched", ()), (16, "one at a time", ("--max-batch", 1))] * 2
        at_16: dict[str, list[dict[str, Any]]] = {}
        for clients, kind, words in runs:
            at_16.setdefault(kind, []).append(measure(folder, expected[:clients], args.short, *words))
        heavy = measure(folder, expected, args.seconds, "--max-batch", 64)
    rates = {kind: [run["requests_per_s"] for run in found] for kind, found in at_16.items()}
    gain = float(np.mean(rates["batched"]) / np.mean(rates["one at a time"]))
    save(
        "server_load",
        {
            "policy": "MLP 4 x 512, Euler-5, state 18, actions 8 x 4",
            "nearest_strangers": nearest_strangers(expected),
            "tolerance": TOLERANCE,
            "at_64": heavy,
            "at_16": at_16,
            "gain_at_16": round(gain, 2),
            "holds": heavy["lost"] == heavy["mixed_up"] == 0 and gain >= 3,
        },
    )


if __name__ == "__main__":
    main()
