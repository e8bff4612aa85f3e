"""Small helpers every part of the mathematics shares: parts, level broadcasting, per-row noise.

A *sample* `x` is a tensor, or a dict of tensors when several things are denoised together (action, next image, ...).
A *level* `t` says how noisy it is: a number, or a tensor `[B]` (per row) or `[B, T]` (per position), or a dict of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

Sample = Tensor | dict[str, Tensor]
Level = Tensor | dict[str, Tensor]
Shape = tuple[int, ...] | dict[str, tuple[int, ...]]
Random = Generator | Sequence[Generator] | None


def map_parts(fn: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Apply `fn` to a tensor, or to each part of a dict; a dict among `rest` is indexed by part, the others shared."""
    if not isinstance(first, Mapping):
        return fn(first, *rest)
    return {
        key: fn(value, *(other[key] if isinstance(other, Mapping) else other for other in rest))
        for key, value in first.items()
    }


def expand(level: Tensor, x: Tensor) -> Tensor:
    """Append axes to `level` (scalar, `[B]` or `[B, T]`) until it broadcasts against `x` (`[B, T, D]` or `[B, ...]`)."""
    return level.reshape(level.shape + (1,) * (x.dim() - level.dim()))


def rows(level: Tensor | float, x: Tensor) -> Tensor:
    """Return `level` as `[B]`, or as `[B, T]` where it is given per position (`[T]` is not accepted: ambiguous)."""
    level = torch.as_tensor(level, device=x.device)
    return level.expand(x.shape[0]) if level.dim() == 0 else level


def randn(shape: tuple[int, ...], generator: Random = None, like: Tensor | None = None) -> Tensor:
    """Draw standard normal noise; with one generator per row, a row's noise does not depend on the other rows.

    Args:
        shape: `[B, ...]`.
        generator: One generator for the whole batch, or a sequence of `B` of them (so that a batch may be split
            in any way and every row still sees the same numbers), or None for torch's global one.
        like: Tensor that gives dtype and device.

    Raises:
        ValueError: The number of generators is not `B`.
    """
    options: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    if generator is None or isinstance(generator, Generator):
        return torch.randn(shape, generator=generator, **options)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
    if shape[0] == 0:
        return torch.empty(shape, **options)
    return torch.stack([torch.randn(shape[1:], generator=g, **options) for g in generator])


def randn_like(x: Sample, generator: Random = None) -> Sample:
    """Draw standard normal noise shaped as `x`, part by part in the dict's order."""
    noise: Sample = map_parts(lambda part: randn(tuple(part.shape), generator, like=part), x)
    return noise
