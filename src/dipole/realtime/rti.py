"""Real-time iteration: start denoising from the previous chunk, moved up, and take a few steps. No retraining.

Source: Duan et al., "Real-Time Iteration Scheme for Diffusion Policy" (2025). The first call of an episode denoises a
chunk from noise. Every later call starts from G = the previous chunk seen Ta steps later (its last action repeated),
clean and normalised, and visits a short list of levels, such as 2, 1, 0 of 100, as if G were a sample at the first.

How far a guess can move in such a list follows from the shape of the score. For a conditional of standard deviation s
the part of an error that is left is a product over the steps of c_x + c_x0 alpha s^2 / (alpha^2 s^2 + sigma^2), with
c the coefficients of the step: `residual`. `dipole.realtime.start_level` measures the same on a trained policy. A
binary action at the wrong end of [-1, 1] is too far away, hence the two remedies of `discrete_mode`:

- `clip` (any policy): the guess's binary numbers are pulled in to +-1/factor before the next call;
- `scale` (trained so: `scale_discrete`): binary numbers are +-1/factor in the policy's own units.

Both put out +-1 by sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dipole.data.normalizer import Normalizer
from dipole.diffusion import DDIM, DDPM, VP, Kernel, Process, add_noise, sample
from dipole.diffusion.tensors import Random, randn
from dipole.errors import DipoleError
from dipole.policies.policy import Observation, State
from dipole.realtime.base import RealtimePolicy, for_rows, rows_of, shifted

# Noise-to-signal ratio of level 2 of DDPM's 100: where the published lists for the easier tasks start.
START_RATIO = 0.058


@dataclass(frozen=True)
class StartLevel:
    """One row of the table a start level was chosen from (see `dipole.realtime.start_level`).

    Attributes:
        level: The level a list would start at.
        left: Share of an error that is left after the list, mean over observations.
        left_high: Its 90th percentile.
        nfe: Network calls of the list.
    """

    level: float
    left: float
    left_high: float
    nfe: int


@dataclass(frozen=True)
class RTIConfig:
    """How a call goes on from the previous chunk.

    Attributes:
        levels: The levels visited, falling; empty to replay the previous chunk; None for `num_steps` levels, evenly
            spaced from `start_level`.
        start_level: First level; None for the one with sigma/alpha = 0.058 (level 2 of DDPM's 100).
        num_steps: Network calls.
        kernel: Of these steps. DDPM's are noisy, as published; DDIM's are not.
        shift: Env steps between two calls; None for Ta. (The published code always shifts by 1, whatever Ta.)
        renoise: Add the noise of the first level to the guess; published: no.
        relabel_skips: Where the list skips levels, step to the next lower level and call it the next listed one, as
            the published code does; False steps to the next listed level. `VP` processes only.
        discrete: Indices of binary actions.
        discrete_mode: `clip`, `scale` or `none` (see above).
        factor: The divisor of both.
        table: What the start level was chosen from; kept for the record.
    """

    levels: tuple[float, ...] | None = None
    start_level: float | None = None
    num_steps: int = 3
    kernel: Literal["ddpm", "ddim"] = "ddpm"
    shift: int | None = None
    renoise: bool = False
    relabel_skips: bool = False
    discrete: tuple[int, ...] = ()
    discrete_mode: Literal["none", "clip", "scale"] = "none"
    factor: float = 10.0
    table: tuple[StartLevel, ...] = field(default=())


class RTIPolicy(RealtimePolicy):
    """A policy that goes on from its previous chunk.

    State: `chunk` `[B, Tp, Da]`, the previous one, normalised, and `warm` `[B]`, whether there is one.

    Attributes:
        levels: The levels visited from a warm start, and then clean.
    """

    def __init__(self, policy: Any, options: RTIConfig) -> None:
        super().__init__(policy, options)
        _check(options, policy)
        listed = warm_levels(options, policy.process)
        self.levels = (*listed, policy.process.clean)
        clip = policy.sampler.clip
        self.kernel: Kernel = DDPM(clip=clip) if options.kernel == "ddpm" else DDIM(clip=clip)

    @property
    def nfe(self) -> int:
        """Return the network calls of a warm call."""
        return len(self.levels) - 1

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of `batch` episodes: no previous chunk."""
        return {"chunk": self._empty_chunks(batch), "warm": self._no_rows(batch)}

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; `noise` starts the rows that have no chunk yet."""
        cond, warm = self.encode(obs), state["warm"]
        x0 = state["chunk"]
        if bool(warm.any()):
            shift = self.action_horizon if self.options.shift is None else self.options.shift
            x0 = self._refined(shifted(x0, shift), cond, for_rows(generator, warm))
        if not bool(warm.all()):
            x0 = rows_of(warm, x0, self.policy.denoise(cond, noise, for_rows(generator, ~warm)))
        chunk, guess = self._discrete(x0)
        return self.executed(chunk), {"chunk": guess, "warm": torch.ones_like(warm)}

    def _refined(self, guess: Tensor, cond: dict[str, Tensor], generator: Random) -> Tensor:
        """Return the chunk after the warm steps."""
        levels = self.levels
        if len(levels) == 1:
            return guess
        x = guess
        if self.options.renoise:
            x = add_noise(x, randn(tuple(x.shape), generator, like=x), levels[0], self.process)
        runs = [levels]
        if self.options.relabel_skips:
            runs = [(level, level - 1) for level in levels[:-1]]
        for run in runs:
            listed = torch.tensor(run, dtype=torch.float64)
            x = sample(self.denoiser, self.process, listed, self.kernel, cond=cond, init=x, generator=generator)
        return x

    def _discrete(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chunk with binary actions snapped, and the guess to keep for the next call."""
        mode = self.options.discrete_mode
        if mode == "none":
            return x0, x0
        dims, small = list(self.options.discrete), 1 / self.options.factor
        sign = torch.where(x0[..., dims] > 0, 1.0, -1.0).to(x0)
        chunk, guess = x0.clone(), x0.clone()
        chunk[..., dims] = sign * (small if mode == "scale" else 1.0)
        if mode == "clip":
            guess[..., dims] = sign * small
        return chunk, guess


def warm_levels(options: RTIConfig, process: Process) -> tuple[float, ...]:
    """Return the levels a warm start visits, without the clean one at the end.

    Raises:
        DipoleError: They do not fall, or lie outside the process.
    """
    if options.levels is None:
        start = float(process.level_at(START_RATIO)) if options.start_level is None else options.start_level
        levels = spaced(start, options.num_steps, process)
    else:
        levels = tuple(float(level) for level in options.levels)
    inside = all(process.clean < level <= process.noisiest for level in levels)
    whole = not isinstance(process, VP) or all(level == round(level) for level in levels)
    if not inside or not whole or any(b >= a for a, b in pairwise(levels)):
        raise DipoleError(
            f"warm start levels {list(levels)}: they must fall, from at most {process.noisiest:g} to above "
            f"{process.clean:g}" + (", in whole numbers" if isinstance(process, VP) else "")
        )
    return levels


def spaced(start: float, num_steps: int, process: Process) -> tuple[float, ...]:
    """Return `num_steps` levels from `start` down, evenly spaced; for a `VP` whole ones that end at 0.

    Raises:
        DipoleError: There are not so many levels.
    """
    if isinstance(process, VP):
        if not 1 <= num_steps <= start + 1:
            raise DipoleError(f"{num_steps} warm steps from level {start:g}: choose from 1 to {int(start) + 1} steps")
        # One step alone is made at the start, where it can still move the guess.
        grid = torch.linspace(start, 0 if num_steps > 1 else start, num_steps, dtype=torch.float64).round()
        return tuple(grid.tolist())
    if num_steps < 1:
        raise DipoleError(f"{num_steps} warm steps: at least 1")
    return tuple(torch.linspace(start, process.clean, num_steps + 1, dtype=torch.float64)[:-1].tolist())


def residual(
    process: Process,
    levels: tuple[float, ...],
    std: float,
    kernel: Kernel | None = None,
    relabel_skips: bool = False,
) -> float:
    """Return the share of a guess's error that is left after visiting `levels` and then clean, without noise.

    For a conditional N(m, std^2) with its exact score; the guess is a clean sample taken for a noisy one.

    Args:
        process: The process.
        levels: Falling.
        std: Standard deviation of the conditional, normalised units.
        kernel: Of the steps; default DDPM.
        relabel_skips: As in `RTIConfig`.
    """
    kernel, left = DDPM() if kernel is None else kernel, 1.0
    steps = [(t, t - 1) for t in levels] if relabel_skips else pairwise((*levels, process.clean))
    for t, s in steps:
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        pull = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        step = kernel.coefficients(process, t, s)
        left *= float(step.x) + float(step.x0 + step.raw) * pull
    return left


def scale_discrete(normalizer: Normalizer, discrete: tuple[int, ...], factor: float = 10.0) -> Normalizer:
    """Return a normalizer that maps binary actions to +-1/factor: train with it, then run with `discrete_mode=scale`.

    Args:
        normalizer: One that maps them to +-1.
        discrete: Indices of binary actions.
        factor: The divisor.

    Raises:
        DipoleError: There is no such action.
    """
    size = normalizer.parts("action")[0].numel()
    for index in discrete:
        if not 0 <= index < size:
            raise DipoleError(f"binary action {index}: the actions are 0 to {size - 1}")
    affine: dict[str, tuple[Tensor, Tensor]] = {}
    origin: dict[str, Tensor] = {}
    for key in normalizer.features:
        scale, offset, start = normalizer.parts(key)
        if key == "action":
            shrink = torch.ones_like(scale)
            shrink[list(discrete)] = 1 / factor
            scale, offset = scale * shrink, offset * shrink
        affine[key] = (scale, offset)
        if start is not None:
            origin[key] = start
    return Normalizer(affine, origin)


def _check(options: RTIConfig, policy: Any) -> None:
    if (options.discrete_mode != "none") != bool(options.discrete):
        raise DipoleError("discrete_mode needs the indices of the binary actions in 'discrete', and these need a mode")
    for index in options.discrete:
        if not 0 <= index < policy.action_dim:
            raise DipoleError(f"discrete action {index}: the policy has actions 0 to {policy.action_dim - 1}")
    if not math.isfinite(options.factor) or options.factor < 1:
        raise DipoleError(f"factor {options.factor}: at least 1")
    if options.shift is not None and options.shift < 0:
        raise DipoleError(f"shift {options.shift}: at least 0 env steps")
    if options.relabel_skips and not isinstance(policy.process, VP):
        raise DipoleError("relabel_skips has a meaning only for processes with whole levels (vp-*): leave it out")
