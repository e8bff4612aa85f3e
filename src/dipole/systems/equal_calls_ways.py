"""The ways to run the policies of `equal_calls_bases`, what each costs in network calls, and how each is played.

A way plans a chunk with `calls` network calls and executes `steps` actions of it: k calls for every chunk of Ta = 8
actions, or k calls at every env step, which costs as much as 8 k calls for every chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dipole.data import Episodes
from dipole.envs import make
from dipole.evaluation.rollout import rollout
from dipole.evaluation.seeds import episode_seeds, first_seed, policy_generator
from dipole.networks.moe import MoDE
from dipole.policies import DiffusionPolicy, SamplerConfig
from dipole.realtime import Runtime, apply
from dipole.realtime.block_schedule import ScheduleOptions, make_schedule, options_table
from dipole.realtime.block_schedule import calibrate as calibrate_cache
from dipole.realtime.cost import Cost, chunk_cost
from dipole.realtime.rti import RTIConfig
from dipole.realtime.start_level import calibrate
from dipole.serialization import to_dict
from dipole.systems.equal_calls_bases import TA, Task, demonstrations, policy_of
from dipole.systems.experiment import observations

EPISODES = 100
ROWS = {"pusht": 50}  # episodes side by side; a simulator of Meta-World takes longer to make than to play
OTHER_ROWS = 20
PIECES = 2  # h of the streaming policy
CALIBRATION = 8
# Of 100 levels, noise 0.7 times the signal. Tried first, on 20 episodes of peg insertion; 60 did as well there.
RENOISED_LEVEL = 40
CACHE = ScheduleOptions(budget=10, bubble=5)


@dataclass(frozen=True)
class Way:
    """How a policy is run.

    Attributes:
        name: Unique.
        kind: Which of the trained policies.
        calls: Network calls of a chunk, the first of an episode included if `first` is None.
        runtime: How it is run; for `rti` and `block-cache` without what has to be measured on the policy first.
        steps: Env steps per chunk.
        first: Network calls of the first chunk of an episode, where they differ.
        calibrated: Whether the start level of `rti` is measured, instead of the published 2 of 100.
    """

    name: str
    kind: str
    calls: int
    runtime: Runtime
    steps: int = TA
    first: int | None = None
    calibrated: bool = False


def ddim(steps: int) -> SamplerConfig:
    """Return DDIM with so many steps."""
    return SamplerConfig("ddim", steps, clip=1.0)


def _sampled(name: str, kind: str, calls: int, sampler: SamplerConfig, steps: int = TA) -> Way:
    return Way(name, kind, calls, Runtime(sampler=sampler, action_horizon=steps), steps)


DDPM100 = SamplerConfig("ddpm", 100, clip=1.0)
SOLVERS = (
    _sampled("ddpm-100", "base", 100, DDPM100),
    *(_sampled(f"ddim-{k}", "base", k, ddim(k)) for k in (1, 2, 5, 8, 24)),
    *(_sampled(f"dpmpp-2m-{k}", "base", k, SamplerConfig("dpmpp-2m", k)) for k in (2, 5)),
)
TRAINED = (
    *(_sampled(f"flow-{k}", "flow", k, SamplerConfig("euler", k)) for k in (1, 2, 5)),
    _sampled("distilled-1", "student", 1, ddim(1)),
    *(Way(f"streaming-{k}", "streaming", k, Runtime("streaming", sampler=ddim(PIECES * k))) for k in (1, 2, 5)),
)


LOW_NOISE = tuple(_sampled(f"beso-{k}", "beso", k, SamplerConfig("ddim", k, "exponential")) for k in (1, 2, 5))
EXPERTS = tuple(_sampled(f"mode-{k}", "mode", k, SamplerConfig("ddim", k, "exponential")) for k in (1, 2, 5))


def _warm(name: str, calls: int, steps: int, calibrated: bool = True) -> Way:
    # The first chunk of an episode gets what DDIM would spend on eight env steps.
    first = calls * (TA // steps)
    runtime = Runtime("rti", {"num_steps": calls}, ddim(first), action_horizon=steps)
    return Way(name, "base", calls, runtime, steps, first, calibrated)


def _renoised(name: str, calls: int, steps: int) -> Way:
    first = calls * (TA // steps)
    options = {"num_steps": calls, "start_level": RENOISED_LEVEL, "renoise": True, "kernel": "ddim"}
    return Way(name, "base", calls, Runtime("rti", options, ddim(first), action_horizon=steps), steps, first)


RENOISED = (
    *(_renoised(f"renoised rti-{k} every step", k, 1) for k in (1, 3)),
    _renoised("renoised rti-2", 2, TA),
)
EVERY_STEP = (
    *(_sampled(f"ddim-{k} every step", "base", k, ddim(k), 1) for k in (1, 3)),
    *(_warm(f"rti-{k} every step", k, 1) for k in (1, 3)),
    _warm("rti 2, 1, 0 every step", 3, 1, calibrated=False),
    _warm("rti-2", 2, TA),
    Way("ensemble of ddim-3", "base", 3, Runtime("ensemble", sampler=ddim(3), action_horizon=1), 1),
)
CACHED = (
    _sampled("transformer ddpm-100", "transformer", 100, DDPM100),
    Way("transformer ddpm-100 cached", "transformer", 100, Runtime("block-cache", sampler=DDPM100)),
)
WAYS = {way.name: way for way in (*SOLVERS, *TRAINED, *LOW_NOISE, *EXPERTS, *EVERY_STEP, *RENOISED, *CACHED)}
GROUPS: dict[str, tuple[Way, ...]] = {
    "solvers": SOLVERS,
    "trained": TRAINED,
    "beso": LOW_NOISE,
    "mode": EXPERTS,
    "every-step": EVERY_STEP,
    "renoised": RENOISED,
}

PAIRS = (
    *((f"dpmpp-2m-{k}", f"ddim-{k}") for k in (2, 5)),
    *((f"flow-{k}", f"ddim-{k}") for k in (1, 2, 5)),
    ("distilled-1", "ddim-1"),
    *((f"streaming-{k}", f"ddim-{k}") for k in (1, 2, 5)),
    *((f"beso-{k}", f"ddim-{k}") for k in (1, 2, 5)),
    *((f"mode-{k}", f"ddim-{k}") for k in (1, 2, 5)),
    ("rti-2", "ddim-2"),
    *((f"rti-{k} every step", f"ddim-{k} every step") for k in (1, 3)),
    *((f"rti-{k} every step", f"ddim-{TA * k}") for k in (1, 3)),
    ("renoised rti-2", "ddim-2"),
    *((f"renoised rti-{k} every step", f"ddim-{k} every step") for k in (1, 3)),
    *((f"renoised rti-{k} every step", f"ddim-{TA * k}") for k in (1, 3)),
    ("rti 2, 1, 0 every step", "ddim-3 every step"),
    ("rti 2, 1, 0 every step", "ddim-24"),
    ("ensemble of ddim-3", "ddim-3 every step"),
    ("ensemble of ddim-3", "ddim-24"),
)
"""Accelerators, and DDIM with as many network calls per env step."""


def running(way: Way, policy: DiffusionPolicy, task: Task, episodes: Episodes) -> Any:
    """Return the policy run that way, with what the way has to know measured on the demonstrations."""
    runtime = way.runtime
    if way.calibrated:
        planned = apply(policy, Runtime(sampler=runtime.sampler, action_horizon=way.steps))
        found = to_dict(calibrate(planned, episodes, RTIConfig(num_steps=way.calls)))
        runtime = replace(runtime, options={"num_steps": way.calls, "levels": found["levels"]})
    if runtime.method == "streaming" and task.env == "pusht":
        runtime = replace(runtime, options={"primer": "constant"})  # actions are positions: begin by holding still
    return apply(policy, runtime)


def cached(policy: DiffusionPolicy, episodes: Episodes, count: int = CALIBRATION) -> tuple[Any, int, Cost]:
    """Return a policy with its branches cached, DDIM's calls at equal multiplications, and what a chunk costs."""
    policy = policy.with_sampler(DDPM100)
    obs = observations(policy, episodes, count)
    schedule = make_schedule(calibrate_cache(policy, obs), CACHE)
    cost = chunk_cost(policy, {key: value[:1] for key, value in obs.items()})
    runtime = replace(WAYS["transformer ddpm-100 cached"].runtime, options=options_table(schedule))
    return apply(policy, runtime), cost.equal_calls(cost.cached(schedule)), cost


