"""What a sampling step costs besides the network: dipole against diffusers' schedulers.

One action chunk of shape (1, 16, 7), one thread, a network that returns a fixed tensor. For each sampler both libraries
make the same steps; they take turns, and each is judged by its fastest run. The peer is charged for its `step` calls
only, dipole for everything `sample` does. Run it:  python benchmarks/scheduler_overhead.py

The back end `whole-chunk` compiles the steps together with the network, so there is no step to be timed by itself: it
is what a chunk takes longer than the same calls of the same network do. Both are compiled alike, one matrix product
called ten times at DDIM's levels: once with the sampler around it, once with each call given the last one's output and
nothing else. Entering the graph costs the same both times and so does not count; finding it (`WholeChunk`, in Python)
does. (The product cannot be fused with the steps, as little as a network can. With a larger network the difference of
two long times is lost in their noise.)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

from dipole import networks
from dipole.data import Feature, Normalizer
from dipole.diffusion import DDIM, DDPM, EDM, VP, DPMSolverPP2M, Flow, NetworkDenoiser, sample
from dipole.errors import DipoleError
from dipole.policies import DiffusionPolicy, ObjectiveConfig, PolicyConfig, ProcessConfig, SamplerConfig
from dipole.realtime.export_plan import make_plan
from dipole.realtime.whole_chunk import ChunkGraph, compiled, whole_chunk

SHAPE = (1, 16, 7)
STATE = 9
TRAINED: dict[str, Any] = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
TURNS = 300
HEADLINE = "DDIM-10, clipped"


def run() -> dict[str, Any]:
    """Return the headline result (name, ours, peer, ratio, unit: microseconds a step) and all of them under `all`.

    The headline is DDIM-10, compiled where there is a C++ compiler (about a minute), with the eager ratio beside it.
    """
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            results = [_measure(name, *pair) for name, pair in _pairs().items()]
            whole = _measure_compiled()
    finally:
        torch.set_num_threads(threads)
    headline = next(result for result in results if result["name"] == HEADLINE)
    if whole is None:
        return {**headline, "all": results}
    return {**whole, "ratio, eager": headline["ratio"], "all": [*results, whole]}


def _pairs() -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """Return for each sampler: our run, the peer's run, and their number of steps."""
    vp, flow, edm = VP.cosine(100), Flow(), EDM()
    ddim = diffusers.DDIMScheduler(**TRAINED)
    dpm = diffusers.DPMSolverMultistepScheduler(**TRAINED, timestep_spacing="trailing")
    return {
        "DDPM-100, clipped": (
            _ours(vp, vp.levels(100), DDPM(clip=1.0), "epsilon"),
            _peer(diffusers.DDPMScheduler(**TRAINED), 100),
            100,
        ),
        HEADLINE: (_ours(vp, vp.levels(10, "leading"), DDIM(clip=1.0), "epsilon"), _peer(ddim, 10), 10),
        "DPM-Solver++ 2M-10": (_ours(vp, vp.levels(10), DPMSolverPP2M(), "epsilon"), _peer(dpm, 10), 10),
        "flow Euler-10": (
            _ours(flow, flow.levels(10), DDIM(), "velocity"),
            _peer(diffusers.FlowMatchEulerDiscreteScheduler(), 10),
            10,
        ),
        "EDM Euler-10": (_ours(edm, edm.levels(10), DDIM(), "edm"), _peer(diffusers.EDMEulerScheduler(), 10), 10),
    }


def _ours(process: Any, levels: torch.Tensor, kernel: Any, prediction_type: Any) -> Callable[[], Any]:
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    denoiser = NetworkDenoiser(lambda x, time, cond: output, process, prediction_type)
    generator = torch.Generator().manual_seed(0)
    return lambda: sample(denoiser, process, levels, kernel, init=x, generator=generator)


def _peer(scheduler: Any, num_steps: int) -> Callable[[], Any]:
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    network = lambda x, time, cond: output  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator} if isinstance(scheduler, diffusers.DDPMScheduler) else {}

    def loop() -> Any:
        sample = x
        for t in scheduler.timesteps:
            sample = scheduler.step(network(sample, t, None), t, sample, **options).prev_sample
        return sample

    def timed() -> float:
        scheduler.set_timesteps(num_steps)  # multistep schedulers remember the last chunk; not counted
        return _seconds(loop)

    return timed


