"""What a sampler does to Gaussians, exactly: for tests and for understanding.

With the denoiser of a Gaussian (`oracle.GaussianDenoiser`), every sampler - DDPM, DDIM, Heun with churn, inpainting,
classifier-free guidance, linear guidance - is an affine map of where it starts and of the noise it draws,

    x' = A x + b + L n,    n ~ N(0, I).

`affine_map` finds A, b and L by running the real code on basis vectors and on known noise, without Monte-Carlo error;
`propagate` carries a mean and a covariance through a whole run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dipole.diffusion.denoiser import Denoiser
from dipole.diffusion.kernels import Kernel
from dipole.diffusion.process import Process
from dipole.diffusion.samplers import sample
from dipole.diffusion.solvers import Solver

_SEED = 7919


@dataclass(frozen=True)
class Affine:
    """The map x' = matrix x + offset + noise n on flattened samples of N numbers, n ~ N(0, I) of M numbers.

    Attributes:
        matrix: `[N, N]`.
        offset: `[N]`.
        noise: `[N, M]`.
    """

    matrix: Tensor
    offset: Tensor
    noise: Tensor

    def moments(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean `[N]` and covariance `[N, N]` of x' for x of mean `[N]` and covariance `[N, N]`."""
        return self.matrix @ mean + self.offset, self.matrix @ cov @ self.matrix.T + self.noise @ self.noise.T


def affine_map(function: Callable[[Tensor, list[Generator]], Tensor], shape: tuple[int, ...], draws: int = 0) -> Affine:
    """Return the affine map that `function` is.

    Args:
        function: `function(x [R, *shape], generators) -> [R, *shape]`, row by row, float64; row i may draw standard
            normal noise of `shape`, at most `draws` times, from generator i.
        shape: Shape of one sample.
        draws: How often a row draws noise.

    Raises:
        ValueError: `function` is not affine.
    """
    zero = torch.zeros(shape, dtype=torch.float64)
    size, num_noises = zero.numel(), zero.numel() * draws
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    probe = torch.linspace(-1, 1, size, dtype=torch.float64).reshape(shape) + 0.3
    # rows: 0 | the basis, with the noise of row 0 | 0 with other noises | a probe of both
    starts = torch.stack([zero, *basis, *[zero] * num_noises, probe])
    seeds = [_SEED] * (1 + size) + [_SEED + 1 + i for i in range(num_noises + 1)]
    results = function(starts, [_generator(seed) for seed in seeds]).reshape(len(starts), size)
    matrix = (results[1 : 1 + size] - results[0]).T
    noises = torch.stack([_noise(seed, shape, draws) for seed in seeds])
    spread = noises[1 + size : -1] - noises[0]
    noise = torch.linalg.solve(spread, results[1 + size : -1] - results[0]).T
    offset = results[0] - noise @ noises[0]
    expected = matrix @ probe.flatten() + offset + noise @ noises[-1]
    if not torch.allclose(expected, results[-1], rtol=1e-7, atol=1e-7 * float(results.abs().max().clamp(min=1))):
        raise ValueError(f"not an affine map: off by {float((expected - results[-1]).abs().max()):.3g} at a probe")
    return Affine(matrix, offset, noise)


def sampler_map(
    denoiser: Denoiser,
    process: Process,
    levels: Tensor,
    kernel: Kernel | Solver,
    shape: tuple[int, ...],
    *,
    cond: dict[str, Tensor] | None = None,
    project: Callable[[Any, Any], Any] | None = None,
) -> Affine:
    """Return the affine map that `sample` makes of the sample at the first of `levels`.

    Args:
        denoiser: Affine in x, and so must be guidance.
        process: Its process.
        levels: `[K+1]`, or `[K+1, 1, T]` per position.
        kernel: Kernel or solver.
        shape: Shape of one sample, without the batch.
        cond: Conditioning `[1, ...]`, the same for every row.
        project: As in `sample`.
    """

    def run(x: Tensor, generators: list[Generator]) -> Tensor:
        repeated = (
            None if cond is None else {key: value.expand(len(x), *value.shape[1:]) for key, value in cond.items()}
        )
        end: Tensor = sample(
            denoiser, process, levels, kernel, cond=repeated, init=x, generator=generators, project=project
        )
        return end

    draws = len(levels) - 1 if isinstance(kernel, Kernel) or getattr(kernel, "churn", 0) > 0 else 0
    return affine_map(run, shape, draws)


def propagate(
    denoiser: Denoiser,
    process: Process,
    levels: Tensor,
    kernel: Kernel | Solver,
    shape: tuple[int, ...],
    *,
    start: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return mean `[N]` and covariance `[N, N]` of what `sample` returns.

    Args:
        denoiser: As in `sampler_map`, like the other arguments and `options`.
        process: See there.
        levels: See there.
        kernel: Kernels are taken step by step; solvers, which may remember earlier steps, in one run.
        shape: See there.
        start: Mean `[N]` and covariance `[N, N]` of the sample at the first level; None for the noise that sampling
            starts with.
        **options: `cond` and `project`.
    """
    size = torch.Size(shape).numel()
    if start is None:
        std = float(process.prior_std(levels[0].max()))
        start = torch.zeros(size, dtype=torch.float64), std**2 * torch.eye(size, dtype=torch.float64)
    runs = [levels]
    if isinstance(kernel, Kernel):
        runs = [levels[k : k + 2] for k in range(len(levels) - 1)]
    for visited in runs:
        start = sampler_map(denoiser, process, visited, kernel, shape, **options).moments(*start)
    return start


def _generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def _noise(seed: int, shape: tuple[int, ...], draws: int) -> Tensor:
    """Return the numbers that a row with this seed draws, flattened: `[draws * N]`."""
    generator = _generator(seed)
    numbers = [torch.randn(shape, generator=generator, dtype=torch.float64).flatten() for _ in range(draws)]
    return torch.cat([torch.empty(0, dtype=torch.float64), *numbers])
