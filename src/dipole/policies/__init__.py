"""Policies: from observations to action chunks. Pure functions with explicit state; folders on disk."""

from dipole.policies.checkpoint import find_policy, load_policy, save_policy
from dipole.policies.config import ObjectiveConfig, PolicyConfig, ProcessConfig, SamplerConfig
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.policies.lerobot import from_lerobot
from dipole.policies.lerobot_export import to_lerobot
from dipole.policies.make import fit_normalizer, make_config, make_policy
from dipole.policies.policy import Policy, State

__all__ = [
    "DiffusionPolicy",
    "ObjectiveConfig",
    "Policy",
    "PolicyConfig",
    "ProcessConfig",
    "SamplerConfig",
    "State",
    "find_policy",
    "fit_normalizer",
    "from_lerobot",
    "load_policy",
    "make_config",
    "make_policy",
    "save_policy",
    "to_lerobot",
]
