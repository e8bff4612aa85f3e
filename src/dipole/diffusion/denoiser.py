"""Denoisers: `D(x, t, cond) -> x0_hat`, the one interface samplers, guidance and composition speak.

A network becomes a denoiser with `NetworkDenoiser`; guidance and composition turn denoisers into a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dipole.diffusion.prediction import PredictionType, conversion, float_conversion, to_x0
from dipole.diffusion.process import Flow, LevelLike, Process
from dipole.diffusion.tensors import Level, Sample, expand, rows, scaled, weighted_sum

Processes = Process | Mapping[str, Process]
Clock = Literal["noise_at_one", "data_at_one"]


class Denoiser(Protocol):
    """The expected clean sample, given a noisy one.

    Args of `__call__`: `x` `[B, ...]` (or parts); `t` a number (every row at that level), `[B]` or `[B, T]` (or parts);
    `cond` whatever the network behind it takes, batch first. Returns x0_hat, shaped as `x`.

    A denoiser may also have `prepare(levels, cond) -> Denoiser`, called once by the sampler before its loop: the place
    to compute what does not change from level to level (see `prepare`).
    """

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return x0_hat."""


def prepare(denoiser: Denoiser, levels: Level, cond: Any) -> Denoiser:
    """Return the denoiser made ready for these levels and this conditioning, or itself if it has nothing to prepare.

    What comes back is called with this very conditioning only. A wrapper of denoisers passes the call on.
    """
    ready: Callable[[Level, Any], Denoiser] | None = getattr(denoiser, "prepare", None)
    return denoiser if ready is None else ready(levels, cond)


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network wrapped as a denoiser.

    Attributes:
        network: `network(x, time, cond) -> output`, with `x` `[B, ...]` scaled by the prediction's c_in, and `time`
            `[B]` or `[B, T]` from `process.network_time`, float32 even where `x` is half precision (levels up to 1000
            need it). With parts, x, time and the output are dicts.
        process: Its process (with parts: one for all, or one per part).
        prediction_type: What the output means.
        sigma_data: For `edm`.
        clock: `data_at_one` for flow networks trained with t = 1 at the data: they are told 1 - t and their
            velocity x0 - eps changes sign.
    """

    network: Callable[..., Any]
    process: Processes
    prediction_type: PredictionType = "epsilon"
    sigma_data: float = 0.5
    clock: Clock = "noise_at_one"

    def __post_init__(self) -> None:
        if self.clock == "data_at_one" and not isinstance(self.process, Mapping | Flow):
            raise ValueError(f"clock 'data_at_one' is for Flow processes, not {self.process}")

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return x0_hat, shaped as `x`."""
        if not isinstance(x, Tensor):
            return self._parts(x, t, cond)
        if isinstance(t, Tensor) or isinstance(self.process, Mapping):
            process = self._process()
            output = self.network(self._scaled(x, t, process), self._time(x, t, process), cond)
            return self._x0(output, x, t, process)
        # The fast path: all rows at one level, told as a number.
        at = self._shared_level(x, t, self.process)
        output = self.network(x if at.c_in == 1.0 else scaled(x, at.c_in), at.time, cond)
        if self.prediction_type == "x0" or output.dtype is not x.dtype:
            return self._x0(output, x, t, self.process)
        return weighted_sum(at.c_x, x, at.c_out, output)

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Let the network prepare for these levels, told as its times (float64), if it can; else return self."""
        ready = getattr(self.network, "prepare", None)
        if ready is None:
            return self
        times: Any
        if isinstance(levels, Mapping):
            times = {key: self._visited(part, key) for key, part in levels.items()}
        elif isinstance(self.process, Mapping):
            times = {key: self._visited(levels, key) for key in self.process}
        else:
            times = self._visited(levels)
        return replace(self, network=ready(times, cond))

    def _visited(self, levels: Tensor, part: str | None = None) -> Tensor:
        return network_time(levels[:-1], self._process(part), torch.float64, self.clock)

    def _process(self, part: str | None = None) -> Process:
        if isinstance(self.process, Mapping):
            if part is None:
                raise ValueError("one process per part was given, but the sample has no parts")
            return self.process[part]
        return self.process

    def _parts(self, x: Mapping[str, Tensor], t: Any, cond: Any) -> Sample:
        level = {key: t[key] if isinstance(t, Mapping) else t for key in x}
        process = {key: self._process(key) for key in x}
        output = self.network(
            {key: self._scaled(x[key], level[key], process[key]) for key in x},
            {key: self._time(x[key], level[key], process[key]) for key in x},
            cond,
        )
        return {key: self._x0(output[key], x[key], level[key], process[key]) for key in x}

    def _shared_level(self, x: Tensor, t: Any, process: Process) -> _SharedLevel:
        return _shared_level(
            process, self.prediction_type, self.sigma_data, self.clock, float(t), x.shape[0], x.dtype, x.device
        )

    def _scaled(self, x: Tensor, t: Any, process: Process) -> Tensor:
        if self.prediction_type != "edm":
            return x
        if not isinstance(t, Tensor):
            return scaled(x, float_conversion(self.prediction_type, process, float(t), self.sigma_data).c_in)
        return x * expand(conversion(self.prediction_type, process, t, self.sigma_data).c_in, x).to(x)

    def _time(self, x: Tensor, t: Any, process: Process) -> Tensor:
        if not isinstance(t, Tensor):
            return self._shared_level(x, t, process).time
        return network_time(rows(t, x), process, x.dtype, self.clock)

    def _x0(self, output: Tensor, x: Tensor, t: Any, process: Process) -> Tensor:
        return to_x0(
            to_our_clock(output, self.prediction_type, self.clock), x, t, process, self.prediction_type, self.sigma_data
        )


def network_time(
    t: LevelLike, process: Process, dtype: torch.dtype = torch.float32, clock: Clock = "noise_at_one"
) -> Tensor:
    """Return what a network is told about level `t`, shaped as it; float32 or, for float64 samples, float64."""
    time = process.network_time(1 - t if clock == "data_at_one" else t)
    return time.to(torch.promote_types(dtype, torch.float32))


def to_our_clock(output: Tensor, prediction_type: PredictionType, clock: Clock) -> Tensor:
    """Return a network's output in the convention of this library: with t = 1 at the data, velocity is x0 - eps."""
    return -output if clock == "data_at_one" and prediction_type == "velocity" else output


class _SharedLevel(NamedTuple):
    """What a call at one level for all rows needs: `[B]` network times and the coefficients of the conversion to x0."""

    time: Tensor
    c_in: float
    c_x: float
    c_out: float


@lru_cache(maxsize=4096)
def _shared_level(
    process: Process,
    prediction_type: PredictionType,
    sigma_data: float,
    clock: Clock,
    t: float,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _SharedLevel:
    """Return the constants of a level, remembered: samplers visit the same few levels again and again."""
    number = float_conversion(prediction_type, process, t, sigma_data)
    sign = -1.0 if clock == "data_at_one" and prediction_type == "velocity" else 1.0
    with torch.inference_mode(False):
        time = network_time(t, process, dtype, clock).to(device).expand(batch)
    return _SharedLevel(time, number.c_in, number.c_x, sign * number.c_out)
