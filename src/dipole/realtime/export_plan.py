"""What an exported policy computes around its graphs, as plain numbers: `policy.json` of an export.

Every sampler of `SamplerConfig` is linear in the noise it starts from and in the denoised samples it asks for, so that
a run of it is a list of steps with fixed coefficients. Step i calls the network once,

    output = network(c_in sample_i, time, cond),    x0_i = c_x sample_i + c_out output,

and makes the next sample, where clip(.) bounds |x0_j| and z is fresh standard normal noise,

    sample_{i+1} = sum_j a_j sample_j + sum_j b_j clip(x0_j) + sum_j r_j x0_j + std z.

The coefficients are those that `dipole.diffusion` uses itself: a kernel's table, or (for the solvers) what the real
solver does to basis vectors. Nothing is derived here a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion import Kernel, Process, sample
from dipole.diffusion.denoiser import NetworkDenoiser, network_time
from dipole.diffusion.kernels import coefficient_table
from dipole.diffusion.prediction import float_conversion
from dipole.diffusion.solvers import Solver
from dipole.errors import DipoleError
from dipole.policies.diffusion_policy import DiffusionPolicy

Terms = list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """One network call and the sample that follows it; see the module's docstring.

    Attributes:
        time: What the network is told about the level.
        c_in: Factor on the sample that the network is fed.
        c_x: Factor on the sample in x0.
        c_out: Factor on the network's output in x0.
        samples: `(j, a_j)`; sample 0 is the one denoising starts from.
        clipped: `(j, b_j)`.
        x0s: `(j, r_j)`.
        std: Of the fresh noise; 0 for none.
    """

    time: float
    c_in: float
    c_x: float
    c_out: float
    samples: Terms = field(default_factory=list)
    clipped: Terms = field(default_factory=list)
    x0s: Terms = field(default_factory=list)
    std: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A whole run of a sampler.

    Attributes:
        prior_std: Factor on the standard normal noise that becomes sample 0.
        clip: Bound of clip(.); None where nothing is clipped.
        steps: The steps.
    """

    prior_std: float
    clip: float | None
    steps: tuple[Step, ...]

    @property
    def deterministic(self) -> bool:
        """Whether no step draws noise."""
        return all(step.std == 0 for step in self.steps)


def make_plan(policy: DiffusionPolicy) -> Plan:
    """Return the plan of a policy's present sampler.

    Raises:
        DipoleError: The sampler cannot make its steps in this process.
    """
    process = policy.process if policy.sampler.process is None else policy.sampler.process.build()
    try:
        return plan_of(policy.denoiser, process, policy.sampler.levels(process), policy.sampler.build())
    except ValueError as error:
        raise DipoleError(f"sampler '{policy.sampler.name}': {error}") from None


def plan_of(denoiser: NetworkDenoiser, process: Process, levels: Tensor, kernel: Kernel | Solver) -> Plan:
    """Return the plan of what `sample` does with these arguments.

    Args:
        denoiser: The network with the process it was trained in.
        process: Process of the samples; another than the denoiser's is seen through `ProcessView`.
        levels: `[K+1]`.
        kernel: A kernel or a solver.

    Raises:
        ValueError: The kernel cannot make its steps in this process.
    """
    call = _caller(denoiser, process)
    if isinstance(kernel, Kernel):
        steps = _kernel_steps(kernel, process, levels, call)
    else:
        steps = _solver_steps(kernel, process, levels, call)
    return Plan(float(process.prior_std(levels[0])), getattr(kernel, "clip", None), tuple(steps))


def _caller(denoiser: NetworkDenoiser, process: Process) -> Callable[[float], dict[str, Any]]:
    """Return `call(level) -> {time, c_in, c_x, c_out}` for samples of `process`."""
    own: Any = denoiser.process

    def call(level: float) -> dict[str, Any]:
        factor = 1.0
        if process is not own:
            level, factor = _matched(own, process, level)
        number = float_conversion(denoiser.prediction_type, own, level, denoiser.sigma_data)
        time = float(network_time(level, own, torch.float64))
        return {"time": time, "c_in": number.c_in * factor, "c_x": number.c_x * factor, "c_out": number.c_out}

    return call


def _matched(own: Process, other: Process, level: float) -> tuple[float, float]:
    """Return the level of `own` that a level of `other` is, and the factor from other to own samples."""
    from dipole.diffusion.process_view import ProcessView

    seen: list[tuple[float, float]] = []

    def denoiser(x: Tensor, t: Any, cond: Any = None) -> Tensor:
        seen.append((float(t), float(x)))
        return x

    ProcessView(denoiser, own, other)(torch.ones((), dtype=torch.float64), level)
    return seen[0]


def _kernel_steps(
    kernel: Kernel, process: Process, levels: Tensor, call: Callable[[float], dict[str, Any]]
) -> list[Step]:
    visited = levels.tolist()
    steps = []
    for k, c in enumerate(coefficient_table(kernel, process, tuple(visited))):
        # Without a clip the table puts everything that x0 does into `x0`.
        clipped, raw = (c.x0, c.raw) if kernel.clip is not None else (0.0, c.x0 + c.raw)
        steps.append(
            Step(
                **call(visited[k]),
                samples=_terms({k: c.x}),
                clipped=_terms({k: clipped}),
                x0s=_terms({k: raw}),
                std=max(0.0, c.std),
            )
        )
    return steps


def _solver_steps(solver: Any, process: Process, levels: Tensor, call: Callable[[float], dict[str, Any]]) -> list[Step]:
    """Run the solver on basis vectors: e_0 is where it starts, e_i what the denoiser answers to call i - 1."""
    size = 3 * len(levels)  # no solver calls more than twice a step
    basis = torch.eye(size, dtype=torch.float64)
    inputs: list[Tensor] = []
    times: list[float] = []

    def denoiser(x: Tensor, t: Any, cond: Any = None) -> Tensor:
        inputs.append(x[0])
        times.append(float(t))
        return basis[len(inputs)][None]

    final = sample(denoiser, process, levels, solver, init=basis[:1])[0]
    rows = [*inputs[1:], final]
    return [
        Step(
            **call(time),
            samples=_terms({0: float(row[0])}),
            x0s=_terms({j: float(row[j + 1]) for j in range(i + 1)}),
        )
        for i, (time, row) in enumerate(zip(times, rows, strict=True))
    ]


def _terms(weights: dict[int, float]) -> Terms:
    return [(j, weight) for j, weight in weights.items() if weight != 0.0]
