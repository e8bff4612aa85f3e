"""The loop of fine-tuning: any method, any policy, any environment; evaluated, resumable, interruptible.

    finetune(policy, "micro/two_goal", "dsrl", DSRLConfig(...), FinetuneConfig(env_steps=20_000), out)

writes `RUN/finetune.json`, `metrics.jsonl`, `checkpoints/last` and `checkpoints/best` (policy folders that load like
any other) and `training_state/`. A resumed run ends with the very weights of an uninterrupted one.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dipole.data import Episodes
from dipole.envs import make
from dipole.envs.seeds import SELECT_SEED
from dipole.envs.spec import VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.rollout import rollout
from dipole.evaluation.seeds import episode_seeds
from dipole.policies.checkpoint import save_policy
from dipole.rl.base import Base
from dipole.rl.learner import Learner, Setting
from dipole.rl.methods import make_learner
from dipole.serialization import read_json, to_dict, write_json
from dipole.training.checkpoint import (
    TrainingState,
    load_state,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_state,
)
from dipole.training.progress import ProgressBar
from dipole.training.record import check_same
from dipole.training.result import Best
from dipole.training.stopping import StopRequest
from dipole.training.tracking import Trackers, check_trackers, open_trackers

RECORD = "finetune.json"
EVALUATIONS = 10
SAVE_SECONDS = 60.0
_FREE = ("save_seconds", "track", "mode", "num_workers")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a run that every method has.

    Attributes:
        env_steps: Env steps to take in all (an iteration under way is finished).
        num_envs: Environments.
        seed: Of everything random.
        reward: The environment's own, or 1 at success and 0 else.
        step_penalty: Subtracted from the reward of every env step.
        eval_every: Env steps between two evaluations; None for ten in all.
        eval_episodes: Episodes of an evaluation; 0 for none.
        save_seconds: Seconds between two saves of the training state.
        mode: How the environments run; see `dipole.envs.make`.
        num_workers: Worker processes of mode `async`.
        track: Further places to log to.
    """

    env_steps: int = 100_000
    num_envs: int = 8
    seed: int = 0
    reward: Literal["env", "success"] = "env"
    step_penalty: float = 0.0
    eval_every: int | None = None
    eval_episodes: int = 50
    save_seconds: float = SAVE_SECONDS
    mode: Literal["sync", "async", "native"] | None = None
    num_workers: int | None = None
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("env_steps", 1), ("num_envs", 1), ("eval_episodes", 0), ("eval_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DipoleError(f"{name} is {value}: it must be at least {least}")


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended.

    Attributes:
        out: Its folder.
        env_steps: Env steps taken.
        episodes: Training episodes begun.
        seconds: Time taken, evaluations included.
        before: Score of the base on the evaluation episodes; None without evaluation.
        after: Score of the last evaluation.
        best: Best evaluation.
        lost: What was lost with workers that died.
        policy: The improved policy, in memory.
    """

    out: Path
    env_steps: int
    episodes: int
    seconds: float
    before: float | None
    after: float | None
    best: Best | None
    lost: dict[str, int]
    policy: Any


def finetune(
    policy: Any,
    env: str,
    method: str,
    method_config: Any,
    config: FinetuneConfig,
    out: str | Path,
    *,
    offline: Episodes | None = None,
    env_options: Mapping[str, Any] | None = None,
    command: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> FinetuneResult:
    """Improve a policy in an environment.

    Args:
        policy: The base; its weights are not changed.
        env: Name of the environment.
        method: See `dipole.rl.methods.METHODS`.
        method_config: Its configuration.
        config: Settings of the run.
        out: Folder: new or empty, or with `resume` the one to go on with.
        offline: Recorded experience, for methods that use it.
        env_options: Passed to `dipole.envs.make`.
        command: Anything JSON-able to keep in `finetune.json`.
        resume: Go on from the newest training state.
        progress: Show a progress bar on stderr; None only on a terminal.

    Raises:
        DipoleError: Policy, environment, settings or folder are at fault, or a reward is not finite.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after the state was saved.
    """
    out = Path(out)
    options = dict(env_options or {})
    check_trackers(config.track)
    described = _describe(env, options, method, method_config, config, policy, command or {})
    _check_out(out, resume, method, described)
    workers = {} if config.num_workers is None else {"num_workers": config.num_workers}
    make_env = functools.partial(make, env, config.num_envs, config.mode, **workers, **options)
    evaluator = make(env, max(1, min(16, config.eval_episodes)), **options)
    learner: Learner | None = None
    try:
        base = Base(policy.eval() if isinstance(policy, nn.Module) else policy, evaluator)
        setting = Setting(base, make_env, config.num_envs, config.seed, config.reward, config.step_penalty, offline)
        learner = make_learner(method, setting, method_config)
        run = _Run(learner, config, out, evaluator, described)
        state = load_state(out / "training_state") if resume else None
        if state is not None:
            run.restore(state)
        elif not resume:
            write_json(out / RECORD, described)
        return run.go(progress, base.policy)
    finally:
        evaluator.close()
        if learner is not None:
            learner.collector.close()


class _Run:
    """A run in this process."""

    def __init__(
        self, learner: Learner, config: FinetuneConfig, out: Path, env: VectorEnv, described: Mapping[str, Any]
    ) -> None:
        self.learner, self.config, self.out, self.env, self.described = learner, config, out, env, described
        self.iteration = 0
        self.seconds = 0.0
        self.scores: list[tuple[int, float]] = []
        self.best: Best | None = None
        self.next_eval = self.eval_every = config.eval_every or max(1, config.env_steps // EVALUATIONS)
        self.trackers = Trackers([])

    @property
    def env_steps(self) -> int:
        return self.learner.collector.env_steps

    def go(self, progress: bool | None, base: Any) -> FinetuneResult:
        began, before = time.monotonic(), self.seconds
        self.trackers = open_trackers(self.config.track, self.out, self.env_steps, self.described)
        saved = began
        try:
            with StopRequest() as stop, ProgressBar(self.config.env_steps, self.env_steps, progress) as bar:
                if not self.scores and self.config.eval_episodes:
                    self._evaluate(base, first=True)
                while self.env_steps < self.config.env_steps:
                    figures = self.learner.iterate(self.iteration)
                    self.iteration += 1
                    self._report(figures, bar)
                    last = self.env_steps >= self.config.env_steps
                    if self.config.eval_episodes and (last or self.env_steps >= self.next_eval):
                        self._evaluate(self.learner.policy())
                        self.next_eval = (self.env_steps // self.eval_every + 1) * self.eval_every
                    self.seconds = before + time.monotonic() - began
                    if last or stop.received or time.monotonic() - saved > self.config.save_seconds:
                        self._save()
                        saved = time.monotonic()
                    if stop.received:
                        raise KeyboardInterrupt
        finally:
            self.trackers.close()
        return self._result()

    def _report(self, figures: dict[str, float], bar: ProgressBar) -> None:
        for key, value in figures.items():
            if not math.isfinite(value):
                raise DipoleError(
                    f"'{key}' is {value} after {self.env_steps} env steps: lower the learning rates; "
                    f"checkpoints in {self.out} are from before"
                )
        recent = self.learner.collector.figures()
        self.trackers.log(self.env_steps, {**figures, **{f"train/{key}": value for key, value in recent.items()}})
        shown = {"success": recent.get("success"), "eval": self.scores[-1][1] if self.scores else None}
        bar.show(min(self.env_steps, self.config.env_steps), **shown)

    def _evaluate(self, policy: Any, first: bool = False) -> None:
        """Play the episodes set aside for choosing checkpoints."""
        played = rollout(policy, self.env, episode_seeds(SELECT_SEED, self.config.eval_episodes))
        column = {"return": "return_"}.get(self.env.spec.score, self.env.spec.score)
        score = float(played.column(column).mean())
        success = float(played.column("success").mean())
        self.scores.append((self.env_steps, score))
        self.trackers.log(self.env_steps, {"eval/score": score, "eval/success": success})
        if not first and (self.best is None or score > self.best.score):
            self.best = Best(score, self.env_steps)
            save_policy(policy, self.out / "checkpoints" / "best")

    def _save(self) -> None:
        learner = self.learner
        save_policy(learner.policy(), self.out / "checkpoints" / "last")
        collector, values = learner.collector.state()
        tensors = {"modules": module_tensors(learner.modules), "collector": collector}
        for name, optimizer in learner.optimizers.items():
            tensors[f"optimizer-{name}"] = optimizer_tensors(optimizer, learner.modules)
        for name, memory in learner.buffers.items():
            tensors[f"memory-{name}"] = memory.state()
        kept = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "scores": self.scores,
            "best": None if self.best is None else [self.best.score, self.best.step],
            "next_eval": self.next_eval,
            "learner": learner.values,
            "collector": values,
        }
        save_state(self.out / "training_state", self.env_steps, tensors, kept)

    def restore(self, state: TrainingState) -> None:
        """Go on from a saved state."""
        learner, kept = self.learner, state.values
        restore_module(learner.modules, state.tensors["modules"])
        for name, optimizer in learner.optimizers.items():
            restore_optimizer(optimizer, learner.modules, state.tensors[f"optimizer-{name}"])
        for name, memory in learner.buffers.items():
            memory.restore(state.tensors[f"memory-{name}"])
        learner.values.update(kept["learner"])
        learner.collector.restore(state.tensors["collector"], kept["collector"])
        self.iteration, self.seconds, self.next_eval = kept["iteration"], kept["seconds"], kept["next_eval"]
        self.scores = [(int(steps), float(score)) for steps, score in kept["scores"]]
        self.best = Best(*kept["best"]) if kept["best"] else None

    def _result(self) -> FinetuneResult:
        collector = self.learner.collector
        return FinetuneResult(
            out=self.out,
            env_steps=self.env_steps,
            episodes=collector.episodes,
            seconds=self.seconds,
            before=self.scores[0][1] if self.scores else None,
            after=self.scores[-1][1] if self.scores else None,
            best=self.best,
            lost=dict(collector.lost),
            policy=self.learner.policy(),
        )


def _describe(
    env: str,
    options: dict[str, Any],
    method: str,
    method_config: Any,
    config: FinetuneConfig,
    policy: Any,
    command: Any,
) -> dict[str, Any]:
    """Return what must be the same on resumption (in the parts `check_same` compares), and what may differ."""
    from dipole.evaluation.describe import digest

    values = to_dict(config)
    return {
        "format": 1,
        "method": method,
        "train": {key: value for key, value in values.items() if key not in _FREE},
        "policy": {"digest": digest(policy), "sampler": to_dict(getattr(policy, "sampler", None))},
        "data": {"env": env, "options": options, "settings": to_dict(method_config)},
        "free": {key: values[key] for key in _FREE},
        "command": dict(command),
    }


def _check_out(out: Path, resume: bool, method: str, described: Mapping[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise DipoleError(f"{out}: is a file: choose another output folder")
    if not resume:
        if out.is_dir() and any(out.iterdir()):
            hint = (
                "go on with --resume, or choose another --out" if (out / RECORD).is_file() else "choose another --out"
            )
            raise DipoleError(f"{out}: the output folder is not empty: {hint}")
        return
    check_same(read_record(out, method), described, out)


def read_record(out: Path, method: str) -> dict[str, Any]:
    """Return what a run was started with.

    Raises:
        DipoleError: There is no run, or it was started with another method.
    """
    if not (out / RECORD).is_file():
        raise DipoleError(f"{out}: nothing to resume ('{RECORD}' is missing): start the run without --resume")
    stored: dict[str, Any] = read_json(out / RECORD)
    if stored.get("method") != method:
        raise DipoleError(f"{out}: was started with method '{stored.get('method')}', not '{method}': use another --out")
    return stored
