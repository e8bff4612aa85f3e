"""What a composed policy is made of, and whether its parents fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dipole.data.features import Feature
from dipole.diffusion.guidance.composition import Span, one_scale
from dipole.errors import DipoleError
from dipole.policies.config import SamplerConfig, check_horizons

Operator = Literal["convex", "and", "or"]

_NEEDED = ("encode", "denoiser", "process", "normalizer", "sampler")
# Scales that differ less than this are equal: they are stored in float32.
_SAME = 1e-5


@dataclass(frozen=True)
class Parent:
    """Where a parent lies.

    Attributes:
        path: Its checkpoint folder, relative to the composed policy's; empty where it was never saved.
        sha256: Of its `config.json`, which holds the digests of its weights.
    """

    path: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class ComposedConfig:
    """A policy composed of others.

    Attributes:
        parents: Where they lie.
        weights: One per parent, none negative, their sum 1. With `or`, how likely each is beforehand; `and` needs none.
        observation: Features that any of them sees.
        action: What they all produce.
        obs_horizon: To, the longest of theirs.
        pred_horizon: Tp, long enough for every parent's chunk, with the action for now at index To - 1 in all.
        action_horizon: Ta.
        sampler: How the chunk is denoised; its process is the first parent's unless it names one.
        operator: `convex` mean of the scores, or `and` / `or` of superposition.
        tolerance: Largest relative difference between the components' scales that counts as none (see `fit_spaces`).
        limit: Largest deviation from equal weights with `and`.
        fps: Control rate in Hz.
        task: In words.
    """

    parents: tuple[Parent, ...]
    weights: tuple[float, ...]
    observation: dict[str, Feature]
    action: Feature
    obs_horizon: int
    pred_horizon: int
    action_horizon: int
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    operator: Operator = "convex"
    tolerance: float = 1e-3
    limit: float = 2.0
    fps: float = 10.0
    task: str = ""

    def __post_init__(self) -> None:
        check_horizons(self.obs_horizon, self.pred_horizon, self.action_horizon)
        check_weights(self.weights, len(self.parents))

    @property
    def action_dim(self) -> int:
        """Return Da."""
        return self.action.shape[0]

    @property
    def images(self) -> list[str]:
        """Return the names of the image features."""
        return [key for key, feature in self.observation.items() if feature.is_image]


def check_weights(weights: Sequence[float], parents: int) -> None:
    """Raise DipoleError unless there is one weight per parent, none negative, their sum 1."""
    given = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != parents:
        raise DipoleError(f"{len(weights)} weights ({given}) for {parents} parents: give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise DipoleError(f"weights {given}: none may be negative")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise DipoleError(f"weights {given} sum to {sum(weights):g}: they must sum to 1")


def trait(policy: Any, name: str) -> Any:
    """Return an entry of a policy's configuration, or of the policy's that it wraps; None where nobody has it."""
    while not hasattr(getattr(policy, "config", None), name) and hasattr(policy, "base"):
        policy = policy.base
    return getattr(getattr(policy, "config", None), name, None)


def check_parents(parents: Sequence[Any], names: Sequence[str]) -> None:
    """Raise DipoleError unless the policies can act as one: same actions, same rate, no memory, chunks that denoise.

    Args:
        parents: The policies.
        names: What they are called in messages.
    """
    if len(parents) < 2:
        raise DipoleError("a composition needs at least two policies")
    for policy, name in zip(parents, names, strict=True):
        missing = [need for need in _NEEDED if not hasattr(policy, need)]
        if missing or trait(policy, "action") is None:
            kind = getattr(policy, "type_name", type(policy).__name__)
            raise DipoleError(f"{name}: a policy of kind '{kind}' does not denoise chunks that could be composed")
        if policy.initial_state(1):
            raise DipoleError(f"{name}: the policy remembers something between chunks: compose plain policies")
    first, name = parents[0], names[0]
    for other, its in zip(parents[1:], names[1:], strict=True):
        _check_actions(trait(first, "action"), trait(other, "action"), name, its)
        rates = trait(first, "fps"), trait(other, "fps")
        if None not in rates and not math.isclose(*rates, rel_tol=1e-3):
            raise DipoleError(
                f"{name} acts at {rates[0]:g} Hz and {its} at {rates[1]:g} Hz: an action of theirs does not last "
                "equally long; resample the demonstrations of one and train it again"
            )


def _check_actions(a: Feature, b: Feature, name: str, its: str) -> None:
    if a.shape != b.shape:
        raise DipoleError(
            f"{name} gives actions of {a.shape[0]} components, {its} of {b.shape[0]}: they are not for the same robot"
        )
    if a.names is not None and b.names is not None and a.names != b.names:
        raise DipoleError(f"the components of the action are ({', '.join(a.names)}) in {name}, ({', '.join(b.names)}) "
                          f"in {its}: they must be the same, in the same order")  # fmt: skip


def union(parents: Sequence[Any], names: Sequence[str]) -> dict[str, Feature]:
    """Return the features that any parent sees.

    Raises:
        DipoleError: Two parents want a feature in different shapes.
    """
    found: dict[str, tuple[Feature, str]] = {}
    for policy, name in zip(parents, names, strict=True):
        for key, feature in trait(policy, "observation").items():
            seen, whose = found.setdefault(key, (feature, name))
            if seen.shape != feature.shape:
                raise DipoleError(f"'{key}' has shape {list(seen.shape)} in {whose}, {list(feature.shape)} in {name}: "
                                  "rename one of them, or train on the same data")  # fmt: skip
    return {key: feature for key, (feature, _) in found.items()}


def spans(parents: Sequence[Any]) -> tuple[tuple[Span, ...], int]:
    """Return the positions of each parent's chunk in the common one, and its length.

    The action for now, index To - 1 of a parent's chunk, is at the same place for all.
    """
    first = max(policy.obs_horizon for policy in parents)
    starts = [first - policy.obs_horizon for policy in parents]
    found = tuple((start, start + policy.pred_horizon) for start, policy in zip(starts, parents, strict=True))
    return found, max(stop for _, stop in found)


def fit_spaces(parents: Sequence[Any], names: Sequence[str], tolerance: float) -> list[tuple[Tensor, Tensor] | None]:
    """Return how each parent's normalised actions follow from the first one's: own = scale * first + offset.

    None where they are the same. A scale that differs between components gives the noise another size in each, which
    no noise level can say (spec c4), so it is refused.

    Raises:
        DipoleError: The scales of the components differ by more than `tolerance`, relatively.
    """
    scale, offset = (value.double() for value in parents[0].normalizer.affine("action"))
    found: list[tuple[Tensor, Tensor] | None] = []
    for policy, name in zip(parents, names, strict=True):
        own_scale, own_offset = (value.double() for value in policy.normalizer.affine("action"))
        ratio = own_scale / scale
        shift = own_offset - ratio * offset
        same = float((ratio - 1).abs().max()) < _SAME and float(shift.abs().max()) < _SAME
        found.append(None if same else (ratio.float(), shift.float()))
        if not same and not one_scale(ratio, tolerance):
            texts = ", ".join(f"{value:.4g}" for value in torch.as_tensor(ratio).tolist()[:8])
            raise DipoleError(
                f"{names[0]} and {name} normalise the components of the action by scales whose ratios differ "
                f"({texts}): noise would have another size in each; train both with the same statistics, or accept "
                f"the error of differences up to a --tolerance (now {tolerance:g})"
            )
    return found
