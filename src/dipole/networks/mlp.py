"""Residual MLP with FiLM: the fast default for policies that see state vectors.

The chunk and the conditioning are flattened into one vector; residual blocks are modulated by the noise level and the
conditioning (FiLM, Perez et al. 2018, in the pre-norm form of DiT, Peebles & Xie 2023). With c = the context,

    h_0 = Linear([x, cond]),   h_{i+1} = h_i + W2 Mish(W1 ((1 + a_i(c)) LN(h_i) + b_i(c))),   output = Linear(LN(h_n)).

The conditioning enters twice: once in full, where the first layer can read it sharply, and once, compressed, in c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.networks.activation import mish
from dipole.networks.embedding import CondDims, StepEncoder, flat_width, flatten_cond
from dipole.networks.hooks import BlockHook, branch

# The head starts small, so that an untrained network predicts almost nothing, as adding blocks must not hurt.
HEAD_INIT_SCALE = 0.1


@dataclass(frozen=True)
class MLPConfig:
    """The MLP's shape; defaults give about 2.8 million parameters for chunks of 16 small actions.

    Attributes:
        width: Of the residual stream.
        num_blocks: Residual blocks.
        context_width: Of the context that modulates the blocks.
        step_embed_dim: Width of the sinusoidal embedding of a level.
        dropout: Inside the residual branches, in training.
        per_position_levels: Accept a level for every position of the chunk, `time` `[B, T]`: their embeddings are
            concatenated. A `time` `[B]` then means that level everywhere.
    """

    name: ClassVar[str] = "mlp"

    width: int = 512
    num_blocks: int = 4
    context_width: int = 128
    step_embed_dim: int = 64
    dropout: float = 0.0
    per_position_levels: bool = False

    def build(self, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> MLP:
        """Return the network for chunks `[B, pred_horizon, action_dim]` and these conditioning sets."""
        return MLP(self, action_dim, pred_horizon, cond_dims)


class FiLMBlock(nn.Module):
    """A pre-norm residual branch, scaled and shifted by the context."""

    def __init__(self, width: int, context_width: int, dropout: float) -> None:
        super().__init__()
        self.film = nn.Linear(context_width, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Return what is added to `h` `[B, width]`."""
        scale, shift = self.film(context).chunk(2, dim=-1)
        # FiLM follows at once, so the norm needs no scale and shift of its own.
        normed = F.layer_norm(h, h.shape[-1:])
        out: Tensor = self.outer(self.dropout(mish(self.inner(torch.addcmul(shift, normed, 1 + scale)))))
        return out


class MLP(nn.Module):
    """The network: `(x [B, T, D], time [B] or [B, T], cond) -> [B, T, D]`.

    Attributes:
        branches: Names of the residual branches a `hook` sees, in order.
    """

    def __init__(self, config: MLPConfig, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> None:
        super().__init__()
        self.cond_names = tuple(cond_dims)
        chunk, cond, context = pred_horizon * action_dim, flat_width(cond_dims), config.context_width
        positions = pred_horizon if config.per_position_levels else None
        self.step_encoder = StepEncoder(config.step_embed_dim, 2 * context, context, positions)
        self.cond_encoder: nn.Module | None = None
        if cond:
            self.cond_encoder = nn.Sequential(nn.Linear(cond, 2 * context), nn.Mish(), nn.Linear(2 * context, context))
        self.stem = nn.Linear(chunk + cond, config.width)
        self.blocks = nn.ModuleList(FiLMBlock(config.width, context, config.dropout) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, chunk)
        with torch.no_grad():
            self.head.weight.mul_(HEAD_INIT_SCALE)
            self.head.bias.zero_()
        self.branches = tuple(f"block{i}" for i in range(config.num_blocks))

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
        flat, context, h = flatten_cond(cond, self.cond_names), self.step_encoder(time), x.flatten(1)
        if flat is not None and self.cond_encoder is not None:
            context = context + self.cond_encoder(flat)
            h = torch.cat((h, flat), dim=-1)
        context, h = mish(context), self.stem(h)
        for name, block in zip(self.branches, self.blocks, strict=True):
            h = h + branch(hook, name, block, h, context)
        out: Tensor = self.head(self.norm(h)).view_as(x)
        return out
