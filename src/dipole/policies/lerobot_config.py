"""`config.json` of a LeRobot diffusion policy of any version: strict, with the defaults of the version that wrote it.

LeRobot writes all fields it knows, so a missing key means that the writing version had no such field, or that somebody
removed it. Either way the value is the one that version would have used, never today's: between 0.1 and 0.6 the
defaults of `crop_shape`, `horizon`, `n_action_steps`, `use_group_norm` and `use_separate_rgb_encoder_per_camera`
changed. Before 2025 features were called `input_shapes` and normalisation `input_normalization_modes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dipole.errors import DipoleError, unknown
from dipole.serialization import from_dict, read_json

FeatureKind = Literal["STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE"]
NormMode = Literal["MIN_MAX", "MEAN_STD", "IDENTITY", "QUANTILES", "QUANTILE10"]

STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"

# Keys that say how a policy was trained, stored or compiled: they do not change what it does.
_WITHOUT_EFFECT = {
    *("device", "use_amp", "push_to_hub", "repo_id", "private", "tags", "license"),
    *("pretrained_path", "pretrained_revision", "pretrained_backbone_weights"),
    *("compile_model", "compile_mode", "gradient_checkpointing", "drop_n_last_frames"),
    *("optimizer_lr", "optimizer_betas", "optimizer_eps", "optimizer_weight_decay"),
    *("scheduler_name", "scheduler_warmup_steps"),
}

_ALWAYS: dict[str, Any] = {
    "n_obs_steps": 2,
    "horizon": 16,
    "n_action_steps": 8,
    "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    "vision_backbone": "resnet18",
    "resize_shape": None,
    "crop_ratio": 1.0,
    "crop_shape": [84, 84],
    "crop_is_random": True,
    "use_group_norm": True,
    "spatial_softmax_num_keypoints": 32,
    "use_separate_rgb_encoder_per_camera": False,
    "down_dims": [512, 1024, 2048],
    "kernel_size": 5,
    "n_groups": 8,
    "diffusion_step_embed_dim": 128,
    "use_film_scale_modulation": True,
    "noise_scheduler_type": "DDPM",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_inference_steps": None,
    "do_mask_loss_for_padding": False,
}
# What later versions changed, and the keys by which their files are known.
_SINCE_044 = {"crop_shape": None}
_KEYS_044 = {"resize_shape", "crop_ratio", "compile_model", "compile_mode"}
_SINCE_060 = {
    "crop_shape": None,
    "horizon": 64,
    "n_action_steps": 32,
    "use_group_norm": False,
    "use_separate_rgb_encoder_per_camera": True,
}
_KEYS_060 = {"pretrained_revision", "gradient_checkpointing"}

# Far beyond any real policy; a damaged file must not make us allocate what it asks for.
_LARGEST = {"num_train_timesteps": 100_000, "horizon": 100_000, "n_obs_steps": 10_000, "pixels": 16_384}


@dataclass(frozen=True)
class LeRobotFeature:
    """A feature: its kind, and its shape (`VISUAL`: channels, height, width)."""

    type: FeatureKind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LeRobotConfig:
    """The keys of `config.json` that decide what a diffusion policy does; names and meaning are LeRobot's."""

    input_features: dict[str, LeRobotFeature]
    output_features: dict[str, LeRobotFeature]
    normalization_mapping: dict[str, NormMode]
    n_obs_steps: int
    horizon: int
    n_action_steps: int
    vision_backbone: str
    resize_shape: tuple[int, int] | None
    crop_ratio: float
    crop_shape: tuple[int, int] | None
    crop_is_random: bool
    use_group_norm: bool
    spatial_softmax_num_keypoints: int
    use_separate_rgb_encoder_per_camera: bool
    down_dims: tuple[int, ...]
    kernel_size: int
    n_groups: int
    diffusion_step_embed_dim: int
    use_film_scale_modulation: bool
    noise_scheduler_type: Literal["DDPM", "DDIM"]
    num_train_timesteps: int
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"]
    beta_start: float
    beta_end: float
    prediction_type: Literal["epsilon", "sample"]
    clip_sample: bool
    clip_sample_range: float
    num_inference_steps: int | None
    do_mask_loss_for_padding: bool

    @property
    def cameras(self) -> list[str]:
        """Return the image features, in the order they are encoded."""
        return [key for key, feature in self.input_features.items() if feature.type == "VISUAL"]

    @property
    def used(self) -> dict[str, LeRobotFeature]:
        """Return the input features the network sees; LeRobot ignores others (such as a second `STATE`)."""
        return {
            key: feature
            for key, feature in self.input_features.items()
            if feature.type == "VISUAL" or key == {"STATE": STATE, "ENV": ENVIRONMENT}.get(feature.type)
        }

    @property
    def crop(self) -> tuple[int, int] | None:
        """Return (H, W) that is cropped: after a resize it follows from `crop_ratio` alone."""
        if self.resize_shape is None:
            return self.crop_shape
        if self.crop_ratio >= 1.0:
            return None
        height, width = self.resize_shape
        return int(height * self.crop_ratio), int(width * self.crop_ratio)


