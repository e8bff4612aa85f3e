"""The 1-D U-Net as matrix products over `[B, T, C]`: see `dipole.realtime.packed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.networks.embedding import flatten_cond
from dipole.networks.hooks import BlockHook, branch
from dipole.networks.unet1d import ConvBlock, ResidualBlock, UNet1D
from dipole.realtime.packed import PackedLinear, frozen


class Convolution:
    """A convolution over positions as one product: the windows of `k` positions, laid side by side, times a matrix.

    Args:
        weight: `[out, k * in]`, positions first.
        bias: `[out]`.
        kernel_size: k, odd; the input is padded by k // 2 on both sides.
        stride: Of the windows.
        dtype: Of the product.
        rows: See `pack`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, kernel_size: int, stride: int, dtype: torch.dtype, rows: int
    ) -> None:
        self.linear = PackedLinear(weight, bias, dtype, rows)
        self.kernel_size, self.stride = kernel_size, stride

    @classmethod
    def of(cls, conv: nn.Conv1d, dtype: torch.dtype, rows: int) -> Convolution:
        """Return what an `nn.Conv1d` computes."""
        weight = conv.weight.permute(0, 2, 1).reshape(conv.out_channels, -1)
        return cls(weight, conv.bias, conv.kernel_size[0], conv.stride[0], dtype, rows)

    @classmethod
    def upsampling(cls, conv: nn.ConvTranspose1d, dtype: torch.dtype, rows: int) -> Convolution:
        """Return what a transposed convolution (kernel 4, stride 2, padding 1) computes, before `interleave`.

        y[2i] = W1 x[i] + W3 x[i-1] and y[2i+1] = W2 x[i] + W0 x[i+1]: a window of three gives two outputs.
        """
        w0, w1, w2, w3 = conv.weight.detach().permute(2, 1, 0)  # each [out, in]
        none = torch.zeros_like(w0)
        even, odd = torch.cat((w3, w1, none), 1), torch.cat((none, w2, w0), 1)
        bias = None if conv.bias is None else torch.cat((conv.bias, conv.bias))
        return cls(torch.cat((even, odd)), bias, 3, 1, dtype, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Return `[B, T', out]` from `x` `[B, T, in]`, contiguous."""
        batch, positions, channels = x.shape
        if self.kernel_size > 1:
            pad = self.kernel_size // 2
            padded = F.pad(x, (0, 0, pad, pad))
            positions = (positions - 1) // self.stride + 1
            size = (batch, positions, self.kernel_size * channels)
            x = padded.as_strided(size, (padded.stride(0), self.stride * channels, 1))
        return self.linear(x.reshape(batch * positions, -1)).view(batch, positions, -1)


def interleave(x: Tensor) -> Tensor:
    """Return `[B, 2T, C]` from the two outputs per position `[B, T, 2C]` of `Convolution.upsampling`."""
    return x.view(x.shape[0], 2 * x.shape[1], -1)


class Block:
    """Convolution, group norm, Mish."""

    def __init__(self, block: ConvBlock, dtype: torch.dtype, rows: int) -> None:
        conv, norm, _ = block.block
        assert isinstance(conv, nn.Conv1d)
        assert isinstance(norm, nn.GroupNorm)
        self.conv = Convolution.of(conv, dtype, rows)
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = frozen(norm.weight, dtype), frozen(norm.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Return `[B, T, out]` from `[B, T, in]`."""
        # [B, C, 1, T] over memory of [B, T, C] is what torch calls channels last, for which it has a group norm.
        h = self.conv(x).transpose(1, 2).unsqueeze(2)
        h = F.group_norm(h, self.groups, self.weight, self.bias, self.eps)
        return F.mish(h.squeeze(2).transpose(1, 2))


class Residual:
    """A residual block without its FiLM projection, which is computed for all levels at once."""

    def __init__(self, block: ResidualBlock, dtype: torch.dtype, rows: int) -> None:
        self.film_scale = block.film_scale
        self.first, self.second = Block(block.conv1, dtype, rows), Block(block.conv2, dtype, rows)
        skip = block.residual_conv
        self.skip = Convolution.of(skip, dtype, rows) if isinstance(skip, nn.Conv1d) else None

    def __call__(self, x: Tensor, film: Tensor, hook: BlockHook | None, name: str) -> Tensor:
        """Return `[B, T, out]` from `x` `[B, T, in]` and `film` `[B, 1, out or 2 out]`."""
        skip = x if self.skip is None else self.skip(x)
        return branch(hook, name, self._branch, x, film) + skip

    def _branch(self, x: Tensor, film: Tensor) -> Tensor:
        h = self.first(x)
        if self.film_scale:
            scale, shift = film.chunk(2, dim=-1)
            return self.second(torch.addcmul(shift, h, scale))
        return self.second(h + film)


class Level(NamedTuple):
    """One level of the U-Net: two residual blocks and what changes the number of positions, if anything."""

    first: Residual
    second: Residual
    resample: Convolution | None


class PackedUNet1D:
    """The function of a `UNet1D`, packed.

    Args:
        network: The original; its step encoder is used as it is, everything else is copied.
        dtype: Of weights and activations.
        rows: See `pack`.
    """

    def __init__(self, network: UNet1D, dtype: torch.dtype, rows: int) -> None:
        self.dtype, self.cond_names, self.branches = dtype, network.cond_names, network.branches
        self.step_encoder = network.diffusion_step_encoder
        blocks: list[ResidualBlock] = []

        def residual(block: Any) -> Residual:
            blocks.append(block)
            return Residual(block, dtype, rows)

        def level(modules: Any, kind: Any) -> Level:
            first, second, resample = modules
            skip = isinstance(resample, nn.Identity)
            return Level(residual(first), residual(second), None if skip else kind(resample, dtype, rows))

        self.down = [level(modules, Convolution.of) for modules in network.down_modules]
        self.middle = [residual(block) for block in network.mid_modules]
        self.up = [level(modules, Convolution.upsampling) for modules in network.up_modules]
        head, last = network.final_conv
        assert isinstance(head, ConvBlock)
        assert isinstance(last, nn.Conv1d)
        self.head, self.last = Block(head, dtype, rows), Convolution.of(last, dtype, rows)
        films = [film for block in blocks for film in block.cond_encoder if isinstance(film, nn.Linear)]
        self.film = torch.cat([film.weight for film in films]).detach()
        self.film_bias = torch.cat([film.bias for film in films]).detach()
        self.film_sizes = [film.out_features for film in films]

    def constants(self, times: Tensor, cond: Mapping[str, Tensor] | None) -> list[list[Tensor]]:
        """Return for each of `times` the FiLM terms of all blocks, each `[B or 1, 1, width]`.

        Args:
            times: `[K]` for one level of all rows, `[K, B]` or `[K, B, T]`.
            cond: Name -> `[B, N, C]`.
        """
        # The Mish in front of the projection acts on each feature alone, so level and observation separate.
        count = len(times)
        encoding = self.step_encoder(times.reshape(-1, *times.shape[2:]) if times.dim() > 1 else times)
        encoding = F.mish(encoding)
        width = encoding.shape[-1]
        film = F.linear(encoding, self.film[:, :width]).view(count, -1, len(self.film_bias))
        flat = flatten_cond(cond, self.cond_names)
        if flat is None:
            film = film + self.film_bias
        else:
            film = film + F.linear(F.mish(flat), self.film[:, width:], self.film_bias)
        return [list(one.unsqueeze(1).split(self.film_sizes, dim=-1)) for one in film.to(self.dtype)]

    def step(self, x: Tensor, constants: list[Tensor], hook: BlockHook | None = None) -> Tensor:
        """Return the network's output `[B, T, D]` for `x` `[B, T, D]` and one entry of `constants`."""
        films, names = iter(constants), iter(self.branches)
        h, skips = x.to(self.dtype).contiguous(), []

        def residual(block: Residual, h: Tensor) -> Tensor:
            return block(h, next(films), hook, next(names))

        for first, second, down in self.down:
            h = residual(second, residual(first, h))
            skips.append(h)
            h = h if down is None else down(h)
        for block in self.middle:
            h = residual(block, h)
        for first, second, up in self.up:
            h = residual(second, residual(first, torch.cat((h, skips.pop()), dim=-1)))
            h = h if up is None else interleave(up(h))
        return self.last(self.head(h)).to(x.dtype)
