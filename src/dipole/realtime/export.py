"""Write a policy for a robot that has no dipole: graphs, constants, and a small runner that puts them together.

```
OUT/policy.json     features and their normalisation, horizons, the sampler's steps as numbers, the parity check
OUT/encoder.*       normalised observation -> conditioning          (.onnx, or .pt2 for torch-export and aoti)
OUT/denoiser.*      noisy chunk, level, conditioning -> network output; or OUT/sampler.* with all steps in one graph
OUT/runner.py       numpy + onnxruntime, or torch: `Runner(OUT).act(observation)`; run it to check the folder
OUT/parity.npz      an observation, the noise and the chunk that the policy itself made of them
```

The runner is run on what was just written and compared with the policy, at batch sizes 1 and 3, before the folder
appears; beyond the tolerance there is no folder.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipole import __version__
from dipole.data.formats.files import atomic_folder
from dipole.diffusion.tensors import randn
from dipole.errors import DipoleError, unknown
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.realtime import export_graphs, export_runner
from dipole.realtime.export_graphs import FORMATS, DenoiserGraph, EncoderGraph, SamplerGraph, write_graph
from dipole.realtime.export_plan import Plan, make_plan
from dipole.serialization import to_dict, write_json

POLICY, RUNNER, PARITY = "policy.json", "runner.py", "parity.npz"
TOLERANCE = 1e-4
"""Largest difference in normalised actions (whose range is about 2): far below what a robot can follow."""

_BATCHES = (3, 1)
_SEED = 0


def export(
    policy: Any, path: str | Path, form: str = "onnx", *, unroll: bool = False, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Write an exported policy and check that it acts as the policy does.

    Args:
        policy: A `DiffusionPolicy` (an imported one as well), with the sampler it shall be run with.
        path: Folder to write; must not exist yet, or be empty.
        form: `onnx`, `torch-export` or `aoti` (compiled for this kind of processor).
        unroll: One graph with all denoising steps; for samplers that draw no noise.
        tolerance: Largest difference between runner and policy, in normalised actions.

    Returns:
        What `policy.json` says about the check: `max_difference`, `max_difference_physical`, `batches`, `tolerance`.

    Raises:
        DipoleError: The policy is of another kind, cannot be exported, or acts differently once it is.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    policy = _checked(policy)
    plan = make_plan(policy)
    if unroll and not plan.deterministic:
        raise DipoleError(f"the sampler '{policy.sampler.name}' draws noise in its steps: leave --unroll out")
    export_graphs.check_tools(form)
    with atomic_folder(Path(path)) as folder:
        _write_graphs(policy, plan, folder, form, unroll)
        (folder / RUNNER).write_text(Path(export_runner.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        constants = _constants(policy, plan, form, unroll)
        write_json(folder / POLICY, constants)
        parity = _check(policy, plan, folder, tolerance)
        write_json(folder / POLICY, {**constants, "parity": parity})
    return parity


def _checked(policy: Any) -> DiffusionPolicy:
    if type(policy) is not DiffusionPolicy:
        kind = getattr(policy, "type_name", type(policy).__name__)
        raise DipoleError(f"a policy of kind '{kind}' cannot be exported as a graph: only plain diffusion policies can")
    return policy.eval()


def _write_graphs(policy: DiffusionPolicy, plan: Plan, folder: Path, form: str, unroll: bool) -> None:
    features = [policy.normalizer.normalize(key, value) for key, value in _observation(policy, 2).items()]
    noise = torch.zeros(2, policy.pred_horizon, policy.action_dim)
    names = [key.replace(".", "_") for key in policy.config.observation]
    if unroll:
        graph: torch.nn.Module = SamplerGraph(policy, plan)
        write_graph(graph, (noise, *features), (["noise", *names], ["chunk"]), folder / "sampler", form)
        return
    encoder = EncoderGraph(policy)
    with torch.no_grad():
        cond = encoder(*features)
    sets = [f"cond_{name}" for name in policy.encoder.cond_dims]
    write_graph(encoder, tuple(features), (names, sets), folder / "encoder", form)
    arguments = (noise, torch.zeros(2), *cond)
    write_graph(DenoiserGraph(policy), arguments, (["x", "time", *sets], ["output"]), folder / "denoiser", form)


def _constants(policy: DiffusionPolicy, plan: Plan, form: str, unroll: bool) -> dict[str, Any]:
    config = policy.config
    observation = []
    for key, feature in config.observation.items():
        shape = (feature.shape[2], *feature.shape[:2]) if feature.is_image else feature.shape
        observation.append(
            {"name": key, "image": feature.is_image, "shape": list(shape), **_affine(policy.normalizer, key)}
        )
    return {
        "format": form,
        "dipole_version": __version__,
        "unrolled": unroll,
        "source": config.source,
        "task": config.task,
        "fps": config.fps,
        "obs_horizon": policy.obs_horizon,
        "pred_horizon": policy.pred_horizon,
        "action_horizon": policy.action_horizon,
        "action_dim": policy.action_dim,
        "observation": observation,
        "action": {"name": "action", **_affine(policy.normalizer, "action")},
        "sampler": to_dict(policy.sampler),
        "prior_std": plan.prior_std,
        "clip": plan.clip,
        "steps": [asdict(step) for step in plan.steps],
    }


def _affine(normalizer: Any, key: str) -> dict[str, Any]:
    scale, offset, origin = normalizer.parts(key)
    parts = {"scale": scale, "offset": offset, "origin": torch.zeros_like(offset) if origin is None else origin}
    return {name: value.double().tolist() for name, value in parts.items()}


def _observation(policy: DiffusionPolicy, batch: int) -> dict[str, Tensor]:
    """Return random observations as they come in practice: normalised values in [-1, 1], images in [0, 1]."""
    generator = torch.Generator().manual_seed(_SEED)
    observation = {}
    for key, feature in policy.config.observation.items():
        shape = (batch, policy.obs_horizon)
        if feature.is_image:
            height, width, channels = feature.shape
            observation[key] = torch.rand(*shape, channels, height, width, generator=generator)
        else:
            value = torch.rand(*shape, *feature.shape, generator=generator) * 2 - 1
            observation[key] = policy.normalizer.denormalize(key, value)
    return observation


def _check(policy: DiffusionPolicy, plan: Plan, folder: Path, tolerance: float) -> dict[str, Any]:
    """Return the differences between the runner in `folder` and the policy; records what they were fed."""
    runner = export_runner.Runner(folder)
    scale = policy.normalizer.parts("action")[0].numpy()
    normalised = physical = 0.0
    for batch in _BATCHES:
        inputs, expected = _record(policy, plan, batch)
        if batch == _BATCHES[0]:
            arrays: dict[str, Any] = {**inputs, "chunk": expected}
            np.savez(folder / PARITY, **arrays)
        observation = {key[4:]: value for key, value in inputs.items() if key.startswith("obs/")}
        found = runner.act(observation, inputs["noise"], step_noise=inputs.get("step_noise"))
        difference = np.abs(found - expected)
        physical = max(physical, _largest(difference))
        normalised = max(normalised, _largest(difference * np.abs(scale)))
    if not normalised <= tolerance:
        raise DipoleError(
            f"the exported policy differs from the original by {normalised:.3g} in normalised actions, above the "
            f"tolerance of {tolerance:g}: nothing was written"
        )
    return {
        "batches": list(_BATCHES),
        "max_difference": normalised,
        "max_difference_physical": physical,
        "tolerance": tolerance,
        "tolerance_physical": tolerance / float(np.abs(scale).min()),
    }


def _largest(values: np.ndarray) -> float:
    return float(values.max()) if np.isfinite(values).all() else float("inf")


def _record(policy: DiffusionPolicy, plan: Plan, batch: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return a random input of the runner, and the policy's own chunk for it."""
    observation = _observation(policy, batch)
    shape = (batch, policy.pred_horizon, policy.action_dim)
    noise = randn(shape, torch.Generator().manual_seed(_SEED + 1))
    inputs = {f"obs/{key}": value.numpy() for key, value in observation.items()} | {"noise": noise.numpy()}
    random = [step for step in plan.steps if step.std > 0]
    if random:
        # The same generator gives the policy, step by step, what the runner is given at once.
        generator = torch.Generator().manual_seed(_SEED + 2)
        inputs["step_noise"] = np.stack([randn(shape, generator).numpy() for _ in random])
    chunk, _ = policy.act(observation, policy.initial_state(batch), noise, torch.Generator().manual_seed(_SEED + 2))
    return inputs, chunk.numpy()
