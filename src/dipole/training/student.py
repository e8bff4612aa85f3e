"""The student of a distillation: its teacher's architecture and weights, the loss of a method, a sampler of few steps.

Four methods, all on a grid of the levels the teacher would visit in `teacher_steps` steps (see
`dipole.diffusion.distillation` for the targets):

- `direct`: each of the student's steps lands where the teacher's own steps would (Luhman & Luhman 2021). Nothing is
  learnt from the student itself, so errors do not add up; an update costs teacher_steps / nfe calls of the teacher.
- `consistency`: from neighbouring levels the student must jump to the same place (Consistency Policy, Prasad et al.
  2024). Theirs is also told where to jump to, and so needs another network; ours jumps to the end only.
- `shortcut`: the student learns steps of every dyadic length, each from two of half its length (Frans et al. 2024). The
  length is told by the network's own clock: lengths other than the final one live on times beyond its end. The shortest
  steps follow the teacher, which is kept, where theirs trains one network for both.
- `progressive`: two steps of the teacher become one of the student, which is the next teacher (Salimans & Ho 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from dipole.diffusion import DDIM, Denoiser, NetworkDenoiser, add_noise
from dipole.diffusion.distillation import (
    consistency_target,
    jump,
    many_step_target,
    ode_step,
    output_error,
    pseudo_huber,
)
from dipole.diffusion.process import EDM
from dipole.diffusion.tensors import expand, randn_like
from dipole.errors import DipoleError, unknown
from dipole.evaluation.blocks import device_of
from dipole.policies.config import PolicyConfig, SamplerConfig
from dipole.policies.diffusion_policy import DiffusionPolicy

Method = Literal["direct", "consistency", "shortcut", "progressive"]
METHODS: tuple[Method, ...] = ("direct", "consistency", "shortcut", "progressive")


@dataclass(frozen=True)
class DistillConfig:
    """How a policy is distilled.

    Attributes:
        method: `direct`, `consistency`, `shortcut` or `progressive`.
        nfe: Network calls of the student per chunk, a power of two.
        teacher_steps: Steps of the teacher that are condensed, a power of two of at least 2 nfe.
    """

    method: Method = "direct"
    nfe: int = 1
    teacher_steps: int = 8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("distillation method", self.method, METHODS)
        for name, value in (("nfe", self.nfe), ("teacher_steps", self.teacher_steps)):
            if value < 1 or value & (value - 1):
                raise DipoleError(f"{name} {value}: it must be a power of two")
        if self.teacher_steps < 2 * self.nfe:
            raise DipoleError(f"teacher_steps {self.teacher_steps}: at least {2 * self.nfe}, twice the student's")


class _Teacher:
    """Holds a policy outside the modules of its student, whose copies all share it."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.policy = policy.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Teacher:
        return self

    def on(self, device: torch.device) -> DiffusionPolicy:
        """Return the policy, on a device."""
        if device_of(self.policy) != device:
            self.policy.to(device)
        return self.policy


