"""Limits on what a policy may command, and what is found where they are broken; `dipole.safety.guard` enforces them.

There are finite numbers, a box per action dimension, and a largest change per tick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dipole.errors import DipoleError, unknown

Rule = Literal["finite", "limits", "rate", "monitor"]
Response = Literal["clamp", "refuse"]
Objection = Literal["report", "clamp", "refuse"]


@dataclass(frozen=True)
class Limits:
    """What a robot may be told to do, in the units of the actions, one entry per action dimension.

    Attributes:
        low: Smallest action; None for no box (then `high` must be None too).
        high: Largest action.
        max_change: Largest change from one control tick to the next; None for no rate limit.
        hold: The action that keeps the robot where it is, e.g. zeros for velocities; None: the previous action again,
            which is right for positions.
        on_nonfinite: What to do about NaN and infinity. `clamp` repeats the last finite value of that dimension.
        on_limits: What to do about an action outside the box.
        on_rate: What to do about a change that is too fast.
        on_monitor: What to do when a `Monitor` objects: `refuse`, `clamp` (hold from the first tick it objects to), or
            `report` and let it pass.
    """

    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    max_change: tuple[float, ...] | None = None
    hold: tuple[float, ...] | None = None
    on_nonfinite: Response = "refuse"
    on_limits: Response = "clamp"
    on_rate: Response = "clamp"
    on_monitor: Objection = "refuse"

    def __post_init__(self) -> None:
        self._check_responses()
        given = {name: getattr(self, name) for name in ("low", "high", "max_change", "hold")}
        sizes = {name: len(value) for name, value in given.items() if value is not None}
        if len(set(sizes.values())) > 1:
            raise DipoleError(f"the limits differ in their number of dimensions: {sizes}")
        for name, value in given.items():
            if value is not None and not np.isfinite(value).all():
                raise DipoleError(f"the limit '{name}' must be finite: {list(value)}")
        if (self.low is None) != (self.high is None):
            raise DipoleError("give both low and high, or neither")
        if self.max_change is not None and min(self.max_change, default=1.0) <= 0:
            raise DipoleError("max_change must be positive in every dimension")
        if self.low is None or self.high is None:
            return
        if any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise DipoleError("low must not exceed high in any dimension")
        if self.hold is not None and not np.array_equal(np.clip(self.hold, self.low, self.high), self.hold):
            raise DipoleError("hold must be within low and high")

    def _check_responses(self) -> None:
        for name in ("on_nonfinite", "on_limits", "on_rate", "on_monitor"):
            known = get_args(Objection if name == "on_monitor" else Response)
            if getattr(self, name) not in known:
                raise unknown(f"response {name} =", str(getattr(self, name)), known)


@dataclass(frozen=True)
class Violation:
    """One rule broken in one dimension of one row of a chunk.

    Attributes:
        rule: `finite`, `limits`, `rate`, or `monitor`.
        row: Row of the batch.
        dimension: Of the action; None where a rule looks at whole chunks.
        first: First tick of the chunk at which it was broken.
        count: At how many ticks.
        excess: By how much at most, in the action's units; 0 for `finite`.
        response: `clamp`, `refuse` or `report`.
        text: More, from a monitor.
    """

    rule: Rule
    row: int
    dimension: int | None
    first: int
    count: int
    excess: float
    response: Objection
    text: str = ""
