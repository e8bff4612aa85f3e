"""A `DiffusionPolicy` as a LeRobot 0.4.4 policy folder: same weights, same numbers.

LeRobot's `diffusion` policy is one architecture (U-Net, ResNet with spatial softmax) in one process (DDPM's) with two
samplers (DDPM, DDIM with `leading` spacing). Whatever it cannot represent is an error that says what.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dipole.data.normalizer import Mode, Normalizer
from dipole.errors import DipoleError
from dipole.policies.checkpoint import replace_folder
from dipole.policies.config import PolicyConfig
from dipole.policies.diffusion_policy import DiffusionPolicy
from dipole.policies.lerobot import CONFIG, MODEL, PREDICTIONS, PROCESSES, their_name
from dipole.policies.lerobot_config import ACTION, ENVIRONMENT, STATE, NormMode
from dipole.policies.lerobot_stats import (
    BOUNDS,
    EPS,
    MODES,
    NORMALIZER_STEP,
    POSTPROCESSOR,
    PREPROCESSOR,
    UNNORMALIZER_STEP,
)
from dipole.serialization import write_json

# How LeRobot trains by default; it only matters there, when training goes on.
_TRAINING = {
    "optimizer_lr": 1e-4,
    "optimizer_betas": [0.95, 0.999],
    "optimizer_eps": 1e-8,
    "optimizer_weight_decay": 1e-6,
    "scheduler_name": "cosine",
    "scheduler_warmup_steps": 500,
}
_HUB = dict.fromkeys(("repo_id", "private", "tags", "license", "pretrained_path"))


def to_lerobot(policy: Any, path: str | Path) -> Path:
    """Write a folder that LeRobot 0.4.4 loads and that acts as `policy` does with its present sampler.

    Args:
        policy: A `DiffusionPolicy`.
        path: Folder to write; must not exist yet, or be empty.

    Returns:
        The folder.

    Raises:
        DipoleError: LeRobot cannot represent the policy, or the folder cannot be written.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DipoleError(f"{folder} exists: choose another folder")
    if not isinstance(policy, DiffusionPolicy):
        raise _cannot(f"a policy of type '{getattr(policy, 'type_name', type(policy).__name__)}'", "use 'diffusion'")
    features = _features(policy.config)
    modes, stats = _statistics(policy.config, policy.normalizer, features)
    config = _config(policy, features, modes)
    state = {their_name(key): value for key, value in policy.state_dict().items() if not key.startswith("normalizer.")}
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        save_file({key: value.detach().contiguous().cpu() for key, value in state.items()}, temporary / MODEL)
        write_json(temporary / CONFIG, config)
        _write_processors(temporary, config, stats, policy.config.roles)
        os.chmod(temporary, 0o755)
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise DipoleError(f"{folder}: cannot be written ({error}): free some space or choose another folder") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _cannot(what: str, mend: str) -> DipoleError:
    return DipoleError(f"LeRobot cannot represent {what}: {mend}")


def _features(config: PolicyConfig) -> dict[str, dict[str, Any]]:
    """Return LeRobot's features by its own names, `action` last."""
    features: dict[str, dict[str, Any]] = {}
    for key, feature in config.observation.items():
        name = config.roles.get(key, key)
        if feature.is_image:
            height, width, channels = feature.shape
            features[name] = {"type": "VISUAL", "shape": [channels, height, width]}
        elif name in (STATE, ENVIRONMENT):
            features[name] = {"type": "STATE" if name == STATE else "ENV", "shape": list(feature.shape)}
        else:
            raise _cannot(f"the observation '{key}'", f"it knows '{STATE}', '{ENVIRONMENT}' and images")
    if STATE not in features or len(features) < 2:
        raise _cannot(
            f"a policy that sees only {', '.join(features)}", f"it needs '{STATE}' and an image or environment"
        )
    if len({tuple(feature["shape"]) for feature in features.values() if feature["type"] == "VISUAL"}) > 1:
        raise _cannot("cameras of different shapes", "record them in one shape")
    return {**features, ACTION: {"type": "ACTION", "shape": list(config.action.shape)}}


