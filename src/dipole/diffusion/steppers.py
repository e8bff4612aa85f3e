"""The steps of the sampling loop: a kernel's or a solver's, for one list of levels, prepared before the loop begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dipole.diffusion.denoiser import Denoiser, Processes
from dipole.diffusion.kernels import Coefficients, Kernel, check_steps, coefficient_table
from dipole.diffusion.process import Process
from dipole.diffusion.solvers import Solver
from dipole.diffusion.tensors import Level, Random, expand, map_parts

Stepper = Callable[[int, Any, Any], tuple[Any, Any, Any]]
"""`advance(k, x, memory) -> (x_next, x0_hat, memory)`."""


def stepper(
    denoiser: Denoiser,
    process: Processes,
    levels: Level,
    kernel: Kernel | Solver,
    cond: Any,
    generator: Random,
    x: Any,
) -> Stepper:
    """Return `advance(k, x, memory) -> (x_next, x0_hat, memory)` for this kernel or solver."""
    if isinstance(kernel, Kernel):
        return _kernel_stepper(denoiser, process, levels, kernel, cond, generator, x)
    if not isinstance(levels, Tensor) or levels.dim() != 1 or isinstance(process, Mapping) or isinstance(x, Mapping):
        raise ValueError(f"{type(kernel).__name__} needs one level list shared by all rows and positions, and no parts")
    if bool((levels[1:] >= levels[:-1]).any()):
        raise ValueError(f"{type(kernel).__name__} needs levels that decrease")
    return _solver_stepper(denoiser, process, levels, kernel, cond, generator)


def _solver_stepper(
    denoiser: Denoiser, process: Process, levels: Tensor, solver: Solver, cond: Any, generator: Random
) -> Stepper:
    numbers = levels.tolist()

    def denoise(x: Tensor, t: float) -> Tensor:
        x0_hat: Tensor = denoiser(x, t, cond)
        return x0_hat

    def advance(k: int, x: Any, memory: Any) -> tuple[Any, Any, Any]:
        return solver.solve(denoise, x, numbers[k], numbers[k + 1], process, memory, generator)

    return advance


def _kernel_stepper(
    denoiser: Denoiser, process: Processes, levels: Level, kernel: Kernel, cond: Any, generator: Random, x: Any
) -> Stepper:
    """The coefficients of the whole list, and the levels told to the denoiser, are worked out before the loop."""
    visited = _visited(levels)
    if not isinstance(x, Mapping):
        table = _coefficients(x, levels, process, kernel)

        def advance(k: int, x: Any, memory: Any) -> tuple[Any, Any, Any]:
            x0_hat = denoiser(x, visited[k], cond)
            return kernel.combine(x, x0_hat, table[k]).sample(generator), x0_hat, None

        return advance
    tables = map_parts(lambda part, level, own: _coefficients(part, level, own, kernel), x, levels, process)

    def advance_parts(k: int, x: Any, memory: Any) -> tuple[Any, Any, Any]:
        x0_hat = denoiser(x, visited[k], cond)
        x_next = {key: kernel.combine(part, x0_hat[key], tables[key][k]).sample(generator) for key, part in x.items()}
        return x_next, x0_hat, None

    return advance_parts


def _visited(levels: Level) -> list[Any]:
    """Return the K + 1 levels one by one, as `level_at` does."""
    if isinstance(levels, Tensor) and levels.dim() == 1:
        return levels.tolist()
    return [level_at(levels, k) for k in range(count_steps(levels) + 1)]


def _coefficients(x: Tensor, levels: Any, process: Any, kernel: Kernel) -> Sequence[Coefficients]:
    """Return the coefficients of each step: numbers where all rows share the levels, else broadcast against `x`."""
    if levels.dim() == 1:
        return coefficient_table(kernel, process, tuple(levels.tolist()))
    value = kernel.coefficients(process, levels[:-1], levels[1:])
    check_steps(kernel, levels, value)
    return [Coefficients(*(expand(c[k], x).to(x) for c in value)) for k in range(len(levels) - 1)]


def count_steps(levels: Level) -> int:
    """Return K, the number of steps between the levels of a list (or of one per part).

    Raises:
        ValueError: The parts differ in it, or there are no levels.
    """
    counts = {len(part) for part in (levels.values() if isinstance(levels, Mapping) else [levels])}
    if len(counts) != 1 or min(counts) < 1:
        raise ValueError("every part needs the same number of levels (repeat one to hold a part where it is)")
    return counts.pop() - 1


def level_at(levels: Level, k: int) -> Any:
    """Return the k-th level: a number where all rows share it, else a tensor (or parts)."""

    def one(part: Tensor) -> Tensor | float:
        return float(part[k]) if part.dim() == 1 else part[k]

    return map_parts(one, levels)
