"""Closed loops in which the policy's answers come late: latency, jitter and loss, simulated and reproducible.

The world does not wait for the policy, but for the first chunk of an episode (a robot is not started before the policy
answers). An observation of tick n reaches the policy, and its chunk the robot, d ticks later, d being the delay rounded
up to whole ticks of the environment's `fps`. What the robot does meanwhile is decided by the same `Controller` that
runs beside a real robot, in one of its modes. An episode's delays come from a generator of its own, seeded with the
episode's seed and drawn in the same number whatever the settings, so that modes and latencies are compared on equal
terms, and results do not depend on the number of environments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dipole.envs.spec import EnvSpec, VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.describe import trained
from dipole.evaluation.rollout import Runner, check_chunk
from dipole.policies.policy import Policy, put_rows, take_rows
from dipole.realtime.execution import Command, Controller, Fallback, Request, execution_mode
from dipole.realtime.prefix import PrefixPolicy
from dipole.realtime.runtime import Runtime, apply
from dipole.realtime.watchdog import Watchdog

_LINK_STREAM = 0x6C_69_6E_6B  # keeps the link's draws apart from the environment's and the policy's


@dataclass(frozen=True)
class Link:
    """What lies between an observation and its chunk: inference and network together.

    Attributes:
        latency_ms: Mean delay in milliseconds.
        jitter_ms: The delay is uniform within this of the mean (and never negative).
        drop: Fraction of requests that are lost.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.latency_ms < math.inf and 0 <= self.jitter_ms < math.inf):
            raise DipoleError("latency and jitter are milliseconds, not negative")
        if not 0 <= self.drop < 1:
            raise DipoleError(f"drop {self.drop:g}: the fraction of lost requests is at least 0 and below 1")

    @property
    def longest_ms(self) -> float:
        """Return the longest delay of a request that is not lost."""
        return self.latency_ms + self.jitter_ms

    def draw(self, generator: np.random.Generator) -> float | None:
        """Return the delay of the next request in seconds; None if it is lost."""
        late, lost = generator.uniform(size=2)
        if lost < self.drop:
            return None
        return max(0.0, self.latency_ms + self.jitter_ms * (2 * float(late) - 1)) / 1000


@dataclass(frozen=True)
class Delay:
    """A simulated closed loop.

    Attributes:
        mode: How chunks are executed (a name of `dipole.realtime.execution.MODES`).
        link: The delays.
        fallback: What the robot does without a planned action: `hold` still (see `held`), `last` again, or `zero`.
        timeout_ms: Age of the newest observation at which the watchdog falls back; None for never.
    """

    mode: str = "sync"
    link: Link = field(default_factory=Link)
    fallback: Fallback = "hold"
    timeout_ms: float | None = None

    def __post_init__(self) -> None:
        execution_mode(self.mode)
        if self.timeout_ms is not None and self.timeout_ms <= 0:
            raise DipoleError("timeout_ms must be positive")

    def runner(self, policy: Policy, env: VectorEnv, seeds: Sequence[int], block: int) -> DelayedRunner:
        """Return the loop of `rollout` with this delay."""
        return DelayedRunner(policy, env, seeds, block, self)

    def controller(self, action_dim: int, every: int, fps: float) -> Controller:
        """Return the controller of one row."""
        execution = replace(execution_mode(self.mode), fallback=self.fallback)
        watchdog = Watchdog(None if self.timeout_ms is None else self.timeout_ms / 1000)
        # Lost is what has not come a tick after the longest delay.
        retry = self.link.longest_ms / 1000 + 1 / fps
        return Controller(execution, action_dim, every, fps, retry, watchdog)


def executed_policy(policy: Any, mode: str) -> Any:
    """Return the policy as a mode needs it: whole chunks where they overlap, told of the plan in `rtc`.

    A policy that is run by a method of `dipole.realtime` or has a memory of its own keeps its chunks as they are.

    Raises:
        DipoleError: Real-time chunking does not work with this policy.
    """
    execution = execution_mode(mode)
    if not execution.overlap:
        return policy
    plain = trained(policy) is policy and not policy.initial_state(1)
    if execution.prefix:
        if not plain:
            raise DipoleError(
                f"mode '{mode}' needs a policy that is run plainly: add --method plain, or use another mode"
            )
        return PrefixPolicy(policy)
    if not plain or not hasattr(getattr(policy, "config", None), "action_horizon"):
        return policy
    return apply(policy, Runtime(action_horizon=policy.pred_horizon - policy.obs_horizon + 1))


def held(spec: EnvSpec, last: np.ndarray | None) -> np.ndarray:
    """Return the action `[Da]` that leaves a simulated robot where it is.

    By the names of its components, increments and velocities (`dx`, `vy`) are zero, and the rest (targets, grippers)
    are those of the last action. Components without names are taken for targets.

    Args:
        spec: The environment's.
        last: The last action.
    """
    names = spec.action.names or ("",) * spec.action.shape[0]
    moving = np.array([re.fullmatch("[dv](x|y|z|_.*)", name) is not None for name in names])
    before = np.zeros(len(names), np.float32) if last is None else last
    return np.where(moving, np.zeros_like(before), before)


