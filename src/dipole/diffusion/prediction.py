"""What a network predicts, and the linear maps between those quantities and x0.

| prediction_type | network output                  | used by                              |
|-----------------|---------------------------------|--------------------------------------|
| `x0`            | x0                              | DiffusionDrive, Decision Diffuser    |
| `epsilon`       | eps                             | DDPM, Diffusion Policy               |
| `v`             | alpha eps - sigma x0            | Salimans & Ho 2022                   |
| `velocity`      | eps - x0                        | flow matching (level 1 is noise)     |
| `edm`           | F of Karras et al. 2022, eq. 7  | BESO, MoDE, policy-guided diffusion  |

For a process x = alpha x0 + sigma eps every one of them is  x0 = c_x x + c_out output.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dipole.diffusion.process import LevelLike, Process
from dipole.diffusion.tensors import expand, weighted_sum

PredictionType = Literal["x0", "epsilon", "v", "velocity", "edm"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


class Conversion(NamedTuple):
    """`x0 = x * c_x + output * c_out`, and what the network is fed, `x * c_in`. Shaped as the level, float64."""

    c_in: Tensor
    c_x: Tensor
    c_out: Tensor


def conversion(prediction_type: PredictionType, process: Process, t: LevelLike, sigma_data: float = 0.5) -> Conversion:
    """Return the coefficients that turn a network's output at level `t` into x0.

    Args:
        prediction_type: What the network predicts.
        process: The forward process.
        t: Level, any shape.
        sigma_data: Standard deviation of the data, for `edm` only.

    Raises:
        ValueError: Unknown prediction type.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    one = torch.ones_like(alpha)
    if prediction_type == "x0":
        return Conversion(one, 0 * one, one)
    if prediction_type == "epsilon":
        return Conversion(one, 1 / alpha, -sigma / alpha)
    if prediction_type == "v":
        power = alpha**2 + sigma**2
        return Conversion(one, alpha / power, -sigma / power)
    if prediction_type == "velocity":
        return Conversion(one, 1 / (alpha + sigma), -sigma / (alpha + sigma))
    if prediction_type == "edm":
        ratio = sigma / alpha
        power = ratio**2 + sigma_data**2
        return Conversion(power.rsqrt() / alpha, sigma_data**2 / power / alpha, ratio * sigma_data * power.rsqrt())
    raise ValueError(f"unknown prediction_type '{prediction_type}': known are {', '.join(PREDICTION_TYPES)}")


class FloatConversion(NamedTuple):
    """As `Conversion`, in plain numbers: the fast path when the whole batch is at one level."""

    c_in: float
    c_x: float
    c_out: float


@lru_cache(maxsize=8192)
def float_conversion(prediction_type: PredictionType, process: Process, t: float, sigma_data: float) -> FloatConversion:
    """Return `conversion` at one level as numbers, remembered.

    Raises:
        ValueError: The output does not determine x0 at this level (epsilon where there is no signal).
    """
    value = FloatConversion(*(float(c) for c in conversion(prediction_type, process, t, sigma_data)))
    if not all(map(math.isfinite, value)):
        raise ValueError(f"prediction_type '{prediction_type}' does not determine x0 at level {t:g} of {process}")
    return value


def to_x0(
    output: Tensor, x: Tensor, t: LevelLike, process: Process, prediction_type: PredictionType, sigma_data: float = 0.5
) -> Tensor:
    """Return x0 from a network output: `output`, `x`: `[B, ...]`; `t`: number, `[B]` or `[B, T]`."""
    if output.dtype is not x.dtype:  # a network under autocast answers in half precision
        output = output.to(x.dtype)
    if prediction_type == "x0":
        return output
    if not isinstance(t, Tensor):
        number = float_conversion(prediction_type, process, float(t), sigma_data)
        return weighted_sum(number.c_x, x, number.c_out, output)
    _, c_x, c_out = (expand(c, x).to(x) for c in conversion(prediction_type, process, t, sigma_data))
    return weighted_sum(c_x, x, c_out, output)


def to_output(
    x0: Tensor, x: Tensor, t: LevelLike, process: Process, prediction_type: PredictionType, sigma_data: float = 0.5
) -> Tensor:
    """Return the network output that means `x0`: the inverse of `to_x0`. Undefined where the output has no effect."""
    _, c_x, c_out = (expand(c, x).to(x) for c in conversion(prediction_type, process, t, sigma_data))
    return (x0 - c_x * x) / c_out


def to_epsilon(x0: Tensor, x: Tensor, t: LevelLike, process: Process) -> Tensor:
    """Return the noise implied by `x0`: eps = (x - alpha x0) / sigma. Undefined at the clean level."""
    alpha, sigma = _coefficients(process, t, x)
    return (x - alpha * x0) / sigma


def to_score(x0: Tensor, x: Tensor, t: LevelLike, process: Process) -> Tensor:
    """Return the score implied by `x0`: -eps / sigma = (alpha x0 - x) / sigma^2."""
    alpha, sigma = _coefficients(process, t, x)
    return (alpha * x0 - x) / sigma**2


def target(
    x0: Tensor,
    epsilon: Tensor,
    t: LevelLike,
    process: Process,
    prediction_type: PredictionType,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return what the network should output for data `x0` and noise `epsilon`; `t`: number, `[B]` or `[B, T]`."""
    if prediction_type == "x0":
        return x0
    if prediction_type == "epsilon":
        return epsilon
    if prediction_type == "velocity":
        return epsilon - x0
    alpha, sigma = _coefficients(process, t, x0)
    if prediction_type == "v":
        return alpha * epsilon - sigma * x0
    return to_output(x0, alpha * x0 + sigma * epsilon, t, process, prediction_type, sigma_data)


def add_noise(x0: Tensor, epsilon: Tensor, t: LevelLike, process: Process) -> Tensor:
    """Return x_t = alpha(t) x0 + sigma(t) epsilon; `t`: number, `[B]` or `[B, T]`."""
    alpha, sigma = _coefficients(process, t, x0)
    return weighted_sum(alpha, x0, sigma, epsilon)


def _coefficients(process: Process, t: LevelLike, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma in the dtype and on the device of `x`, broadcasting against it."""
    return expand(process.alpha(t), x).to(x), expand(process.sigma(t), x).to(x)
