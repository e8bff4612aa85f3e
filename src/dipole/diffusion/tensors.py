"""Small helpers every part of the mathematics shares: parts, level broadcasting, per-row noise.

A *sample* `x` is a tensor, or a dict of tensors when several things are denoised together (action, next image, ...).
A *level* `t` says how noisy it is: a number, or a tensor `[B]` (per row) or `[B, T]` (per position), or a dict of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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
    """Append axes to `level` (scalar, `[B]` or `[B, T]`) until it broadcasts against `x` (`[B, ...]`)."""
    return level.reshape(level.shape + (1,) * (x.dim() - level.dim()))


def rows(level: Tensor | float, x: Tensor) -> Tensor:
    """Return `level` as `[B]`, or as `[B, T]` where it is given per position (`[T]` is not accepted: ambiguous)."""
    level = torch.as_tensor(level, device=x.device)
    return level.expand(x.shape[0], *level.shape[1:])


@lru_cache(maxsize=16384)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a 0-dimensional tensor, remembered: torch multiplies by it twice as fast as by the number."""
    with torch.inference_mode(False):  # else the first caller's mode would decide whether others can differentiate
        return torch.tensor(value, dtype=dtype)


def scaled(x: Tensor, factor: Tensor | float) -> Tensor:
    """Return factor * x; `factor`: a number, or a tensor that broadcasts against `x`."""
    if isinstance(factor, Tensor) or torch.compiler.is_compiling():
        return x * factor
    return x * constant(factor, x.dtype)


def weighted_sum(a: Tensor | float, x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """Return a x + b y.

    Never fused into one rounding, so that the result is bit for bit the same whether `a` and `b` are numbers or
    tensors, and wherever in a batch a row stands.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor) or torch.compiler.is_compiling():
        return x * a + y * b
    if a == 1.0:
        return x + y * constant(b, x.dtype)
    return x * constant(a, x.dtype) + y * constant(b, x.dtype)


def randn(
    shape: tuple[int, ...],
    generator: Random = None,
    like: Tensor | None = None,
    drawing: Sequence[bool] | None = None,
) -> Tensor:
    """Draw standard normal noise; with one generator per row, a row's noise does not depend on the other rows.

    Args:
        shape: `[B, ...]`.
        generator: One generator for the whole batch, or a sequence of `B` of them (so that a batch may be split
            in any way and every row still sees the same numbers), or None for torch's global one. Numbers are drawn on
            the generator's device: a CPU generator gives the same ones on every machine.
        like: Tensor that gives dtype and device; without it the generator's device.
        drawing: With one generator per row: rows that draw; the others get zeros and leave their generator alone.

    Raises:
        ValueError: The number of generators is not `B`.
    """
    dtype = None if like is None else like.dtype
    if generator is None:
        return torch.randn(shape, dtype=dtype, device=None if like is None else like.device)
    if isinstance(generator, Generator):
        noise = torch.empty(shape, dtype=dtype, device=generator.device).normal_(generator=generator)
        return noise if like is None or like.device == noise.device else noise.to(like.device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
    if shape[0] == 0:
        return torch.empty(shape, dtype=dtype, device=None if like is None else like.device)
    zeros = torch.zeros(shape[1:], dtype=dtype)
    noise = torch.stack(
        [
            torch.randn(shape[1:], generator=g, dtype=dtype, device=g.device) if draws else zeros.to(g.device)
            for g, draws in zip(generator, drawing or [True] * shape[0], strict=True)
        ]
    )
    return noise if like is None else noise.to(like.device)


def randn_like(x: Sample, generator: Random = None) -> Sample:
    """Draw standard normal noise shaped as `x`, part by part in the dict's order."""
    noise: Sample = map_parts(lambda part: randn(tuple(part.shape), generator, like=part), x)
    return noise