def _config(policy: DiffusionPolicy, features: dict[str, dict[str, Any]], modes: dict[str, NormMode]) -> dict[str, Any]:
    config, action = policy.config, {ACTION: features[ACTION]}
    return {
        "type": "diffusion",
        "n_obs_steps": config.obs_horizon,
        "input_features": {key: feature for key, feature in features.items() if key != ACTION},
        "output_features": action,
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        **_HUB,
        "horizon": config.pred_horizon,
        "n_action_steps": config.action_horizon,
        "normalization_mapping": modes,
        "drop_n_last_frames": max(0, config.pred_horizon - config.action_horizon - config.obs_horizon + 1),
        **_vision(config),
        **_network(config),
        **_scheduler(policy),
        "compile_model": False,
        "compile_mode": "reduce-overhead",
        "do_mask_loss_for_padding": config.objective.mask_padding,
        **_TRAINING,
    }


def _vision(config: PolicyConfig) -> dict[str, Any]:
    vision: dict[str, Any] | None = config.vision if config.images else {"name": "resnet18"}
    if vision is None or not vision["name"].startswith("resnet"):
        raise _cannot(f"the image encoder '{vision and vision['name']}'", "train with vision 'resnet18'")
    resize, crop = vision.get("resize_shape"), vision.get("crop_shape")
    return {
        "vision_backbone": vision["name"],
        "resize_shape": resize and list(resize),
        "crop_ratio": _crop_ratio(resize, crop) if resize and crop else 1.0,
        "crop_shape": crop and list(crop),
        "crop_is_random": vision.get("crop_random", True),
        "pretrained_backbone_weights": None,
        "use_group_norm": vision.get("norm", "group") == "group",
        "spatial_softmax_num_keypoints": vision.get("num_keypoints", 32),
        "use_separate_rgb_encoder_per_camera": vision.get("separate", False),
    }


def _crop_ratio(resize: list[int], crop: list[int]) -> float:
    """Return a ratio that LeRobot turns into this crop: int(ratio * size) on both sides."""
    if list(crop) == list(resize):
        return 1.0
    low = max(part / whole for part, whole in zip(crop, resize, strict=True))
    high = min((part + 1) / whole for part, whole in zip(crop, resize, strict=True))
    ratio = min((low + high) / 2, 1 - 1e-9)
    if [int(whole * ratio) for whole in resize] != list(crop):
        raise _cannot(f"a crop to {crop} after a resize to {resize}", "the crop must be one share of both sides")
    return ratio


def _network(config: PolicyConfig) -> dict[str, Any]:
    network = config.network
    if network["name"] != "unet1d" or network["per_position_levels"]:
        what = "levels per position" if network["name"] == "unet1d" else f"the network '{network['name']}'"
        raise _cannot(what, "train with network 'unet1d'")
    factor = 2 ** len(network["down_dims"])
    if config.pred_horizon % factor:
        raise _cannot(f"pred_horizon {config.pred_horizon} with these down_dims", f"use a multiple of {factor}")
    return {
        "down_dims": list(network["down_dims"]),
        "kernel_size": network["kernel_size"],
        "n_groups": network["n_groups"],
        "diffusion_step_embed_dim": network["step_embed_dim"],
        "use_film_scale_modulation": network["film_scale"],
    }


