"""Configuration of BESO: everything that `config.json` of its checkpoint holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from dipole.data.features import Feature
from dipole.diffusion import EDM, VP, DenoisingObjective, LogLogistic, Process, Uniform
from dipole.errors import DipoleError
from dipole.networks.gpt import GPTConfig
from dipole.policies.config import NormalizationMode, SamplerConfig

History = Literal["redenoise", "hold", "renoise"]


@dataclass(frozen=True)
class BesoConfig:
    """A BESO policy; the defaults are the paper's for the kitchen.

    Attributes:
        observation: Features given at run time, all vectors; one of them may be the goal.
        action: The feature it produces.
        action_low: `[Da]` smallest action of the data, which bounds what the policy does (see `clip`).
        action_high: `[Da]` largest.
        goal: The feature of `observation` that holds the goal at run time; None for a policy without goals.
        goal_dims: Which components of the concatenated observation a goal fixes, in the order of the goal feature; the
            others are zeroed. Empty: all of them.
        window: w, pairs of observation and action the network sees.
        goal_horizon: g, consecutive observations that make a goal; at run time the goal is repeated.
        network: Sizes.
        objective: `edm`: the paper. `ddpm`: the network predicts the noise of a discrete process of 100 levels (squared
            cosine), as diffusion policies did before; the network is told ln(sigma / alpha) in place of ln(sigma).
        sigma_min: Smallest noise.
        sigma_max: Largest noise; 1, not 80: sampling in three steps depends on it.
        sigma_data: Standard deviation of normalised actions.
        rho: Curvature of the `karras` spacing.
        cond_dropout: Probability of training without the goal.
        cond_dropout_kind: `per_sample` drops the whole goal; `per_element` single numbers, as the published code does.
        guidance_scale: L; 1 is the goal-conditioned model, 0 the one without goal.
        history: The actions before the current one, while it is denoised: `redenoise` starts them clean and denoises
            them along (the published code); `hold` puts them back after each step; `renoise` gives them the noise of
            the level, as in training.
        sampler: How to denoise at run time.
        clip: Actions are kept within this factor of the data's bounds, in normalised units; None for no bound.
        normalization: Mode of `observation` and `action`.
        fps: Control rate in Hz.
        task: What it was trained to do, in words.
    """

    observation: dict[str, Feature]
    action: Feature
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    goal: str | None = "observation.goal"
    goal_dims: tuple[int, ...] = ()
    window: int = 4
    goal_horizon: int = 2
    network: GPTConfig = field(default_factory=GPTConfig)
    objective: Literal["edm", "ddpm"] = "edm"
    sigma_min: float = 0.005
    sigma_max: float = 1.0
    sigma_data: float = 0.5
    rho: float = 5.0
    cond_dropout: float = 0.1
    cond_dropout_kind: Literal["per_sample", "per_element"] = "per_sample"
    guidance_scale: float = 1.0
    history: History = "redenoise"
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddim", 3, "exponential"))
    clip: float | None = 1.1
    normalization: dict[str, NormalizationMode] = field(
        default_factory=lambda: {"observation": "mean_std", "action": "min_max"}
    )
    fps: float = 10.0
    task: str = ""

    def __post_init__(self) -> None:
        if self.goal is not None and self.goal not in self.observation:
            raise DipoleError(f"the goal '{self.goal}' is not among the observations: {', '.join(self.observation)}")
        for key, feature in self.observation.items():
            if len(feature.shape) != 1 or feature.is_image:
                raise DipoleError(f"BESO sees vectors only, and '{key}' has shape {list(feature.shape)}")
        if not self.state_keys:
            raise DipoleError("BESO needs an observation besides the goal")
        if not len(self.action_low) == len(self.action_high) == self.action.shape[0]:
            raise DipoleError("action_low and action_high need one number per action component")
        goal_size = self.obs_dim if self.goal is None else self.observation[self.goal].shape[0]
        if goal_size != (len(self.goal_dims) or self.obs_dim):
            raise DipoleError(
                f"the goal has {goal_size} components: list in goal_dims which of {self.obs_dim} they are"
            )

    @property
    def state_keys(self) -> list[str]:
        """Return the features that are observed, without the goal."""
        return [key for key in self.observation if key != self.goal]

    @property
    def obs_dim(self) -> int:
        """Return C, the width of the concatenated observation."""
        return sum(self.observation[key].shape[0] for key in self.state_keys)

    @property
    def process(self) -> Process:
        """Return the forward process."""
        return _ddpm_process() if self.objective == "ddpm" else EDM(self.sigma_min, self.sigma_max, self.rho)

    def build_objective(self) -> DenoisingObjective:
        """Return the training objective."""
        if self.objective == "ddpm":
            return DenoisingObjective(self.process, "epsilon", Uniform())
        time = LogLogistic(math.log(0.5), 0.5, self.sigma_min, self.sigma_max)
        return DenoisingObjective(self.process, "edm", time, sigma_data=self.sigma_data)

    def normalization_modes(self) -> dict[str, NormalizationMode]:
        """Return the mode of every feature that needs statistics; the goal shares those of what is observed."""
        observed = dict.fromkeys(self.state_keys, self.normalization["observation"])
        return observed | {"action": self.normalization["action"]}


@lru_cache(maxsize=1)
def _ddpm_process() -> VP:
    return VP.cosine(100)
