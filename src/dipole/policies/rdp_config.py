"""Configuration of Reactive Diffusion Policy: everything that `config.json` of its checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dipole.data.features import Feature
from dipole.errors import DipoleError
from dipole.networks.action_codec import CodecConfig
from dipole.policies.config import NormalizationMode, ObjectiveConfig, ProcessConfig, SamplerConfig


@dataclass(frozen=True)
class RdpConfig:
    """A slow policy that plans latents and a fast decoder that reacts; periods and horizons are the paper's.

    Attributes:
        observation: Features it sees, all vectors.
        fast: Those of them that the decoder sees at every tick, such as force; the slow policy sees all.
        action: The feature it produces, one per tick.
        base: For actions that are absolute poses: the feature that tells the pose at the time of planning. Actions are
            then learned relative to it. None for actions that are relative already.
        base_dims: Which components of `base` belong to the components of the action.
        obs_horizon: To, ticks of observations.
        pred_horizon: T, ticks of a plan; index To - 1 is the action for now.
        period: Ticks between two plans.
        offset: Plans are made at the first tick and whenever tick = offset modulo period, e.g. when pictures arrive.
        latency: Ticks between the observation a plan is made from and the first action taken from it. The first plan of
            an episode is used at once.
        codec: Shape of encoder and decoder.
        network: The slow policy's denoiser of latents (see `dipole.networks`).
        process: Its forward process.
        objective: Its training objective.
        sampler: How it denoises at run time; `clip` = 1 keeps latents within those of the demonstrations.
        latent_sample: What the slow policy learns: a `sample` of the encoder's posterior (the published code) or its
            `mean`.
        normalization: Mode of `observation`, `fast` and `action`.
        fps: Ticks per second.
        task: What it was trained to do, in words.
    """

    observation: dict[str, Feature]
    fast: tuple[str, ...]
    action: Feature
    base: str | None = None
    base_dims: tuple[int, ...] = ()
    obs_horizon: int = 4
    pred_horizon: int = 32
    period: int = 16
    offset: int = 0
    latency: int = 4
    codec: CodecConfig = field(default_factory=CodecConfig)
    network: dict[str, Any] = field(default_factory=lambda: {"name": "mlp"})
    process: ProcessConfig = field(default_factory=lambda: ProcessConfig("vp-cosine"))
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig("epsilon", "uniform"))
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddim", 8, clip=1.0))
    latent_sample: Literal["sample", "mean"] = "sample"
    normalization: dict[str, NormalizationMode] = field(
        default_factory=lambda: {"observation": "min_max", "fast": "mean_std", "action": "min_max"}
    )
    fps: float = 24.0
    task: str = ""

    def __post_init__(self) -> None:
        for key, feature in self.observation.items():
            if len(feature.shape) != 1 or feature.is_image:
                raise DipoleError(f"RDP sees vectors only, and '{key}' has shape {list(feature.shape)}")
        for key in [*self.fast, *([] if self.base is None else [self.base])]:
            if key not in self.observation:
                raise DipoleError(f"'{key}' is not among the observations: {', '.join(self.observation)}")
        if not self.fast:
            raise DipoleError("RDP needs at least one fast feature, such as 'observation.force'")
        if self.base is not None and len(self.base_dims) != self.action.shape[0]:
            raise DipoleError(f"base_dims needs one component of '{self.base}' per action component")
        if self.obs_horizon < 1 or not 0 <= self.offset < self.period or not 0 <= self.latency < self.period:
            raise DipoleError(
                f"offset {self.offset} and latency {self.latency} must be in 0..{self.period - 1} (period)"
            )
        needed = self.obs_horizon - 1 + self.latency + self.period
        if needed > self.pred_horizon:
            raise DipoleError(
                f"a plan of {self.pred_horizon} ticks ends before the next one is ready: To - 1 + latency + period is "
                f"{needed}; raise pred_horizon or lower the period"
            )

    @property
    def fast_dim(self) -> int:
        """Return F, the width of the fast features."""
        return sum(self.observation[key].shape[0] for key in self.fast)

    def modes(self) -> dict[str, NormalizationMode]:
        """Return the normalisation of every observed feature."""
        return {key: self.normalization["fast" if key in self.fast else "observation"] for key in self.observation}