def _scheduler(policy: DiffusionPolicy) -> dict[str, Any]:
    process, sampler = policy.config.process, policy.sampler
    schedules = {ours: theirs for theirs, ours in PROCESSES.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if process.name not in schedules or sampler.process not in (None, process):
        name = process.name if sampler.process is None else sampler.process.name
        raise _cannot(f"the process '{name}'", f"train with {', '.join(schedules)}")
    prediction = policy.config.objective.prediction_type
    if prediction not in predictions:
        raise _cannot(f"prediction_type '{prediction}'", f"train with {', '.join(predictions)}")
    plain = sampler.name in ("ddim", "euler") and (sampler.name == "euler" or not sampler.eta)
    if not plain and sampler.name != "ddpm":
        raise _cannot(f"the sampler '{sampler.name}' with eta {sampler.eta}", "choose ddim (eta 0) or ddpm")
    leading = replace(sampler, spacing="leading").levels(policy.process)
    if not torch.equal(sampler.levels(policy.process), leading):
        raise _cannot(
            f"the spacing '{sampler.spacing or 'trailing'}' of {sampler.num_steps} steps",
            "choose the spacing 'leading' (dipole export --steps does; evaluate it first)",
        )
    return {
        "noise_scheduler_type": "DDPM" if sampler.name == "ddpm" else "DDIM",
        "num_train_timesteps": process.num_steps,
        "beta_schedule": schedules[process.name],
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "prediction_type": predictions[prediction],
        "clip_sample": sampler.clip is not None,
        "clip_sample_range": 1.0 if sampler.clip is None else sampler.clip,
        "num_inference_steps": sampler.num_steps,
    }


def _statistics(
    config: PolicyConfig, normalizer: Normalizer, features: dict[str, dict[str, Any]]
) -> tuple[dict[str, NormMode], dict[str, Tensor]]:
    """Return the mode of each kind of feature, and the statistics `<feature>.<statistic>`."""
    given = {config.roles.get(key, key): key for key in config.observation} | {ACTION: ACTION}
    modes: dict[str, NormMode] = {}
    stats: dict[str, Tensor] = {}
    for kind in dict.fromkeys(feature["type"] for feature in features.values()):
        keys = [key for key, feature in features.items() if feature["type"] == kind]
        ours = {config.normalization_mode(given[key]) for key in keys}
        modes[kind] = _mode(ours.pop() if len(ours) == 1 else "min_max")
        for key in keys:
            for name, value in _inverted(normalizer, given[key], modes[kind], kind == "ACTION").items():
                stats[f"{key}.{name}"] = value
    return modes, stats


def _mode(ours: Mode) -> NormMode:
    return next(theirs for theirs, mode in MODES.items() if mode == ours)


def _inverted(normalizer: Normalizer, key: str, mode: NormMode, output: bool) -> dict[str, Tensor]:
    """Return the statistics from which LeRobot's formulas give the normalizer's scale and offset."""
    scale, offset, center = normalizer.parts(key)
    scale, offset = scale.double(), offset.double()
    origin = torch.zeros_like(scale) if center is None else center.double()
    if mode == "IDENTITY":
        if bool((scale != 1).any() | (offset - scale * origin != 0).any()):
            raise DipoleError(f"'{key}' is normalised though its mode is 'identity': its configuration is wrong")
        return {}
    if mode == "MEAN_STD":
        values = {"mean": origin - offset / scale, "std": 1 / scale if output else (1 / scale - EPS).clamp(min=0)}
    else:
        low, high = BOUNDS[mode]
        values = {low: origin + (-1 - offset) / scale, high: origin + (1 - offset) / scale}
    stored = {name: value.float() for name, value in values.items()}
    if mode != "MEAN_STD":
        width = stored[high].double() - stored[low].double()
        width = torch.where(width == 0, EPS, width)
        # Such a feature lives in the last digits of its numbers: LeRobot's float32 bounds cannot hold its range.
        if bool(((width * scale / 2 - 1).abs() > 1e-2).any()):
            raise _cannot(f"the narrow range of '{key}' in float32", "normalise it by mean_std")
    return stored


def _write_processors(folder: Path, config: dict[str, Any], stats: dict[str, Tensor], roles: dict[str, str]) -> None:
    norm_map = config["normalization_mapping"]
    outputs = config["output_features"]
    before = {"eps": EPS, "features": {**config["input_features"], **outputs}, "norm_map": norm_map}
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": dict(roles)}},
        {"registry_name": "to_batch_processor", "config": {}},
        device,
        {"registry_name": NORMALIZER_STEP, "config": before},
    ]
    _write_processor(folder / PREPROCESSOR, steps, 3, stats)
    after = {"registry_name": UNNORMALIZER_STEP, "config": {"eps": EPS, "features": outputs, "norm_map": norm_map}}
    _write_processor(folder / POSTPROCESSOR, [after, device], 0, stats)


def _write_processor(path: Path, steps: list[dict[str, Any]], index: int, stats: dict[str, Tensor]) -> None:
    state = f"{path.stem}_step_{index}_{steps[index]['registry_name']}.safetensors"
    steps[index]["state_file"] = state
    save_file(stats, path.with_name(state))
    write_json(path, {"name": path.stem, "steps": steps})
