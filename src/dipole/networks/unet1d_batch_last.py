"""The U-Net with the batch as the last axis: the same function, for compiled training on a CPU.

An action chunk has few positions, 4 to 16. Where they are the last axis, as convolutions want them, a compiler fills
only a part of each vector register, and torch's kernels re-order everything they are given. With activations `[C, T,
B]` every operation that is not a matrix product runs along the batch; a convolution is one matrix product of its
weight, as it lies in memory, with copies of its input that are shifted by whole rows; so are both its gradients.
Kernel by kernel nothing is gained (the shifted copies cost what the products save), so this is for compiled networks
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.networks.activation import mish

if TYPE_CHECKING:
    from dipole.networks.unet1d import ConvBlock, ResidualBlock, UNet1D

# Fewer samples would leave registers empty. (Measured: 1.3 times as fast for 16, 1.4 for 64, 1.2 for 256.)
LEAST_ROWS = 16


def applies(x: Tensor) -> bool:
    """Whether a network called with chunks `x` `[B, T, D]` is to be computed this way (in float32 it is no faster)."""
    training = torch.compiler.is_compiling() and not torch.compiler.is_exporting() and torch.is_grad_enabled()
    return training and x.device.type == "cpu" and x.shape[0] >= LEAST_ROWS and _product_dtype(x) == torch.bfloat16


def unet1d(network: UNet1D, x: Tensor, features: Tensor) -> Tensor:
    """Return what `network` computes of chunks `x` `[B, T, D]` and features `[B, F]` that went through their Mish."""
    layers = _Layers(_product_dtype(x))
    with torch.autocast("cpu", enabled=False):  # what is computed in which precision is said here
        out = layers.unet1d(network, x.permute(2, 1, 0), features.t())
    return out.permute(2, 1, 0)


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


@dataclass(frozen=True)
class _Layers:
    """The layers of the U-Net on activations `[C, T, B]`.

    Attributes:
        dtype: Of the factors of matrix products. All else is computed in at least single precision.
    """

    dtype: torch.dtype

    def unet1d(self, network: UNet1D, x: Tensor, features: Tensor) -> Tensor:
        films = iter(self.films(network.blocks(), features))
        h, skips = x, []
        level: Any
        for level in network.down_modules:
            first, second, down = level
            h = self.block(second, self.block(first, h, next(films)), next(films))
            skips.append(h)
            h = self.resampled(down, h)
        for level in network.mid_modules:
            h = self.block(level, h, next(films))
        for level in network.up_modules:
            first, second, up = level
            h = torch.cat((h, skips.pop()))
            h = self.resampled(up, self.block(second, self.block(first, h, next(films)), next(films)))
        head: Any = network.final_conv
        return self.conv(head[1], self.conv_block(head[0], h))

    def films(self, blocks: list[ResidualBlock], features: Tensor) -> tuple[Tensor, ...]:
        """Return every block's FiLM parameters `[C or 2 C, B]`, of one product for all of them."""
        layers: list[Any] = [block.cond_encoder[1] for block in blocks]
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        films = self.product(weight, features) + bias[:, None]
        return torch.split(films, [layer.out_features for layer in layers])

    def block(self, block: ResidualBlock, x: Tensor, film: Tensor) -> Tensor:
        skip = x if isinstance(block.residual_conv, nn.Identity) else self.conv(block.residual_conv, x)
        h = self.conv_block(block.conv1, x)
        if block.film_scale:
            scale, shift = film[:, None].chunk(2)
            h = scale * h + shift
        else:
            h = h + film[:, None]
        return self.conv_block(block.conv2, h) + skip

    def conv_block(self, block: ConvBlock, x: Tensor) -> Tensor:
        layers: Any = block.block
        return mish(self.group_norm(layers[1], self.conv(layers[0], x)))

    def resampled(self, layer: nn.Conv1d | nn.ConvTranspose1d | nn.Identity, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Identity):
            return x
        return self.doubling(layer, x) if isinstance(layer, nn.ConvTranspose1d) else self.conv(layer, x)

    def conv(self, conv: nn.Conv1d, x: Tensor) -> Tensor:
        """Return the convolution of `x` `[C, T, B]`, by one product of `[O, C K]` with `[C K, T' B]`."""
        (kernel,), (stride,), (pad,) = conv.kernel_size, conv.stride, (int(p) for p in conv.padding)
        positions = (x.shape[1] + 2 * pad - kernel) // stride + 1
        padded = F.pad(x.to(self.dtype), (0, 0, pad, pad))
        shifted = [padded[:, k : k + stride * (positions - 1) + 1 : stride] for k in range(kernel)]
        columns = torch.stack(shifted, 1).flatten(0, 1).flatten(1)
        out = self.product(conv.weight.flatten(1), columns).view(-1, positions, x.shape[2])
        return out if conv.bias is None else out + conv.bias[:, None, None]

    def doubling(self, conv: nn.ConvTranspose1d, x: Tensor) -> Tensor:
        """Return the transposed convolution of `x` `[C, T, B]` with kernel 4, stride 2 and padding 1: `[O, 2 T, B]`.

        Tap k of position t belongs to position 2 t + k - 1.
        """
        taps = self.product(conv.weight.flatten(1).t(), x.flatten(1)).view(*conv.weight.shape[1:], *x.shape[1:])
        padded = F.pad(taps, (0, 0, 1, 1)).to(conv.weight.dtype)
        even = padded[:, 1, 1:-1] + padded[:, 3, :-2]
        odd = padded[:, 2, 1:-1] + padded[:, 0, 2:]
        out = torch.stack((even, odd), 2).flatten(1, 2)
        return out if conv.bias is None else out + conv.bias[:, None, None]

    def group_norm(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = wide.view(norm.num_groups, -1, *x.shape[1:])
        number = grouped.shape[1] * grouped.shape[2]
        centred = grouped - grouped.sum((1, 2), keepdim=True) / number
        variance = centred.square().sum((1, 2), keepdim=True) / number
        normed = (centred * (variance + norm.eps).rsqrt()).flatten(0, 1)
        return normed * norm.weight[:, None, None] + norm.bias[:, None, None]

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return left.to(self.dtype) @ right.to(self.dtype)
