"""Configuration of a policy: what `config.json` of a checkpoint holds. Closed sets of names, plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

from dipole.data.features import Feature
from dipole.diffusion import (
    CPS,
    DDIM,
    DDPM,
    DPM2,
    EDM,
    VP,
    Beta,
    ConsistencyRenoise,
    ContinuousVP,
    DenoisingObjective,
    DPMSolverPP2M,
    DPMSolverPP2S,
    Flow,
    FlowSDE,
    Heun,
    Kernel,
    LogitNormal,
    LogLogistic,
    LogNormal,
    PredictionType,
    Process,
    Solver,
    Uniform,
)
from dipole.diffusion.objectives import TimeDistribution, Weighting
from dipole.diffusion.process import Spacing
from dipole.errors import DipoleError, unknown
from dipole.policies.streaming import StreamingTraining

ProcessName = Literal[
    "flow", "vp-cosine", "vp-linear", "vp-scaled-linear", "vp-continuous-cosine", "vp-continuous-linear", "edm"
]
SamplerName = Literal[
    "ddim", "ddpm", "euler", "ancestral", "heun", "dpm2", "dpmpp-2m", "dpmpp-2s", "flow-sde", "cps", "consistency"
]
TimeName = Literal["uniform", "logit-normal", "beta", "log-logistic", "log-normal"]
NormalizationMode = Literal["min_max", "mean_std", "quantiles", "quantiles10", "identity"]


@dataclass(frozen=True)
class ProcessConfig:
    """A forward process by name.

    Attributes:
        name: Which process.
        num_steps: Trained levels of the discrete `vp-*` processes.
        beta_start: First beta of `vp-linear` and `vp-scaled-linear`.
        beta_end: Last beta of those.
        sigma_min: Smallest noise of `edm`.
        sigma_max: Largest noise of `edm`.
    """

    name: ProcessName = "flow"
    num_steps: int = 100
    beta_start: float = 1e-4
    beta_end: float = 0.02
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def build(self) -> Process:
        """Return the process; the same object for equal configurations."""
        return _build_process(self)


@lru_cache(maxsize=256)
def _build_process(config: ProcessConfig) -> Process:
    beta = (config.num_steps, config.beta_start, config.beta_end)
    makers: dict[str, Any] = {
        "flow": Flow,
        "vp-cosine": lambda: VP.cosine(config.num_steps),
        "vp-linear": lambda: VP.linear(*beta),
        "vp-scaled-linear": lambda: VP.scaled_linear(*beta),
        "vp-continuous-cosine": lambda: ContinuousVP("cosine"),
        "vp-continuous-linear": lambda: ContinuousVP("linear"),
        "edm": lambda: EDM(sigma_min=config.sigma_min, sigma_max=config.sigma_max),
    }
    if config.name not in makers:
        raise unknown("process", config.name, makers)
    process: Process = makers[config.name]()
    return process


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network predicts and which levels it is trained on.

    Attributes:
        prediction_type: `x0`, `epsilon`, `v`, `velocity` or `edm`.
        time: Distribution of the training levels.
        weighting: Weight of each level (see `DenoisingObjective`).
        sigma_data: Standard deviation of the data, for `edm`.
        mask_padding: Leave actions beyond an episode's end out of the loss (Diffusion Policy trains on them).
    """

    prediction_type: PredictionType = "velocity"
    time: TimeName = "logit-normal"
    weighting: Weighting = "one"
    sigma_data: float = 0.5
    mask_padding: bool = False

    def build(self, process: ProcessConfig) -> DenoisingObjective:
        """Return the objective for a process."""
        times: dict[str, TimeDistribution] = {
            "uniform": Uniform(),
            "logit-normal": LogitNormal(),
            "beta": Beta(),
            "log-logistic": LogLogistic(loc=math.log(0.5), low=process.sigma_min, high=process.sigma_max),
            "log-normal": LogNormal(),
        }
        if self.time not in times:
            raise unknown("time distribution", self.time, times)
        return DenoisingObjective(
            process.build(), self.prediction_type, times[self.time], self.weighting, sigma_data=self.sigma_data
        )


@dataclass(frozen=True)
class SamplerConfig:
    """How a trained policy denoises: kernel or solver, number of steps, spacing of the levels.

    Attributes:
        name: Kernel (`ddim`, `ddpm`, `ancestral`, `flow-sde`, `cps`, `consistency`) or ODE solver (`euler`, `heun`,
            `dpm2`, `dpmpp-2m`, `dpmpp-2s`).
        num_steps: Steps; also the number of network calls, but for `heun`, `dpm2` and `dpmpp-2s` (2n - 1).
        spacing: Spacing of the levels; None for the process's own default.
        eta: Amount of noise of `ddim`, `flow-sde` and `cps`; None for the kernel's own default.
        clip: Bound on the denoised action in normalised units, for kernels; None for none.
        process: Sample in this process instead of the one the policy was trained in (see `ProcessView`).
    """

    name: SamplerName = "euler"
    num_steps: int = 5
    spacing: Spacing | None = None
    eta: float | None = None
    clip: float | None = None
    process: ProcessConfig | None = None

    def build(self) -> Kernel | Solver:
        """Return the kernel or solver."""
        noise: dict[str, Any] = {} if self.eta is None else {"eta": self.eta}
        makers: dict[str, Any] = {
            "ddim": lambda: DDIM(clip=self.clip, **noise),
            "ddpm": lambda: DDPM(clip=self.clip),
            "euler": lambda: DDIM(clip=self.clip, eta=0.0),
            "ancestral": lambda: DDIM(clip=self.clip, eta=1.0),
            "flow-sde": lambda: FlowSDE(clip=self.clip, **noise),
            "cps": lambda: CPS(clip=self.clip, **noise),
            "consistency": lambda: ConsistencyRenoise(clip=self.clip),
            "heun": Heun,
            "dpm2": DPM2,
            "dpmpp-2m": DPMSolverPP2M,
            "dpmpp-2s": DPMSolverPP2S,
        }
        if self.name not in makers:
            raise unknown("sampler", self.name, makers)
        kernel: Kernel | Solver = makers[self.name]()
        return kernel

    def levels(self, process: Process) -> Any:
        """Return the `[num_steps + 1]` levels visited in `process`.

        Raises:
            DipoleError: The number of steps or the spacing does not fit the process.
        """
        try:
            return process.levels(self.num_steps, *([] if self.spacing is None else [self.spacing]))
        except ValueError as error:
            raise DipoleError(f"sampler '{self.name}': {error}") from None

    @property
    def nfe(self) -> int:
        """Return the number of network calls per chunk."""
        return 2 * self.num_steps - 1 if self.name in ("heun", "dpm2", "dpmpp-2s") else self.num_steps


