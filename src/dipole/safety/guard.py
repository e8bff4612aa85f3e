"""The guard of what a policy commands: every chunk is checked against limits before it leaves for a robot.

`OutputGuard.check` is the last thing a chunk passes. Each rule either clamps (the nearest action that obeys) or refuses
(the whole chunk of that row is replaced by holding still), and every violation is counted and reported. Clamping goes
through the chunk in time order: with y_t the action put into the box [low, high],

    a_t = clip(y_t, a_{t-1} - max_change, a_{t-1} + max_change),        a_{-1} = previous

lies between a_{t-1} and y_t, so it is in the box as well: both limits hold at once, across the border of chunks too. A
`previous` outside the box counts as the nearest action in it. Bounds are computed in float64 and rounded to the
chunk's dtype, in which they hold exactly.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from dipole.errors import DipoleError
from dipole.safety.limits import Limits, Objection, Response, Rule, Violation


class Monitor(Protocol):
    """Something that judges whole chunks, e.g. formulas of signal temporal logic (`dipole.safety.monitor`)."""

    def check(
        self, chunk: np.ndarray, obs: Mapping[str, Any] | None, past: Sequence[Any] | None = None
    ) -> list[Violation]:
        """Return what is wrong with `chunk` `[B, Ta, Da]`, which obeys the limits already; see `OutputGuard.check`."""

    def remember(self, past: Any, actions: np.ndarray, obs: Mapping[str, Any] | None) -> Any:
        """Return what the next check of a robot is to be told; see `OutputGuard.remember`."""


class RefusedError(DipoleError):
    """A chunk was refused and there is nothing to replace it with.

    Attributes:
        rows: The refused rows that have no previous action.
        violations: All that was found.
    """

    def __init__(self, rows: list[int], violations: list[Violation]) -> None:
        guilty = [v for v in violations if v.row in rows and (v.response == "refuse" or v.rule == "monitor")]
        rules = ", ".join(sorted({f"{v.rule} '{v.text}'" if v.text else v.rule for v in guilty}))
        super().__init__(
            f"the policy's actions were refused ({rules}) and nothing is known to send instead: set hold in the limits"
        )
        self.rows, self.violations = rows, violations


class OutputGuard:
    """Checks chunks against limits. Holds nothing but its counters, so it serves any number of robots and threads.

    Args:
        limits: The limits.
        monitor: Judges the clamped chunk.
    """

    def __init__(self, limits: Limits, monitor: Monitor | None = None) -> None:
        self.limits, self.monitor = limits, monitor
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def counts(self) -> dict[str, int]:
        """Return how many actions' dimensions broke each rule, and how many rows were `refused`, so far."""
        with self._lock:
            return dict(self._counts)

    def check(
        self,
        chunk: np.ndarray,
        previous: np.ndarray | None = None,
        obs: Mapping[str, Any] | None = None,
        past: Sequence[Any] | None = None,
    ) -> tuple[np.ndarray, list[Violation]]:
        """Return `(chunk, violations)`, the chunk obeying all limits; unchanged where it did already.

        Args:
            chunk: `[B, Ta, Da]`, any float type.
            previous: `[B, Da]`, the actions last sent; None at the start: the first action is then free of the rate.
            obs: What the policy saw, `[B, To, ...]` each, for the monitor.
            past: For the monitor: per row what `remember` returned last; None at the start of an episode.

        Raises:
            RefusedError: A row was refused, and there is neither `previous` nor `hold` to replace it with.
            DipoleError: `previous` is not finite, or a shape does not fit the limits.
        """
        self._check_shapes(chunk, previous)
        start = None if previous is None else self._into_box(previous.astype(chunk.dtype))
        violations: list[Violation] = []
        safe = self._finite(chunk, start, violations)
        boxed = self._into_box(safe)
        if self.limits.low is not None:
            beyond = np.abs(safe.astype(np.float64) - boxed)
            violations += _collect("limits", np.where(np.isfinite(chunk), beyond, 0.0), self.limits.on_limits)
        safe, excess = self._slow(boxed, start)
        violations += _collect("rate", excess, self.limits.on_rate)
        safe = self._hold_refused(safe, start, violations)
        if self.monitor is not None:
            response = self.limits.on_monitor
            violations += [_answered(found, response) for found in self.monitor.check(safe, obs, past)]
            safe = self._hold_refused(safe, start, violations)
        self._count(violations)
        return safe, violations

    def remember(self, past: Any, actions: np.ndarray, obs: Mapping[str, Any] | None = None) -> Any:
        """Return the `past` of a robot's next check.

        Args:
            past: What was returned last; None at the start of an episode.
            actions: `[n, Da]`, what was sent to the robot since.
            obs: What the policy saw before, `[To, ...]` each.
        """
        return None if self.monitor is None else self.monitor.remember(past, actions, obs)

    def held(self, past: Any, action: np.ndarray, ticks: int, obs: Mapping[str, Any] | None = None) -> Any:
        """Return the `past` of a robot's next check after ticks that were missed.

        The robot went on with what it was sent last. Rules that this broke are counted; nothing can be held any more.

        Args:
            past: What was returned last.
            action: `[Da]`, what was sent last.
            ticks: How many were missed.
            obs: What the policy saw last, `[To, ...]` each.
        """
        if self.monitor is None:
            return None
        actions = np.repeat(action[None], ticks, axis=0)
        rows = {key: np.asarray(value)[None] for key, value in (obs or {}).items()}
        self._count([_answered(found, "report") for found in self.monitor.check(actions[None], rows, [past])])
        return self.monitor.remember(past, actions, obs)

    def _check_shapes(self, chunk: np.ndarray, previous: np.ndarray | None) -> None:
        if chunk.ndim != 3 or 0 in chunk.shape or chunk.dtype.kind != "f":
            raise DipoleError(f"a chunk must be floats [B, Ta, Da], got {chunk.dtype} {list(chunk.shape)}")
        for name in ("low", "max_change", "hold"):
            value = getattr(self.limits, name)
            if value is not None and len(value) != chunk.shape[2]:
                raise DipoleError(
                    f"the limits are for {len(value)} action dimensions, the chunk has {chunk.shape[2]}: are they of "
                    "another robot?"
                )
        if previous is not None:
            if previous.shape != (chunk.shape[0], chunk.shape[2]):
                raise DipoleError(
                    f"previous has shape {list(previous.shape)}, expected {[chunk.shape[0], chunk.shape[2]]}"
                )
            if not np.isfinite(previous).all():
                raise DipoleError("the previous action is not finite: what was sent to the robot?")

    def _finite(self, chunk: np.ndarray, start: np.ndarray | None, violations: list[Violation]) -> np.ndarray:
        """Return the chunk with each number that is none replaced by the one before it, or what is nearest to 0."""
        bad = ~np.isfinite(chunk)
        if not bad.any():
            return chunk
        violations += _collect("finite", np.where(bad, np.nan, 0.0), self.limits.on_nonfinite)
        safe = chunk.copy()
        hold = np.zeros(chunk.shape[2]) if self.limits.hold is None else np.array(self.limits.hold)
        before = np.broadcast_to(self._into_box(hold.astype(chunk.dtype)), safe[:, 0].shape) if start is None else start
        for t in range(chunk.shape[1]):
            safe[:, t] = np.where(bad[:, t], before, safe[:, t])
            before = safe[:, t]
        return safe

    def _into_box(self, actions: np.ndarray) -> np.ndarray:
        if self.limits.low is None:
            return actions
        low, high = (np.array(bound).astype(actions.dtype) for bound in (self.limits.low, self.limits.high))
        boxed: np.ndarray = np.clip(actions, low, high)
        return boxed

    def _slow(self, actions: np.ndarray, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the actions with the rate limit kept, and by how much each was beyond it, `[B, Ta, Da]`."""
        excess = np.zeros(actions.shape)
        if self.limits.max_change is None:
            return actions, excess
        change, slow, before = np.array(self.limits.max_change), actions.copy(), start
        for t in range(actions.shape[1]):
            if before is not None:
                center = before.astype(np.float64)
                low, high = ((center + sign * change).astype(actions.dtype) for sign in (-1, 1))
                slow[:, t] = np.clip(actions[:, t], low, high)
                excess[:, t] = np.abs(actions[:, t].astype(np.float64) - slow[:, t])
            before = slow[:, t]
        return slow, excess

    def _hold_refused(self, actions: np.ndarray, start: np.ndarray | None, violations: list[Violation]) -> np.ndarray:
        """Return the actions with refused rows held, from where a monitor objects on if that is clamped."""
        since: dict[int, int] = {}
        for found in violations:
            if found.response == "refuse":
                since[found.row] = 0
            elif found.response == "clamp" and found.rule == "monitor":
                since[found.row] = min(found.first, since.get(found.row, found.first))
        if not since:
            return actions
        lost = [row for row, tick in since.items() if tick == 0 and start is None and self.limits.hold is None]
        if lost:
            self._count(violations)
            raise RefusedError(sorted(lost), violations)
        held = actions.copy()
        for row, tick in since.items():
            before = actions[row, tick - 1] if tick else None if start is None else start[row]
            target = np.asarray(before if self.limits.hold is None else self.limits.hold, dtype=actions.dtype)
            rest = np.broadcast_to(self._into_box(target), held[row : row + 1, tick:].shape)
            held[row : row + 1, tick:] = self._slow(rest, None if before is None else before[None])[0]
        return held

    def _count(self, violations: list[Violation]) -> None:
        with self._lock:
            for violation in violations:
                self._counts[violation.rule] += violation.count
            self._counts["refused"] += len({v.row for v in violations if v.response == "refuse"})


def _collect(rule: Rule, excess: np.ndarray, response: Response) -> list[Violation]:
    """Return the violations where `excess` `[B, Ta, Da]` is not 0; NaN stands for what has no amount."""
    broken = excess != 0
    found = []
    for row, dimension in np.argwhere(broken.any(axis=1)):
        ticks = np.flatnonzero(broken[row, :, dimension])
        amount = float(np.nan_to_num(excess[row, ticks, dimension]).max())
        found.append(Violation(rule, int(row), int(dimension), int(ticks[0]), len(ticks), amount, response))
    return found


def _answered(found: Violation, response: Objection) -> Violation:
    return replace(found, rule="monitor", response=response)
