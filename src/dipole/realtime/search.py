"""A search for the fastest way to run a policy: its candidates, their timing and their episodes, kept on disk.

`dipole.realtime.accelerate` says in which order all this happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dipole import __version__
from dipole.envs.seeds import SELECT_SEED
from dipole.envs.spec import VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.blocks import acting, device_of
from dipole.evaluation.describe import digest
from dipole.evaluation.episode import Episode
from dipole.evaluation.latency import count_network_calls
from dipole.evaluation.rollout import first_observation, rollout
from dipole.evaluation.seeds import episode_seeds, first_seed, policy_generator
from dipole.policies.checkpoint import find_policy
from dipole.realtime.candidates import Candidate, Workshop, calibration_observations, make_candidates
from dipole.realtime.selection import BLOCK, Entry, SearchConfig, paired
from dipole.serialization import read_json, to_dict, write_json

_SELECT_BLOCKS = 4  # of 10 000 seeds each, within the range kept for choosing; what follows them is for calibration

Progress = Callable[[Episode], None]
Say = Callable[[str], None]


@dataclass
class Search:
    """A search in progress: see `dipole.realtime.accelerate`."""

    run: Path
    env: VectorEnv
    config: SearchConfig
    out: Path
    workshop: Workshop
    say: Say
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.on_success = self.env.spec.score == "success"
        self.notes: list[str] = []
        first_seed(self.config.seed)  # an impossible one is reported here
        block = self.config.seed % _SELECT_BLOCKS
        self.seeds = [SELECT_SEED + 10_000 * block + i for i in range(self.config.episodes)]

    def candidates(self) -> list[Entry]:
        """Return the candidates, with what an earlier search left of them."""
        config, folder = self.config, find_policy(self.run)
        policy = self.workshop.bare(str(self.run))

        def observations() -> dict[str, Tensor]:
            return calibration_observations(policy, self.env, SELECT_SEED, max_steps=config.max_steps)

        found, notes = make_candidates(
            self.workshop,
            str(self.run),
            samplers=config.samplers,
            distilled=config.distilled,
            observations=observations,
            calibration_folder=folder,
            seed=config.seed,
        )
        self.notes += notes
        return [self.entry(candidate) for candidate in found]

    def entry(self, candidate: Candidate) -> Entry:
        """Return the entry of a candidate: the stored one if nothing it depends on has changed."""
        policy = self.workshop.bare(candidate.run)
        text = [digest(policy), to_dict(policy.sampler), to_dict(candidate.runtime), self.env.spec.name]
        settings = [self.seeds[0], self.config.max_steps, BLOCK, __version__]
        key = hashlib.sha256(json.dumps([*text, *settings], sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = self._path(candidate)
        fresh = Entry(candidate, key)
        if not path.is_file():
            return fresh
        stored = read_json(path)
        if not isinstance(stored, dict) or stored.get("key") != key:
            return fresh
        names = ("scores", "successes", "lengths", "p50_ms", "p95_ms", "nfe", "actions")
        return replace(fresh, **{name: stored[name] for name in names})

    def _path(self, candidate: Candidate) -> Path:
        return self.out / "candidates" / f"{candidate.slug}.json"

    def _keep(self, entry: Entry) -> None:
        values = {name: value for name, value in vars(entry).items() if name not in ("candidate", "dropped", "problem")}
        write_json(self._path(entry.candidate), {"name": entry.candidate.name, **values})

    def time(self, entries: Sequence[Entry], anew: bool = False) -> None:
        """Time candidates in turn, several passes over all, so that a busy machine treats them alike.

        Args:
            entries: The candidates.
            anew: Also those that were timed before.
        """
        todo = [entry for entry in entries if (anew or entry.p50_ms is None) and not entry.problem]
        ready: list[tuple[Entry, Stopwatch]] = []
        for entry in todo:
            try:
                policy = self.workshop.build(entry.candidate)
                ready.append((entry, Stopwatch(policy, first_observation(policy, self.env, self.seeds[0]))))
                entry.nfe = count_network_calls(policy, ready[-1][1].obs)
                entry.actions = int(policy.action_horizon)
            except DipoleError as error:
                entry.problem = str(error)
        for _ in range(4):
            for _, watch in ready:
                watch.run(self.config.calls // 4, seconds=1.0)
        if ready:
            self._note_load()
        for entry, watch in ready:
            entry.p50_ms, entry.p95_ms = (float(value) for value in np.percentile(watch.times, [50, 95]))
            self._keep(entry)

    def _note_load(self) -> None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        cores = os.cpu_count() or 1  # all there are, as the load counts what runs on any of them
        note = f"the machine was busy while candidates were timed (load {load:.0f} on {cores} cores): time them again"
        if load > cores and not any(line.startswith("the machine was busy") for line in self.notes):
            self.notes.append(note)

    def play(self, entries: Sequence[Entry], episodes: int) -> None:
        """Let candidates play until each has `episodes` episodes, kept after every block."""
        for entry in entries:
            policy = None
            while len(entry.scores) < episodes and not entry.problem:
                begin = len(entry.scores)
                seeds = self.seeds[begin : min(begin + 2 * BLOCK, episodes)]
                try:
                    policy = self.workshop.build(entry.candidate) if policy is None else policy
                    runs = rollout(
                        policy, self.env, seeds, block=BLOCK, max_steps=self.config.max_steps, progress=self.progress
                    )
                except DipoleError as error:
                    entry.problem = str(error)
                    break
                score = {"success": "success", "max_reward": "max_reward", "return": "return_"}[self.env.spec.score]
                entry.scores += [float(value) for value in runs.column(score)]
                entry.successes += [bool(value) for value in runs.column("success")]
                entry.lengths += [int(value) for value in runs.column("length")]
                self._keep(entry)

    def confirm(self, chosen: Entry, reference: Entry) -> dict[str, Any] | None:
        """Return how the choice does against the reference on fresh seeds; None if it is the reference."""
        if chosen is reference or not self.config.confirm:
            return None
        selection, self.seeds = self.seeds, episode_seeds(first_seed(self.config.seed), self.config.episodes)
        out, self.out = self.out, self.out / "confirmation"
        try:
            before, after = self.entry(reference.candidate), self.entry(chosen.candidate)
            self.play([before, after], self.config.episodes)
        finally:
            self.seeds, self.out = selection, out
        return {"first_seed": first_seed(self.config.seed), **paired(before, after, self.on_success)}


@dataclass
class Stopwatch:
    """Times single chunks of a policy, its state handed on from call to call."""

    policy: Any
    obs: dict[str, Tensor]
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = device_of(self.policy)
        self._generator = policy_generator(0, device)
        self.obs = {key: value.to(device) for key, value in self.obs.items()}
        self._state = self.policy.initial_state(1)
        for _ in range(3):
            self._call()

    def run(self, calls: int, seconds: float) -> None:
        """Time `calls` chunks, fewer but at least two where they take longer than `seconds` in all."""
        began = time.perf_counter()
        for call in range(max(2, calls)):
            self.times.append(self._call())
            if call and time.perf_counter() - began > seconds:
                break

    def _call(self) -> float:
        with acting(self.policy):
            began = time.perf_counter()
            chunk, self._state = self.policy.act(self.obs, self._state, generator=[self._generator])
            chunk.cpu()  # waits for the accelerator, as the robot does
            return 1000 * (time.perf_counter() - began)