def entry(policy: Any) -> torch.nn.Module:
    """Return what is called once in every network call: MoDE with its experts fused is another module than MoDE."""
    network: torch.nn.Module = policy.network
    return network.embed_action if isinstance(network, MoDE) else network


def counted(policy: Any, network: torch.nn.Module, obs: dict[str, Tensor], chunks: int = 3) -> list[int]:
    """Return the network calls of the first chunks of an episode, counted at the network itself."""
    seen: list[None] = []
    hook = network.register_forward_pre_hook(lambda module, inputs: seen.append(None))
    counts: list[int] = []
    try:
        state, generator = policy.initial_state(1), [policy_generator(0)]
        for _ in range(chunks):
            _, state = policy.act({key: value[:1] for key, value in obs.items()}, state, generator=generator)
            counts.append(len(seen) - sum(counts))
    finally:
        hook.remove()
    return counts


def simulators(task: Task) -> Any:
    """Return the environments of a task that run side by side."""
    return make(task.env, ROWS.get(task.env, OTHER_ROWS), **task.options)


def played(policy: Any, env: Any, seed: int) -> dict[str, Any]:
    """Return the score of every episode of a block of seeds that belongs to the training seed, and its chunks."""
    runs = rollout(policy, env, episode_seeds(first_seed(seed), EPISODES), block=env.num_envs)
    score = runs.column("max_reward" if env.spec.score == "max_reward" else "success").astype(float)
    return {
        "score": score.tolist(),
        "chunks": int(runs.column("chunks").sum()),
        "steps": int(runs.column("length").sum()),
    }


