"""The published systems: what each one is, and its reproduction. One module per system, loaded when asked for.

A system module has `CARD`, a `Card`, and `TIERS`, a dict from tier name to a function `(Run) -> list of Claim`.
"""

from __future__ import annotations

import importlib
import time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from dipole import __version__
from dipole.errors import DipoleError, unknown
from dipole.serialization import write_json
from dipole.systems.card import TIERS, Card, Claim, Margin, Measure, Report, Source, Tier
from dipole.systems.run import Progress, Run, silent

__all__ = ["Card", "Claim", "Margin", "Measure", "Report", "Run", "Source", "card", "names", "reproduce", "tiers"]

# A closed list: a module's name with '-' for '_' is the system's name.
_MODULES = (
    "bac",
    "bc_diffusion",
    "beso",
    "diffusiondrive",
    "dppo",
    "dsrl",
    "equal_calls",
    "expo",
    "find",
    "gpc",
    "harpg",
    "metaworld_rl",
    "mode",
    "npg_igt",
    "rdp",
    "rdp_contact",
    "reinflow",
    "resip",
    "rti",
    "sdp",
)


def names() -> list[str]:
    """Return the names of all systems, sorted."""
    return sorted(module.replace("_", "-") for module in _MODULES)


def _module(name: str) -> ModuleType:
    if name not in names():
        raise unknown("system", name, names())
    return importlib.import_module(f"dipole.systems.{name.replace('-', '_')}")


def card(name: str) -> Card:
    """Return a system's card.

    Raises:
        DipoleError: Unknown system.
    """
    found: Card = _module(name).CARD
    return found


def tiers(name: str) -> list[Tier]:
    """Return the tiers a system can be reproduced at.

    Raises:
        DipoleError: Unknown system.
    """
    module = _module(name)
    return [tier for tier in TIERS if tier in module.TIERS]


def reproduce(
    name: str, tier: Tier = "ci", out: str | Path | None = None, progress: Progress = silent, fresh: bool = False
) -> Report:
    """Run a system's reproduction and save `report.json` and plots in the run folder.

    Args:
        name: Name of the system.
        tier: `ci` (seconds, exact checks), `small` (minutes on two cores) or `gpu`.
        out: Run folder, default `runs/reproduce/<name>-<tier>`. Parts finished there by an earlier run are reused.
        progress: Called with one line as parts start.
        fresh: Compute all parts again.

    Raises:
        DipoleError: Unknown system, or a tier it does not have.
    """
    from dipole.evaluation.machine import machine

    module = _module(name)
    if tier not in module.TIERS:
        raise DipoleError(f"'{name}' has no tier '{tier}': it has {', '.join(tiers(name))}")
    folder = Path("runs") / "reproduce" / f"{name}-{tier}" if out is None else Path(out)
    run = Run(folder, progress, fresh)
    start = time.perf_counter()
    claims = module.TIERS[tier](run)
    report = Report(
        system=name,
        tier=tier,
        claims=tuple(claims),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        seconds=time.perf_counter() - start + run.saved_seconds,
        machine=machine(),
        version=__version__,
        plots=tuple(run.plots),
    )
    write_json(folder / "report.json", report.as_dict())
    return report
