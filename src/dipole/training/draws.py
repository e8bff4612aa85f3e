"""Random draws of one process that are its rows of what a single process would have drawn.

A policy's loss draws noise and levels for the batch it is given. With several processes each sees a part of the batch;
so that their number changes nothing, every process draws for the whole batch, from the same seed, and keeps its rows.
Drawing on the CPU whatever the device also makes a run on a GPU see the noise of a run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

_FACTORIES = (torch.randn, torch.rand, torch.randint)


class ShardedDraws(TorchFunctionMode):
    """While active, draws from `generator` whose first axis is this process's rows are made for the whole batch.

    An axis of k times the rows (frames of the rows, say) is cut in the same proportion. Draws of any other shape are
    the same in every process. Only `torch.randn`, `torch.rand`, `torch.randint` and functions of a tensor that keep its
    shape (`torch.bernoulli`, ...) can be cut.

    Args:
        generator: The CPU generator, equally seeded in every process.
        process: Number of this process.
        processes: How many there are.
        rows: Rows of the batch in this process.
    """

    def __init__(self, generator: Generator, process: int, processes: int, rows: int) -> None:
        super().__init__()
        self.generator, self.process, self.processes, self.rows = generator, process, processes, rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, cutting what it draws from the generator."""
        kwargs = kwargs or {}
        if kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        if func in _FACTORIES:
            return self._factory(func, args, dict(kwargs))
        return self._elementwise(func, args, kwargs)

    def _factory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        device = kwargs.pop("device", None)
        rest: tuple[Any, ...]
        if "size" in kwargs:
            rest, shape = args, kwargs.pop("size")
        elif func is not torch.randint and isinstance(args[0], int):
            rest, shape = (), args
        else:
            rest, shape = args[:-1], args[-1]
        local, whole = self._cut(tuple(shape))
        drawn: Tensor = func(*rest, whole, **kwargs)
        return drawn[local].to(device) if device is not None else drawn[local]

    def _elementwise(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        first = args[0]
        local, whole = self._cut(tuple(first.shape))
        repeats = whole[0] // first.shape[0] if first.dim() else 1
        drawn: Tensor = func(first.cpu().repeat(repeats, *[1] * (first.dim() - 1)), *args[1:], **kwargs)
        return drawn[local].to(first.device)

    def _cut(self, shape: tuple[int, ...]) -> tuple[slice, tuple[int, ...]]:
        """Return the part of the whole that is ours, and the shape of the whole."""
        if not shape or shape[0] == 0 or shape[0] % self.rows:
            return slice(None), shape
        size = shape[0]
        return slice(self.process * size, (self.process + 1) * size), (size * self.processes, *shape[1:])