def measure(group: str, task: Task, seed: int, demos: str, folders: dict[str, str]) -> dict[str, Any]:
    """Return, for each way of a group, its scores and its network calls per env step."""
    episodes, results = demonstrations(task, demos), {}
    env = simulators(task)
    try:
        for way in GROUPS[group]:
            policy = policy_of(folders[way.kind])
            runner = running(way, policy, task, episodes)
            first, *later = counted(runner, entry(policy), observations(policy, episodes, 1))
            found = played(runner, env, seed)
            total = EPISODES * first + (found["chunks"] - EPISODES) * later[-1]
            results[way.name] = {**found, "calls": total / found["steps"], "counted": [first, *later]}
    finally:
        env.close()
    return results


def measure_cache(task: Task, seed: int, demos: str, folder: str) -> dict[str, Any]:
    """Return scores of a transformer with and without its branches cached, and of DDIM at equal multiplications.

    Calls are those of the whole network that cost as many multiplications.
    """
    episodes, policy = demonstrations(task, demos), policy_of(folder)
    runner, equal, cost = cached(policy, episodes)
    schedule = runner.options
    plans = {
        "transformer ddpm-100": (policy.with_sampler(DDPM100), 100.0),
        "transformer ddpm-100 cached": (runner, cost.cached(schedule) / cost.call),
        f"transformer ddim-{equal}": (policy.with_sampler(ddim(equal)), float(equal)),
    }
    env = simulators(task)
    try:
        results = {}
        for name, (plan, calls) in plans.items():
            found = played(plan, env, seed)
            results[name.replace(f"ddim-{equal}", "ddim, equal cost")] = {
                **found, "calls": calls * found["chunks"] / found["steps"], "per_chunk": calls,
            }  # fmt: skip
        return results
    finally:
        env.close()
