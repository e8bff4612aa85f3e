"""How a server answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dipole.serving.limits import Limits


@dataclass(frozen=True)
class ServiceConfig:
    """How requests are answered.

    Attributes:
        limits: Bounds on clients. Messages may be no larger than what the policies see explains, either.
        max_batch: Most sessions answered by one call of the policy.
        latency_budget_ms: Longest wait for other sessions before a call.
        block: Rows of every call, padded, so that replies do not even differ by rounding; 0 for as many as there are.
        quick_ms: Longest call that the event loop makes itself while there is only one session, so that no time is lost
            in waking threads; 0 for never. Pages and new clients wait for as long.
        metadata: Further entries of the metadata, such as openpi's `reset_pose`.
    """

    limits: Limits = field(default_factory=Limits)
    max_batch: int = 16
    latency_budget_ms: float = 5.0
    block: int = 0
    quick_ms: float = 10.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
