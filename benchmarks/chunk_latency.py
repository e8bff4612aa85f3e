"""Milliseconds per action chunk, dipole against LeRobot: same weights, same observation, same noise, same machine.

    python benchmarks/chunk_latency.py --peer-python PATH_TO_A_PYTHON_WITH_LEROBOT_0.4 [--device cuda]

Two 1-D U-Nets as LeRobot builds them (4.5 and 63.5 million parameters) are written as a LeRobot 0.4.4 policy, which
LeRobot and `dipole import` both load. Both denoise the same observations from the same noise with DDIM-10; LeRobot also
with its default, DDPM-100. LeRobot is timed inside its model (`generate_actions`), dipole for the whole of `act`,
normalisation included. The two take turns, so that a machine whose load changes changes for both. For each size there
is the floor: the weights read once per step at the measured memory bandwidth, the products at the measured peak.
On a GPU, LeRobot is timed with its U-Net compiled as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIZES = {"4.5M": (64, 128, 256), "63.5M": (256, 512, 1024)}
STEPS, ROUNDS, CALLS = 10, 5, 4
BATCHES = (1, 32)
PEER = Path(__file__).parent / "peers" / "lerobot_chunk_latency.py"
RUNTIMES = {
    "cpu": {
        "eager": ("eager", "fp32"),
        "packed": ("packed", "fp32"),
        "packed bf16": ("packed", "bf16"),
        "packed-compiled": ("packed-compiled", "fp32"),
        "packed-compiled bf16": ("packed-compiled", "bf16"),
    },
    "cuda": {
        "eager": ("eager", "fp32"),
        "cuda-graph": ("cuda-graph", "fp32"),
        "cuda-graph bf16": ("cuda-graph", "bf16"),
        "compile": ("compile", "fp32"),
    },
}


def run(peer_python: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Return for each size and batch the milliseconds per chunk, ratios to the peer, differences and floors."""
    machine = {"bandwidth_GB_per_s": bandwidth(device), "fp32_GFLOP_per_s": peak(torch.float32, device)}
    machine["bf16_GFLOP_per_s"] = peak(torch.bfloat16, device)
    results = {}
    for name, down_dims in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compare(Path(folder), down_dims, peer_python, machine, device)
    return {
        "name": "chunk_latency",
        "unit": "ms per chunk of DDIM-10 (median)",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "machine": machine,
        "sizes": results,
        "target": "batch 1: 4.5M >= 3x and 63.5M >= 1.5x in fp32, 63.5M >= 3x in bf16, difference <= 1e-4 in fp32",
    }


def compare(
    folder: Path, down_dims: tuple[int, ...], peer_python: str | None, machine: Any, device: str
) -> dict[str, Any]:
    """Return the figures of one size."""
    from dipole.policies import from_lerobot, to_lerobot
    from dipole.realtime import Runtime, apply

    to_lerobot(make_policy(down_dims), folder / "policy")
    policy = from_lerobot(folder / "policy").eval().to(device)
    ours = {name: apply(policy, Runtime(backend=b, precision=p)) for name, (b, p) in RUNTIMES[device].items()}
    parameters = sum(parameter.numel() for parameter in policy.network.parameters())
    results: dict[str, Any] = {"parameters": parameters, "floor": floor(policy, machine)}
    peers = {"peer": False, "peer compiled": True} if device == "cuda" else {"peer": False}
    with peer_process(peer_python, folder / "policy", device) as ask:
        for batch in BATCHES:
            obs, noise = inputs(policy, batch)
            normalised = {key: policy.normalizer.normalize(key, value) for key, value in obs.items()}
            file = folder / "inputs.safetensors"
            save_file({**{key: value.contiguous() for key, value in normalised.items()}, "noise": noise}, file)
            request = {"batch": batch, "steps": STEPS, "sampler": "DDIM", "calls": CALLS, "inputs": str(file)}
            if batch > 1:  # compiling for every batch takes minutes
                peers, ours = ({k: v for k, v in table.items() if "compile" not in k} for table in (peers, ours))
            times: dict[str, list[float]] = {name: [] for name in (*peers, *ours)}
            chunks = {}
            for _ in range(ROUNDS):
                for name, compiled in peers.items() if ask is not None else ():
                    times[name] += ask({**request, "compiled": compiled})
                for name, one in ours.items():
                    seconds, chunks[name] = time_calls(one, obs, noise)
                    times[name] += seconds
            row = {name: 1e3 * median(values) for name, values in times.items() if values}
            if ask is not None:
                chunk = load_file(folder / "peer.safetensors")["chunk"]
                row["difference"] = {
                    name: float((policy.normalizer.normalize("action", value).cpu() - chunk).abs().max())
                    for name, value in chunks.items()
                }
                row["ratio"] = {name: row["peer"] / row[name] for name in ours}
                if batch == 1:
                    default = {**request, "sampler": "DDPM", "steps": 100, "calls": 1}
                    row["peer_ddpm100"] = 1e3 * median([ask(default)[0] for _ in range(3)])
                    row["ratio_to_ddpm100"] = {name: row["peer_ddpm100"] / row[name] for name in ours}
            results[f"batch {batch}"] = row
            print(json.dumps({"parameters": parameters, "batch": batch, **row}), file=sys.stderr, flush=True)
    return results


