"""Run a policy that `dipole export` wrote, without dipole: numpy, and onnxruntime (onnx) or torch (torch-export, aoti).

This file is copied as `runner.py` into the exported folder, beside `policy.json` and the graphs. It normalises the
observation, encodes it, denoises a chunk of actions by the steps in `policy.json`, and brings it to physical units.

    python runner.py                 # act on the recorded observation, compare with the recorded chunk, time it

    from runner import Runner
    runner = Runner("path/to/folder")
    chunk = runner.act({"observation.state": state, ...}, rng=numpy.random.default_rng(0))   # [B, Ta, Da]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Graph = Callable[..., list[np.ndarray]]


class Runner:
    """An exported policy.

    Args:
        folder: The exported folder (by default where this file is).
        threads: Threads that a graph may use; None leaves it to the library.
    """

    def __init__(self, folder: str | Path | None = None, threads: int | None = None) -> None:
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.policy = json.loads((self.folder / "policy.json").read_text(encoding="utf-8"))
        names = ("sampler",) if self.policy["unrolled"] else ("encoder", "denoiser")
        load = {"onnx": _load_onnx, "torch-export": _load_exported, "aoti": _load_compiled}[self.policy["format"]]
        self.graphs = {name: load(self.folder, name, threads) for name in names}

    def act(
        self,
        observation: Mapping[str, np.ndarray],
        noise: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
        step_noise: Any = None,
    ) -> np.ndarray:
        """Return a chunk of actions `[B, Ta, Da]` in physical units; the first one is for now.

        Args:
            observation: Name -> `[B, To, ...]`, oldest first; images uint8 `[B, To, H, W, C]`, or float
                `[B, To, C, H, W]` in [0, 1].
            noise: Standard normal `[B, Tp, Da]` to start from; None to draw it.
            rng: `numpy.random.Generator` to draw from; None for a new one.
            step_noise: Standard normal `[n, B, Tp, Da]` for the n steps that are random; None to draw it.
        """
        features = self.normalized(observation)
        rng = np.random.default_rng() if rng is None else rng
        shape = (len(features[0]), self.policy["pred_horizon"], self.policy["action_dim"])
        if noise is None:
            noise = rng.standard_normal(shape)
        noise = np.ascontiguousarray(noise, dtype=np.float32)
        if noise.shape != shape:
            raise ValueError(f"noise has shape {list(noise.shape)}, expected {list(shape)}")
        if self.policy["unrolled"]:
            chunk = self.graphs["sampler"](noise, *features)[0]
        else:
            chunk = self.denoise(noise, self.graphs["encoder"](*features), rng, step_noise)
        first = self.policy["obs_horizon"] - 1
        return self.denormalized(chunk[:, first : first + self.policy["action_horizon"]])

    def normalized(self, observation: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the features in the graph's order, normalised, float32."""
        features = []
        for feature in self.policy["observation"]:
            name = feature["name"]
            if name not in observation:
                raise ValueError(f"observation lacks '{name}', which the policy was trained on")
            value = np.asarray(observation[name])
            if feature["image"] and value.dtype == np.uint8:
                value = np.moveaxis(value, -1, -3).astype(np.float32) / np.float32(255)
            expected = [self.policy["obs_horizon"], *feature["shape"]]
            if list(value.shape[1:]) != expected:
                raise ValueError(f"observation '{name}' has shape {list(value.shape)}, expected [B, *{expected}]")
            scale, offset, origin = (np.asarray(feature[part], np.float32) for part in ("scale", "offset", "origin"))
            features.append(np.ascontiguousarray((value.astype(np.float32) - origin) * scale + offset))
        return features

    def denormalized(self, chunk: np.ndarray) -> np.ndarray:
        """Return actions in physical units."""
        action = self.policy["action"]
        scale, offset, origin = (np.asarray(action[part], np.float32) for part in ("scale", "offset", "origin"))
        actions: np.ndarray = (chunk - offset) / scale + origin
        return actions

    def denoise(
        self, noise: np.ndarray, cond: list[np.ndarray], rng: np.random.Generator, step_noise: Any = None
    ) -> np.ndarray:
        """Return a whole denoised chunk `[B, Tp, Da]`, normalised; see `policy.json`, key `steps`."""
        clip = self.policy["clip"]
        samples: list[np.ndarray] = [np.float32(self.policy["prior_std"]) * noise]
        x0s: list[np.ndarray] = []
        drawn = 0
        for step in self.policy["steps"]:
            sample = samples[-1]
            level = np.full(len(noise), step["time"], np.float32)
            output = self.graphs["denoiser"](np.float32(step["c_in"]) * sample, level, *cond)[0]
            x0s.append(np.float32(step["c_x"]) * sample + np.float32(step["c_out"]) * output)
            following = np.zeros_like(sample)
            for j, weight in step["samples"]:
                following = following + np.float32(weight) * samples[j]
            for j, weight in step["clipped"]:
                following = following + np.float32(weight) * np.clip(x0s[j], -clip, clip)
            for j, weight in step["x0s"]:
                following = following + np.float32(weight) * x0s[j]
            if step["std"] > 0:
                fresh = rng.standard_normal(noise.shape) if step_noise is None else step_noise[drawn]
                following = following + np.float32(step["std"]) * np.asarray(fresh, np.float32)
                drawn += 1
            samples.append(following)
        return samples[-1]


def _load_onnx(folder: Path, name: str, threads: int | None) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda *values: session.run(None, dict(zip(names, values, strict=True)))


def _load_exported(folder: Path, name: str, threads: int | None) -> Graph:
    import torch

    return _torch_graph(torch.export.load(folder / f"{name}.pt2").module(), threads)


def _load_compiled(folder: Path, name: str, threads: int | None) -> Graph:
    import torch

    return _torch_graph(torch._inductor.aoti_load_package(str(folder / f"{name}.pt2")), threads)


def _torch_graph(graph: Any, threads: int | None) -> Graph:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

    def call(*values: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            results = graph(*(torch.from_numpy(np.ascontiguousarray(value)) for value in values))
        results = results if isinstance(results, tuple | list) else (results,)
        return [result.numpy() for result in results]

    return call


def recorded(folder: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """Return the observation, the arguments of `act` and the chunk that were recorded at export."""
    with np.load(Path(folder) / "parity.npz", allow_pickle=False) as file:
        arrays = dict(file)
    observation = {key[4:]: value for key, value in arrays.items() if key.startswith("obs/")}
    options = {"noise": arrays["noise"], "step_noise": arrays.get("step_noise")}
    return observation, options, arrays["chunk"]


def main() -> int:
    """Act on the recorded observation; exit with 1 when the chunk is another one than dipole's."""
    runner = Runner()
    observation, options, expected = recorded(runner.folder)
    difference = float(np.abs(runner.act(observation, **options) - expected).max())
    single = {key: value[:1] for key, value in observation.items()}
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        runner.act(single, rng=np.random.default_rng(0))
        seconds.append(time.perf_counter() - start)
    tolerance = runner.policy["parity"]["tolerance_physical"]
    print(f"largest difference from the recorded chunk: {difference:.3g} (tolerance {tolerance:.3g})")
    print(f"one chunk: {1000 * sorted(seconds)[len(seconds) // 2]:.2f} ms (median of {len(seconds)}, batch 1)")
    return int(not difference <= tolerance)


if __name__ == "__main__":
    sys.exit(main())
