"""Conditional 1-D U-Net over the action chunk: the convolutional Diffusion Policy.

Source: Chi et al. 2023, "Diffusion Policy" (DP-C); Janner et al. 2022 (the U-Net); Perez et al. 2018 (FiLM); levels per
position as in Hoeg et al. 2024, "Streaming Diffusion Policy". A residual block computes, with the feature vector
c = [step encoding, conditioning],

    h = Mish(GN(Conv(x))),   h = a(c) h + b(c)  (or h + b(c)),   y = Mish(GN(Conv(h))) + Conv1x1(x).

Layer structure and parameter names are those of LeRobot's `DiffusionConditionalUnet1d`, so that its weights load as
they are; diffusion_policy's own network is the same function under other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipole.errors import DipoleError
from dipole.networks import unet1d_batch_last
from dipole.networks.activation import Mish, mish
from dipole.networks.convolution import Conv1d
from dipole.networks.embedding import CondDims, StepEncoder, flat_width, flatten_cond
from dipole.networks.hooks import BlockHook, branch

# Both published implementations leave the head's norm at eight groups, whatever the rest uses.
HEAD_GROUPS = 8


@dataclass(frozen=True)
class UNet1DConfig:
    """The U-Net's shape; defaults are the paper's for state observations (65.8 M parameters on PushT).

    Attributes:
        down_dims: Channels of each level. Images in the paper: (512, 1024, 2048). On a CPU (64, 128, 256), about
            4.6 M parameters, is usually enough.
        kernel_size: Of the convolutions in residual blocks (odd).
        n_groups: Groups of the group norms.
        step_embed_dim: Width of the step encoding; 128 in the paper's image policies and in LeRobot.
        film_scale: Whether conditioning scales features as well as shifting them.
        per_position_levels: Accept a level for every position of the chunk, `time` `[B, T]`.
    """

    name: ClassVar[str] = "unet1d"

    down_dims: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    n_groups: int = 8
    step_embed_dim: int = 256
    film_scale: bool = True
    per_position_levels: bool = False

    def build(self, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> UNet1D:
        """Return the network for chunks `[B, pred_horizon, action_dim]` and these conditioning sets."""
        return UNet1D(self, action_dim, pred_horizon, cond_dims)


class ConvBlock(nn.Module):
    """Convolution, group norm, Mish: `[B, C, T]` -> `[B, C', T]`."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Conv1d(channels_in, channels_out, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, channels_out),
            Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out: Tensor = self.block(x)
        return out


class ResidualBlock(nn.Module):
    """Two convolution blocks with FiLM between them, and a skip."""

    def __init__(self, channels_in: int, channels_out: int, cond_dim: int, config: UNet1DConfig) -> None:
        super().__init__()
        self.film_scale = config.film_scale
        films = 2 if config.film_scale else 1
        self.conv1 = ConvBlock(channels_in, channels_out, config.kernel_size, config.n_groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, films * channels_out))
        self.conv2 = ConvBlock(channels_out, channels_out, config.kernel_size, config.n_groups)
        self.residual_conv = Conv1d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor, hook: BlockHook | None, name: str) -> Tensor:
        """Return `[B, C', T]` from `x` `[B, C, T]` and `cond` `[B, cond_dim]`, already through its Mish."""
        skip: Tensor = self.residual_conv(x)
        return branch(hook, name, self._branch, x, cond) + skip

    def _branch(self, x: Tensor, cond: Tensor) -> Tensor:
        # The Mish in front of `cond_encoder` is the same for every block: the network applies it once.
        film, h = self.cond_encoder[1](cond).unsqueeze(-1), self.conv1(x)
        if self.film_scale:
            scale, shift = film.chunk(2, dim=1)
            h = scale * h + shift  # not fused: rounded as in the published networks
        else:
            h = h + film
        out: Tensor = self.conv2(h)
        return out


