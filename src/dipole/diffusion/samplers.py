"""Sampling: a loop over a list of levels. Functions without state; randomness comes from the generator passed in.

    x0 = sample(denoiser, process, process.levels(10), kernel=DDIM(eta=0.0), cond=cond, shape=(B, T, D), generator=g)

A list of levels is a tensor whose first axis is the K + 1 visited levels, the last one usually `process.clean`:
`[K+1]` (all alike), `[K+1, B]` (per row), `[K+1, B or 1, T]` (per position), or a dict of these, one per part. A part
or position whose level does not change stays as it is. K is the number of kernel steps, and of network calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion.denoiser import Denoiser, Processes, prepare
from dipole.diffusion.kernels import DDIM, Kernel, Reduce, log_prob
from dipole.diffusion.process import Process
from dipole.diffusion.solvers import Solver
from dipole.diffusion.steppers import count_steps, level_at, stepper
from dipole.diffusion.tensors import Level, Random, Sample, Shape, expand, map_parts, randn


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees after a step: `x` at level `t` became `x_next` at `s`; `x0_hat` was predicted at `t`."""

    index: int
    num_steps: int
    t: Any
    s: Any
    x: Any
    x0_hat: Any
    x_next: Any


@dataclass(frozen=True)
class Chain:
    """A recorded denoising chain.

    Attributes:
        levels: `[K+1]`-first levels visited (or parts).
        samples: K + 1 samples, noisiest first, as the kernel drew them; after `project`, if there was one (entries it
            overwrites have no density: leave them out of the score by its `mask`).
        x0_hats: K denoiser outputs.
    """

    levels: Level
    samples: tuple[Sample, ...]
    x0_hats: tuple[Sample, ...]

    @property
    def final(self) -> Sample:
        """Return the last sample."""
        return self.samples[-1]


def initial_noise(
    process: Processes, levels: Level, shape: Shape, generator: Random = None, like: Any = None
) -> Sample:
    """Return the sample that denoising starts from: `prior_std` of the first level times standard normal noise."""

    def draw(part_shape: tuple[int, ...], part_levels: Tensor, part_process: Process) -> Tensor:
        noise = randn(tuple(part_shape), generator, like=like)
        std = part_process.prior_std(part_levels[0])
        return noise * expand(std, noise).to(noise)

    noise: Sample = map_parts(draw, shape, levels, process)
    return noise


def from_level(levels: Tensor, t_start: float) -> Tensor:
    """Return the part of a shared level list at or below `t_start`, which is put in front if it is not on the list.

    Args:
        levels: `[K+1]` decreasing.
        t_start: Level to start from.
    """
    if levels.dim() != 1:
        raise ValueError(
            "t_start needs one level list shared by all rows, positions and parts: shorten the list yourself"
        )
    below = levels[levels < t_start]
    return torch.cat([levels.new_tensor([t_start]), below])


