"""MoDE policy: chunks of actions from a mixture of denoising experts, told what to do by language or a goal.

Source: Reuss et al., "Efficient Diffusion Transformer Policies with Mixture of Expert Denoisers for Multitask Learning"
(2024). Tokens are [noise, goal, one token per feature and observed step, noisy actions]. Training adds the routers'
load-balance loss to Karras et al.'s preconditioned denoising loss with sigma in [0.001, 80]. At run time the experts of
each level are fused once (see `dipole.networks.moe`), so that the routers are not run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from dipole import networks
from dipole.data.episodes import Episodes
from dipole.data.features import Feature
from dipole.data.normalizer import Normalizer
from dipole.diffusion import EDM, DenoisingObjective, LogLogistic, NetworkDenoiser, sample
from dipole.diffusion.guidance import random_drop
from dipole.diffusion.tensors import Random, randn
from dipole.errors import DipoleError
from dipole.networks.moe import MoDE, MoDEConfig
from dipole.networks.routing import Routing, load_balance
from dipole.policies.common import Configured
from dipole.policies.config import NormalizationMode, SamplerConfig, check_horizons
from dipole.policies.encoder import image_to_float
from dipole.policies.policy import Observation, State


@dataclass(frozen=True)
class ModeConfig:
    """A MoDE policy; the defaults are the paper's.

    Attributes:
        observation: Features given at run time, vectors or images; one of them may be the goal.
        action: The feature it produces.
        goal: The feature of `observation` that says what to do: a language embedding or a goal state, a vector. None
            for a policy without goals.
        obs_horizon: To.
        pred_horizon: Tp.
        action_horizon: Ta.
        network: Sizes and choices of the network.
        vision: Configuration of the image encoder, one per camera; None without images.
        sigma_min: Smallest noise.
        sigma_max: Largest noise.
        sigma_data: Standard deviation of normalised actions.
        cond_dropout: Probability of training without the goal.
        balance: Weight of the load-balance loss; 0 when fine-tuning with frozen routers.
        balance_kind: `full`: the mean softmax (the paper); `selected`: renormalised probabilities (published code).
        sampler: How to denoise at run time.
        normalization: Mode of `observation`, `goal`, `action` and `image`.
        fps: Control rate in Hz.
        task: What it was trained to do, in words.
    """

    observation: dict[str, Feature]
    action: Feature
    goal: str | None = "observation.language"
    obs_horizon: int = 1
    pred_horizon: int = 10
    action_horizon: int = 10
    network: MoDEConfig = field(default_factory=MoDEConfig)
    vision: dict[str, Any] | None = None
    sigma_min: float = 0.001
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    cond_dropout: float = 0.1
    balance: float = 0.01
    balance_kind: Literal["full", "selected"] = "full"
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddim", 10, "exponential"))
    normalization: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "observation": "min_max",
            "goal": "identity",
            "action": "min_max",
            "image": "min_max",
        }
    )
    fps: float = 10.0
    task: str = ""

    def __post_init__(self) -> None:
        check_horizons(self.obs_horizon, self.pred_horizon, self.action_horizon)
        if self.goal is not None and self.goal not in self.observation:
            raise DipoleError(f"the goal '{self.goal}' is not among the observations: {', '.join(self.observation)}")
        for key, feature in self.observation.items():
            if len(feature.shape) != 1 and (not feature.is_image or key == self.goal):
                raise DipoleError(f"'{key}' must be a vector, its shape is {list(feature.shape)}")
        if self.images and self.vision is None:
            raise DipoleError(f"the observation has images ({', '.join(self.images)}): configure an image encoder")

    @property
    def images(self) -> list[str]:
        """Return the names of the image features."""
        return [key for key, feature in self.observation.items() if feature.is_image]

    @property
    def process(self) -> EDM:
        """Return the forward process."""
        return EDM(self.sigma_min, self.sigma_max)

    def normalization_mode(self, key: str) -> NormalizationMode:
        """Return how a feature is normalised."""
        if key == "action":
            return self.normalization["action"]
        if key == self.goal:
            return self.normalization["goal"]
        return self.normalization["image" if key in self.images else "observation"]


def make_mode(
    episodes: Episodes, *, observation: Sequence[str], goal: str | None = None, seed: int = 0, **options: Any
) -> ModePolicy:
    """Return an untrained policy for demonstrations; train it on plain `Windows`.

    Args:
        episodes: The data.
        observation: Features that are observed, besides the goal; one token each.
        goal: The feature that says what to do.
        seed: Of the weights.
        **options: Other fields of `ModeConfig`.
    """
    keys = [*observation] if goal is None else [goal, *observation]
    config = ModeConfig(
        observation={key: episodes.feature(key) for key in keys},
        action=episodes.feature("action"),
        goal=goal,
        **{"fps": episodes.fps, **options},
    )
    modes = {key: config.normalization_mode(key) for key in (*keys, "action")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ModePolicy(config, Normalizer.fit(episodes.stats(), modes))


class ModePolicy(Configured, nn.Module):
    """A policy that denoises action chunks with experts chosen by noise level. It remembers nothing between calls.

    Attributes:
        config: Its configuration.
        normalizer: Statistics of every feature.
        network: The mixture of experts.
        vision: One image encoder per camera.
        sampler: How it denoises at run time (starts as `config.sampler`).
        expert_cache: Whether the experts of each level are fused at run time.
    """

    config: ModeConfig
    config_class = ModeConfig
    type_name = "mode"

    def __init__(self, config: ModeConfig, normalizer: Normalizer) -> None:
        super().__init__()
        for key in [*config.observation, "action"]:
            normalizer.affine(key)
        self.config = config
        self.normalizer = normalizer
        self.vision = nn.ModuleDict()
        self.expert_cache = True
        cond_dims = {} if config.goal is None else {"goal": (1, config.observation[config.goal].shape[0])}
        for key, feature in config.observation.items():
            if key in config.images:
                encoder = networks.build_vision(config.vision or {}, {key: feature.shape})
                self.vision[_module_name(key)] = encoder
                cond_dims[key] = (config.obs_horizon, encoder.out_dim)
            elif key != config.goal:
                cond_dims[key] = (config.obs_horizon, feature.shape[0])
        self.network = MoDE(config.network, self.action_dim, config.pred_horizon, cond_dims)
        self.sampler = config.sampler
        time = LogLogistic(math.log(0.5), 0.5, config.sigma_min, config.sigma_max)
        self.objective = DenoisingObjective(config.process, "edm", time, sigma_data=config.sigma_data)

    @property
    def denoiser(self) -> NetworkDenoiser:
        """Return the denoiser of normalised chunks; its conditioning is what `encode` returns."""
        network = self.network if self.expert_cache else self.network.forward
        return NetworkDenoiser(network, self.config.process, "edm", self.config.sigma_data)

    def with_sampler(self, sampler: SamplerConfig, expert_cache: bool | None = None) -> ModePolicy:
        """Return a policy with the same weights (shared, not copied), another sampler and, if given, cache setting."""
        other = copy.copy(self)
        other.sampler = sampler
        if expert_cache is not None:
            other.expert_cache = expert_cache
        return other

    def encode(self, obs: Observation, generator: Generator | None = None) -> dict[str, Tensor]:
        """Return the conditioning for raw observations `[B, To, ...]`: `goal` `[B, 1, G]`, features `[B, To, C]`."""
        cond = {}
        for key in self.config.observation:
            if key == self.config.goal:
                cond["goal"] = self.normalizer.normalize(key, obs[key][:, -1:])
            elif key in self.config.images:
                image = self.normalizer.normalize(key, image_to_float(obs[key]))
                cond[key] = self.vision[_module_name(key)]({key: image}, generator=generator)
            else:
                cond[key] = self.normalizer.normalize(key, obs[key])
        return cond

    def losses(self, batch: Mapping[str, Tensor], generator: Generator | None = None) -> dict[str, Tensor]:
        """Return the denoising loss (`denoising`) and the load-balance loss, unweighted (`balance`).

        Args:
            batch: Observations `[B, To, ...]` and `action` `[B, Tp, Da]`, raw.
            generator: Source of levels, noise, experts, dropped goals and crops.
        """
        x0 = self.normalizer.normalize("action", batch["action"])
        cond = self.encode(batch, generator)
        if self.training and self.config.goal is not None:
            cond = random_drop(cond, self.config.cond_dropout, ("goal",), generator=generator)
        routings: list[Routing] = []

        def network(x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            out, chosen = self.network.route(x, time, cond, generator)
            routings.extend(chosen)
            return out

        denoising = self.objective(network, x0, cond, generator=generator)
        return {"denoising": denoising, "balance": load_balance(routings, self.config.balance_kind)}

    def loss(self, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return the loss of a batch of windows: denoising + balance weight x load balance."""
        losses = self.losses(batch, generator)
        return losses["denoising"] + self.config.balance * losses["balance"]

    def forward(self, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
        """Return `loss(batch, generator)`."""
        return self.loss(batch, generator)

    @torch.no_grad()
    def act(
        self, obs: Observation, state: State, noise: Tensor | None = None, generator: Random = None
    ) -> tuple[Tensor, State]:
        """Return `(chunk [B, Ta, Da] in physical units, state)`; see `Policy.act`."""
        self.check_observation(obs)
        cond = self.encode(obs)
        like = self.network.position
        batch = next(iter(obs.values())).shape[0]
        shape = (batch, self.pred_horizon, self.action_dim)
        noise = randn(shape, generator, like=like) if noise is None else noise
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        process = self.config.process
        levels = self.sampler.levels(process)
        init = noise * float(process.prior_std(levels[0]))
        x0 = sample(self.denoiser, process, levels, self.sampler.build(), cond=cond, init=init, generator=generator)
        return self.executed(x0), state


def _module_name(key: str) -> str:
    """Return a legal module name: those may not hold dots."""
    return key.replace(".", "/")
