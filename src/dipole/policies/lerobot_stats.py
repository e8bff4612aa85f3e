"""How a LeRobot policy normalises: read from its processor files (0.4 and later) or from its weights (0.3 and earlier).

With eps = 1e-8, as LeRobot computes it:

    MEAN_STD    y = (x - mean) / (std + eps)              x = std y + mean
    MIN_MAX     y = 2 (x - min) / w - 1                   x = (y + 1) / 2 w + min
    QUANTILES   as MIN_MAX with q01 and q99; QUANTILE10 with q10 and q90

w = max - min, or eps where that is 0 (inputs up to 0.3: max - min + eps). A statistic that is missing, which LeRobot
passes over in silence, is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dipole.data.normalizer import Mode, Normalizer
from dipole.errors import DipoleError, unknown
from dipole.policies.lerobot_config import ACTION, LeRobotConfig, LeRobotFeature, NormMode
from dipole.serialization import from_dict, read_json

EPS = 1e-8
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER_STEP, UNNORMALIZER_STEP = "normalizer_processor", "unnormalizer_processor"
_RENAME_STEP = "rename_observations_processor"

BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
MODES: dict[NormMode, Mode] = {
    "MIN_MAX": "min_max",
    "MEAN_STD": "mean_std",
    "QUANTILES": "quantiles",
    "QUANTILE10": "quantiles10",
    "IDENTITY": "identity",
}

# Modules of a 0.3 policy that hold statistics; the second normalises the targets of training.
_INPUTS, _TARGETS, _OUTPUTS = "normalize_inputs", "normalize_targets", "unnormalize_outputs"


@dataclass(frozen=True)
class Statistics:
    """What is needed to normalise a policy's features.

    Attributes:
        normalizer: Statistics of the features the network sees, under the names they come with, and of `action`.
        modes: How each of them is normalised.
        renamed: LeRobot's name of a feature -> the name it comes with, where that is another one.
    """

    normalizer: Normalizer
    modes: dict[str, Mode]
    renamed: dict[str, str]


@dataclass(frozen=True)
class _NormalizerStep:
    """`config` of a normalising step."""

    eps: float
    features: dict[str, LeRobotFeature]
    norm_map: dict[str, NormMode]
    normalize_observation_keys: tuple[str, ...] | None = None


@dataclass
class _Parts:
    """Scale, offset and origin of the features read so far."""

    affine: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    origin: dict[str, Tensor] = field(default_factory=dict)
    modes: dict[str, Mode] = field(default_factory=dict)

    def add(
        self, key: str, feature: LeRobotFeature, mode: NormMode, found: Mapping[str, Tensor], **options: Any
    ) -> None:
        shape = (feature.shape[0], 1, 1) if feature.type == "VISUAL" else feature.shape
        scale, offset, origin = _affine(key, shape, mode, found, **options)
        self.affine[key], self.origin[key], self.modes[key] = (scale, offset), origin, MODES[mode]


def _affine(
    key: str,
    shape: tuple[int, ...],
    mode: NormMode,
    found: Mapping[str, Tensor],
    where: str,
    eps: float,
    output: bool,
    always_eps: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scale, offset, origin), float64: y = scale (x - origin) + offset."""

    def need(name: str) -> Tensor:
        if name not in found:
            raise DipoleError(f"{where}: statistic '{name}' of '{key}' is missing, which {mode} needs")
        value = found[name].double()
        if value.dim() == 1 and len(shape) == 3:
            value = value[:, None, None]
        if tuple(value.shape) != shape:
            raise DipoleError(f"{where}: '{name}' of '{key}' has shape {list(value.shape)}, expected {list(shape)}")
        if not bool(torch.isfinite(value).all()):
            raise DipoleError(f"{where}: '{name}' of '{key}' is not finite: this policy was never given statistics")
        return value

    if mode == "IDENTITY":
        return torch.ones(shape), torch.zeros(shape), torch.zeros(shape)
    if mode == "MEAN_STD":
        mean, std = need("mean"), need("std")
        width = torch.where(std == 0, eps, std) if output else std + eps
        return 1 / width, torch.zeros(shape), mean
    low, high = (need(name) for name in BOUNDS[mode])
    width = high - low
    width = width + eps if always_eps and not output else torch.where(width == 0, eps, width)
    return 2 / width, -torch.ones(shape), low


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        DipoleError: It is missing or damaged.
    """
    if not path.is_file():
        raise DipoleError(f"{path}: missing: copy the whole checkpoint folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DipoleError(f"{path}: not a safetensors file ({error}): restore it from a copy") from None


def from_weights(config: LeRobotConfig, weights: dict[str, Tensor], path: Path) -> Statistics:
    """Return the statistics inside the weights of a policy of LeRobot 0.3 or earlier; takes them out of `weights`."""
    parts = _Parts()
    for side, features in ((_INPUTS, config.input_features), (_TARGETS, config.output_features)):
        for key, feature in features.items():
            found = _taken(weights, side, key)
            if side == _INPUTS and key in config.used:
                mode = config.normalization_mapping.get(feature.type, "IDENTITY")
                where = f"{path}: {side}.buffer_{_joined(key)}"
                parts.add(key, feature, mode, found, where=where, eps=EPS, output=False, always_eps=True)
    action = config.output_features[ACTION]
    mode = config.normalization_mapping.get(action.type, "IDENTITY")
    found = _taken(weights, _OUTPUTS, ACTION)
    parts.add(ACTION, action, mode, found, where=f"{path}: {_OUTPUTS}.buffer_action", eps=EPS, output=True)
    return Statistics(Normalizer(parts.affine, parts.origin), parts.modes, {})


def _joined(key: str) -> str:
    return key.replace(".", "_")


def _taken(weights: dict[str, Tensor], side: str, key: str) -> dict[str, Tensor]:
    """Take the statistics of a feature out of `weights`.

    The name is joined and compared: splitting the joined one at each `_` would break names that hold a `_`.
    """
    prefix = f"{side}.buffer_{_joined(key)}."
    return {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def from_processors(config: LeRobotConfig, folder: Path) -> Statistics:
    """Return the statistics in the processor files of LeRobot 0.4 and later."""
    parts, path = _Parts(), folder / PREPROCESSOR
    steps = _steps(path, (_RENAME_STEP, "to_batch_processor"), NORMALIZER_STEP)
    renamed = _renamed([values["config"] for name, values in steps if name == _RENAME_STEP], config, path)
    found, step = _normalizer(steps, NORMALIZER_STEP, path)
    chosen = step.normalize_observation_keys
    for key, feature in config.used.items():
        if key not in step.features:
            raise DipoleError(f"{path}: '{key}' is not among the features of its {NORMALIZER_STEP}")
        mode = step.norm_map.get(step.features[key].type, "IDENTITY")
        mode = mode if chosen is None or key in chosen else "IDENTITY"
        options = {"where": str(path), "eps": step.eps, "output": False}
        parts.add(renamed.get(key, key), feature, mode, found.get(key, {}), **options)
    path = folder / POSTPROCESSOR
    found, step = _normalizer(_steps(path, (), UNNORMALIZER_STEP), UNNORMALIZER_STEP, path)
    mode = step.norm_map.get("ACTION", "IDENTITY")
    options = {"where": str(path), "eps": step.eps, "output": True}
    parts.add(ACTION, config.output_features[ACTION], mode, found.get(ACTION, {}), **options)
    return Statistics(Normalizer(parts.affine, parts.origin), parts.modes, renamed)


def _steps(path: Path, others: tuple[str, ...], wanted: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, step) of each step of a processor file; steps with other effects on numbers are refused."""
    values = read_json(path)
    steps = values.get("steps") if isinstance(values, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise DipoleError(f"{path}: not a processor file (key 'steps' is missing)")
    named = []
    for step in steps:
        name = str(step.get("registry_name", step.get("class", "")))
        if name not in (*others, wanted, "device_processor"):
            raise unknown(f"processing step in {path}:", name, (*others, wanted, "device_processor"))
        values = step.get("config", {})
        if not isinstance(values, dict):
            raise DipoleError(f"{path}: 'config' of step '{name}' is not a table")
        if name == "device_processor" and values.get("float_dtype") not in (None, "float32", "float"):
            raise DipoleError(f"{path}: float_dtype '{values['float_dtype']}': only float32 policies can be imported")
        named.append((name, {**step, "config": values}))
    if [name for name, _ in named].count(wanted) != 1:
        raise DipoleError(f"{path}: there must be one step '{wanted}'")
    return named


def _renamed(steps: list[dict[str, Any]], config: LeRobotConfig, path: Path) -> dict[str, str]:
    """Return LeRobot's name -> given name of the features that are renamed."""
    tables = [step.get("rename_map", {}) for step in steps]
    table = tables[0] if tables else {}
    if len(tables) > 1 or not isinstance(table, dict) or not all(isinstance(new, str) for new in table.values()):
        raise DipoleError(f"{path}: 'rename_map' is not one table of names")
    used = [(old, new) for old, new in table.items() if new in config.used and old != new]
    renamed = {new: old for old, new in used}
    given = [renamed.get(key, key) for key in config.used]
    twice = [new for _, new in used if [n for _, n in used].count(new) > 1] or [n for n in given if given.count(n) > 1]
    if twice:
        raise DipoleError(f"{path}: 'rename_map' is ambiguous about '{twice[0]}'")
    return renamed


def _normalizer(
    steps: list[tuple[str, dict[str, Any]]], wanted: str, path: Path
) -> tuple[dict[str, dict[str, Tensor]], _NormalizerStep]:
    """Return the statistics by feature and name, and the configuration, of the normalising step."""
    step = next(values for name, values in steps if name == wanted)
    where = f"{path}: {wanted}"
    config = from_dict(_NormalizerStep, {"eps": EPS, "normalize_observation_keys": None, **step["config"]}, where)
    state = step.get("state_file")
    if state is None:
        return {}, config
    if not isinstance(state, str) or Path(state).name != state:
        raise DipoleError(f"{where}: state_file {state!r} is not the name of a file in this folder")
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in read_safetensors(path.parent / state).items():
        key, _, statistic = name.rpartition(".")
        found.setdefault(key, {})[statistic] = value
    return found, config