def sample(
    denoiser: Denoiser,
    process: Processes,
    levels: Level,
    kernel: Kernel | Solver | None = None,
    *,
    cond: Any = None,
    shape: Shape | None = None,
    generator: Random = None,
    init: Any = None,
    t_start: float | None = None,
    like: Tensor | None = None,
    project: Callable[[Any, Any], Any] | None = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Any:
    """Draw a sample by visiting `levels` in order.

    Args:
        denoiser: `D(x, t, cond) -> x0_hat`.
        process: Its forward process, or one per part.
        levels: See the module's docstring.
        kernel: A transition kernel or an ODE solver; default `DDIM(eta=0)`.
        cond: Conditioning handed to the denoiser.
        shape: `(B, ...)` of the sample (or parts) when it starts from noise.
        generator: One generator, or one per row.
        init: Start here instead of from noise: the sample *at the first level* (use `add_noise` to noise a clean one).
        t_start: Visit only the levels from here on.
        like: Tensor that gives dtype and device of the initial noise; without it float32, where the generator is.
        project: `project(x, t) -> x` applied to the start and after every step, e.g. to hold known entries.
        callback: Called with a `StepInfo` after every step.

    Returns:
        The sample at the last level, shaped as `shape` or `init`.

    Raises:
        ValueError: Neither `shape` nor `init` is given; a solver is used with per-row or per-position levels or with
            parts; or the kernel cannot make a step of these levels.
    """
    kernel = DDIM() if kernel is None else kernel
    if t_start is not None:
        if not isinstance(levels, Tensor):
            raise ValueError("t_start needs one level list shared by all parts: shorten the lists yourself")
        levels = from_level(levels, t_start)
    x = _start(process, levels, shape, generator, init, like)
    if project is not None:
        x = project(x, level_at(levels, 0))
    denoiser = prepare(denoiser, levels, cond)
    num_steps = count_steps(levels)
    if num_steps == 0:
        return x
    advance = stepper(denoiser, process, levels, kernel, cond, generator, x)
    memory = None
    for k in range(num_steps):
        x_next, x0_hat, memory = advance(k, x, memory)
        if project is not None:
            x_next = project(x_next, level_at(levels, k + 1))
        if callback is not None:
            callback(StepInfo(k, num_steps, level_at(levels, k), level_at(levels, k + 1), x, x0_hat, x_next))
        x = x_next
    return x


def sample_chain(denoiser: Denoiser, process: Processes, levels: Level, kernel: Kernel, **options: Any) -> Chain:
    """Draw a sample as `sample` does and return the whole chain, for scoring with `score_chain`."""
    steps: list[StepInfo] = []
    final = sample(denoiser, process, levels, kernel, callback=steps.append, **options)
    visited = from_level(levels, options["t_start"]) if options.get("t_start") is not None else levels  # type: ignore[arg-type]
    return Chain(visited, (*(info.x for info in steps), final), tuple(info.x0_hat for info in steps))


def score_chain(
    denoiser: Denoiser,
    process: Processes,
    kernel: Kernel,
    chain: Chain,
    cond: Any = None,
    *,
    reduce: Reduce,
    steps: range | None = None,
    mask: Any = None,
) -> Tensor:
    """Return the log-probability of each step of a chain under `denoiser`, by the kernel that drew it.

    Args:
        denoiser: The policy's denoiser; gradients flow through it.
        process: Its process, or one per part.
        kernel: The kernel the chain was drawn with. Deterministic steps raise, but for parts and positions that stay
            at their level: those do not count.
        chain: From `sample_chain`.
        cond: Conditioning.
        reduce: `sum` or `mean` over a sample's dimensions.
        steps: Which steps (default all).
        mask: Entries that count, `[B]`, `[B, T]` or broadcastable to the sample (or parts); default all.

    Returns:
        `[len(steps), B]`.
    """
    chosen = range(len(chain.samples) - 1) if steps is None else steps
    scores = []
    for k in chosen:
        t, s = level_at(chain.levels, k), level_at(chain.levels, k + 1)
        x = chain.samples[k]
        dist = kernel.step(x, denoiser(x, t, cond), t, s, process)
        moving = map_parts(_moving, x, t, s, mask)
        scores.append(log_prob(dist, chain.samples[k + 1], reduce, moving))
    return torch.stack(scores)


def _moving(x: Tensor, t: Any, s: Any, mask: Tensor | None) -> Tensor | None:
    """Return which entries of `x` count: those whose level changes, within `mask`; None for all."""
    if not isinstance(t, Tensor) and t != s:
        return mask
    moves = expand(torch.as_tensor(t != s, device=x.device), x)
    return moves if mask is None else moves & expand(mask, x).bool()


def _start(
    process: Processes, levels: Level, shape: Shape | None, generator: Random, init: Any, like: Tensor | None
) -> Any:
    if init is not None:
        return init
    if shape is None:
        raise ValueError("sample needs the shape of the sample, or an init to start from")
    return initial_noise(process, levels, shape, generator, like)
