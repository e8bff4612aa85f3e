"""Denoisers: `D(x, t, cond) -> x0_hat`, the one interface samplers, guidance and composition speak.

A network becomes a denoiser with `NetworkDenoiser`; guidance and composition are functions from denoisers to a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dipole.diffusion.prediction import PredictionType, conversion, float_conversion, to_x0
from dipole.diffusion.process import Process
from dipole.diffusion.tensors import Level, Sample, expand, rows

Processes = Process | Mapping[str, Process]


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
    """Return the denoiser made ready for these levels and this conditioning, or itself if it has nothing to prepare."""
    ready: Callable[[Level, Any], Denoiser] | None = getattr(denoiser, "prepare", None)
    return denoiser if ready is None else ready(levels, cond)


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network wrapped as a denoiser.

    Attributes:
        network: `network(x, time, cond) -> output`, with `x` `[B, ...]` scaled by the prediction's c_in, and `time`
            `[B]` or `[B, T]` from `process.network_time`. With parts, all three and the output are dicts.
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
    clock: Literal["noise_at_one", "data_at_one"] = "noise_at_one"

    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        """Return x0_hat, shaped as `x`."""
        if isinstance(x, Mapping):
            return self._parts(x, t, cond)
        process = self._process()
        output = self.network(self._scaled(x, t, process), self._time(x, t, process), cond)
        return self._x0(output, x, t, process)

    def prepare(self, levels: Level, cond: Any) -> Denoiser:
        """Let the network prepare for these levels, told in its own time, if it can; else return self."""
        ready = getattr(self.network, "prepare", None)
        if ready is None or not isinstance(levels, Tensor):
            return self
        times = self._times(levels[:-1], self._process())
        return NetworkDenoiser(ready(times, cond), self.process, self.prediction_type, self.sigma_data, self.clock)

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

    def _scaled(self, x: Tensor, t: Any, process: Process) -> Tensor:
        if self.prediction_type != "edm":
            return x
        if not isinstance(t, Tensor):
            return x * float_conversion(self.prediction_type, process, float(t), self.sigma_data).c_in
        return x * expand(conversion(self.prediction_type, process, t, self.sigma_data).c_in, x).to(x.dtype)

    def _times(self, t: Tensor | float, process: Process) -> Tensor:
        if self.clock == "data_at_one":
            t = 1 - t
        return process.network_time(t)

    def _time(self, x: Tensor, t: Any, process: Process) -> Tensor:
        if not isinstance(t, Tensor):
            return _time_rows(process, float(t), self.clock, x.shape[0], x.dtype, x.device)
        return self._times(rows(t, x), process).to(x.dtype)

    def _x0(self, output: Tensor, x: Tensor, t: Any, process: Process) -> Tensor:
        if self.clock == "data_at_one":
            output = -output
        return to_x0(output, x, t, process, self.prediction_type, self.sigma_data)


@lru_cache(maxsize=4096)
def _time_rows(process: Process, t: float, clock: str, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `[B]` network times for one level, remembered: samplers visit the same few levels again and again."""
    time = process.network_time(1 - t if clock == "data_at_one" else t)
    return time.to(dtype=dtype, device=device).expand(batch)
