"""RDP on a simulated contact task: the reproduction of `rdp`, with a MuJoCo touch sensor instead of a formula.

Actions are absolute positions of the tool here, learned relative to where it was last seen, as published.
"""

from __future__ import annotations

from dataclasses import replace

from dipole.envs import collect
from dipole.envs.micro.wipe import BAND
from dipole.systems import rdp
from dipole.systems.card import Claim, Margin, Measure
from dipole.systems.rdp_checks import relative_error
from dipole.systems.rdp_scores import FORCE
from dipole.systems.run import Run

CARD = replace(
    rdp.CARD,
    name="rdp-contact",
    title="RDP on a MuJoCo wiping task with a touch sensor",
    needs_extras=("envs",),
)
ENV = "contact/Wipe"
# The tool's seen position (x, z) is what target positions are relative to.
OPTIONS = {"base": rdp.STATE, "base_dims": (0, 1)}


def small(run: Run) -> list[Claim]:
    """Train and compare as `rdp` does, on the simulator."""
    return rdp.small(run, ENV, OPTIONS)


def ci(run: Run) -> list[Claim]:
    """Check the relative poses, and that there is something to learn from."""
    force = collect(ENV, 4).columns[FORCE][:, 0]
    share = float(((force >= BAND[0]) & (force <= BAND[1])).mean())
    return [
        Claim("relative poses and back", "0", Measure(relative_error()), None, Margin(high=1e-6)),
        Claim(
            "the demonstrator keeps the force, share of ticks",
            "",
            Measure(share),
            None,
            Margin(low=0.8),
            "4 episodes with a shift each",
        ),
    ]


TIERS = {"ci": ci, "small": small}
