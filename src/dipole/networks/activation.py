"""Mish, x tanh(log(1 + e^x)) (Misra 2019): torch's, or with a single exponential where that is worth it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Beyond it tanh(log(1 + e^x)) is 1 in float32, and e^2x would overflow.
_LARGEST = 20.0


def mish(x: Tensor) -> Tensor:
    """Return Mish of `x`, of the same shape.

    A compiler for CPUs fuses it with its neighbours, so that its own arithmetic counts: the definition takes three
    transcendental functions, and its derivative four.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == "cpu":
        out: Tensor = _OneExponential.apply(x)  # type: ignore[no-untyped-call]
        return out
    return F.mish(x)


class Mish(nn.Mish):
    """`mish` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return Mish of `x`, of the same shape."""
        return mish(x)


class _OneExponential(torch.autograd.Function):
    """With n = e^x (e^x + 2): tanh(log(1 + e^x)) = n / (n + 2), and its derivative is 4 e^x (e^x + 1) / (n + 2)^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide, power, ratio = _parts(x)
        return (wide * power * (power + 2) * ratio).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide, power, ratio = _parts(x)
        slope = power * (power + 2) * ratio + wide * 4 * power * (power + 1) * ratio * ratio
        return (dy * slope).to(x.dtype)


def _parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x in at least single precision, e^x and 1 / (n + 2)."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    power = wide.clamp(max=_LARGEST).exp()
    return wide, power, 1 / (power * (power + 2) + 2)
