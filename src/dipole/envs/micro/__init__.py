"""Micro environments: tasks in numpy, microseconds a step, with demonstrators, for tests and small experiments."""

from __future__ import annotations

from typing import Any

from dipole.envs.experts.expert import Demonstrator, Expert, RowExpert
from dipole.envs.micro import fork2d
from dipole.envs.micro.task import MicroTask, NativeVector
from dipole.envs.spec import VectorEnv

_MICRO: dict[str, tuple[type[MicroTask], type[Demonstrator]]] = {
    fork2d.NAME: (fork2d.Fork2D, fork2d.Fork2DExpert),
}
TASKS = {
    fork2d.NAME: fork2d.TASK,
}
EXPERTS = frozenset(TASKS)


def build_native(name: str, num_envs: int, max_steps: int | None = None, **options: Any) -> NativeVector:
    """Return `num_envs` rows of micro environment `name`; `options` go to the task."""
    return NativeVector(_MICRO[name][0](**options), num_envs, max_steps)


def build_expert(env: VectorEnv) -> Expert:
    """Return the demonstrator for the rows of `env`."""
    return RowExpert(_MICRO[env.spec.name][1](), env.num_envs)
