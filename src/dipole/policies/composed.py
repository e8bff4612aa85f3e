"""A policy composed of others at the level of their scores: one chunk is denoised by all of them together.

Source: Cao et al., "General Policy Composition" (arXiv 2510.01068); spec c4. Every parent encodes its own observations
with its own statistics and sees the noisy chunk in its own process, at its own place and in its own units; what they
answer is mixed. Nothing is trained. On disk it is a small folder that names the parents.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dipole.data.normalizer import Normalizer
from dipole.diffusion import DDIM, DDPM, Denoiser, Kernel, Process
from dipole.diffusion.guidance.composition import Composition, Selected, SpaceView, shares
from dipole.diffusion.guidance.superposition import And, Or
from dipole.diffusion.kernels import coefficient_table
from dipole.diffusion.process_view import ProcessView
from dipole.errors import DipoleError
from dipole.policies.checkpoint import CONFIG, file_digest, find_policy, load_policy, write_files, write_folder
from dipole.policies.common import Denoising
from dipole.policies.composed_config import (
    ComposedConfig,
    Operator,
    Parent,
    check_parents,
    fit_spaces,
    spans,
    trait,
    union,
)
from dipole.policies.config import SamplerConfig
from dipole.policies.policy import Observation


class ComposedPolicy(Denoising, nn.Module):
    """The policy; see `Policy`. Normalised actions are those of the first parent.

    Args:
        config: Its configuration.
        parents: The policies.
        folders: Where they were loaded from, to be named when this one is saved; empty where they were not.

    Raises:
        DipoleError: The parents do not fit together, or the operator does not fit them or the sampler.
    """

    config: ComposedConfig
    config_class = ComposedConfig
    type_name = "composed"

    def __init__(self, config: ComposedConfig, parents: Sequence[Any], folders: Sequence[Path] = ()) -> None:
        super().__init__()
        if isinstance(parents, Normalizer):
            raise DipoleError("a composed policy names its parents' folders: it cannot be stored inside another policy")
        names = _names(len(parents), folders)
        check_parents(parents, names)
        self.config, self.sampler = config, config.sampler
        self.parents = nn.ModuleList(parents)
        self.folders = tuple(folders)
        self.spans = spans(parents)[0]
        self._spaces = fit_spaces(parents, names, config.tolerance)
        self._check_operator()

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the parents' weights."""
        return self.config.weights

    @property
    def normalizer(self) -> Normalizer:
        """Return the first parent's statistics, whose normalised actions are denoised."""
        normalizer: Normalizer = self.parents[0].normalizer  # type: ignore[assignment]
        return normalizer

    @property
    def process(self) -> Process:
        """Return the first parent's process."""
        process: Process = self.parents[0].process  # type: ignore[assignment]
        return process

    @property
    def networks(self) -> list[nn.Module]:
        """Return the parents' networks, for whoever counts their calls."""
        found: list[nn.Module] = []
        for parent in self.parents:
            found += parent.networks if isinstance(parent, ComposedPolicy) else [parent.network]  # type: ignore[list-item]
        return list(dict.fromkeys(found))  # a parent may be there twice

    @property
    def denoiser(self) -> Denoiser:
        """Return the denoiser of normalised chunks in `process`, all parents together."""
        return self._denoiser(self.process)

    def denoiser_and_process(self) -> tuple[Denoiser, Process]:
        """Return what denoises normalised chunks, and the process in which the sampler does so."""
        process = self.process if self.sampler.process is None else self.sampler.process.build()
        return self._denoiser(process), process

    @property
    def identity(self) -> ComposedConfig:
        """Return the configuration without where the parents lie and how it is sampled: for a digest."""
        return replace(self.config, parents=tuple(Parent() for _ in self.parents), sampler=SamplerConfig())

    def with_sampler(self, sampler: SamplerConfig) -> ComposedPolicy:
        """Return a policy of the same parents with another sampler."""
        other = copy.copy(self)
        other.sampler = sampler
        other._check_operator()
        return other

    def with_weights(self, weights: Sequence[float]) -> ComposedPolicy:
        """Return a policy of the same parents with other weights."""
        other = copy.copy(self)
        other.config = replace(self.config, weights=tuple(float(weight) for weight in weights))
        return other

    def alone(self, parent: int) -> ComposedPolicy:
        """Return one of the parents, by number, with this policy's sampler and horizons."""
        other = self.with_weights([float(i == parent) for i in range(len(self.weights))])
        other.config = replace(other.config, operator="convex")
        return other

    def encode(self, obs: Observation, generator: Generator | None = None) -> dict[str, Tensor]:
        """Return the conditioning of the parents that are asked, `<number>/<name>`, for raw observations."""
        cond: dict[str, Tensor] = {}
        for i in self._asked():
            parent: Any = self.parents[i]
            seen = {key: obs[key][:, -parent.obs_horizon :] for key in trait(parent, "observation")}
            cond |= {f"{i}/{key}": value for key, value in parent.encode(seen, generator).items()}
        return cond

    def save(self, path: str | Path) -> Path:
        """Write the folder: the configuration with the parents' relative paths and digests, and their weights.

        Raises:
            DipoleError: A parent was never saved, or the folder cannot be written.
        """
        if not self.folders:
            raise DipoleError("save the parents first and compose them from their folders: this names where they lie")
        folder = Path(path)
        return write_folder(folder, self.type_name, *self._content(folder, self.folders))

    def write_into(self, folder: Path, parents: Sequence[Path]) -> None:
        """Write the files into a folder that is there, for copies of the parents that lie in `parents`."""
        write_files(folder, self.type_name, *self._content(folder, parents))

    def _content(self, folder: Path, parents: Sequence[Path]) -> tuple[ComposedConfig, dict[str, Tensor], Normalizer]:
        places = tuple(
            Parent(Path(os.path.relpath(parent.resolve(), folder.resolve())).as_posix(), file_digest(parent / CONFIG))
            for parent in parents
        )
        values = {"weights": torch.tensor(self.weights, dtype=torch.float64)}
        return replace(self.config, parents=places, sampler=self.sampler), values, self.normalizer

    @classmethod
    def open(cls, folder: Path, config: ComposedConfig) -> ComposedPolicy:
        """Return the policy of a folder: called by `load_policy`.

        Raises:
            DipoleError: A parent is missing or not the one that was composed.
        """
        folders = []
        for parent in config.parents:
            where = Path(os.path.normpath(folder / parent.path))
            if Path(parent.path).is_absolute() or not (where / CONFIG).is_file():
                raise DipoleError(f"{folder / CONFIG}: the parent '{parent.path}' is not there: copy it along, with "
                                  "the same relative path, or compose again")  # fmt: skip
            if file_digest(where / CONFIG) != parent.sha256:
                raise DipoleError(f"{where}: changed since it was composed (its SHA-256 is another): compose again")
            folders.append(where)
        return cls(config, [load_policy(where) for where in folders], folders)

    def _asked(self) -> list[int]:
        """Return the parents whose answer counts anywhere in the chunk."""
        if self.config.operator != "convex":
            return list(range(len(self.parents)))
        table = shares(self.weights, self.spans, self.pred_horizon)
        return [i for i, row in enumerate(table) if any(row)]

    def _denoiser(self, process: Process) -> Denoiser:
        asked = self._asked()
        seen = tuple(Selected(self._seen(i, process), f"{i}/") for i in asked)
        if self.config.operator == "and":
            return And(seen, process, limit=self.config.limit)
        if self.config.operator == "or":
            bias = tuple(math.log(weight) if weight > 0 else -math.inf for weight in self.weights)
            return Or(seen, process, self._ancestral(), bias=bias)
        weights, places = tuple(self.weights[i] for i in asked), tuple(self.spans[i] for i in asked)
        whole = all(place == (0, self.pred_horizon) for place in places)
        return Composition(seen, weights, () if whole else places)

    def _seen(self, i: int, process: Process) -> Denoiser:
        """Return a parent's denoiser in the common process and units."""
        parent: Any = self.parents[i]
        space = self._spaces[i]
        if space is not None:
            return SpaceView(parent.denoiser, parent.process, process, *space)
        own: Denoiser = parent.denoiser
        return own if parent.process == process else ProcessView(own, parent.process, process)

    def _ancestral(self) -> bool:
        kernel = self.sampler.build()
        return isinstance(kernel, DDPM) or (isinstance(kernel, DDIM) and kernel.eta == 1)

    def _check_operator(self) -> None:
        """Raise DipoleError where AND or OR cannot be computed."""
        operator, kernel = self.config.operator, self.sampler.build()
        if operator == "convex":
            return
        if len(set(self.spans)) > 1:
            raise DipoleError(f"operator '{operator}' compares whole chunks: it needs parents of equal horizons")
        if operator == "or" and not isinstance(kernel, Kernel):
            raise DipoleError(f"operator 'or' follows the chain step by step: use a kernel, not '{self.sampler.name}'")
        process = self.process if self.sampler.process is None else self.sampler.process.build()
        if operator == "and" and isinstance(kernel, Kernel):
            levels = tuple(self.sampler.levels(process).tolist())
            if any(step.std > 0 for step in coefficient_table(kernel, process, levels)):
                raise DipoleError(f"operator 'and' follows the ODE, and '{self.sampler.name}' adds noise: use ddim")