class UNet1D(nn.Module):
    """The network: `(x [B, T, D], time [B] or [B, T], cond) -> [B, T, D]`.

    All conditioning sets are flattened and concatenated, in the order of `cond_dims`.

    Attributes:
        branches: Names of the residual branches a `hook` sees, in order.
    """

    def __init__(self, config: UNet1DConfig, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> None:
        super().__init__()
        _check(config, pred_horizon)
        self.cond_names = tuple(cond_dims)
        dims, width = config.down_dims, config.step_embed_dim
        positions = pred_horizon if config.per_position_levels else None
        self.diffusion_step_encoder = StepEncoder(width, 4 * width, width, positions)
        block = partial(ResidualBlock, cond_dim=width + flat_width(cond_dims), config=config)
        self.down_modules = nn.ModuleList()
        for level, (narrow, wide) in enumerate(zip((action_dim, *dims[:-1]), dims, strict=True)):
            down = Conv1d(wide, wide, 3, 2, 1) if level + 1 < len(dims) else nn.Identity()
            self.down_modules.append(nn.ModuleList([block(narrow, wide), block(wide, wide), down]))
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]) for _ in range(2)])
        self.up_modules = nn.ModuleList()
        for narrow, wide in reversed(list(pairwise(dims))):
            up = nn.ConvTranspose1d(narrow, narrow, 4, 2, 1)
            self.up_modules.append(nn.ModuleList([block(2 * wide, narrow), block(narrow, narrow), up]))
        self.final_conv = nn.Sequential(
            ConvBlock(dims[0], dims[0], config.kernel_size, HEAD_GROUPS), Conv1d(dims[0], action_dim, 1)
        )
        downs, ups = range(len(self.down_modules)), range(len(self.up_modules))
        self.branches = (
            *(f"down{i}.{j}" for i in downs for j in range(2)),
            *(f"mid.{j}" for j in range(2)),
            *(f"up{i}.{j}" for i in ups for j in range(2)),
        )

    def blocks(self) -> list[ResidualBlock]:
        """Return the residual blocks in the order of `branches`."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def forward(
        self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor] | None = None, hook: BlockHook | None = None
    ) -> Tensor:
        """Return the network's output `[B, T, D]` (its meaning is the prediction type's).

        Args:
            x: `[B, T, D]` noisy chunk.
            time: `[B]` level of each sample, or `[B, T]` of each position, about 0..1000.
            cond: Name -> `[B, N, C]`.
            hook: See `dipole.networks.hooks`.
        """
        features = self.diffusion_step_encoder(time)
        flat = flatten_cond(cond, self.cond_names)
        features = mish(features if flat is None else torch.cat((features, flat), dim=-1))
        if hook is None and unet1d_batch_last.applies(x):
            return unet1d_batch_last.unet1d(self, x, features)
        h, skips, names = x.transpose(1, 2), [], iter(self.branches)
        level: Any
        for level in self.down_modules:
            first, second, down = level
            h = second(first(h, features, hook, next(names)), features, hook, next(names))
            skips.append(h)
            h = down(h)
        for module in self.mid_modules:
            h = module(h, features, hook, next(names))
        for level in self.up_modules:
            first, second, up = level
            h = torch.cat((h, skips.pop()), dim=1)
            h = up(second(first(h, features, hook, next(names)), features, hook, next(names)))
        out: Tensor = self.final_conv(h).transpose(1, 2)
        return out


def _check(config: UNet1DConfig, pred_horizon: int) -> None:
    factor = 2 ** (len(config.down_dims) - 1)
    if not config.down_dims or pred_horizon % factor:
        raise DipoleError(
            f"pred_horizon {pred_horizon} with {len(config.down_dims)} U-Net levels: it must be a multiple of {factor}"
        )
    if config.kernel_size % 2 == 0:
        raise DipoleError(f"kernel_size {config.kernel_size} of the U-Net: it must be odd")
    bad = [dim for dim in config.down_dims if dim % config.n_groups] or [
        dim for dim in config.down_dims[:1] if dim % HEAD_GROUPS
    ]
    if bad:
        raise DipoleError(
            f"down_dims {config.down_dims}: {bad[0]} is not a multiple of {config.n_groups} (n_groups) "
            f"and {HEAD_GROUPS} (groups of the head)"
        )