class StudentPolicy(DiffusionPolicy):
    """A policy being distilled: saved and loaded as the `DiffusionPolicy` it is, but with the loss of its method.

    The encoder of the observation is the teacher's and stays as it is; nothing is dropped out.
    """

    levels: Tensor

    def __init__(self, config: PolicyConfig, teacher: DiffusionPolicy, options: DistillConfig) -> None:
        super().__init__(config, teacher.normalizer)
        self.load_state_dict(teacher.state_dict())
        self.encoder.requires_grad_(False)
        self.options = options
        self._teacher = _Teacher(teacher)
        self.register_buffer("levels", grid(teacher, options.teacher_steps), persistent=False)

    def train(self, mode: bool = True) -> StudentPolicy:
        """Stay in evaluation mode: the targets are deterministic, so dropout would only add noise."""
        super().train(False)
        return self

    def loss(self, batch: dict[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return the distillation loss of a batch of windows; see `DiffusionPolicy.loss`."""
        x0 = self.normalizer.normalize("action", batch["action"])
        with torch.no_grad():
            cond = self.encode(batch)
        size = self._sizes(len(x0), generator)
        i = self._draw(size, generator)
        t = self.levels[i]
        x = add_noise(x0, randn_like(x0, generator), t, self.process)  # type: ignore[arg-type]
        with torch.no_grad():
            target = self._target(x, i, size, cond)
        predicted = jump(self._stepping(size), x, t, self.process, cond)
        objective = self.config.objective
        mask = torch.ones_like(x0[..., :1])
        if objective.mask_padding:
            mask = (~batch["action_is_pad"]).unsqueeze(-1).to(x0)
        if self.options.method == "consistency":
            return pseudo_huber((predicted - target) * mask).mean()
        error = output_error(predicted, target, t, self.process, objective.prediction_type, objective.sigma_data)
        return (error.square() * mask).sum() / (mask.sum() * error.shape[-1]).clamp(min=1)

    def _sizes(self, rows: int, generator: Generator | None) -> Tensor:
        """Return how many steps of the grid each row takes at once, `[B]`."""
        one = torch.ones(rows, dtype=torch.long, device=self.levels.device)
        if self.options.method == "consistency":
            return one
        if self.options.method == "progressive":
            return 2 * one
        if self.options.method == "direct":
            return one * (self.options.teacher_steps // self.options.nfe)
        draws = torch.randint(1, self._longest + 1, (rows,), generator=generator, device=_device(generator))
        return 2 ** draws.to(one.device)

    @property
    def _longest(self) -> int:
        """Return the binary logarithm of the steps of the grid that the finished student takes at once."""
        return int(math.log2(self.options.teacher_steps // self.options.nfe))

    def _draw(self, size: Tensor, generator: Generator | None) -> Tensor:
        """Return where on the grid each row begins: at a multiple of its size."""
        uniform = torch.rand(len(size), generator=generator, device=_device(generator)).to(size.device)
        places = self.options.teacher_steps // size
        return torch.minimum((uniform * places).long(), places - 1) * size

    def _target(self, x: Tensor, i: Tensor, size: Tensor, cond: dict[str, Tensor]) -> Tensor:
        teacher = self._teacher.on(x.device)
        kernel = DDIM(clip=teacher.sampler.clip)
        t, s = self.levels[i], self.levels[i + size]
        if self.options.method == "consistency":
            moved = ode_step(teacher.denoiser, x, t, s, self.process, cond, kernel)
            return consistency_target(self._stepping(size), moved, s, self.process, cond)
        if self.options.method == "direct":
            visited = [self.levels[i + k] for k in range(self.options.teacher_steps // self.options.nfe + 1)]
            return many_step_target(teacher.denoiser, x, visited, self.process, cond, kernel)
        halves = (t, self.levels[i + size // 2], s)
        target = many_step_target(teacher.denoiser, x, halves, self.process, cond, kernel)
        if self.options.method == "progressive":
            return target
        # Two steps of half the length, except for the shortest, which follow the teacher.
        own = many_step_target(self._stepping(size // 2), x, halves, self.process, cond)
        return torch.where(expand(size == 2, x), target, own)

    def _stepping(self, size: Tensor) -> Denoiser:
        """Return the student's denoiser for steps of these sizes."""
        if self.options.method != "shortcut":
            return self.denoiser
        shorter = self._longest - torch.log2(size.float()).round()
        network = _Shifted(self.network, shorter * 2 * _clock_end(self.process))
        objective = self.config.objective
        return NetworkDenoiser(network, self.process, objective.prediction_type, objective.sigma_data)


@dataclass(frozen=True)
class _Shifted:
    """A network told times moved by `offset` `[B]`."""

    network: nn.Module
    offset: Tensor

    def __call__(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = self.network(x, time + self.offset.to(time), cond)
        return out


def _device(generator: Generator | None) -> torch.device | None:
    return None if generator is None else generator.device


def _clock_end(process: Any) -> float:
    """Return the range of the times a network is told."""
    times = process.network_time(torch.tensor([process.noisiest, max(process.clean, 1e-3)]))
    return float((times[0] - times[1]).abs())


def grid(teacher: DiffusionPolicy, steps: int) -> Tensor:
    """Return the `[steps + 1]` levels that are condensed.

    Raises:
        DipoleError: The process has fewer.
    """
    levels: Tensor = SamplerConfig("ddim", steps).levels(teacher.process)
    return levels


def make_student(teacher: DiffusionPolicy, options: DistillConfig) -> StudentPolicy:
    """Return the untrained student: the teacher's architecture and weights.

    A network that predicts noise is made to predict `v` instead: where almost no signal is left, noise says nothing
    about the action (Salimans & Ho 2022, section 4).

    Raises:
        DipoleError: The policy is of a kind that cannot be distilled, or the number of steps does not fit it.
    """
    config = getattr(teacher, "config", None)
    if not isinstance(teacher, DiffusionPolicy) or not isinstance(config, PolicyConfig):
        kind = getattr(teacher, "type_name", type(teacher).__name__)
        raise DipoleError(f"a policy of kind '{kind}' cannot be distilled: only plain diffusion and flow policies can")
    if isinstance(teacher.process, EDM):
        raise DipoleError("an EDM policy cannot be distilled: only flow and variance-preserving ones can")
    if getattr(config, "streaming", None) is not None:
        raise DipoleError("a streaming policy cannot be distilled: its chunks are never at one level")
    objective = config.objective
    if objective.prediction_type == "epsilon":
        objective = replace(objective, prediction_type="v")
    student = replace(config, objective=objective, sampler=student_sampler(teacher, options))
    return StudentPolicy(student, teacher, options)


def student_sampler(teacher: DiffusionPolicy, options: DistillConfig) -> SamplerConfig:
    """Return how the student is run: consistency sampling, or ODE steps, on its `nfe` levels of the grid."""
    name: Any = "consistency" if options.method == "consistency" else "ddim"
    return SamplerConfig(name, options.nfe, clip=teacher.sampler.clip)
