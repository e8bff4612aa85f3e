"""The exact expert cache of MoDE: for each level of a sampler's list and each block, the chosen experts fused into one.

A cache serves a list of levels and one state of the weights. It holds K x L fused experts, each k times as large as
one expert. Changed weights are noticed by their storage and version counters, and by a few probed values, because
writes through `.data` (some EMA and averaging code) do not raise the counters; such a write to a single entry that is
not probed goes unnoticed: call `MoDE.clear_cache` after surgery of that kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dipole.errors import DipoleError
from dipole.networks.hooks import BlockHook

if TYPE_CHECKING:
    from dipole.networks.moe import MoDE

_PROBES = 32
_ROUNDING = 1e-6


class FusedExpert(NamedTuple):
    """The weighted sum of k SwishGLU experts as one: w1 `[2kH, C]`, b1 `[2kH]`, w2 `[C, kH]`."""

    w1: Tensor
    b1: Tensor
    w2: Tensor


class FusedLevel(NamedTuple):
    """What a network needs at one level: its noise embedding `[1, C]` and one fused expert per block."""

    time: float
    noise: Tensor
    experts: list[FusedExpert]


class ExpertCache:
    """Fused experts of a list of levels, each made when its level is first visited.

    Entries are kept by the level's place in the list. A time belongs to a level if they agree to within float32's
    rounding (solvers and samplers may compute it in another precision); the experts are those of the very time given.

    Args:
        network: The network, whose weights' state is noted.
        times: `[K]` network times.

    Attributes:
        times: The network times as numbers.
        fingerprint: State of the weights.
    """

    def __init__(self, network: MoDE, times: Tensor) -> None:
        self.times = tuple(times.tolist())
        self.fingerprint = fingerprint(network)
        self._levels: list[FusedLevel | None] = [None] * len(self.times)

    def serves(self, network: MoDE, times: Tensor) -> bool:
        """Return whether the cache was made for these levels and the network's present weights."""
        return tuple(times.tolist()) == self.times and fingerprint(network) == self.fingerprint

    def at(self, network: MoDE, time: Tensor) -> FusedLevel | None:
        """Return what `network` needs for rows at `time` `[B]`; None when they differ or are not on the list."""
        now = float(time[0])
        if not (len(time) == 1 or time.stride(0) == 0 or bool((time == now).all())):
            return None
        index = next((i for i, t in enumerate(self.times) if abs(t - now) <= _ROUNDING * max(1.0, abs(t))), None)
        if index is None:
            return None
        level = self._levels[index]
        if level is None or level.time != now:
            level = self._levels[index] = _fuse(network, time[:1])
        return level


def _fuse(network: MoDE, time: Tensor) -> FusedLevel:
    """Choose and fuse the experts of one level (`time` `[1]`) with the network's present weights."""
    # Ordinary tensors even inside inference mode: guidance may later differentiate through them.
    with torch.inference_mode(False), torch.no_grad():
        noise = network.noise_embedding(time.clone())
        experts = []
        for block in network.layers:
            routing = block.router(noise)
            experts.append(block.experts.fuse(routing.selected[0], routing.weights[0]))
    return FusedLevel(float(time[0]), noise, experts)


@dataclass(frozen=True)
class PreparedMoDE:
    """A network whose experts are fused for the levels of one sampler; called like the network itself."""

    network: MoDE
    cache: ExpertCache

    def __call__(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor], hook: BlockHook | None = None) -> Tensor:
        """Return `[B, T, D]`, as `MoDE.forward` does.

        Raises:
            DipoleError: The rows are not all at one cached level, and the network is configured to refuse that.
        """
        level = self.cache.at(self.network, time)
        if level is None:
            message = (
                f"MoDE expert cache missed: it holds {len(self.cache.times)} levels, and the batch is not at one of "
                "them (midpoint solvers and per-row levels visit others); experts are routed as usual, more slowly"
            )
            if self.network.config.cache_miss == "raise":
                raise DipoleError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            routed: Tensor = self.network(x, time, cond, hook)
            return routed
        return self.network.denoise(x, level.noise, cond, level.experts, hook)


def fingerprint(network: MoDE) -> tuple[object, ...]:
    """Return what changes when any weight the fused experts depend on does."""
    parameters = [
        *network.embed_noise.parameters(),
        *(p for block in network.layers for part in (block.router, block.experts) for p in part.parameters()),
    ]
    identity = [(p.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.shape) for p in parameters]
    probes = [p.detach().reshape(-1)[:: max(1, p.numel() // _PROBES)].double() for p in parameters]
    return (*identity, *torch.cat(probes).tolist())
