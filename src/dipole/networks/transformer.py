"""Transformer over the action chunk: the time-series diffusion transformer of Diffusion Policy.

Source: Chi et al. 2023, "Diffusion Policy" (DP-T). A pre-norm decoder: action tokens attend to themselves causally and
to a memory of [level token, conditioning tokens], each passed through a two-layer Mish MLP. Action i sees the level and
the observations j <= i, so that action To - 1, the first one executed, sees all To of them.

Levels per position (`time` `[B, T]`) need no other weights: every action then sees a level token of its own, at the
place in the memory where the common one stood. With equal levels this is the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.errors import DipoleError
from dipole.networks.embedding import CondDims, SinusoidalEmbedding, cond_set
from dipole.networks.hooks import BlockHook, branch

INIT_STD = 0.02


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer's shape; defaults are the paper's for PushT from state (9.0 M parameters).

    Attributes:
        num_layers: Decoder layers.
        num_heads: Attention heads; they divide `width`.
        width: Of the tokens (768 in the paper's kitchen runs).
        dropout: In attention weights and residual branches: 0.01 PushT state, 0.3 images, 0.1 kitchen in the paper.
        embed_dropout: On the tokens that enter.
        causal: Whether actions see only earlier actions, and observations only up to their own time.
        time_aligned: Conditioning sets with one token per observed step, to which the causal rule applies; every
            other set (goals, text) is seen by all actions.
    """

    name: ClassVar[str] = "transformer"

    num_layers: int = 8
    num_heads: int = 4
    width: int = 256
    dropout: float = 0.01
    embed_dropout: float = 0.0
    causal: bool = True
    time_aligned: tuple[str, ...] = ("obs",)

    def build(self, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> Transformer:
        """Return the network for chunks `[B, pred_horizon, action_dim]` and these conditioning sets."""
        return Transformer(self, action_dim, pred_horizon, cond_dims)


class Attention(nn.Module):
    """Multi-head attention; parameters are named and shaped as `nn.MultiheadAttention`'s."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width).normal_(std=INIT_STD))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None) -> Tensor:
        """Attend from `x` `[B, T, W]` to `memory` `[B, S, W]` (None: to itself) where `mask` `[T, S]` is true."""
        if memory is None:
            q, k, v = (self._heads(part) for part in self._project(x, 0, 3).chunk(3, dim=-1))
        else:
            q = self._heads(self._project(x, 0, 1))
            k, v = (self._heads(part) for part in self._project(memory, 1, 3).chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        joined: Tensor = self.out_proj(out.transpose(1, 2).reshape(x.shape))
        return joined

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        rows = slice(first * x.shape[-1], last * x.shape[-1])
        return F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class DecoderLayer(nn.Module):
    """h += self-attention, h += cross-attention, h += feed-forward, each after a layer norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn = Attention(width, config.num_heads, config.dropout)
        self.multihead_attn = Attention(width, config.num_heads, config.dropout)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def self_attention(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Return the self-attention branch of `h` `[B, T, width]`."""
        out: Tensor = self.dropout(self.self_attn(self.norm1(h), None, mask))
        return out

    def cross_attention(self, h: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Return the cross-attention branch."""
        out: Tensor = self.dropout(self.multihead_attn(self.norm2(h), memory, mask))
        return out

    def feedforward(self, h: Tensor) -> Tensor:
        """Return the feed-forward branch."""
        out: Tensor = self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(self.norm3(h))))))
        return out


class Transformer(nn.Module):
    """The network: `(x [B, T, D], time [B] or [B, T], cond) -> [B, T, D]`.

    Attributes:
        branches: Names of the residual branches a `hook` sees, in order: `layer0.sa`, `layer0.ca`, `layer0.ffn`, ...
    """

    mask: Tensor | None
    cond_mask: Tensor

    def __init__(self, config: TransformerConfig, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> None:
        super().__init__()
        if config.width % (2 * config.num_heads):
            raise DipoleError(
                f"transformer width {config.width}: it must be a multiple of 2 x num_heads = {2 * config.num_heads}"
            )
        width = config.width
        self.cond_dims, self.config = dict(cond_dims), config
        self.input_emb = nn.Linear(action_dim, width)
        self.pos_emb = nn.Parameter(torch.empty(1, pred_horizon, width).normal_(std=INIT_STD))
        self.time_emb = SinusoidalEmbedding(width)
        # A list, in the order of `cond_dims`: a module's name may hold no dots, a conditioning's may.
        self.cond_emb = nn.ModuleList(nn.Linear(channels, width) for _, channels in cond_dims.values())
        tokens = 1 + sum(count for count, _ in cond_dims.values())
        self.cond_pos_emb = nn.Parameter(torch.empty(1, tokens, width).normal_(std=INIT_STD))
        self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, action_dim)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.apply(_init)
        self.branches = tuple(f"layer{i}.{kind}" for i in range(config.num_layers) for kind in ("sa", "ca", "ffn"))
        causal = torch.ones(pred_horizon, pred_horizon, dtype=torch.bool).tril() if config.causal else None
        self.register_buffer("mask", causal, persistent=False)
        self.register_buffer("cond_mask", self._cond_mask(pred_horizon), persistent=False)

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
        memory, memory_mask = self._memory(time, cond)
        h, names = self.dropout(self.input_emb(x) + self.pos_emb), iter(self.branches)
        layer: Any
        for layer in self.layers:
            h = h + branch(hook, next(names), layer.self_attention, h, self.mask)
            h = h + branch(hook, next(names), layer.cross_attention, h, memory, memory_mask)
            h = h + branch(hook, next(names), layer.feedforward, h)
        out: Tensor = self.head(self.ln_f(h))
        return out

    def _memory(self, time: Tensor, cond: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the memory `[B, S, width]` and which of it each action sees, `[T, S]`."""
        level: Tensor = self.time_emb(time if time.dim() == 2 else time[:, None])
        tokens = [embed(cond_set(cond, name)) for name, embed in zip(self.cond_dims, self.cond_emb, strict=True)]
        steps, places = level.shape[1], self.cond_pos_emb.expand(1, -1, -1)
        if steps > 1:
            places = torch.cat((places[:, :1].expand(-1, steps, -1), places[:, 1:]), dim=1)
        memory = self.encoder(self.dropout(torch.cat((level, *tokens), dim=1) + places))
        own = torch.eye(steps, dtype=torch.bool, device=time.device) if steps > 1 else self.cond_mask.new_ones(1, 1)
        return memory, torch.cat((own.expand(self.pos_emb.shape[1], -1), self.cond_mask), dim=1)

    def _cond_mask(self, pred_horizon: int) -> Tensor:
        """Return which conditioning tokens each action sees, `[T, tokens]`."""
        action = torch.arange(pred_horizon)[:, None]
        blocks = [torch.ones(pred_horizon, 0, dtype=torch.bool)]
        for name, (count, _) in self.cond_dims.items():
            aligned = self.config.causal and name in self.config.time_aligned
            seen = torch.arange(count) <= action if aligned else torch.ones(pred_horizon, count, dtype=torch.bool)
            blocks.append(seen)
        return torch.cat(blocks, dim=1)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
