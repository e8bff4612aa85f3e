"""What the architectures share: the embedding of noise levels and the flattening of conditioning.

Source: Vaswani et al. 2017 (sinusoids), in the form of DDPM and diffusion_policy: for `dim` = 2h the frequencies are
10000^(-i/(h-1)), i = 0..h-1, and the embedding is [sin(time f_0), .., sin(time f_{h-1}), cos(time f_0), ..].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dipole.errors import DipoleError

CondDims = Mapping[str, tuple[int, int]]
"""Name -> (N, C) of every conditioning set a network is built for, in the order it is used."""


class SinusoidalEmbedding(nn.Module):
    """Sinusoidal embedding of network times: `[...]` -> `[..., dim]`.

    Args:
        dim: Even, at least 4.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise DipoleError(f"step embedding of width {dim}: it must be even and at least 4")
        half = dim // 2
        # In float32 from the first operation on: published weights were trained with exactly these roundings.
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """Embed `time` `[...]`; returns `[..., dim]`."""
        angle = time.unsqueeze(-1) * self.frequencies
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class StepEncoder(nn.Sequential):
    """Sinusoids of the level(s), then Linear, Mish, Linear: `[B]` or `[B, T]` -> `[B, out]`.

    Args:
        dim: Width of the sinusoidal embedding of one level.
        hidden: Width between the two linear layers.
        out: Width of the result.
        positions: None for one level per sample; T for one per position, whose embeddings are concatenated
            (Streaming Diffusion Policy), so that the horizon is part of the weights.
    """

    def __init__(self, dim: int, hidden: int, out: int, positions: int | None = None) -> None:
        super().__init__(
            SinusoidalEmbedding(dim), nn.Linear(dim * (positions or 1), hidden), nn.Mish(), nn.Linear(hidden, out)
        )
        self.positions = positions

    def forward(self, time: Tensor) -> Tensor:
        """Encode `time`; with `positions`, a `[B]` time is the same level at every position."""
        if self.positions is not None and time.dim() == 1:
            time = time[:, None].expand(-1, self.positions)
        elif self.positions is None and time.dim() != 1:
            raise DipoleError(
                "the network was built for one noise level per sample and got one per position: "
                "build and train it with per_position_levels=True"
            )
        encoding: Tensor = self[3](self[2](self[1](self[0](time).flatten(1))))
        return encoding


def flat_width(cond_dims: CondDims) -> int:
    """Return the width of all conditioning sets, flattened and concatenated."""
    return sum(tokens * channels for tokens, channels in cond_dims.values())


def flatten_cond(cond: Mapping[str, Tensor] | None, names: Sequence[str]) -> Tensor | None:
    """Return the sets `names` of `cond` (each `[B, N, C]`), flattened and concatenated: `[B, sum of N C]`.

    Returns None when the network takes no conditioning.

    Raises:
        DipoleError: A set the network was built for is missing.
    """
    if not names:
        return None
    flat = [cond_set(cond, name).flatten(1) for name in names]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


def cond_set(cond: Mapping[str, Tensor] | None, name: str) -> Tensor:
    """Return one conditioning set `[B, N, C]`, or raise a DipoleError that names it."""
    if cond is None or name not in cond:
        given = ", ".join(cond) if cond else "nothing"
        raise DipoleError(f"conditioning '{name}' is missing: the network was built for it and got {given}")
    return cond[name]