def default_sampler(process: ProcessConfig) -> SamplerConfig:
    """Return a fast and safe sampler: Euler-5 for flows, DDIM-10 with clipping for VP, DPM-Solver++ for EDM."""
    if process.name == "flow":
        return SamplerConfig("euler", 5)
    if process.name == "edm":
        return SamplerConfig("dpmpp-2m", 10)
    return SamplerConfig("ddim", min(10, process.num_steps), clip=1.0)


def default_objective(process: ProcessConfig) -> ObjectiveConfig:
    """Return what is usually predicted in a process, and the levels it is usually trained on."""
    if process.name == "flow":
        return ObjectiveConfig("velocity", "logit-normal")
    if process.name == "edm":
        return ObjectiveConfig("edm", "log-logistic")
    return ObjectiveConfig("epsilon", "uniform")


@dataclass(frozen=True)
class PolicyConfig:
    """A diffusion policy: features, horizons, network, process, objective, sampler.

    Attributes:
        observation: Features the policy sees, by name.
        action: The feature it produces.
        obs_horizon: To, observations given.
        pred_horizon: Tp, actions denoised at once.
        action_horizon: Ta, actions executed before the next chunk; the first one is index To - 1 of the prediction.
        network: Configuration of the denoising network (`{"name": ..., ...}`; see `dipole.networks`).
        vision: Configuration of the image encoder; None without images.
        process: Forward process.
        objective: Training objective.
        sampler: How to denoise at run time.
        normalization: Mode for each kind of feature: `observation`, `action`, `image`; a feature's own name overrides
            its kind.
        fps: Control rate in Hz, as in the demonstrations.
        task: What the policy was trained to do, in words.
        roles: For features with names of their own, the LeRobot name whose place they take in the conditioning, such
            as `{"observation.qpos": "observation.state"}`.
        source: Where an imported policy comes from; empty for one trained here.
        streaming: Trained for streaming, with a noise level for every position of the chunk; None for one level.
    """

    # Fields that folders written before they existed lack, with what that meant.
    LATER_FIELDS: ClassVar[dict[str, Any]] = {"roles": {}, "source": "", "streaming": None}

    observation: dict[str, Feature]
    action: Feature
    obs_horizon: int = 2
    pred_horizon: int = 16
    action_horizon: int = 8
    network: dict[str, Any] = field(default_factory=lambda: {"name": "mlp"})
    vision: dict[str, Any] | None = None
    process: ProcessConfig = field(default_factory=ProcessConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    normalization: dict[str, NormalizationMode] = field(
        default_factory=lambda: {"observation": "min_max", "action": "min_max", "image": "min_max"}
    )
    fps: float = 10.0
    task: str = ""
    roles: dict[str, str] = field(default_factory=dict)
    source: str = ""
    streaming: StreamingTraining | None = None

    def __post_init__(self) -> None:
        check_horizons(self.obs_horizon, self.pred_horizon, self.action_horizon)
        if not self.observation:
            raise DipoleError("the policy sees no observation: name at least one feature of the dataset")
        if len(self.action.shape) != 1:
            raise DipoleError(f"the action must be a vector, the dataset's has shape {list(self.action.shape)}")

    @property
    def action_dim(self) -> int:
        """Return Da."""
        return self.action.shape[0]

    @property
    def images(self) -> list[str]:
        """Return the names of the image features."""
        return [key for key, feature in self.observation.items() if feature.dtype in ("image", "video")]

    def normalization_mode(self, key: str) -> NormalizationMode:
        """Return how a feature is normalised."""
        kind = "action" if key == "action" else "image" if key in self.images else "observation"
        return self.normalization.get(key) or self.normalization[kind]


def check_horizons(obs_horizon: int, pred_horizon: int, action_horizon: int) -> None:
    """Raise DipoleError when To, Tp and Ta do not fit together."""
    if min(obs_horizon, pred_horizon, action_horizon) < 1:
        raise DipoleError(f"horizons must be at least 1, got To={obs_horizon}, Tp={pred_horizon}, Ta={action_horizon}")
    if obs_horizon - 1 + action_horizon > pred_horizon:
        raise DipoleError(
            f"Ta={action_horizon} actions starting at index To-1={obs_horizon - 1} do not fit in a chunk of "
            f"Tp={pred_horizon}: lower action_horizon to {max(1, pred_horizon - obs_horizon + 1)} or raise pred_horizon"
        )
