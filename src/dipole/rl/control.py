"""Small control problems for policy gradients on their own: LQR with everything in closed form, Pendulum, CartPole.

Dynamics are those of Gymnasium's `Pendulum-v1` and `CartPole-v1`, as batches of tensors; states are `[..., n]` with any
leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor


class Dynamics(Protocol):
    """An environment.

    Attributes:
        feature_dim: Components of what a policy sees.
        action_dim: Components of an action; with `discrete` the number of actions.
        discrete: Whether an action is one of a few.
    """

    @property
    def feature_dim(self) -> int:
        """Return the number of components of what a policy sees."""

    @property
    def action_dim(self) -> int:
        """Return the components of an action, or the number of actions."""

    @property
    def discrete(self) -> bool:
        """Return whether an action is one of a few."""

    def begin(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        """Return first states `[*shape, n]`."""

    def features(self, state: Tensor) -> Tensor:
        """Return what the policy sees, `[..., feature_dim]`."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next states, rewards `[...]` and whether the episode is over `[...]`."""


def _matrix(rows: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class LQR:
    """A point with velocity is pushed back to rest: linear dynamics, quadratic costs, in float64.

    s' = A s + B a, reward -(s^T Q s + a^T R a), first state N(0, scale^2 I). The policy is a = K s + std * noise.

    Attributes:
        transition: A.
        control: B.
        state_cost: Q.
        action_cost: R.
        scale: Standard deviation of the first state.
    """

    transition: tuple[tuple[float, ...], ...] = ((0.98, 0.15), (0.0, 0.9))
    control: tuple[tuple[float, ...], ...] = ((0.0,), (0.3,))
    state_cost: tuple[tuple[float, ...], ...] = ((0.5, 0.0), (0.0, 0.1))
    action_cost: tuple[tuple[float, ...], ...] = ((0.1,),)
    scale: float = 1.0
    feature_dim: int = field(default=2, init=False)
    action_dim: int = field(default=1, init=False)
    discrete: bool = field(default=False, init=False)

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A, B, Q, R."""
        return tuple(map(_matrix, (self.transition, self.control, self.state_cost, self.action_cost)))  # type: ignore[return-value]

    def begin(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        """Return first states."""
        return self.scale * torch.randn(*shape, 2, dtype=torch.float64, generator=generator)

    def features(self, state: Tensor) -> Tensor:
        """Return the state."""
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move; an episode never ends early."""
        a, b, q, r = self.matrices
        reward = -((state @ q) * state).sum(-1) - ((action @ r) * action).sum(-1)
        return state @ a.T + action @ b.T, reward, torch.zeros(state.shape[:-1], dtype=torch.bool)

    def value(self, gain: Tensor, std: float, horizon: int, gamma: float, second: Tensor | None = None) -> Tensor:
        """Return J(K) in closed form, differentiable.

            J = -sum_h gamma^h (tr[(Q + K^T R K) S_h] + std^2 tr R),  S_{h+1} = M S_h M^T + std^2 B B^T,  M = A + B K

        Args:
            gain: K `[..., 1, 2]`.
            std: Of the policy.
            horizon: H.
            gamma: Discount.
            second: S_0, E[s s^T] `[2, 2]` of the first state; default scale^2 I.
        """
        a, b, q, r = self.matrices
        moment = self.scale**2 * torch.eye(2, dtype=torch.float64) if second is None else second
        closed, cost = a + b @ gain, q + gain.mT @ r @ gain
        total = gain.new_zeros(gain.shape[:-2])
        for h in range(horizon):
            spent = (cost * moment).sum((-2, -1)) + std**2 * r.diagonal().sum()
            total = total - gamma**h * spent
            moment = closed @ moment @ closed.mT + std**2 * b @ b.T
        return total

    def gradient(self, gain: Tensor, std: float, horizon: int, gamma: float, second: Tensor | None = None) -> Tensor:
        """Return grad J `[1, 2]` for one K, in closed form.

        grad J = -2 sum_h gamma^h (R K + gamma B^T P_{h+1} M) S_h,  P_h = Q + K^T R K + gamma M^T P_{h+1} M,  P_H = 0
        """
        a, b, q, r = self.matrices
        moment = self.scale**2 * torch.eye(2, dtype=torch.float64) if second is None else second
        closed, cost = a + b @ gain, q + gain.T @ r @ gain
        values = [torch.zeros_like(q)]
        for _ in range(horizon):
            values.append(cost + gamma * closed.T @ values[-1] @ closed)
        total = torch.zeros_like(gain)
        for h in range(horizon):
            total -= 2 * gamma**h * (r @ gain + gamma * b.T @ values[horizon - h - 1] @ closed) @ moment
            moment = closed @ moment @ closed.T + std**2 * b @ b.T
        return total

    def optimum(self, std: float, horizon: int, gamma: float) -> tuple[Tensor, float]:
        """Return the best stationary K `[1, 2]` and J there: Newton's method from the gain of the Riccati equation."""
        a, b, q, r = self.matrices
        p = q
        for _ in range(300):
            inner = torch.linalg.inv(r + gamma * b.T @ p @ b)
            gain = -gamma * inner @ b.T @ p @ a
            p = q + gamma * a.T @ p @ (a + b @ gain)
        flat = gain.flatten()
        for _ in range(8):

            def negated(k: Tensor) -> Tensor:
                return -self.value(k.view(1, 2), std, horizon, gamma)

            slope = torch.autograd.functional.jacobian(negated, flat)  # type: ignore[no-untyped-call]
            curvature = torch.autograd.functional.hessian(negated, flat)  # type: ignore[no-untyped-call]
            flat = flat - torch.linalg.solve(curvature, slope)
        gain = flat.view(1, 2)
        return gain, float(self.value(gain, std, horizon, gamma))


@dataclass(frozen=True)
class Pendulum:
    """Gymnasium's `Pendulum-v1`: swing up and hold. State: angle, angular velocity; action in units of the torque."""

    feature_dim: int = field(default=3, init=False)
    action_dim: int = field(default=1, init=False)
    discrete: bool = field(default=False, init=False)

    def begin(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        """Return angles anywhere, velocities in [-1, 1]."""
        unit = 2 * torch.rand(*shape, 2, dtype=torch.float64, generator=generator) - 1
        return unit * torch.tensor([math.pi, 1.0], dtype=torch.float64)

    def features(self, state: Tensor) -> Tensor:
        """Return cosine, sine and velocity / 8."""
        angle, speed = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), speed / 8], dim=-1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the torque for 0.05 s."""
        angle, speed = state.unbind(-1)
        torque = action[..., 0].clamp(-2, 2)
        wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
        speed = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
        return torch.stack([angle + speed * 0.05, speed], dim=-1), reward, torch.zeros_like(speed, dtype=torch.bool)


@dataclass(frozen=True)
class CartPole:
    """Gymnasium's `CartPole-v1`: balance; reward 1 per step. Actions: 0 pushes left, 1 right."""

    feature_dim: int = field(default=4, init=False)
    action_dim: int = field(default=2, init=False)
    discrete: bool = field(default=True, init=False)

    def begin(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        """Return states in [-0.05, 0.05]^4."""
        return 0.1 * torch.rand(*shape, 4, dtype=torch.float64, generator=generator) - 0.05

    def features(self, state: Tensor) -> Tensor:
        """Return the state, its parts of like size."""
        return state * torch.tensor([1.0, 1.0, 10.0, 1.0], dtype=torch.float64)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Push for 0.02 s; the episode is over when the pole leans 12 degrees or the cart is 2.4 away."""
        x, v, angle, turn = state.unbind(-1)
        force = 20.0 * action.to(state.dtype) - 10.0
        push = (force + 0.05 * turn**2 * angle.sin()) / 1.1
        lean = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
        pull = push - 0.05 * lean * angle.cos() / 1.1
        after = torch.stack([x + 0.02 * v, v + 0.02 * pull, angle + 0.02 * turn, turn + 0.02 * lean], dim=-1)
        over = (after[..., 0].abs() > 2.4) | (after[..., 2].abs() > 12 * 2 * math.pi / 360)
        return after, torch.ones_like(x), over
