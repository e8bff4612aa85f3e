"""The C++ compiler that torch needs to compile a network for a CPU."""

from __future__ import annotations

import os
import shutil
import sys

from dipole.errors import DipoleError


def need_compiler(what: str, instead: str) -> None:
    """Raise a DipoleError when torch would find no C++ compiler: it takes the one named in CXX, else a usual one.

    Args:
        what: What needs it, as the user asked for it.
        instead: What to do without one.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise DipoleError(
            f"{what} needs a C++ compiler, and '{name}' was not found: install it, name another in CXX, or {instead}"
        )
