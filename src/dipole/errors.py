"""Errors a user can mend: each says what is wrong, where, and how to put it right, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DipoleError(Exception):
    """A mistake in the input (not in dipole). The command line prints it on one line and exits with code 2."""


class MissingExtraError(DipoleError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"'{package}' is not installed: run  pip install 'dipole[{extra}]'")


def unknown(kind: str, name: str, options: Iterable[str]) -> DipoleError:
    """Return the error for an unknown `name`, suggesting the nearest of `options`."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return DipoleError(f"unknown {kind} '{name}': {hint}")
