"""Targets that turn a many-step denoiser into a one- or two-step one. All of them are clean samples x0.

A *jump* is what a distilled denoiser answers: not the expected clean sample, but the end of the ODE's path from where
it stands. Sources: Salimans & Ho 2022, "Progressive Distillation" (one step for two); Song et al. 2023, "Consistency
Models", eq. 7-10; Prasad et al. 2024, "Consistency Policy"; Frans et al. 2024, "One Step Diffusion via Shortcut
Models"; Luhman & Luhman 2021, "Knowledge Distillation in Iterative Generative Models".

Levels are `[B]`; an ODE step is a kernel's step without noise, DDIM with eta = 0 unless another is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dipole.diffusion.denoiser import Denoiser
from dipole.diffusion.kernels import DDIM, Kernel
from dipole.diffusion.prediction import PredictionType, conversion
from dipole.diffusion.process import Process
from dipole.diffusion.tensors import expand


def ode_step(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    process: Process,
    cond: Any = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Return `x` `[B, ...]` carried from levels `t` to levels `s` by one step of the ODE."""
    step = (DDIM() if kernel is None else kernel).step(x, denoiser(x, t, cond), t, s, process)
    mean: Tensor = step.mean
    return mean


def jump(denoiser: Denoiser, x: Tensor, t: Tensor, process: Process, cond: Any = None) -> Tensor:
    """Return f(x, t), the consistency function: the denoiser's answer, and `x` itself at the clean level.

    The boundary holds of itself for every prediction type but `x0`, whose network may say anything there.
    """
    return torch.where(expand(t == process.clean, x), x, denoiser(x, t, cond))


def consistency_target(student: Denoiser, x_next: Tensor, s: Tensor, process: Process, cond: Any = None) -> Tensor:
    """Return f(x_s, s), where the student must also land from the level before (Song et al. 2023, eq. 7).

    Args:
        student: The student without gradients.
        x_next: The sample carried to level `s` by an ODE step of the teacher.
        s: Its level.
        process: The process.
        cond: Conditioning.
    """
    return jump(student, x_next, s, process, cond)


def clean_of_step(x: Tensor, x_next: Tensor, t: Tensor, s: Tensor, process: Process) -> Tensor:
    """Return the x0 with which one DDIM step goes from `x` at level `t` to `x_next` at level `s`.

    In `Flow` this says: the velocity (x - x0) / t is the mean velocity between the two.
    """
    c = DDIM().coefficients(process, t, s)
    return (x_next - expand(c.x, x).to(x) * x) / expand(c.x0, x).to(x)


def many_step_target(
    teacher: Denoiser,
    x: Tensor,
    levels: Sequence[Tensor],
    process: Process,
    cond: Any = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Return the x0 with which one step from the first to the last of `levels` lands where the teacher's steps do.

    With two steps: Salimans & Ho 2022, appendix G; with halves of equal length in `Flow` also the self-consistency
    target of shortcut models (Frans et al. 2024, eq. 4): the mean of the two velocities. With all steps of a sampler,
    down to the clean level: Luhman & Luhman 2021.

    Args:
        teacher: The denoiser whose steps are condensed.
        x: Samples at the first level, `[B, ...]`.
        levels: Levels visited, each `[B]`, falling.
        process: The process.
        cond: Conditioning.
        kernel: Of the teacher's steps.
    """
    end = x
    for t, s in pairwise(levels):
        end = ode_step(teacher, end, t, s, process, cond, kernel)
    return clean_of_step(x, end, levels[0], levels[-1], process)


def output_error(
    x0: Tensor, target: Tensor, t: Tensor, process: Process, prediction_type: PredictionType, sigma_data: float = 0.5
) -> Tensor:
    """Return the error of a network's output that means `x0` where `target` was wanted, shaped as `x0`.

    Undefined at the clean level, where the output has no effect.
    """
    c_out = conversion(prediction_type, process, t, sigma_data).c_out
    return (x0 - target) / expand(c_out, x0).to(x0)


def pseudo_huber(error: Tensor, constant: float | None = None) -> Tensor:
    """Return sqrt(|error|^2 + c^2) - c for each row, `[B]` (Song & Dhariwal 2024, eq. 10).

    Args:
        error: `[B, ...]`.
        constant: c; default 0.00054 sqrt(numbers per row), as in that paper and in Consistency Policy.
    """
    flat = error.flatten(1)
    c = 0.00054 * float(flat.shape[1] ** 0.5) if constant is None else constant
    return (flat.square().sum(1) + c**2).sqrt() - c
