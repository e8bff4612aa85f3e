"""dipole: DIffusion POlicies: Learning and Execution.

A denoiser, a process, a sampler: every method of the library changes one of these or what surrounds them. Importing
`dipole` is quick and loads no optional dependency; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "DDIM": "dipole.diffusion",
    "DDPM": "dipole.diffusion",
    "EDM": "dipole.diffusion",
    "Flow": "dipole.diffusion",
    "VP": "dipole.diffusion",
    "sample": "dipole.diffusion",
    "Policy": "dipole.policies",
    "DipoleError": "dipole.errors",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'dipole' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
