"""One update of a policy on a GPU, recorded once as a CUDA graph and launched as a whole from then on.

An update of a small network is a thousand kernels of a few microseconds each: launching them one by one from Python
takes ten times as long as running them. A CUDA graph is their record. It computes the same numbers; what changes from
update to update (batch, noise, learning rate) is written into buffers that it reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dipole.training.draws import ShardedDraws

Batch = dict[str, Tensor]

# Libraries choose algorithms, and the optimizer makes its state, in the first updates: they must not be recorded.
_EAGER_UPDATES = 3


class Compute(Protocol):
    """Loss, gradients and optimizer step for one batch."""

    def __call__(self, batch: Batch, noise: Generator, draws: AbstractContextManager[Any]) -> Tensor:
        """Return loss and gradient norm, `[2]`, on the device; `noise` is drawn from inside of `draws`."""


class NotRecordable(RuntimeError):
    """An update does what a graph cannot repeat."""


class RecordedDraws(TorchFunctionMode):
    """Random draws that a graph can repeat: made on the CPU, as always, and read by the graph from fixed buffers.

    Inside of `recording(noise)` every draw from `noise` is made, remembered, and returned as a buffer on the device;
    `refill(noise)` makes the same draws again, into the buffers; inside of `reading(noise)` the buffers are returned.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._draws: list[tuple[Callable[..., Tensor], Tensor]] = []
        self._noise: Generator | None = None
        self._left: Iterator[Tensor] | None = None

    @contextmanager
    def recording(self, noise: Generator) -> Iterator[None]:
        """Remember what is drawn from `noise`."""
        self._draws.clear()
        self._noise, self._left = noise, None
        with self:
            yield

    @contextmanager
    def reading(self, noise: Generator) -> Iterator[None]:
        """Return buffers instead of drawing from `noise`."""
        self._noise, self._left = noise, iter([buffer for _, buffer in self._draws])
        with self:
            yield

    def refill(self, noise: Generator) -> None:
        """Draw anew what was recorded."""
        for draw, buffer in self._draws:
            buffer.copy_(_pinned(draw(generator=noise), self.device), non_blocking=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, unless it draws from the noise."""
        kwargs = dict(kwargs or {})
        if self._noise is None or kwargs.get("generator") is not self._noise:
            return func(*args, **kwargs)
        if self._left is not None:
            return self._next(self._left)
        for key in ("generator", "device"):
            kwargs.pop(key, None)
        if args and isinstance(args[0], Tensor):
            if args[0].device.type != "cpu":
                raise NotRecordable("what is drawn depends on values on the GPU")
            args = (args[0].clone(), *args[1:])
        draw = partial(func, *args, **kwargs)
        buffer = _pinned(draw(generator=self._noise), self.device).to(self.device, non_blocking=True, copy=True)
        self._draws.append((draw, buffer))
        return buffer

    def _next(self, left: Iterator[Tensor]) -> Tensor:
        for buffer in left:
            return buffer
        raise NotRecordable(f"more is drawn than the {len(self._draws)} draws of the update before")


class RecordedUpdate:
    """Does updates; after a few, from a graph.

    A policy whose loss waits for the GPU (it reads a value back, or chooses its way by one) cannot be recorded: that
    is found out in time, said in a warning, and its updates go on as before.

    Args:
        optimizer: The optimizer of the updates. Its learning rates become tensors, which the graph reads.
        device: The GPU.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._draws = RecordedDraws(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_left: float = _EAGER_UPDATES
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)

    def __call__(self, compute: Compute, batch: Batch, noise: Callable[[], Generator]) -> Tensor:
        """Do an update and return loss and gradient norm, `[2]`.

        Args:
            compute: What does it, always the same; it is not kept, so that its owner can own this object.
            batch: On the GPU. A batch of another shape than the recorded one is computed without the graph.
            noise: Returns this update's generator, on the CPU, the same at every call.
        """
        if self._graph is None and self._eager_left <= 0:
            return self._record(compute, batch, noise)
        if self._graph is None or _shapes(batch) != _shapes(self._batch):
            self._eager_left -= 1
            return _eager(compute, batch, noise())
        for key, value in batch.items():
            self._batch[key].copy_(value)
        self._draws.refill(noise())
        self._graph.replay()
        return self._result.clone()

    def _record(self, compute: Compute, batch: Batch, noise: Callable[[], Generator]) -> Tensor:
        """Do an update as it will be recorded, watching whether it waits for the GPU; then record."""
        self._batch = {key: value.clone() for key, value in batch.items()}
        drawn = noise()
        try:
            with _no_waiting():
                result = compute(self._batch, drawn, self._draws.recording(drawn))
        except RuntimeError as error:
            if not isinstance(error, NotRecordable) and "synchronizing CUDA operation" not in str(error):
                raise
            self._give_up(error)
            return _eager(compute, batch, noise())
        for group in self._optimizer.param_groups:
            group["capturable"] = True
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = compute(self._batch, drawn, self._draws.reading(drawn))
            self._graph = graph
        except RuntimeError as error:
            self._give_up(error)
        return result

    def _give_up(self, error: Exception) -> None:
        self._eager_left = float("inf")
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            group["capturable"] = False
        reason = str(error).splitlines()[0]
        warnings.warn(f"updates are not recorded as a CUDA graph, only slower for it: {reason}", stacklevel=2)


def _eager(compute: Compute, batch: Batch, noise: Generator) -> Tensor:
    return compute(batch, noise, ShardedDraws(noise, 0, 1, len(next(iter(batch.values())))))


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make whatever waits for the GPU raise."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch says that it may overlook some: recording then fails, which is no harm
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _pinned(value: Tensor, device: torch.device) -> Tensor:
    """Return memory that a GPU can copy from while the CPU goes on."""
    return value.pin_memory() if device.type == "cuda" else value


def _shapes(batch: Batch) -> dict[str, Any]:
    return {key: (value.shape, value.dtype) for key, value in batch.items()}