def read_config(path: Path) -> LeRobotConfig:
    """Return the configuration in `config.json`.

    Raises:
        DipoleError: It is not of a diffusion policy, a key is unknown, or a value makes no sense.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise DipoleError(f"{path}: expected a table, found {type(values).__name__}")
    values = dict(values)
    kind = values.pop("type", "diffusion" if "input_shapes" in values else None)
    if kind != "diffusion":
        found = "has no key 'type'" if kind is None else f"is of a policy of type '{kind}'"
        raise DipoleError(f"{path} {found}: only LeRobot's 'diffusion' policies can be imported")
    if values.pop("use_peft", False):
        raise DipoleError(f"{path}: key 'use_peft' is true: merge the adapter into the weights in LeRobot, then import")
    defaults = _defaults(set(values))
    values = {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT}
    if "input_shapes" in values:
        values = _from_2024(values, path)
    config = from_dict(LeRobotConfig, {**defaults, **values}, str(path))
    _check(config, path)
    return config


def _defaults(keys: set[str]) -> dict[str, Any]:
    """Return the defaults of the version that wrote a file with these keys."""
    if keys & _KEYS_060:
        return {**_ALWAYS, **_SINCE_060}
    return {**_ALWAYS, **_SINCE_044} if keys & _KEYS_044 else dict(_ALWAYS)


def _from_2024(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a configuration of 2024 in the words of 2025: kinds of features are told from their names."""
    values = dict(values)
    mapping: dict[str, str] = {}
    for side in ("input", "output"):
        shapes, modes = (values.pop(f"{side}_{what}", None) for what in ("shapes", "normalization_modes"))
        for name, table in (("shapes", shapes), ("normalization_modes", modes)):
            if not isinstance(table, dict):
                raise DipoleError(f"{path}: key '{side}_{name}' is missing or not a table")
        features = {}
        for key, shape in shapes.items():
            kind = _kind(key, path)
            mode = str(modes.get(key, "identity")).upper()
            if mapping.setdefault(kind, mode) != mode:
                raise DipoleError(f"{path}: '{key}' is normalised by {mode}, another {kind} by {mapping[kind]}")
            features[key] = {"type": kind, "shape": shape}
        values[f"{side}_features"] = features
    return {**values, "normalization_mapping": mapping}


def _kind(key: str, path: Path) -> FeatureKind:
    if key.startswith("observation.image"):
        return "VISUAL"
    kinds: dict[str, FeatureKind] = {STATE: "STATE", ENVIRONMENT: "ENV", ACTION: "ACTION"}
    if key not in kinds:
        raise unknown(f"feature in {path}:", key, [*kinds, "observation.image"])
    return kinds[key]


def _check(config: LeRobotConfig, path: Path) -> None:
    action = config.output_features.get(ACTION)
    if action is None or action.type != "ACTION" or len(config.output_features) != 1 or len(action.shape) != 1:
        raise DipoleError(f"{path}: output_features must be one vector 'action', found {config.output_features}")
    state = config.used.get(STATE)
    if state is None or len(config.used) < 2:
        raise DipoleError(
            f"{path}: input_features must hold '{STATE}' and a camera or '{ENVIRONMENT}', "
            f"found: {', '.join(config.input_features)}"
        )
    for key, feature in config.used.items():
        if len(feature.shape) != (3 if feature.type == "VISUAL" else 1) or min(feature.shape, default=0) < 1:
            raise DipoleError(f"{path}: feature '{key}' has shape {list(feature.shape)}")
    if config.cameras and config.vision_backbone not in ("resnet18", "resnet34"):
        raise unknown(f"vision_backbone in {path}:", config.vision_backbone, ("resnet18", "resnet34"))
    if not 0 < config.crop_ratio <= 1:
        raise DipoleError(f"{path}: crop_ratio {config.crop_ratio} must be above 0 and at most 1")
    _check_sizes(config, path)


def _check_sizes(config: LeRobotConfig, path: Path) -> None:
    names = ("n_obs_steps", "horizon", "n_action_steps", "spatial_softmax_num_keypoints", "kernel_size", "n_groups")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in (*names, "num_train_timesteps")}
    sizes |= {f"down_dims[{i}]": dim for i, dim in enumerate(config.down_dims)}
    if config.num_inference_steps is not None:
        sizes["num_inference_steps"] = config.num_inference_steps
    for name, size in sizes.items():
        if not 1 <= size <= _LARGEST.get(name, 1_000_000):
            raise DipoleError(f"{path}: {name} is {size}, which cannot be meant")
    pictures = {key: config.input_features[key].shape[1:] for key in config.cameras}
    for name, shape in {**pictures, "resize_shape": config.resize_shape, "crop_shape": config.crop}.items():
        if shape is not None and not all(1 <= side <= _LARGEST["pixels"] for side in shape):
            raise DipoleError(f"{path}: {name} is {list(shape)} pixels, which cannot be meant")
