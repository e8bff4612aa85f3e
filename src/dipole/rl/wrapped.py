"""Policies made of another policy and something learnt: what they share."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Self

import torch
from torch import Tensor, nn

from dipole.data.features import Feature
from dipole.data.normalizer import Normalizer
from dipole.diffusion.tensors import Random
from dipole.policies.checkpoint import policy_class
from dipole.policies.common import Forwarding
from dipole.policies.config import SamplerConfig
from dipole.serialization import from_dict, to_dict


def build_base(base_type: str, values: dict[str, Any], normalizer: Normalizer) -> Any:
    """Return the wrapped policy that a checkpoint describes."""
    cls = policy_class(base_type)
    later = getattr(cls.config_class, "LATER_FIELDS", {})
    return cls(from_dict(cls.config_class, {**later, **values}, where="config.base"), normalizer)


def base_values(policy: Any) -> dict[str, Any]:
    """Return `base_type` and `base` for the configuration of a wrapper."""
    return {"base_type": policy.type_name, "base": to_dict(policy.config)}


def with_network(policy: Any, network: nn.Module, sampler: SamplerConfig | None = None) -> Any:
    """Return `policy` with another network (shared, not copied), and another sampler of its own if given."""
    other = copy.copy(policy)
    other._modules = {**policy._modules, "network": network}
    if sampler is not None:
        other.config = dataclasses.replace(policy.config, sampler=sampler)
        other.sampler = sampler
    return other


def observation_of(values: dict[str, Any]) -> dict[str, Feature]:
    """Return the observations in the configuration `values` of a policy."""
    found = {}
    for key, value in values["observation"].items():
        names = value.get("names")
        found[key] = Feature(value["dtype"], tuple(value["shape"]), None if names is None else tuple(names))
    return found


class Wrapping(Forwarding):
    """What a policy over `self.base`, a policy without memory, shares with the others."""

    base: Any
    sampler: SamplerConfig

    @property
    def inner(self) -> Any:
        """Return the base."""
        return self.base

    def with_sampler(self, sampler: SamplerConfig) -> Self:
        """Return a policy with the same weights and another sampler (what was learnt, was learnt with its own)."""
        other = copy.copy(self)
        other.sampler = sampler
        return other

    def denoised(self, cond: dict[str, Tensor], noise: Tensor, generator: Random = None) -> Tensor:
        """Return what the base makes of `noise` `[B, Tp, Da]`: its executed part `[B, Ta, Da]`, in physical units."""
        return self.executed(self.base.with_sampler(self.sampler).denoise(cond, noise, generator))

    def features(self, obs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the flattened conditioning `[B, F]`, and the conditioning."""
        cond = self.base.encode(obs)
        return torch.cat([value.flatten(1) for value in cond.values()], dim=1), cond
