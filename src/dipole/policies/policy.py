"""What every policy is: a pure function from observations and state to a chunk of actions and the next state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dipole.diffusion.tensors import Random

State = dict[str, Tensor]
Observation = Mapping[str, Tensor]


class Policy(Protocol):
    """A policy. `act` has no memory of its own: what it must remember is in `state`, a dict of tensors, batch first.

    Attributes:
        obs_horizon: To, how many observations it is given (the last one is now).
        pred_horizon: Tp, how many actions it denoises.
        action_horizon: Ta, how many of them it returns.
        action_dim: Da.
    """

    @property
    def obs_horizon(self) -> int:
        """Return To."""

    @property
    def pred_horizon(self) -> int:
        """Return Tp."""

    @property
    def action_horizon(self) -> int:
        """Return Ta."""

    @property
    def action_dim(self) -> int:
        """Return Da."""

    def initial_state(self, batch: int) -> State:
        """Return the state at the start of `batch` episodes; empty for a policy that remembers nothing."""

    def reset(self, state: State, mask: Tensor) -> State:
        """Return the state with the rows where `mask` (`[B]`, bool) is true put back to the start of an episode."""

    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk, state')`.

        Args:
            obs: Raw observations `[B, To, ...]` by feature name; images uint8 `[B, To, H, W, C]` or float
                `[B, To, C, H, W]` in [0, 1].
            state: From `initial_state` or the previous call.
            noise: Initial noise `[B, Tp, Da]` (standard normal) to start denoising from; None to draw it.
            generator: Source of randomness: one generator, or one per row.

        Returns:
            `chunk` `[B, Ta, Da]` in physical units, the first action being for now, and the next state.
        """

    if not TYPE_CHECKING:  # a type checker would ask it of every policy

        @staticmethod
        def load(path: str | Path, device: Any = "cpu", runtime: Any = "stored") -> Any:
            """Return a policy from its folder, run as its `runtime.json` says: see `dipole.realtime.load`."""
            from dipole.realtime import load

            return load(path, device, runtime)

        @staticmethod
        def from_lerobot(path: str | Path, revision: str | None = None, **options: Any) -> Any:
            """Return LeRobot's diffusion policy: see `dipole.policies.lerobot.from_lerobot`."""
            from dipole.policies.lerobot import from_lerobot

            return from_lerobot(path, revision, **options)


def reset_rows(state: State, initial: State, mask: Tensor) -> State:
    """Return `state` with rows taken from `initial` where `mask` is true: the `reset` of any policy."""

    def pick(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(mask.reshape(-1, *[1] * (old.dim() - 1)), new, old)

    return {key: pick(value, initial[key]) for key, value in state.items()}


def take_rows(state: State, rows: Tensor) -> State:
    """Return the state of some rows (`rows`: indices `[n]`)."""
    return {key: value[rows] for key, value in state.items()}


def put_rows(state: State, rows: Tensor, part: State) -> State:
    """Return `state` with `part` written into `rows` (indices `[n]`)."""
    merged = {}
    for key, value in state.items():
        merged[key] = value.clone()
        merged[key][rows] = part[key]
    return merged
