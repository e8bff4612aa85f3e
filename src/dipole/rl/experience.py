"""What a collector hands round: observers, decisions, and rollouts of decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

Groups = dict[str, Tensor]


class Observer(Protocol):
    """Turns observations into features. It may remember something per row (a queue of actions)."""

    def __call__(self, obs: dict[str, Tensor], rows: Sequence[int], begins: bool, generator: Generator) -> Tensor:
        """Return features `[n, F]` of observations `[n, To, ...]` of `rows`; `begins`: their episodes just began."""


@dataclass(frozen=True)
class Decision:
    """What all rows do next.

    Attributes:
        chunk: `[N, A, Da]` actions in physical units.
        data: Anything to be stored with the decision, `[N, ...]` each.
    """

    chunk: Tensor
    data: Groups = field(default_factory=dict)


Decide = Callable[[Tensor, Generator], Decision]


@dataclass(frozen=True)
class Rollout:
    """Decisions `[T, N]`.

    Attributes:
        features: `[T, N, F]` before each decision.
        next_features: `[T, N, F]` after it, in the same episode (after a termination: of no meaning).
        reward: `[T, N]`, summed over the executed actions.
        terminated: `[T, N]` bool: the task ended (success included, where that ends an episode).
        truncated: `[T, N]` bool: cut by the time limit or by a lost worker.
        data: What `decide` attached, `[T, N, ...]` each.
    """

    features: Tensor
    next_features: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    data: Groups

    def flat(self) -> Groups:
        """Return all as `[T N, ...]` by name, as a replay buffer takes them."""
        own = {key: getattr(self, key) for key in ("features", "next_features", "reward", "terminated", "truncated")}
        return {key: value.flatten(0, 1) for key, value in {**own, **self.data}.items()}


@dataclass
class Row:
    """An episode under way."""

    seed: int
    actions: list[np.ndarray] = field(default_factory=list)
    total: float = 0.0
    success: bool = False


def stack(taken: list[dict[str, Any]]) -> Rollout:
    """Return decisions, one dict of `[N, ...]` each, as a rollout."""
    names = ("features", "next_features", "reward", "terminated", "truncated")
    data = {key: torch.stack([one["data"][key] for one in taken]) for key in taken[0]["data"]}
    return Rollout(**{name: torch.stack([one[name] for one in taken]) for name in names}, data=data)
