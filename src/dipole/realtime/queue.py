"""The actions a robot has still to execute, by control tick, and how a new chunk is merged into them.

Ticks are absolute: a chunk is put at the tick its first action is for, and what is before now is stale and dropped.
Where the old plan and the new chunk overlap, `Merge` decides:

    replace   the new chunk counts, what is left of the old plan is forgotten (LeRobot's `latest_only`)
    weighted  w new + (1 - w) old (LeRobot's `weighted_average`, w = 0.7; `average` 0.5; `conservative` 0.3)
    blend     the share of the new chunk rises linearly over the first ticks, then it alone counts
    ensemble  mean of all chunks that reached the tick, the i-th (0 is the oldest) weighted exp(-decay i)
              (Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", 2023: ACT)
    append    the old plan is kept until it is exhausted, the new chunk follows

Averages of actions are only sensible between chunks that agree: half-way between left and right may be the obstacle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dipole.errors import DipoleError, unknown

MergePolicy = Literal["replace", "weighted", "blend", "ensemble", "append"]


@dataclass(frozen=True)
class Merge:
    """How a new chunk meets the actions still planned.

    Attributes:
        policy: See the module's description.
        new_weight: Share of the new chunk in `weighted`.
        blend_ticks: Length of the crossfade of `blend`: the share of the new chunk is j / (n + 1) at its j-th tick.
        decay: Of `ensemble`, per chunk.
    """

    policy: MergePolicy = "replace"
    new_weight: float = 0.7
    blend_ticks: int = 4
    decay: float = 0.01

    def __post_init__(self) -> None:
        if self.policy not in get_args(MergePolicy):
            raise unknown("merge policy", self.policy, get_args(MergePolicy))
        if not 0 <= self.new_weight <= 1:
            raise DipoleError(f"new_weight must be within 0 and 1, got {self.new_weight:g}")
        if self.blend_ticks < 1 or self.decay < 0:
            raise DipoleError("blend_ticks must be at least 1 and decay at least 0")


class ActionQueue:
    """The plan of one robot. Actions are rows of any float type; averages are taken in float64.

    Attributes:
        merge: How chunks are merged.
        start: Tick of the first planned action (meaningless while nothing is planned).
        consumed: How many planned actions were taken or passed over, ever.
    """

    def __init__(self, merge: Merge | None = None) -> None:
        self.merge = Merge() if merge is None else merge
        self.consumed = 0
        self.clear()

    def clear(self) -> None:
        """Forget the plan."""
        self.start = 0
        self._plan: np.ndarray | None = None  # [n, Da]
        self._votes = np.zeros(0, dtype=np.int64)  # [n], chunks averaged into each action

    def advance(self, now: int) -> None:
        """Pass over what is planned for ticks before `now`."""
        if self._plan is not None:
            gone = min(max(0, now - self.start), len(self._plan))
            self._plan, self._votes = self._plan[gone:], self._votes[gone:]
            self.consumed += gone
        self.start = now

    def put(self, chunk: np.ndarray, first: int, now: int) -> int:
        """Merge a chunk into the plan.

        Args:
            chunk: `[n, Da]`; row k is for tick `first + k`.
            first: Tick of its first action, not after `now`.
            now: The present tick, whose action has not been taken yet.

        Returns:
            How many of its actions were stale, for ticks before `now`, and dropped.
        """
        if first > now:
            raise ValueError(f"the chunk is for tick {first}, but it is only tick {now}")
        self.advance(now)
        stale = min(now - first, len(chunk))
        new, old = np.array(chunk[stale:]), self._plan
        if old is None or not len(old):
            self._plan, self._votes = new, np.ones(len(new), dtype=np.int64)
        elif len(new):
            self._merge(old, new)
        return stale

    def _merge(self, old: np.ndarray, new: np.ndarray) -> None:
        votes, both = self._votes, min(len(old), len(new))
        if self.merge.policy == "append":
            self._plan = np.concatenate([old, new[both:]])
            self._votes = np.concatenate([votes, np.ones(len(new) - both, dtype=np.int64)])
            return
        share = self._share(votes[:both])[:, None]
        mixed = share * new[:both].astype(np.float64) + (1 - share) * old[:both]
        mixed = np.where(share == 1, new[:both], mixed)  # exactly the new chunk where it alone counts
        self._plan = np.concatenate([mixed.astype(new.dtype), new[both:]])
        self._votes = np.concatenate([votes[:both] + 1, np.ones(len(new) - both, dtype=np.int64)])

    def _share(self, votes: np.ndarray) -> np.ndarray:
        """Return the share of the new chunk at each overlapping tick, `[n]`."""
        policy, count = self.merge.policy, len(votes)
        if policy == "weighted":
            return np.full(count, self.merge.new_weight)
        if policy == "blend":
            length = min(self.merge.blend_ticks, count)
            share = np.arange(1, count + 1) / (length + 1)
            share[length:] = 1
            return share
        if policy == "ensemble":
            weights = np.exp(-self.merge.decay * np.arange(max(votes, default=0) + 1))
            shares: np.ndarray = weights[votes] / np.cumsum(weights)[votes]
            return shares
        return np.ones(count)

    def pop(self, now: int) -> np.ndarray | None:
        """Return the action of tick `now` `[Da]` and forget it with all before it; None if there is none."""
        self.advance(now)
        if self._plan is None or not len(self._plan):
            return None
        action: np.ndarray = self._plan[0].copy()
        self.advance(now + 1)
        return action

    def ahead(self, now: int) -> np.ndarray | None:
        """Return the actions planned from tick `now` on, `[n, Da]`; None before the first chunk."""
        if self._plan is None:
            return None
        return self._plan[max(0, now - self.start) :]

    def remaining(self, now: int) -> int:
        """Return how many actions are planned from tick `now` on."""
        plan = self.ahead(now)
        return 0 if plan is None else len(plan)
