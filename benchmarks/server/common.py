"""What the server's benchmarks share: a stand-in policy, a server process, writing results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipole.data import Feature
from dipole.data.normalizer import Normalizer
from dipole.evaluation.machine import machine, versions
from dipole.policies import DiffusionPolicy, PolicyConfig, save_policy

RESULTS = Path(__file__).parents[1] / "results"
STATE = "observation.state"


def small_policy(seed: int = 0) -> DiffusionPolicy:
    """Return an untrained policy of the default size for vectors (MLP of 4 blocks, 512 wide, Euler-5)."""
    state, action = Feature("float32", (18,)), Feature("float32", (4,))
    config = PolicyConfig({STATE: state}, action, 2, 16, 8, network={"name": "mlp"})
    stats = {
        STATE: {"min": np.full(18, -1, np.float32), "max": np.full(18, 1, np.float32)},
        "action": {"min": np.full(4, -1, np.float32), "max": np.full(4, 1, np.float32)},
    }
    torch.manual_seed(seed)
    policy = DiffusionPolicy(config, Normalizer.fit(stats, dict.fromkeys(stats, "min_max"))).eval()
    with torch.no_grad():  # untrained output layers may be zero, and then every answer is the same
        for parameter in policy.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return policy


def save_small(path: Path, seed: int = 0) -> Path:
    """Save `small_policy`."""
    return save_policy(small_policy(seed), path)


@contextlib.contextmanager
def server_process(
    *words: Any, port: int = 0, script: Path | None = None, log: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `dipole serve` (or a script that announces itself alike); yield the process and its address."""
    command = [sys.executable, "-c", "from dipole.cli import main; main()", "serve"]
    if script is not None:
        command = [sys.executable, str(script)]
    with tempfile.TemporaryDirectory() as folder:
        file = log or Path(folder) / "stderr"
        with file.open("ab") as stream:
            begin = file.stat().st_size
            process = subprocess.Popen(
                [*command, *map(str, words), "--port", str(port)],
                stderr=stream,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
            try:
                yield process, _address(process, file, begin)
            finally:
                if process.poll() is None:
                    process.terminate()
                    try:
                        process.wait(20)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()


def _address(process: subprocess.Popen[bytes], file: Path, begin: int) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        text = file.read_bytes()[begin:].decode(errors="replace")
        if found := re.search(r"serving on (\S+)", text):
            return found[1]
        if process.poll() is not None:
            raise RuntimeError(text)
        time.sleep(0.05)
    raise RuntimeError("the server did not start in time")


def rss_mb(pid: int) -> float:
    """Return a process's resident memory in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def quantiles(values: list[float]) -> dict[str, float]:
    """Return p50, p90, p99 and the largest."""
    found = {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 90, 99)}
    return {**found, "max": round(max(values), 3)}


def save(name: str, result: dict[str, Any]) -> None:
    """Write the results and print them."""
    document = {**result, "machine": machine(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(result, indent=1))
