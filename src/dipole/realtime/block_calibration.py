"""Calibration of the block cache: how alike the outputs of each branch are at any two calls of a sampling run.

    calibration = calibrate(policy, observations)                 # one uncached call, remembered as numbers

`dipole.realtime.block_schedule` makes schedules from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dipole.errors import DipoleError
from dipole.policies.policy import Observation
from dipole.realtime.backends import with_network
from dipole.realtime.block_cache import cacheable, visited_levels, weights_digest
from dipole.serialization import from_dict, read_json, write_json

FILE = "block_cache.json"
FORMAT = 1

Metric = Literal["cosine", "mse", "l1"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, eq=False)
class Calibration:
    """How alike the outputs of each branch are at any two calls of a sampling run, averaged over observations.

    Attributes:
        levels: Levels visited (`[L+1]`).
        weights: Digest of the network's weights.
        observations: How many were averaged over.
        matrices: Metric -> branch -> symmetric `[K, K]`.
    """

    levels: tuple[float, ...]
    weights: str
    observations: int
    matrices: dict[Metric, dict[str, np.ndarray]]

    @property
    def branches(self) -> tuple[str, ...]:
        """Return the branches, in the order they are computed."""
        return tuple(self.matrices["cosine"])

    @property
    def num_calls(self) -> int:
        """Return K."""
        return len(self.matrices["cosine"][self.branches[0]])

    def save(self, folder: str | Path) -> Path:
        """Write `block_cache.json` into a checkpoint folder; return the file."""
        path = Path(folder) / FILE
        index = np.triu_indices(self.num_calls)
        table = {
            "format": FORMAT,
            "levels": list(self.levels),
            "weights": self.weights,
            "observations": self.observations,
            "num_calls": self.num_calls,
            # six digits are more than a few observations can tell, and keep the file readable
            "matrices": {
                metric: {name: [float(f"{v:.6g}") for v in matrix[index]] for name, matrix in part.items()}
                for metric, part in self.matrices.items()
            },
        }
        write_json(path, table)
        return path


@dataclass(frozen=True)
class _Stored:
    format: int
    levels: tuple[float, ...]
    weights: str
    observations: int
    num_calls: int
    matrices: dict[str, dict[str, tuple[float, ...]]]


def load_calibration(folder: str | Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        DipoleError: The file is missing or is something else.
    """
    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    stored = from_dict(_Stored, read_json(path), str(path))
    count = stored.num_calls
    sizes = {len(values) for part in stored.matrices.values() for values in part.values()}
    if stored.format != FORMAT or set(stored.matrices) != set(METRICS) or sizes != {count * (count + 1) // 2}:
        raise DipoleError(f"{path}: not a calibration of format {FORMAT}: remove it and calibrate again")
    matrices: Any = {
        metric: {name: _symmetric(values, count) for name, values in part.items()}
        for metric, part in stored.matrices.items()
    }
    return Calibration(stored.levels, stored.weights, stored.observations, matrices)


def _symmetric(values: Sequence[float], count: int) -> np.ndarray:
    matrix = np.zeros((count, count))
    matrix[np.triu_indices(count)] = values
    return np.triu(matrix) + np.triu(matrix, 1).T


class _Recorder(nn.Module):
    """Calls a network and keeps every branch's output, `[K]` of `[B, n]`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in network.branches}  # type: ignore[union-attr]

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = self.network(x, time, cond, self._hook)
        return out

    def _hook(self, name: str, compute: Any) -> Tensor:
        out: Tensor = compute()
        self.outputs[name].append(out.flatten(1))
        return out


@torch.no_grad()
def calibrate(policy: Any, observations: Observation, seed: int = 0, rows: int = 4) -> Calibration:
    """Run a policy uncached on some observations and compare the outputs of each branch at any two calls.

    Args:
        policy: A policy whose network has branches.
        observations: Raw observations `[N, To, ...]`.
        seed: Of the noise.
        rows: Observations at once: what is kept in memory is the output of every branch at every call for these.

    Raises:
        DipoleError: The network's branches cannot be intercepted.
    """
    reason = cacheable(policy)
    if reason is not None:
        raise DipoleError(f"block cache: {reason}")
    count = len(next(iter(observations.values())))
    sums: dict[Metric, dict[str, np.ndarray]] = {metric: {} for metric in METRICS}
    for start in range(0, count, rows):
        part = {key: value[start : start + rows] for key, value in observations.items()}
        size = len(next(iter(part.values())))
        recorder = _Recorder(policy.network)
        generators = [torch.Generator().manual_seed(seed * count + start + i) for i in range(size)]
        with_network(policy, recorder).act(part, policy.initial_state(size), generator=generators)
        for name, outputs in recorder.outputs.items():
            for metric, value in _compare(torch.stack(outputs, 1).double()).items():
                sums[metric][name] = sums[metric].get(name, 0) + value.sum(0).cpu().numpy()
    means: Any = {metric: {name: total / count for name, total in part.items()} for metric, part in sums.items()}
    return Calibration(visited_levels(policy), weights_digest(policy.network), count, means)


def _compare(outputs: Tensor) -> dict[Metric, Tensor]:
    """Return each metric between the K outputs of every row: `[B, K, n]` -> `[B, K, K]`."""
    gram = outputs @ outputs.mT
    square = gram.diagonal(dim1=1, dim2=2)
    norm = square.sqrt().clamp(min=1e-30)
    size = outputs.shape[-1]
    distance = (square[:, :, None] + square[:, None, :] - 2 * gram).clamp(min=0)
    return {
        "cosine": gram / (norm[:, :, None] * norm[:, None, :]),
        "mse": distance / size,
        "l1": torch.cdist(outputs, outputs, p=1) / size,
    }