@dataclass
class _Pending:
    """A request under way."""

    arrival: int
    request: Request
    obs: dict[str, np.ndarray]


@dataclass
class _Loop:
    """What a row has beside its episode: its own tick, its controller and its link."""

    controller: Controller
    generator: np.random.Generator
    now: int = 0
    asked: bool = False  # whether this tick has been considered for a request
    pending: list[_Pending] = field(default_factory=list)

    def due(self) -> _Pending | None:
        """Return the earliest request whose answer has come; its chunk is computed only now, in a batch."""
        arrived = [item for item in self.pending if item.arrival <= self.now]
        return min(arrived, key=lambda item: (item.arrival, item.request.id)) if arrived else None


class DelayedRunner(Runner):
    """The loop of `rollout` with late answers. Rows go on until all of them need a chunk, which come as one batch."""

    def __init__(self, policy: Policy, env: VectorEnv, seeds: Sequence[int], block: int, delay: Delay) -> None:
        self.every = policy.action_horizon
        self.delay = delay
        self.loops: dict[int, _Loop] = {}
        super().__init__(executed_policy(policy, delay.mode), env, seeds, block)

    def _start(self, free: Sequence[int]) -> None:
        before = set(self.active)
        super()._start(free)
        spec = self.env.spec
        for row in set(self.active) - before:
            generator = np.random.default_rng([self.active[row].seed, _LINK_STREAM])
            self.loops[row] = _Loop(self.delay.controller(spec.action.shape[0], self.every, spec.fps), generator)

    def run(self) -> list[Any]:
        """Run all episodes; return them in order."""
        self._start(range(self.env.num_envs))
        while self.active:
            rows = [row for row in sorted(self.active) if not self._waits(row)]
            if rows:
                self._tick(rows)
            else:
                self._plan(sorted(self.active))
        return [self.finished[index] for index in range(len(self.seeds))]

    def _waits(self, row: int) -> bool:
        """Return whether a chunk must be computed before the row can go on; ask for the next one if it is time."""
        loop = self.loops[row]
        if loop.due() is not None:
            return True
        if not loop.asked:
            loop.asked = True
            if loop.controller.wants(loop.now):
                self._ask(row, loop)
        return loop.due() is not None

    def _ask(self, row: int, loop: _Loop) -> None:
        request = loop.controller.ask(loop.now)
        seconds = self.delay.link.draw(loop.generator)
        if seconds is None:
            return
        ticks = math.ceil(seconds * self.env.spec.fps - 1e-9)  # 40 ms at 25 Hz is one tick, whatever the rounding
        obs = {key: value[row].copy() for key, value in self.history.items()}
        loop.pending.append(_Pending(loop.now + ticks, request, obs))

    def _plan(self, rows: list[int]) -> None:
        """Compute the chunks that have come and hand them over, one per row."""
        live, loops = [self.active[row] for row in rows], [self.loops[row] for row in rows]
        due = [item for loop in loops if (item := loop.due()) is not None]
        obs = {key: torch.from_numpy(np.stack([item.obs[key] for item in due])) for key in self.keys}
        index = torch.tensor(rows, device=self.device)
        told: Callable[[list[Request]], Any] | None = getattr(self.policy, "told", None)
        state = take_rows(self.state, index) if told is None else told([item.request for item in due])
        slots = [episode.index % self.caller.block for episode in live]
        chunks, state = self.caller.act(obs, state, slots, [e.generator for e in live])
        self.state = put_rows(self.state, index, state)
        spec = self.env.spec
        for episode, loop, item, chunk in zip(live, loops, due, chunks.numpy(), strict=True):
            check_chunk(chunk, episode, spec)
            clipped = np.clip(chunk, spec.action_low, spec.action_high).astype(chunk.dtype)
            loop.pending.remove(item)
            loop.controller.deliver(item.request, clipped, loop.now)
            episode.chunks += 1

    def _tick(self, rows: list[int]) -> None:
        """Let one tick pass in some rows; the world stands still in those whose first chunk has not come."""
        spec, commands = self.env.spec, dict[int, Command]()
        for row in rows:
            loop = self.loops[row]
            commands[row] = loop.controller.act(loop.now, partial(held, spec, loop.controller.last))
            loop.now += 1
            loop.asked = False
        found = {row: command.action for row, command in commands.items() if command.action is not None}
        if not found:
            return
        moving, actions = list(found), np.stack(list(found.values()))
        result = self.env.step(actions, moving)
        self._remember(moving, result.obs)
        self._start([row for i, row in enumerate(moving) if self._count(row, i, actions[i], result)])

    def _executed(self, row: int) -> dict[str, int]:
        counters = asdict(self.loops[row].controller.counters)
        return {f"execution.{name}": int(counters[name]) for name in ("fallback", "requests", "lost", "late", "stale")}
