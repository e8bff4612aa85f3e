"""Rolling out a policy in a batch of environments, with the same result to the digit whatever the batch's size.

Every environment row runs one episode after another. A row keeps the last To observations (the first one repeated at
the start), executes the Ta actions of a chunk and waits until all rows have, so that the policy is called on many rows
at once; a row that begins an episode waits too. See `blocks` for how a row's answer is kept independent of others'.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from dipole.data.features import single_precision
from dipole.envs.spec import EnvSpec, StepResult, VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.blocks import BlockCaller, acting, device_of
from dipole.evaluation.episode import Episode, Rollouts, Trajectory
from dipole.evaluation.seeds import policy_generator
from dipole.evaluation.video import shrink
from dipole.policies.policy import Policy, put_rows, take_rows

Progress = Callable[[Episode], None]


@dataclass
class Live:
    """An episode under way."""

    index: int
    seed: int
    generator: torch.Generator
    queue: deque[np.ndarray] = field(default_factory=deque)
    rewards: list[float] = field(default_factory=list)
    observations: list[dict[str, np.ndarray]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    success: bool = False
    chunks: int = 0


def rollout(
    policy: Policy,
    env: VectorEnv,
    seeds: Sequence[int],
    *,
    block: int = 16,
    film: Collection[int] = (),
    keep_trajectories: bool = False,
    max_steps: int | None = None,
    stop_on_success: bool | None = None,
    progress: Progress | None = None,
    runner: MakeRunner | None = None,
) -> Rollouts:
    """Run one episode per seed.

    Args:
        policy: A `dipole.policies.Policy`.
        env: A `dipole.envs.VectorEnv`; its rows are used as they become free, it is not closed.
        seeds: One per episode; an episode depends on its seed, its place in this list modulo `block`, and nothing else.
        block: Rows per call of the policy. Results may differ in the last digits between blocks of different size.
        film: Indices of the episodes to film.
        keep_trajectories: Whether to keep observations, actions and rewards.
        max_steps: Longest episode; default the environment's.
        stop_on_success: Whether the first success ends an episode; default: if success is what the environment scores.
        progress: Called with each finished episode.
        runner: Makes the loop; default: the world waits for the policy (`dipole.realtime.delayed` has another).

    Returns:
        The episodes, in the order of `seeds`.

    Raises:
        DipoleError: The policy gave an action that is not finite or has the wrong shape.
    """
    loop = (Runner if runner is None else runner)(policy, env, seeds, block)
    loop.film, loop.keep, loop.progress = frozenset(film), keep_trajectories, progress
    loop.max_steps = env.spec.max_steps if max_steps is None else max_steps
    loop.stop_on_success = env.spec.score == "success" if stop_on_success is None else stop_on_success
    begin = time.perf_counter()
    with acting(policy):
        episodes = loop.run()
    return Rollouts(tuple(episodes), time.perf_counter() - begin, tuple(loop.notes))


class Runner:
    """The loop of `rollout`, with what it has to remember."""

    film: frozenset[int]
    keep: bool
    progress: Progress | None
    max_steps: int
    stop_on_success: bool

    def __init__(self, policy: Policy, env: VectorEnv, seeds: Sequence[int], block: int) -> None:
        self.policy, self.env, self.seeds = policy, env, list(seeds)
        self.device = device_of(policy)
        self.caller = BlockCaller(policy, block, self.device)
        self.pending = deque(range(len(self.seeds)))
        self.active: dict[int, Live] = {}
        self.finished: dict[int, Episode] = {}
        self.notes: list[str] = []
        self.history: dict[str, np.ndarray] = {}
        self.keys = observation_keys(policy, env)
        self.state = policy.initial_state(env.num_envs)

    def run(self) -> list[Episode]:
        """Run all episodes; return them in order."""
        self._start(range(self.env.num_envs))
        while self.active:
            rows = sorted(row for row, episode in self.active.items() if episode.queue)
            if not rows:
                rows = sorted(self.active)
                self._plan(rows)
            actions = np.stack([self.active[row].queue.popleft() for row in rows])
            result = self.env.step(actions, rows)
            self._remember(rows, result.obs)
            self._start([row for i, row in enumerate(rows) if self._count(row, i, actions[i], result)])
        return [self.finished[index] for index in range(len(self.seeds))]

    def _start(self, free: Sequence[int]) -> None:
        """Give the next seeds to free rows."""
        rows = [row for row, _ in zip(free, tuple(self.pending), strict=False)]
        if not rows:
            return
        for row in rows:
            index = self.pending.popleft()
            self.active[row] = Live(index, self.seeds[index], policy_generator(self.seeds[index], self.device))
        obs = self.env.reset(rows, [self.active[row].seed for row in rows])
        for key in self.keys:
            value = single_precision(obs[key])
            if key not in self.history:
                shape = (self.env.num_envs, self.policy.obs_horizon, *value.shape[1:])
                self.history[key] = np.zeros(shape, value.dtype)
            self.history[key][rows] = value[:, None]
        mask = torch.zeros(self.env.num_envs, dtype=torch.bool)
        mask[rows] = True
        self.state = self.policy.reset(self.state, mask.to(self.device))
        for i, row in enumerate(rows):
            self._look(row, {key: obs[key][i] for key in self.keys})

    def _plan(self, rows: list[int]) -> None:
        """Fill the queues of rows that have no action left."""
        live = [self.active[row] for row in rows]
        obs = {key: torch.from_numpy(value[rows]) for key, value in self.history.items()}
        index = torch.tensor(rows, device=self.device)
        slots = [episode.index % self.caller.block for episode in live]
        chunks, state = self.caller.act(obs, take_rows(self.state, index), slots, [e.generator for e in live])
        self.state = put_rows(self.state, index, state)
        spec = self.env.spec
        for episode, chunk in zip(live, chunks.numpy(), strict=True):
            check_chunk(chunk, episode, spec)
            clipped = np.clip(chunk, spec.action_low, spec.action_high).astype(chunk.dtype)
            episode.queue.extend(clipped)
            episode.chunks += 1

    def _remember(self, rows: list[int], obs: dict[str, np.ndarray]) -> None:
        """Append the newest observation of each row to its history."""
        for key, history in self.history.items():
            history[rows, :-1] = history[rows, 1:]
            history[rows, -1] = single_precision(obs[key])

    def _count(self, row: int, i: int, action: np.ndarray, result: StepResult) -> bool:
        """Book one environment step of a row; return whether its episode ended."""
        episode = self.active[row]
        episode.rewards.append(float(result.reward[i]))
        episode.success |= bool(result.success[i])
        if self.keep:
            episode.actions.append(action)
        self._look(row, {key: result.obs[key][i] for key in self.keys})
        terminated, truncated = bool(result.terminated[i]), bool(result.truncated[i])
        truncated = truncated or (not terminated and len(episode.rewards) >= self.max_steps)
        if not (terminated or truncated or (self.stop_on_success and episode.success)):
            return False
        self._finish(row, terminated, truncated)
        return True

    def _look(self, row: int, obs: dict[str, np.ndarray]) -> None:
        """Keep the observation and film the row, as asked."""
        episode = self.active[row]
        if self.keep:
            episode.observations.append({key: np.array(value) for key, value in obs.items()})
        if episode.index not in self.film:
            return
        try:
            episode.frames.append(shrink(np.asarray(self.env.render(row))))
        except Exception as error:  # graphics fail in many ways, none of which should cost the evaluation
            self.notes.append(f"no videos: rendering failed ({type(error).__name__}: {error})")
            self.film = frozenset()

    def _finish(self, row: int, terminated: bool, truncated: bool) -> None:
        live = self.active.pop(row)
        trajectory = None
        if self.keep:
            observations = {key: np.stack([obs[key] for obs in live.observations]) for key in self.keys}
            trajectory = Trajectory(observations, np.stack(live.actions), np.array(live.rewards))
        complete = len(live.frames) == len(live.rewards) + 1
        episode = Episode(
            index=live.index,
            seed=live.seed,
            success=live.success,
            return_=float(np.sum(live.rewards)),
            max_reward=max(live.rewards),
            length=len(live.rewards),
            terminated=terminated,
            truncated=truncated,
            chunks=live.chunks,
            trajectory=trajectory,
            frames=np.stack(live.frames) if complete else None,
            execution=self._executed(row),
        )
        self.finished[live.index] = episode
        if self.progress is not None:
            self.progress(episode)

    def _executed(self, row: int) -> dict[str, int]:
        """Return what there is to say about how the chunks of a finished row were executed."""
        return {}


MakeRunner = Callable[[Policy, VectorEnv, Sequence[int], int], Runner]
"""Makes the loop for a policy, its environments, the seeds and the rows per call of the policy."""


class Loop(Protocol):
    """Another loop than `Runner`, described by a dataclass, which goes into the record of an evaluation."""

    def runner(self, policy: Policy, env: VectorEnv, seeds: Sequence[int], block: int) -> Runner:
        """Return the loop."""


def observation_keys(policy: Policy, env: VectorEnv) -> list[str]:
    """Return the features to hand to a policy: those it was configured with, else all of the environment's.

    Raises:
        DipoleError: The environment lacks one, or gives it in another shape, or takes other actions.
    """
    config, spec = getattr(policy, "config", None), env.spec
    wanted = getattr(config, "observation", None) or spec.observation
    for key, feature in wanted.items():
        if key not in spec.observation:
            have = ", ".join(sorted(spec.observation))
            raise DipoleError(
                f"the policy needs '{key}', but environment '{spec.name}' gives only {have}: is the policy for another "
                "task?"
            )
        if tuple(feature.shape) != tuple(spec.observation[key].shape):
            given, seen = list(spec.observation[key].shape), list(feature.shape)
            raise DipoleError(
                f"environment '{spec.name}' gives '{key}' of shape {given}, the policy was trained on {seen}: "
                "is it for another task?"
            )
    if policy.action_dim != spec.action.shape[0]:
        raise DipoleError(
            f"the policy gives actions of {policy.action_dim} components, environment '{spec.name}' takes "
            f"{spec.action.shape[0]}: is the policy for another task?"
        )
    return [key for key in wanted if spec.observation[key].dtype != "string"]


def first_observation(policy: Policy, env: VectorEnv, seed: int) -> dict[str, torch.Tensor]:
    """Return what a policy sees at the start of the episode of a seed, `[1, To, ...]` each."""
    first = env.reset([0], [seed])
    frames = {key: single_precision(first[key])[:, None] for key in observation_keys(policy, env)}
    return {key: torch.from_numpy(np.repeat(frame, policy.obs_horizon, axis=1)) for key, frame in frames.items()}


def check_chunk(chunk: np.ndarray, episode: Live, spec: EnvSpec) -> None:
    """Raise DipoleError where a chunk has the wrong shape or holds numbers that are not finite."""
    where = f"episode {episode.index} (seed {episode.seed}) of '{spec.name}' at env step {len(episode.rewards)}"
    if chunk.ndim != 2 or len(chunk) == 0 or chunk.shape[1:] != tuple(spec.action.shape):
        shape, wanted = list(chunk.shape), spec.action.shape[0]
        raise DipoleError(f"{where}: the policy's chunk has shape {shape}, not [Ta, {wanted}]: is it for another task?")
    if not np.isfinite(chunk).all():
        raise DipoleError(
            f"{where}: the policy gave an action that is not finite: check its training loss and normalisation stats"
        )