def _names(count: int, folders: Sequence[Path]) -> list[str]:
    return [str(folder) for folder in folders] if folders else [f"parent {i + 1}" for i in range(count)]


def compose(
    parents: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    operator: Operator = "convex",
    sampler: SamplerConfig | None = None,
    action_horizon: int | None = None,
    tolerance: float = 1e-3,
) -> ComposedPolicy:
    """Return a policy composed of others.

    Args:
        parents: Policies, or their folders (only of folders can the result be saved).
        weights: One per parent, their sum 1; default equal.
        operator: See `ComposedConfig`.
        sampler: Default: the first parent's.
        action_horizon: Ta; default the shortest of theirs.
        tolerance: See `ComposedConfig`.

    Raises:
        DipoleError: They do not fit together.
    """
    folders = [find_policy(parent) for parent in parents if isinstance(parent, str | Path)]
    if folders and len(folders) != len(parents):
        raise ValueError("give folders or policies, not some of each")
    policies = [load_policy(folder) for folder in folders] if folders else list(parents)
    names = _names(len(policies), folders)
    check_parents(policies, names)
    config = ComposedConfig(
        parents=tuple(Parent() for _ in policies),
        weights=tuple(float(w) for w in weights) if weights is not None else (1 / len(policies),) * len(policies),
        observation=union(policies, names),
        action=trait(policies[0], "action"),
        obs_horizon=max(policy.obs_horizon for policy in policies),
        pred_horizon=spans(policies)[1],
        action_horizon=min(policy.action_horizon for policy in policies) if action_horizon is None else action_horizon,
        sampler=policies[0].sampler if sampler is None else sampler,
        operator=operator,
        tolerance=tolerance,
        fps=trait(policies[0], "fps") or ComposedConfig.fps,
        task=trait(policies[0], "task") or "",
    )
    return ComposedPolicy(config, policies, folders).eval()
