"""What a sampling step costs besides the network: dipole against diffusers' schedulers.

One action chunk of shape (1, 16, 7), one thread, a network that returns a fixed tensor. For each sampler both libraries
make the same steps; they take turns, and each is judged by its fastest run. The peer is charged for its `step` calls
only, dipole for everything `sample` does. Run it:  python benchmarks/scheduler_overhead.py
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from dipole.diffusion import DDIM, DDPM, EDM, VP, DPMSolverPP2M, Flow, NetworkDenoiser, sample

SHAPE = (1, 16, 7)
TURNS = 300
HEADLINE = "DDIM-10, clipped"


def run() -> dict[str, Any]:
    """Return the headline result (name, ours, peer, ratio, unit: microseconds a step) and all of them under `all`."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            results = [_measure(name, *pair) for name, pair in _pairs().items()]
    finally:
        torch.set_num_threads(threads)
    headline = next(result for result in results if result["name"] == HEADLINE)
    return {**headline, "all": results}


def _pairs() -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """Return for each sampler: our run, the peer's run, and their number of steps."""
    vp, flow, edm = VP.cosine(100), Flow(), EDM()
    trained = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
    ddim = diffusers.DDIMScheduler(**trained)
    dpm = diffusers.DPMSolverMultistepScheduler(**trained, timestep_spacing="trailing")
    return {
        "DDPM-100, clipped": (
            _ours(vp, vp.levels(100), DDPM(clip=1.0), "epsilon"),
            _peer(diffusers.DDPMScheduler(**trained), 100),
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


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(f"{'sampler':22} {'dipole':>8} {'diffusers':>10}  us/step   diffusers / dipole")
    for result in run()["all"]:
        print(f"{result['name']:22} {result['ours']:8.1f} {result['peer']:10.1f} {1 / result['ratio']:21.1f}x")
