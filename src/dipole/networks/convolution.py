"""Convolutions over the few positions of an action chunk, on a CPU: from faster kernels, the same but for rounding.

The kernels that torch chooses are made for images. Two cases that they are slow at are computed in another way: a batch
of one, when acting, and the gradient of the weights in bfloat16, when training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Where the other way was measured to be faster (AVX-512, batches of 16 to 256): 1.3 times for 128 channels and eight
# positions, 2 to 4 times for 256 channels and four, 6 times for 1024 channels. It is slower in float32. Fewer samples
# are left to torch: as channels they come to a kernel of oneDNN 3.12 that is wrong on CPUs with AMX (8 or 12 of them).
_POSITIONS, _CHANNELS, _SAMPLES = range(3, 9), 128, 16


class Conv1d(nn.Conv1d):
    """`nn.Conv1d`, computed as is fastest on a CPU. A graph for inference that is compiled keeps the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` `[B, C, T]`."""
        if torch.compiler.is_exporting() or x.device.type != "cpu":
            return super().forward(x)
        if not torch.compiler.is_compiling() and x.shape[0] * x.shape[2] <= 8 * self.stride[0]:
            return self._as_product(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype != torch.bfloat16 or not self._has_slow_gradient(x):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        out: Tensor = _FewPositions.apply(x.to(dtype), self.weight.to(dtype), bias)  # type: ignore[no-untyped-call]
        return out

    def _as_product(self, x: Tensor) -> Tensor:
        """With very few columns: the convolution kernels re-order the whole weight, 2-3 times the arithmetic."""
        pad = int(self.padding[0])
        columns = F.pad(x, (pad, pad)).unfold(2, self.kernel_size[0], self.stride[0]).transpose(1, 2).flatten(2)
        return F.linear(columns, self.weight.flatten(1), self.bias).transpose(1, 2)

    def _has_slow_gradient(self, x: Tensor) -> bool:
        kernel, pad = self.kernel_size[0], int(self.padding[0])
        as_many = self.stride[0] == self.dilation[0] == self.groups == 1 and kernel == 2 * pad + 1
        few = x.shape[2] in _POSITIONS and x.shape[0] >= _SAMPLES
        wide = min(self.in_channels, self.out_channels) >= _CHANNELS
        return as_many and few and wide and self.weight.requires_grad and torch.is_grad_enabled()


class _FewPositions(torch.autograd.Function):
    """A convolution that keeps the number of positions, with the gradient of its weights as a convolution.

    d loss / d weight[o, i, k] = sum_{b, t} dy[b, o, t] x[b, i, t + k - pad] is a convolution, too, in which samples
    are the channels that are summed over, and x is the kernel. Both are reversed in time, so that it comes out in the
    order of the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv1d(x, weight, bias, padding=weight.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        pad = weight.shape[2] // 2
        dx = F.conv_transpose1d(dy, weight, padding=pad) if ctx.needs_input_grad[0] else None
        dweight = F.conv1d(dy.flip(2).transpose(0, 1), x.flip(2).transpose(0, 1), padding=pad)
        return dx, dweight, dy.sum((0, 2)) if ctx.needs_input_grad[2] else None
