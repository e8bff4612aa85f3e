"""The ways to run a policy that `dipole accelerate` compares: samplers, warm starts, caches, distilled checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipole.data.features import single_precision
from dipole.diffusion.process import EDM, Flow
from dipole.envs.spec import VectorEnv
from dipole.errors import DipoleError
from dipole.evaluation.rollout import rollout
from dipole.evaluation.sweep import parse_sampler
from dipole.policies.checkpoint import load_policy
from dipole.policies.config import SamplerConfig
from dipole.realtime.backends import faster_backends
from dipole.realtime.block_cache import cacheable
from dipole.realtime.block_calibration import calibrate
from dipole.realtime.block_schedule import ScheduleOptions, make_schedule, options_table
from dipole.realtime.runtime import WHOLE_CHUNK_METHODS, Runtime, apply, default_runtime

REFERENCE = "as trained"

# Calibration observations of the block cache, and where on the list of selection seeds they come from: no episode of
# the search is among them.
CALIBRATION_ROWS = 8
_CALIBRATION_OFFSET = 40_000


@dataclass(frozen=True)
class Candidate:
    """One way to run a policy.

    Attributes:
        name: For people, unique.
        run: Folder of the weights.
        runtime: How they are run.
    """

    name: str
    run: str
    runtime: Runtime

    @property
    def slug(self) -> str:
        """Return the name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass
class Workshop:
    """Loads each checkpoint once and builds candidates from it.

    Attributes:
        device: Where policies compute.
    """

    device: str = "cpu"

    def __post_init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def bare(self, run: str) -> Any:
        """Return the policy of a folder as it was trained."""
        if run not in self._loaded:
            self._loaded[run] = load_policy(run, self.device)
        return self._loaded[run]

    def build(self, candidate: Candidate) -> Any:
        """Return the policy of a candidate, ready to act."""
        return apply(self.bare(candidate.run), candidate.runtime)


def default_samplers(policy: Any) -> list[str]:
    """Return samplers worth trying for a policy's process, written `name:steps`."""
    own = policy.sampler
    if own.name == "consistency":
        return ["consistency:1", "consistency:2"]
    if isinstance(policy.process, Flow):
        return ["euler:1", "euler:2", "euler:3", "euler:5", "euler:10", "heun:2", "dpmpp-2m:3"]
    if isinstance(policy.process, EDM):
        return ["ddim:2", "ddim:3", "ddim:5", "ddim:10", "dpmpp-2m:3", "dpmpp-2m:5"]
    return ["ddim:1", "ddim:2", "ddim:3", "ddim:5", "ddim:10", "dpmpp-2m:3", "dpmpp-2m:5", "dpmpp-2m:10"]