def _measure(name: str, ours: Callable[[], Any], peer: Callable[[], float], num_steps: int) -> dict[str, Any]:
    ours()
    pairs = [(_seconds(ours), peer()) for _ in range(TURNS)]
    fastest = [min(column) / num_steps * 1e6 for column in zip(*pairs, strict=True)]
    return {"name": name, "ours": fastest[0], "peer": fastest[1], "ratio": fastest[0] / fastest[1], "unit": "us/step"}


class _Product(torch.nn.Module):
    """A network of one matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(SHAPE[1] * SHAPE[2], SHAPE[1] * SHAPE[2])

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return self.layer(x.flatten(1)).view_as(x)


class _CallsOnly(ChunkGraph):
    """The network's calls of a chunk and nothing else."""

    def forward(self, start: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
        call = self.calls(dict(zip(self.names, cond, strict=True)))
        x = start
        for k in range(len(self.plan.steps)):
            x = call(k, x)
        return x


def _measure_compiled() -> dict[str, Any] | None:
    """Return what the headline's steps cost inside of a compiled graph; None without a compiler."""
    policy = _policy()
    with torch.inference_mode(False):  # tensors of inference mode cannot be captured
        policy.network = _Product().eval()
    try:
        chunk = whole_chunk(policy, "fp32")
    except DipoleError as error:
        print(error, file=sys.stderr)
        return None
    levels, kernel, plan = policy.sampler.levels(policy.process), policy.sampler.build(), make_plan(policy)
    state = torch.randn(1, policy.obs_horizon, STATE)
    init, cond = torch.randn(SHAPE), policy.encode({"observation.state": state})
    peer = _peer(diffusers.DDIMScheduler(**TRAINED), len(plan.steps))
    calls = compiled(_CallsOnly(chunk.network, plan, tuple(cond)), (init, *cond.values()), torch.float32)

    def whole() -> Any:
        return chunk(chunk.denoiser, policy.process, levels, kernel, cond=cond, init=init)

    def bare() -> Any:
        return calls(init, *cond.values())

    def warm(function: Callable[[], Any]) -> float:
        function()  # what comes after diffusers' step finds other things in the caches than what comes after itself
        return _seconds(function)

    peer()
    turns = [(warm(whole), warm(bare), peer()) for _ in range(10 * TURNS)]
    with_sampler, without, theirs = (min(column) / len(plan.steps) * 1e6 for column in zip(*turns, strict=True))
    ours = with_sampler - without
    name = f"{HEADLINE}, whole-chunk"
    return {"name": name, "ours": ours, "peer": theirs, "ratio": ours / theirs, "unit": "us/step"}


def _policy() -> DiffusionPolicy:
    """Return a small policy with random weights, for chunks of `SHAPE`, that is sampled as the headline says."""
    _, horizon, actions = SHAPE
    sizes = {"observation.state": STATE, "action": actions}
    stats = {key: {"min": -np.ones(size), "max": np.ones(size)} for key, size in sizes.items()}
    config = PolicyConfig(
        {"observation.state": Feature("float32", (STATE,))},
        Feature("float32", (actions,)),
        pred_horizon=horizon,
        network=networks.full_config({"name": "mlp", "width": 32, "num_blocks": 1}),
        process=ProcessConfig("vp-cosine", 100),
        objective=ObjectiveConfig("epsilon", "uniform"),
        sampler=SamplerConfig("ddim", 10, "leading", clip=1.0),
    )
    return DiffusionPolicy(config, Normalizer.fit(stats, dict.fromkeys(stats, "min_max"))).eval()


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(f"{'sampler':30} {'dipole':>8} {'diffusers':>10}  us/step   diffusers / dipole")
    for result in run()["all"]:
        print(f"{result['name']:30} {result['ours']:8.1f} {result['peer']:10.1f} {1 / result['ratio']:21.1f}x")
