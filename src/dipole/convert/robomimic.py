"""Checkpoints of robomimic (Mandlekar et al. 2021), v0.1 to v0.5.

A torch pickle `{model, config (JSON text), algo_name, env_metadata, shape_metadata, variable_state?,
obs_normalization_stats?, action_normalization_stats?}`. `model` is a flat state dict, or `{nets, ema, optimizers, ...}`
for the diffusion policy, whose networks are under `policy.obs_encoder` and `policy.noise_pred_net`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from dipole.convert.checkpoint import Converted, choose_weights, flat_tensors, mapping
from dipole.convert.foreign import Foreign
from dipole.convert.tree import TensorName
from dipole.errors import DipoleError

NAME = "robomimic"


def matches(value: Any) -> bool:
    """Whether the top level looks like this framework's."""
    return isinstance(value, dict) and {"model", "config", "algo_name"} <= value.keys()


def convert(foreign: Foreign, weights: str | None = None) -> Converted:
    """Return the checkpoint in plain terms.

    Args:
        foreign: The checkpoint.
        weights: "ema" or "nets"; None takes the EMA weights where there are some. Checkpoints with one flat state dict
            have "nets" only.
    """
    value = mapping(foreign.value, "dictionary at its top")
    model = mapping(value.get("model"), "'model'")
    states = model if isinstance(model.get("nets"), dict) else {"nets": model}
    chosen = choose_weights(states, ("ema", "nets"), weights)
    statistics: dict[str, Tensor] = {}
    for group, prefix in (("obs_normalization_stats", "observation."), ("action_normalization_stats", "")):
        statistics |= _statistics(foreign, value.get(group) or {}, prefix)
    config = {"algo_name": value.get("algo_name"), "config": _config(value.get("config"))}
    config |= {key: value.get(key) for key in ("env_metadata", "shape_metadata")}
    source = {
        "framework": NAME,
        "file": foreign.name,
        "weights": chosen,
        "left_out": sorted(states.keys() - {chosen}),
        "variable_state": value.get("variable_state"),
        "normalizer_rule": "mean and std: (x - mean) / std; offset and scale: (x - offset) / scale",
    }
    return Converted(foreign.tensors(flat_tensors(states[chosen])), statistics, config, source)


def _config(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise DipoleError("the checkpoint's 'config' is not JSON: it may be damaged") from None


def _statistics(foreign: Foreign, groups: Any, prefix: str) -> dict[str, Tensor]:
    """Return `<prefix><key>.<statistic>`; older versions store arrays, newer ones nested lists."""
    found: dict[str, Tensor] = {}
    for key, entries in mapping(groups, "dictionary of normalisation statistics").items():
        for name, entry in mapping(entries, f"statistics of '{key}'").items():
            label = f"{prefix}{key}.{name}"
            if isinstance(entry, TensorName):
                found |= foreign.tensors({label: entry})
            else:
                try:
                    found[label] = torch.tensor(entry, dtype=torch.float64)
                except (TypeError, ValueError):
                    raise DipoleError(f"the checkpoint's statistic '{label}' is not an array of numbers") from None
    return found
