"""Collecting experience: decisions of a batch of environments, a chunk of actions each.

All rows decide together; each executes its chunk until it is over or the episode ends; rows that ended are reset with
the next seed. A decision is stored with the features *after* it, of the last observation of its episode where that
ended, so that values bootstrap through time limits. Environments come from a function that makes a `VectorEnv`: any
kind of vector (in this process, in workers, on other machines) collects the same experience for the same seeds.

Everything random is a function of the seed and of a counter. What an environment holds is not saved but replayed: an
episode follows from its seed and its actions.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from dipole.data.features import single_precision
from dipole.envs.spec import EnvSpec, StepResult, VectorEnv
from dipole.errors import DipoleError
from dipole.rl.experience import Decide, Groups, Observer, Rollout, Row, stack
from dipole.training.seeding import derive, generator

# Demonstrations and evaluations count up from 0 and 100 000: no episode of the upper half is met there.
FIRST_SEED = 2**30
RECENT = 100
_RESTARTS = 5  # in a row, without a decision in between


class Collector:
    """Runs environments for a learner.

    Args:
        make_env: Makes the environments; called again when a worker died.
        observe: Observations to features.
        keys: Observations to look at.
        obs_horizon: To.
        seed: Of episodes and actions.
        reward: The environment's own, or 1 at success and 0 else (`success`).
        step_penalty: Subtracted from the reward of every env step.
        stop_on_success: Whether success ends an episode; default: if success is what the environment scores.

    Attributes:
        env: The environments.
        env_steps: Env steps taken so far.
        decisions: Calls of `decide` so far.
        episodes: Episodes begun.
        lost: Episodes and env steps lost with workers that died, and how often that happened.
        recent: The last finished episodes: (success, return, length).
    """

    def __init__(
        self,
        make_env: Callable[[], VectorEnv],
        observe: Observer,
        keys: Sequence[str],
        obs_horizon: int,
        seed: int,
        *,
        reward: Literal["env", "success"] = "env",
        step_penalty: float = 0.0,
        stop_on_success: bool | None = None,
    ) -> None:
        self.make_env, self.observe, self.keys, self.seed = make_env, observe, list(keys), seed
        self.obs_horizon, self.reward, self.step_penalty = obs_horizon, reward, step_penalty
        self.env = make_env()
        self.num_envs = self.env.num_envs
        spec: EnvSpec = self.env.spec
        self.stop_on_success = spec.score == "success" if stop_on_success is None else stop_on_success
        self.env_steps = self.decisions = self.episodes = self.looks = 0
        self.lost = {"workers": 0, "episodes": 0, "env_steps": 0}
        self.recent: deque[tuple[bool, float, int]] = deque(maxlen=RECENT)
        self._rows: list[Row] = [Row(0) for _ in range(self.num_envs)]
        self._history: dict[str, np.ndarray] = {}
        self._features: Tensor | None = None

    def first(self) -> Tensor:
        """Return the present features `[N, F]`, beginning the first episodes if need be."""
        if self._features is None:
            self._begin(range(self.num_envs))
        assert self._features is not None
        return self._features

    def collect(self, decide: Decide, decisions: int) -> Rollout:
        """Take `decisions` decisions in every row.

        Raises:
            DipoleError: A reward is not finite, or workers die again and again.
        """
        taken: list[dict[str, Any]] = []
        failures = 0
        while len(taken) < decisions:
            try:
                if failures:
                    self.env = self._guard(self.make_env)
                self.first()
                taken.append(self._decide(decide))
                failures = 0
            except _Died as death:
                failures += 1
                if failures > _RESTARTS:
                    raise DipoleError(f"environments died {failures} times in a row: {death}") from death
                self._lose(taken)
        return stack(taken)

    def _decide(self, decide: Decide) -> dict[str, Any]:
        features = self.first()
        decision = decide(features, self._generator("act", self.decisions))
        result = self._execute(decision.chunk)
        self.decisions += 1
        over = np.flatnonzero(result["terminated"] | result["truncated"])
        # What follows a termination is worth nothing, so it is not looked at; the old features fill its place.
        goes_on = np.flatnonzero(~result["terminated"])
        after = features.clone()
        if len(goes_on):
            after[goes_on] = self._look(goes_on, begins=False)
        self._features = after.clone()
        self._book(over)
        if len(over):
            self._begin(over)
        tensors = {key: torch.from_numpy(value) for key, value in result.items()}
        return {"features": features, "next_features": after, "data": decision.data, **tensors}

    def _execute(self, chunk: Tensor) -> dict[str, np.ndarray]:
        """Execute a chunk in every row, until it or the episode is over."""
        actions = chunk.detach().cpu().numpy()
        if not np.isfinite(actions).all():
            raise DipoleError(f"an action for '{self.env.spec.name}' is not finite: lower the learning rates")
        reward = np.zeros(self.num_envs, np.float32)
        ends = {name: np.zeros(self.num_envs, bool) for name in ("terminated", "truncated")}
        rows = np.arange(self.num_envs)
        for k in range(actions.shape[1]):
            result = self._guard(functools.partial(self.env.step, actions[rows, k], rows.tolist()))
            self._remember(rows, result.obs)
            reward[rows] += self._rewards(rows, result)
            ended = result.terminated | (result.success & self.stop_on_success)
            ends["terminated"][rows], ends["truncated"][rows] = ended, result.truncated & ~ended
            for i, row in enumerate(rows):
                self._note(self._rows[row], actions[row, k], result, i)
            self.env_steps += len(rows)
            rows = rows[~(ended | result.truncated)]
            if not len(rows):
                break
        return {"reward": reward, **ends}

    def _note(self, row: Row, action: np.ndarray, result: StepResult, i: int) -> None:
        row.actions.append(action)
        row.total += float(result.reward[i])
        row.success |= bool(result.success[i])

    def _rewards(self, rows: np.ndarray, result: StepResult) -> np.ndarray:
        reward = result.success.astype(np.float32) if self.reward == "success" else result.reward
        if not np.isfinite(reward).all():
            row = rows[int(np.argmin(np.isfinite(reward)))]
            raise DipoleError(
                f"'{self.env.spec.name}' gave a reward that is not finite ({reward[~np.isfinite(reward)][0]}) in the "
                f"episode with seed {self._rows[row].seed} at env step {len(self._rows[row].actions)}: correct it "
                "there, or have success paid instead (--reward success)"
            )
        return reward - np.float32(self.step_penalty)

    def _book(self, over: np.ndarray) -> None:
        for row in over:
            episode = self._rows[row]
            self.recent.append((episode.success, episode.total, len(episode.actions)))

    def _begin(self, rows: Sequence[int] | np.ndarray) -> None:
        """Start new episodes and look at their first observations."""
        rows = [int(row) for row in rows]
        for row in rows:
            self._rows[row] = Row(FIRST_SEED + derive(self.seed, "episode", self.episodes) % FIRST_SEED)
            self.episodes += 1
        self._reset(rows)
        features = self._look(rows, begins=True)
        if self._features is None:
            self._features = features
        else:
            self._features[rows] = features

    def _reset(self, rows: Sequence[int]) -> None:
        obs = self._guard(lambda: self.env.reset(rows, [self._rows[row].seed for row in rows]))
        for key in self.keys:
            value = single_precision(obs[key])
            if key not in self._history:
                self._history[key] = np.zeros((self.num_envs, self.obs_horizon, *value.shape[1:]), value.dtype)
            self._history[key][rows] = value[:, None]

    def _remember(self, rows: np.ndarray, obs: dict[str, np.ndarray]) -> None:
        for key, history in self._history.items():
            history[rows, :-1] = history[rows, 1:]
            history[rows, -1] = single_precision(obs[key])

    def _look(self, rows: Sequence[int] | np.ndarray, begins: bool) -> Tensor:
        rows = [int(row) for row in rows]
        obs = {key: torch.from_numpy(value[rows]) for key, value in self._history.items()}
        self.looks += 1
        return self.observe(obs, rows, begins, self._generator("look", self.looks))

    def _generator(self, *path: int | str) -> Generator:
        return generator(self.seed, *path)

    def _guard(self, call: Callable[[], Any]) -> Any:
        """Call the environments; whatever they fail with becomes `_Died`, but for ValueError: the call was wrong."""
        try:
            return call()
        except ValueError:
            raise
        except Exception as error:
            # A worker adds the traceback of its simulator, whose last line says what happened.
            lines = (str(error).strip() or type(error).__name__).splitlines()
            raise _Died(" ".join(dict.fromkeys((lines[0], lines[-1])))) from error

    def _lose(self, taken: list[dict[str, Any]]) -> None:
        """Give the environments up. Episodes under way end where their last whole decision left them."""
        self.lost["workers"] += 1
        self.lost["episodes"] += sum(bool(row.actions) for row in self._rows)
        self.lost["env_steps"] += sum(len(row.actions) for row in self._rows)
        if taken:
            over = taken[-1]["terminated"] | taken[-1]["truncated"]
            taken[-1]["truncated"] = taken[-1]["truncated"] | ~over
        with contextlib.suppress(Exception):  # it is broken already
            self.env.close()
        self._rows = [Row(0) for _ in range(self.num_envs)]
        self._features = None

    def figures(self) -> dict[str, float]:
        """Return success rate, mean return and mean length of the last finished episodes, and what was lost."""
        figures: dict[str, float] = {"episodes": self.episodes, "env_steps": self.env_steps}
        if self.recent:
            success, total, length = np.array([[float(s), r, n] for s, r, n in self.recent]).mean(0)
            figures |= {"success": success, "return": total, "length": length}
        if self.lost["workers"]:
            figures |= {f"lost_{key}": float(value) for key, value in self.lost.items()}
        return {key: float(value) for key, value in figures.items()}

    def state(self) -> tuple[Groups, dict[str, Any]]:
        """Return tensors and plain values from which `restore` goes on exactly."""
        if self._features is None:
            return {}, {"counters": None}
        lengths = [len(row.actions) for row in self._rows]
        actions = [action for row in self._rows for action in row.actions]
        dim = self.env.spec.action.shape[0]
        tensors = {
            "features": self._features,
            "actions": torch.from_numpy(np.stack(actions)) if actions else torch.zeros(0, dim),
        }
        counters = [self.env_steps, self.decisions, self.episodes, self.looks]
        rows = [[row.seed, length] for row, length in zip(self._rows, lengths, strict=True)]
        recent = [[bool(s), r, n] for s, r, n in self.recent]
        return tensors, {"counters": counters, "rows": rows, "recent": recent, "lost": dict(self.lost)}

    def restore(self, tensors: Groups, values: dict[str, Any]) -> None:
        """Go on from a saved state: episodes under way are replayed.

        Raises:
            DipoleError: The number of environments is another, or they died.
        """
        if values["counters"] is None:
            return
        if len(values["rows"]) != self.num_envs:
            raise DipoleError(f"the run has {len(values['rows'])} environments, not {self.num_envs}")
        self.env_steps, self.decisions, self.episodes, self.looks = values["counters"]
        self.recent.extend((bool(s), float(r), int(n)) for s, r, n in values["recent"])
        self.lost = dict(values["lost"])
        self._rows = [Row(int(seed)) for seed, _ in values["rows"]]
        lengths = [int(length) for _, length in values["rows"]]
        try:
            self._replay([log.numpy() for log in torch.split(tensors["actions"], lengths)])
        except _Died as death:
            raise DipoleError(
                f"'{self.env.spec.name}' died while episodes were replayed: {death}: resume again"
            ) from death
        self._features = tensors["features"].clone()

    def _replay(self, logs: Sequence[np.ndarray]) -> None:
        """Begin the episodes of all rows again, and take the actions `[n, Da]` of each."""
        self._reset(range(self.num_envs))
        for k in range(max(len(log) for log in logs)):
            rows = np.array([row for row, log in enumerate(logs) if k < len(log)])
            actions = np.stack([logs[row][k] for row in rows])
            result = self._guard(functools.partial(self.env.step, actions, rows.tolist()))
            self._remember(rows, result.obs)
            for i, row in enumerate(rows):
                self._note(self._rows[row], actions[i], result, i)

    def close(self) -> None:
        """Close the environments."""
        self.env.close()


class _Died(Exception):
    """A worker or simulator failed."""
