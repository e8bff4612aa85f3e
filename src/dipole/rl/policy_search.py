"""Policy gradients on small problems, on their own: trajectories, their Phi, and ascents of many seeds at once.

Parameters are `[S, P]`: S independent ascents, which are only computed together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from dipole.rl.control import Dynamics
from dipole.rl.normalized_gradient import DirectionConfig, Track, advance, hessian_term, sampling_point
from dipole.training.seeding import generator

BASELINE_RATE = 0.1


@dataclass(frozen=True)
class Trajectories:
    """Trajectories `[S, N]` of H steps.

    Attributes:
        features: `[S, N, H, F]`.
        actions: `[S, N, H, A]`, or `[S, N, H]` numbers of actions.
        reward: `[S, N, H]`, 0 after the end.
        alive: `[S, N, H]` bool: the step was taken.
    """

    features: Tensor
    actions: Tensor
    reward: Tensor
    alive: Tensor


@dataclass(frozen=True)
class Problem:
    """A problem and the kind of policy that is to solve it.

    Attributes:
        dynamics: The environment.
        horizon: H.
        gamma: Discount.
        hidden: Widths of the policy's tanh layers; none: it is linear.
        bias: Whether its layers have one.
        std: Standard deviation of a Gaussian policy; softmax policies have none.
    """

    dynamics: Dynamics
    horizon: int
    gamma: float
    hidden: tuple[int, ...] = ()
    bias: bool = True
    std: float = 0.5

    @property
    def sizes(self) -> list[int]:
        """Return the widths of all layers."""
        return [self.dynamics.feature_dim, *self.hidden, self.dynamics.action_dim]

    @property
    def num_parameters(self) -> int:
        """Return P."""
        return sum((width + self.bias) * out for width, out in itertools.pairwise(self.sizes))

    def start(self, ascents: int, seed: int = 0) -> Tensor:
        """Return first parameters `[S, P]`: the last layer is 0, the others are as torch's."""
        random, parts = generator(seed, "start"), []
        for i, (width, out) in enumerate(itertools.pairwise(self.sizes)):
            bound = 0.0 if i == len(self.hidden) else 1 / math.sqrt(width)
            shape = (ascents, (width + self.bias) * out)
            parts.append(bound * (2 * torch.rand(shape, dtype=torch.float64, generator=random) - 1))
        return torch.cat(parts, dim=1)

    def output(self, theta: Tensor, features: Tensor) -> Tensor:
        """Return means or logits `[S, ..., A]` for features `[S, ..., F]`."""
        x, at = features.flatten(1, -2), 0
        for i, (width, out) in enumerate(itertools.pairwise(self.sizes)):
            if i:
                x = torch.tanh(x)
            weight = theta[:, at : at + width * out].view(-1, width, out)
            at += width * out
            x = x @ weight
            if self.bias:
                x = x + theta[:, None, at : at + out]
                at += out
        return x.view(*features.shape[:-1], -1)

    def _draw(self, output: Tensor, random: Generator) -> Tensor:
        """Return actions."""
        if not self.dynamics.discrete:
            return output + self.std * torch.randn(output.shape, dtype=output.dtype, generator=random)
        # Gumbel's trick: the largest of logits + noise is distributed as the softmax.
        uniform = torch.rand(output.shape, dtype=output.dtype, generator=random).clamp(min=1e-300)
        return (output - torch.log(-torch.log(uniform))).argmax(-1)

    @torch.no_grad()
    def sample(self, theta: Tensor, count: int, random: Generator) -> Trajectories:
        """Return `count` trajectories of each of the policies `theta` `[S, P]`."""
        state = self.dynamics.begin((len(theta), count), random)
        return self.play(theta, state, lambda output, h: self._draw(output, random))

    @torch.no_grad()
    def play(self, theta: Tensor, state: Tensor, draw: Callable[[Tensor, int], Tensor]) -> Trajectories:
        """Return trajectories from `state` `[S, N, n]` with actions `draw(output, h)`."""
        alive = torch.ones(state.shape[:-1], dtype=torch.bool)
        taken: list[tuple[Tensor, ...]] = []
        for h in range(self.horizon):
            features = self.dynamics.features(state)
            action = draw(self.output(theta, features), h)
            after, reward, over = self.dynamics.step(state, action)
            taken.append((features, action, reward * alive, alive))
            state = torch.where(alive[..., None], after, state)
            alive = alive & ~over
            if not alive.any():
                break
        return Trajectories(*(torch.stack(parts, dim=2) for parts in zip(*taken, strict=True)))

    def log_probs(self, theta: Tensor, batch: Trajectories) -> Tensor:
        """Return log pi of every step `[S, N, H]`, 0 after the end."""
        output = self.output(theta, batch.features)
        if self.dynamics.discrete:
            value = output.log_softmax(-1).gather(-1, batch.actions[..., None]).squeeze(-1)
        else:
            value = -0.5 * ((batch.actions - output) / self.std).square().sum(-1)  # up to a constant
        return value * batch.alive

    def to_go(self, batch: Trajectories) -> Tensor:
        """Return sum_{i >= h} gamma^i r_i, `[S, N, H]`."""
        discount = self.gamma ** torch.arange(batch.reward.shape[-1], dtype=torch.float64)
        return (discount * batch.reward).flip(-1).cumsum(-1).flip(-1)

    def returns(self, batch: Trajectories) -> Tensor:
        """Return discounted returns `[S, N]`."""
        return self.to_go(batch)[..., 0]

    def phi(self, theta: Tensor, batch: Trajectories, baseline: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return Phi and log p of every trajectory, `[S, N]` each, as functions of `theta`.

        Args:
            theta: `[S, P]`.
            batch: Trajectories.
            baseline: `[S, H]` subtracted from the reward from h on; it must not depend on `batch`.
        """
        log_probs = self.log_probs(theta, batch)
        worth = self.to_go(batch)
        if baseline is not None:
            worth = worth - baseline[:, None, : worth.shape[-1]]
        return (worth * log_probs).sum(-1), log_probs.sum(-1)


@dataclass(frozen=True)
class Search:
    """An ascent, run.

    Attributes:
        theta: `[S, P]` last parameters.
        used: Trajectories used when each value was taken.
        values: `[len(used), S]`.
        errors: `[len(used), S]` |d_t - grad J(th_t)|, where the true gradient was given.
    """

    theta: Tensor
    used: list[int]
    values: np.ndarray
    errors: np.ndarray | None


def search(
    problem: Problem,
    direction: DirectionConfig,
    iterations: int,
    *,
    batch: int = 1,
    ascents: int = 16,
    seed: int = 0,
    evaluate: Callable[[Tensor], Tensor] | None = None,
    gradient: Callable[[Tensor], Tensor] | None = None,
    every: int = 1,
    baseline: bool = True,
    start: Tensor | None = None,
) -> Search:
    """Climb J from trajectories.

    Args:
        problem: What to solve.
        direction: How to climb.
        iterations: Steps.
        batch: Trajectories per gradient (and as many more per step for `hessian`).
        ascents: S.
        seed: Of everything random.
        evaluate: `[S, P]` to `[S]`: the value of parameters; None for the mean return of the step's trajectories.
        gradient: `[S, P]` to `[S, P]`: the true gradient, to measure how well the direction tracks it.
        every: Steps between two values.
        baseline: Subtract a running mean of the reward from each step on.
        start: `[S, P]` first parameters; None for the problem's.
    """
    track = Track.start(problem.start(ascents, seed) if start is None else start)
    random = generator(seed, "trajectories")
    level, used = torch.zeros(len(track.theta), problem.horizon, dtype=torch.float64), 0
    kept: list[tuple[int, Tensor, Any]] = []
    for step in range(iterations):
        correction = None
        if direction.transport == "hessian" and step:
            q = torch.rand(len(track.theta), 1, dtype=torch.float64, generator=random)
            between = track.between(q).requires_grad_()
            drawn = problem.sample(between, batch, random)
            parts = problem.phi(between, drawn, level if baseline else None)
            correction = hessian_term(*parts, [between], [track.displacement])[0]
            used += batch
        theta = sampling_point(direction, track).detach().requires_grad_()
        drawn = problem.sample(theta, batch, random)
        used += batch
        phi, _ = problem.phi(theta, drawn, level if baseline else None)
        (slope,) = torch.autograd.grad(phi.mean(-1).sum(), theta)
        before = track
        track = advance(direction, track, slope, correction)
        # The newest trajectories enter the baseline only now: it must not depend on what it is subtracted from.
        reached = problem.to_go(drawn).mean(1)
        rate = 1.0 if step == 0 else BASELINE_RATE
        width = reached.shape[-1]
        level[:, width:] *= 1 - rate
        level[:, :width] += rate * (reached - level[:, :width])
        if (step + 1) % every == 0:
            value = problem.returns(drawn).mean(1) if evaluate is None else evaluate(track.theta)
            error = None if gradient is None else (track.direction - gradient(before.theta)).norm(dim=-1)
            kept.append((used, value, error))
    values = torch.stack([value for _, value, _ in kept]).detach().numpy()
    errors = None if gradient is None else torch.stack([error for *_, error in kept]).detach().numpy()
    return Search(track.theta, [count for count, *_ in kept], values, errors)


def slope_of(used: list[int], gap: np.ndarray, first: int = 0) -> float:
    """Return the slope of log gap over log samples, by least squares over the samples from `first` on."""
    x = np.asarray(used, dtype=np.float64)
    chosen = (x >= first) & (np.asarray(gap) > 0)
    return float(np.polyfit(np.log(x[chosen]), np.log(np.asarray(gap)[chosen]), 1)[0])