def make_policy(down_dims: tuple[int, ...]) -> Any:
    """Return an untrained policy of PushT's sizes, as LeRobot would build it."""
    from dipole import networks
    from dipole.data import Feature, Normalizer
    from dipole.policies import DiffusionPolicy, ObjectiveConfig, PolicyConfig, ProcessConfig, SamplerConfig

    torch.manual_seed(0)
    observation = {
        "observation.state": Feature("float32", (2,)),
        "observation.environment_state": Feature("float32", (16,)),
    }
    network = {"name": "unet1d", "down_dims": list(down_dims), "step_embed_dim": 128}
    config = PolicyConfig(
        observation,
        Feature("float32", (2,)),
        network=networks.full_config(network),
        process=ProcessConfig("vp-cosine", 100),
        objective=ObjectiveConfig("epsilon", "uniform"),
        sampler=SamplerConfig("ddim", STEPS, "leading", clip=1.0),
    )
    ends = {"min": -1.0, "max": 1.0}
    stats = {
        key: {name: torch.full(feature.shape, value).double().numpy() for name, value in ends.items()}
        for key, feature in {**observation, "action": config.action}.items()
    }
    return DiffusionPolicy(config, Normalizer.fit(stats, dict.fromkeys(stats, "min_max"))).eval()


def inputs(policy: Any, batch: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return observations and noise."""
    generator = torch.Generator().manual_seed(batch)
    device = next(policy.parameters()).device
    obs = {
        key: (2 * torch.rand(batch, policy.obs_horizon, *feature.shape, generator=generator) - 1).to(device)
        for key, feature in policy.config.observation.items()
    }
    return obs, torch.randn(batch, policy.pred_horizon, policy.action_dim, generator=generator).to(device)


def time_calls(policy: Any, obs: Any, noise: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """Return the seconds of some calls of `act`, and the chunk."""
    seconds = []
    with torch.inference_mode():
        for _ in range(CALLS):
            began = time.perf_counter()
            chunk, _ = policy.act(obs, {}, noise)
            if chunk.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return seconds, chunk


@contextmanager
def peer_process(python: str | None, policy: Path, device: str) -> Any:
    """Give a function that lets LeRobot work and returns its seconds; None without a Python for it."""
    if python is None:
        yield None
        return
    words = [python, str(PEER), str(policy), str(torch.get_num_threads()), device]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def answer(key: str) -> Any:
        for line in stdout:
            if line.startswith("{") and key in (found := json.loads(line)):  # LeRobot prints lines of its own
                return found[key]
        raise RuntimeError("the peer ended: run benchmarks/peers/lerobot_chunk_latency.py by hand to see why")

    answer("parameters")

    def ask(request: dict[str, Any]) -> list[float]:
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return list(answer("seconds"))

    try:
        yield ask
    finally:
        stdin.close()
        process.wait()


def floor(policy: Any, machine: dict[str, float]) -> dict[str, float]:
    """Return the milliseconds that DDIM-10 at batch 1 cannot go below: reading the weights, doing the products."""
    from torch.utils.flop_counter import FlopCounterMode

    obs, noise = inputs(policy, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.act(obs, {}, noise)
    parameters = sum(parameter.numel() for parameter in policy.network.parameters())
    read = {"fp32": 4 * parameters, "bf16": 2 * parameters}
    floors = {
        f"reading {name}": 1e3 * STEPS * size / (1e9 * machine["bandwidth_GB_per_s"]) for name, size in read.items()
    }
    floors["products fp32"] = 1e3 * counter.get_total_flops() / (1e9 * machine["fp32_GFLOP_per_s"])
    return floors


def bandwidth(device: str) -> float:
    """Return the best of several readings of 256 MB (on a GPU 4 GB), in GB/s."""
    data = torch.ones((1024 if device == "cuda" else 64) * 1024 * 1024, device=device)
    return data.numel() * 4 / 1e9 / best(lambda: data.sum(), device)


def peak(dtype: torch.dtype, device: str) -> float:
    """Return the best of several products of matrices of side 1024 (on a GPU 8192), in GFLOP/s."""
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / 1e9 / best(lambda: a @ a, device)


def best(work: Any, device: str) -> float:
    """Return the shortest of ten times, in seconds."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    print(json.dumps(run(args.peer_python, args.device), indent=1))
