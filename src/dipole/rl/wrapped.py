"""Policies made of another policy and something learnt: what they share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dipole.data.features import Feature
from dipole.data.normalizer import Normalizer
from dipole.diffusion.tensors import Random
from dipole.errors import DipoleError
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


def local(base: Any, learnt: str) -> Any:
    """Return the base, if it is in this process and can be stored with what was learnt.

    Raises:
        DipoleError: It is a remote one.
    """
    if not isinstance(base, nn.Module):
        raise DipoleError(f"a remote policy cannot be stored with its {learnt}: keep the training state instead")
    return base


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


@dataclass(frozen=True)
class WrappedConfig:
    """The base in the configuration of a policy made of it; what was learnt comes after.

    Attributes:
        base_type: Kind of the base policy.
        base: Its configuration.
    """

    base_type: str
    base: dict[str, Any]

    @property
    def observation(self) -> Mapping[str, Feature]:
        """Return the features the base sees."""
        return observation_of(self.base)


class Wrapping(Forwarding, nn.Module):
    """What a policy over `self.base`, a policy without memory, shares with the others.

    Args:
        config: A `WrappedConfig` with a `sampler`.
        normalizer: The base's statistics.
    """

    base: Any
    config: Any
    sampler: SamplerConfig

    def __init__(self, config: Any, normalizer: Normalizer) -> None:
        super().__init__()
        self.config, self.sampler = config, config.sampler
        self.base = build_base(config.base_type, config.base, normalizer)

    @classmethod
    def sharing(cls, base: Any, config: Any, **learnt: nn.Module) -> Self:
        """Return the policy of a base and of what was learnt, by attribute, shared and not copied."""
        policy = cls.__new__(cls)
        nn.Module.__init__(policy)
        policy.base, policy.config, policy.sampler = base, config, config.sampler
        for name, module in learnt.items():
            setattr(policy, name, module)
        return policy

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
