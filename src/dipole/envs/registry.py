"""Environments by name. A family (the part before the slash) is one module; simulators are imported when first made."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, Literal

from dipole.envs.async_vector import AsyncVector
from dipole.envs.spec import VectorEnv
from dipole.envs.vector import SyncVector
from dipole.errors import DipoleError, unknown

Mode = Literal["sync", "async", "native"]

# Each module has TASKS: name -> task sentence, and either build(name, **options) -> SingleEnv for simulators or
# build_native(name, num_envs, **options) -> VectorEnv for environments that are vectorised themselves.
FAMILIES = {
    "micro": "dipole.envs.micro",
    "pusht": "dipole.envs.adapters.pusht",
    "metaworld": "dipole.envs.adapters.metaworld",
}


def _module(family: str) -> ModuleType:
    return importlib.import_module(FAMILIES[family])


@functools.cache
def tasks() -> dict[str, str]:
    """Return every environment's name and its task sentence. Imports no simulator."""
    return {name: task for family in FAMILIES for name, task in _module(family).TASKS.items()}


def names() -> list[str]:
    """Return the names of all environments."""
    return list(tasks())


def family_of(name: str) -> ModuleType:
    """Return the module that builds environment `name`, or raise DipoleError with the nearest known name."""
    if name not in tasks():
        raise unknown("environment", name, tasks())
    return next(module for module in map(_module, FAMILIES) if name in module.TASKS)


def make(name: str, num_envs: int = 1, mode: Mode | None = None, **options: Any) -> VectorEnv:
    """Build `num_envs` environments behind one `VectorEnv`.

    Args:
        name: Environment name; `names()` lists them.
        num_envs: Number of rows.
        mode: `native` (vectorised numpy; micro environments only), `sync` (one after the other in this process) or
            `async` (worker processes, see `async_vector`). None picks `native` where there is one, else `sync`.
        options: `max_steps` replaces the time limit, `num_workers` sets the number of async processes; the others go
            to the environment itself.

    Raises:
        DipoleError: Unknown name, or a mode the environment does not have.
        MissingExtraError: The simulator is not installed.
    """
    module = family_of(name)
    if num_envs < 1:
        raise DipoleError(f"num_envs is {num_envs}: it must be at least 1")
    native = hasattr(module, "build_native")
    mode = mode or ("native" if native else "sync")
    if (mode == "native") != native:
        has = "is vectorised already: use mode 'native'" if native else "has no mode 'native': use 'sync' or 'async'"
        raise DipoleError(f"environment '{name}' {has}")
    if mode == "native":
        return module.build_native(name, num_envs, **options)
    if mode == "async":
        return AsyncVector(name, num_envs, **options)
    max_steps = options.pop("max_steps", None)
    build = functools.partial(module.build, name, **options)
    return SyncVector([build] * num_envs, max_steps=max_steps)
