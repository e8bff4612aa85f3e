"""Checkpoints of the `diffusion_policy` code base (Chi et al. 2023, "Diffusion Policy").

A zip written with dill: `{cfg: OmegaConf, state_dicts: {model, ema_model, optimizer}, pickles: {global_step, epoch,
...}}`. The normaliser sits among the weights as `normalizer.params_dict.<feature>.{scale, offset,
input_stats.<statistic>}`; its map is `normalised = x * scale + offset`.
"""

from __future__ import annotations

from typing import Any

from dipole.convert.checkpoint import Converted, choose_weights, mapping
from dipole.convert.foreign import Foreign

NAME = "diffusion_policy"
_NORMALIZER = "normalizer.params_dict."


def matches(value: Any) -> bool:
    """Whether the top level looks like this framework's."""
    return isinstance(value, dict) and {"cfg", "state_dicts"} <= value.keys()


def convert(foreign: Foreign, weights: str | None = None) -> Converted:
    """Return the checkpoint in plain terms.

    Args:
        foreign: The checkpoint.
        weights: "ema_model" or "model"; None takes the EMA weights where there are some.
    """
    value = mapping(foreign.value, "dictionary at its top")
    states = mapping(value.get("state_dicts"), "'state_dicts'")
    chosen = choose_weights(states, ("ema_model", "model"), weights)
    named = states[chosen]
    plain_names = {key: item for key, item in named.items() if not key.startswith(_NORMALIZER)}
    statistics = {key.removeprefix(_NORMALIZER): item for key, item in named.items() if key.startswith(_NORMALIZER)}
    source = {
        "framework": NAME,
        "file": foreign.name,
        "weights": chosen,
        "left_out": sorted(states.keys() - {chosen}),
        "normalizer_rule": "normalised = x * scale + offset",
        **mapping(value.get("pickles", {}), "'pickles'"),
    }
    config = mapping(value.get("cfg"), "'cfg'")
    return Converted(foreign.tensors(plain_names), foreign.tensors(statistics), config, source)
