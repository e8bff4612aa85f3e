"""A denoising chain for a picture: many chunks for one observation, at every level visited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dipole.envs.spec import VectorEnv
from dipole.evaluation.blocks import acting, device_of
from dipole.evaluation.rollout import first_observation
from dipole.evaluation.seeds import policy_generator
from dipole.serialization import write_json

FILE = "chain.json"


def record_chain(policy: Any, env: VectorEnv, seed: int, samples: int = 24) -> dict[str, Any]:
    """Return the chain of `samples` chunks for the first observation of an episode.

    Args:
        policy: A policy with `denoising_chain`.
        env: Its row 0 is reset.
        seed: The episode's seed.
        samples: M.

    Returns:
        JSON-able: `levels` `[K+1]`, `samples` `[K+1][M][Tp][Da]` in physical units, `names` of the action's
        components, `seed`, `env`.
    """
    first = first_observation(policy, env, seed)
    obs = {key: value.repeat_interleave(samples, 0).to(device_of(policy)) for key, value in first.items()}
    with acting(policy):
        levels, chain = policy.denoising_chain(obs, generator=policy_generator(seed, device_of(policy)))
    names = env.spec.action.names or tuple(f"action {i}" for i in range(chain.shape[-1]))
    return {
        "env": env.spec.name,
        "seed": seed,
        "names": list(names),
        "levels": [float(level) for level in levels],
        "samples": np.round(chain.cpu().numpy().astype(np.float64), 4).tolist(),
    }


def save_chain(folder: Path, chain: dict[str, Any]) -> None:
    """Write `chain.json`."""
    write_json(folder / FILE, chain)
