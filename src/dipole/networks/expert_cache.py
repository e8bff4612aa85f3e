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


class FusedExpert(NamedTuple):
    """The weighted sum of k SwishGLU experts as one: w1 `[2kH, C]`, b1 `[2kH]`, w2 `[C, kH]`."""

    w1: Tensor
    b1: Tensor
    w2: Tensor


@dataclass(frozen=True)
class ExpertCache:
    """Fused experts of a list of levels.

    Attributes:
        times: Network times of the levels, as numbers.
        fingerprint: State of the weights they were made from.
        noise: `[K, C]` noise embeddings.
        experts: K lists of L fused experts.
    """

    times: tuple[float, ...]
    fingerprint: tuple[object, ...]
    noise: Tensor
    experts: tuple[list[FusedExpert], ...]

    @classmethod
    def build(cls, network: MoDE, times: Tensor) -> ExpertCache:
        """Choose and fuse the experts of each level with the network's present weights."""
        # Ordinary tensors even inside inference mode: guidance may later differentiate through them.
        with torch.inference_mode(False), torch.no_grad():
            own = times.to(device=network.position.device, dtype=network.position.dtype)
            noise = network.noise_embedding(own)
            routings = [block.router(noise) for block in network.blocks]
            experts = tuple(
                [
                    block.experts.fuse(routing.selected[level], routing.weights[level])
                    for block, routing in zip(network.blocks, routings, strict=True)
                ]
                for level in range(len(own))
            )
        return cls(tuple(own.tolist()), fingerprint(network), noise, experts)

    def serves(self, network: MoDE, times: Tensor) -> bool:
        """Return whether the cache was made for these levels and the network's present weights."""
        wanted = tuple(times.to(network.position.dtype).tolist())
        return wanted == self.times and fingerprint(network) == self.fingerprint

    def index(self, time: Tensor) -> int | None:
        """Return which level the rows `[B]` are at; None when they differ or the level is not in the cache."""
        first = float(time[0])
        shared = len(time) == 1 or time.stride(0) == 0 or bool((time == first).all())
        return self.times.index(first) if shared and first in self.times else None


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
        level = self.cache.index(time)
        if level is None:
            message = (
                f"MoDE expert cache missed: it holds {len(self.cache.times)} levels, and the batch is not at one of "
                "them (midpoint solvers and per-row levels visit others); experts are routed as usual, more slowly"
            )
            if self.network.config.cache_miss == "raise":
                raise DipoleError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return self.network(x, time, cond, hook)
        noise = self.cache.noise[level : level + 1]
        return self.network.denoise(x, noise, cond, self.cache.experts[level], hook)


def fingerprint(network: MoDE) -> tuple[object, ...]:
    """Return what changes when any weight the fused experts depend on does."""
    parameters = [
        *network.embed_noise.parameters(),
        *(p for block in network.blocks for part in (block.router, block.experts) for p in part.parameters()),
    ]
    identity = [(p.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.shape) for p in parameters]
    probes = [p.detach().reshape(-1)[:: max(1, p.numel() // _PROBES)].double() for p in parameters]
    return (*identity, *torch.cat(probes).tolist())