def make_candidates(
    workshop: Workshop,
    run: str,
    *,
    samplers: Sequence[str] | None = None,
    distilled: Sequence[str] = (),
    observations: Callable[[], dict[str, Tensor]] | None = None,
    calibration_folder: Path | None = None,
    seed: int = 0,
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates, the reference first, and what could not be tried, in words.

    Args:
        workshop: Where policies come from.
        run: The checkpoint.
        samplers: `name:steps`; None for the usual ones of the policy's process.
        distilled: Folders of distilled checkpoints.
        observations: Gives observations to calibrate the block cache on; None leaves it out.
        calibration_folder: Where the calibration is saved.
        seed: Of the calibration's noise.

    Raises:
        DipoleError: A sampler that was asked for does not exist, or a checkpoint cannot be read.
    """
    policy = workshop.bare(run)
    reference = default_runtime(policy)
    found = [Candidate(REFERENCE, run, reference)]
    notes: list[str] = []
    if reference.method != "plain":  # trained to be run by one method: its levels are not for the others
        return [*found, *_distilled(workshop, distilled)], notes
    for text in default_samplers(policy) if samplers is None else samplers:
        sampler = parse_sampler(text, _safe(policy.sampler, text))
        if sampler != policy.sampler:
            found.append(Candidate(f"{sampler.name}:{sampler.num_steps}", run, Runtime(sampler=sampler)))
    found += _warm_starts(policy, run)
    if observations is not None:
        found += _caches(policy, run, observations, calibration_folder, seed, notes)
    return [*found, *_distilled(workshop, distilled)], notes


def _safe(own: SamplerConfig, text: str) -> SamplerConfig:
    """Return the settings a sampler inherits: noise of another kernel, and its levels, mean nothing to it."""
    same = text.partition(":")[0] in ("", own.name)
    return own if same else replace(own, eta=None, spacing=None)


def _warm_starts(policy: Any, run: str) -> list[Candidate]:
    """Real-time iteration from low to high levels, with the policy's Ta and with every action planned anew."""
    # Noise to signal at levels 10 and 40 of DDPM's 100.
    middle, high = (float(level) for level in policy.process.level_at(torch.tensor([0.185, 0.75], dtype=torch.float64)))
    renoised = {"start_level": high, "renoise": True, "kernel": "ddim"}
    options: dict[str, dict[str, Any]] = {
        "rti:3": {"num_steps": 3},
        "rti:5": {"num_steps": 5, "start_level": middle},
        "rti:2 renoised": {"num_steps": 2, **renoised},
    }
    found = [Candidate(name, run, Runtime("rti", table)) for name, table in options.items()]
    if getattr(policy, "action_horizon", 1) > 1:
        found += [
            Candidate(f"{name}, Ta 1", run, Runtime("rti", options[name], action_horizon=1))
            for name in ("rti:3", "rti:2 renoised")
        ]
    return found


def _caches(
    policy: Any,
    run: str,
    observations: Callable[[], dict[str, Tensor]],
    folder: Path | None,
    seed: int,
    notes: list[str],
) -> list[Candidate]:
    calls = policy.sampler.nfe
    budgets = sorted({max(2, calls // part) for part in (10, 3, 2)} - {calls}) if calls >= 4 else []
    if not budgets:
        notes.append(f"block cache: not tried, {calls} network calls leave nothing to reuse")
        return []
    reason = cacheable(policy)
    if reason is not None:
        notes.append(f"block cache: not tried, {reason}")
        return []
    try:
        calibration = calibrate(policy, observations(), seed)
    except DipoleError as error:
        notes.append(f"block cache: not tried, {error}")
        return []
    if folder is not None:
        calibration.save(folder)
    found = []
    for budget in budgets:
        schedule = make_schedule(calibration, ScheduleOptions(budget))
        name = f"block-cache {budget} of {calibration.num_calls}"
        found.append(Candidate(name, run, Runtime("block-cache", options_table(schedule))))
    return found


def _distilled(workshop: Workshop, folders: Sequence[str]) -> list[Candidate]:
    found = []
    for folder in folders:
        sampler = workshop.bare(folder).sampler
        found.append(
            Candidate(f"distilled {Path(folder).name} ({sampler.name}:{sampler.num_steps})", folder, Runtime())
        )
    return found


def on_backends(candidate: Candidate, backends: Sequence[str] | None = None, device: str = "cpu") -> list[Candidate]:
    """Return a candidate on other back ends; None: on all of its device.

    The block cache has to see inside the network: it runs on none; methods that make steps of their own not on
    `whole-chunk`.
    """
    if candidate.runtime.method == "block-cache":
        return []
    chosen = list(faster_backends(device) if backends is None else backends)
    if candidate.runtime.method not in WHOLE_CHUNK_METHODS and "whole-chunk" in chosen:
        chosen.remove("whole-chunk")
    return [
        replace(candidate, name=f"{candidate.name} + {name}", runtime=replace(candidate.runtime, backend=name))
        for name in chosen
        if name != candidate.runtime.backend
    ]


def calibration_observations(
    policy: Any, env: VectorEnv, first_seed: int, rows: int = CALIBRATION_ROWS, max_steps: int | None = None
) -> dict[str, Tensor]:
    """Return observations `[rows, To, ...]` met by a policy in an environment, on episodes nothing else uses.

    Args:
        policy: The policy.
        env: The environment.
        first_seed: First seed of the search.
        rows: How many.
        max_steps: Longest episode.
    """
    seeds = [first_seed + _CALIBRATION_OFFSET + i for i in range(2)]
    runs = rollout(policy, env, seeds, keep_trajectories=True, max_steps=max_steps)
    rng = np.random.default_rng(first_seed)
    picked: dict[str, list[np.ndarray]] = {}
    for row in range(rows):
        trajectory = runs.episodes[row % len(seeds)].trajectory
        assert trajectory is not None
        now = int(rng.integers(len(trajectory.actions)))
        frames = np.clip(np.arange(now - policy.obs_horizon + 1, now + 1), 0, None)
        for key, value in trajectory.observations.items():
            picked.setdefault(key, []).append(single_precision(value[frames]))
    return {key: torch.from_numpy(np.stack(values)) for key, values in picked.items()}
