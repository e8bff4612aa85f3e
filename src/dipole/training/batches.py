"""Batches in an order that is a pure function of (seed, step), gathered for one process out of several."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dipole.data.features import single_precision
from dipole.errors import DipoleError
from dipole.training.config import TrainConfig
from dipole.training.seeding import derive

# Gathering a batch above this size is worth a thread: below, handing it over costs more than copying it.
_LARGE_BATCH_BYTES = 4_000_000


class Source(Protocol):
    """Samples by index, gathered many at a time; `dipole.data.Windows` is one."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples at `indices` `[B]`, each array `[B, ...]`."""


class Subset:
    """Some samples of a source, e.g. the windows of the training episodes; nothing is copied."""

    def __init__(self, source: Source, chosen: np.ndarray) -> None:
        self.source, self.chosen = source, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples at `indices` of the subset."""
        return self.source.batch(self.chosen[indices])


class EpochOrder:
    """An endless sequence of epochs, each a permutation given by (seed, epoch), cut into batches.

    A batch may cross from one epoch into the next; no sample is dropped or seen twice in an epoch.

    Args:
        count: Number of samples.
        batch_size: Samples per batch.
        seed: Seed of the run.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count < 1:
            raise DipoleError("the dataset has no training windows")
        self.count = count
        self.batch_size = batch_size
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng(derive(seed, "epoch", epoch)).permutation(count)
        )

    def indices(self, step: int) -> np.ndarray:
        """Return the samples of update `step`, int64 `[batch_size]`."""
        position, left, parts = step * self.batch_size, self.batch_size, []
        while left:
            epoch, offset = divmod(position, self.count)
            part = self._permutation(epoch)[offset : offset + left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        """Return how many epochs are over after `step` updates."""
        return step * self.batch_size / self.count


def shard(batch_size: int, process: int, processes: int) -> slice:
    """Return the rows of a global batch that belong to one process.

    Raises:
        DipoleError: The batch cannot be divided evenly.
    """
    if batch_size % processes:
        raise DipoleError(
            f"batch_size {batch_size} cannot be divided among {processes} processes: use a multiple of {processes}"
        )
    size = batch_size // processes
    return slice(process * size, (process + 1) * size)


def to_tensors(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Return the arrays as tensors on `device`; copies to a GPU go through pinned memory and do not block.

    float64, as robomimic and Minari keep numbers, becomes float32: networks have no other.
    """
    tensors = {key: torch.from_numpy(single_precision(value)) for key, value in batch.items()}
    if device.type == "cpu":
        return tensors
    pin = device.type == "cuda"
    return {key: (value.pin_memory() if pin else value).to(device, non_blocking=True) for key, value in tensors.items()}


class Loader:
    """Yields one process's rows of the batches `start`, `start + 1`, ... up to `stop`.

    Attributes:
        waited: Seconds the consumer has spent waiting for data.
    """

    def __init__(
        self,
        source: Source,
        order: EpochOrder,
        rows: slice,
        device: torch.device,
        start: int = 0,
        stop: int | None = None,
        prefetch: int = 0,
    ) -> None:
        self.source, self.order, self.rows, self.device = source, order, rows, device
        self.start, self.stop, self.prefetch = start, stop, prefetch
        self.waited = 0.0

    @classmethod
    def of(
        cls, source: Source, config: TrainConfig, accelerator: Accelerator, start: int = 0, stop: int | None = None
    ) -> Loader:
        """Return the loader of a run, in this process; `prefetch=None` is decided by the size of a batch."""
        order = EpochOrder(len(source), config.batch_size, config.seed)
        rows = shard(config.batch_size, accelerator.process_index, accelerator.num_processes)
        prefetch = config.prefetch
        if prefetch is None:
            one = sum(array.nbytes for array in source.batch(order.indices(0)[:1]).values())
            prefetch = 2 if one * (rows.stop - rows.start) > _LARGE_BATCH_BYTES else 0
        return cls(source, order, rows, accelerator.device, start, stop, prefetch)

    def load(self, step: int) -> dict[str, Tensor]:
        """Return this process's rows of the batch of one update."""
        return to_tensors(self.source.batch(self.order.indices(step)[self.rows]), self.device)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches in order."""
        batches = self._ahead() if self.prefetch else self._inline()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _inline(self) -> Iterator[dict[str, Tensor]]:
        step = self.start
        while self.stop is None or step < self.stop:
            yield self.load(step)
            step += 1

    def _ahead(self) -> Iterator[dict[str, Tensor]]:
        # One thread keeps the order of the gathers; depth hides a slow one now and then.
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dipole-loader")
        waiting: deque[Future[dict[str, Tensor]]] = deque()
        step = self.start
        try:
            while self.stop is None or step < self.stop or waiting:
                while len(waiting) < self.prefetch and (self.stop is None or step < self.stop):
                    waiting.append(pool.submit(self.load, step))
                    step += 1
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
