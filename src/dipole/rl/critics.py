"""Critics: V(s), and ensembles of Q(s, a) computed as one batched network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "tanh", "mish"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "mish": F.mish}
_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "mish": nn.Mish}


def mlp(sizes: Sequence[int], activation: Activation = "relu", layer_norm: bool = False) -> nn.Sequential:
    """Return Linear (LayerNorm) activation ... Linear through `sizes`, from input to output."""
    layers: list[nn.Module] = []
    for i, (width, out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(width, out))
        if i < len(sizes) - 2:
            layers += [nn.LayerNorm(out)] * layer_norm + [_MODULES[activation]()]
    return nn.Sequential(*layers)


class Value(nn.Module):
    """V(s): `[n, F]` -> `[n]`; its last layer starts at 0, so that the first advantages are those of the rewards."""

    def __init__(self, feature_dim: int, hidden: Sequence[int], activation: Activation = "mish") -> None:
        super().__init__()
        self.net = mlp([feature_dim, *hidden, 1], activation)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return values `[n]`."""
        value: Tensor = self.net(features)
        return value.squeeze(-1)


class _Layers(nn.Module):
    """The weights of one linear layer of `count` networks: `[E, in, out]` and `[E, 1, out]`."""

    def __init__(self, count: int, width: int, out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(count, width, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, out).uniform_(-bound, bound))


class Critics(nn.Module):
    """An ensemble of Q(s, a): `[n, F]`, `[n, d]` -> `[E, n]`.

    Args:
        feature_dim: F.
        action_dim: d.
        hidden: Widths of the hidden layers.
        count: E.
        activation: Nonlinearity.
        layer_norm: Normalise before each nonlinearity (over its own width, without scale and shift).
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        count: int = 2,
        activation: Activation = "relu",
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        sizes = [feature_dim + action_dim, *hidden, 1]
        self.layers = nn.ModuleList(_Layers(count, a, b) for a, b in itertools.pairwise(sizes))
        self.count, self.layer_norm = count, layer_norm
        self.activation: Activation = activation

    def forward(self, features: Tensor, action: Tensor, heads: Tensor | None = None) -> Tensor:
        """Return the values of all heads, or of `heads` (indices `[m]`): `[E, n]` or `[m, n]`."""
        x = torch.cat([features, action], dim=-1).expand(self.count if heads is None else len(heads), -1, -1)
        for i, layer in enumerate(self.layers):
            weight: Tensor = layer.get_parameter("weight")
            bias: Tensor = layer.get_parameter("bias")
            if heads is not None:
                weight, bias = weight[heads], bias[heads]
            x = torch.baddbmm(bias, x, weight)
            if i < len(self.layers) - 1:
                x = F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x
                x = _ACTIVATIONS[self.activation](x)
        return x.squeeze(-1)


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move `target` towards `source`: target <- (1 - tau) target + tau source."""
    ours = [p.detach() for p in target.parameters()]
    torch._foreach_lerp_(ours, [p.detach() for p in source.parameters()], tau)
