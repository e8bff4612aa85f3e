"""Causal transformer over the tokens  [sigma, goal_1..g, s_1, a_1, ..., s_w, a_w]: the score network of BESO.

Source: Reuss et al., "Goal-Conditioned Imitation Learning using Score-based Diffusion Policies" (2023); a pre-LN GPT
(Radford et al. 2019). The sigma token is Linear(ln(sigma) / 4). Observations and goals share one linear map and one
position table; an action has the position of its observation. The output is read at the action tokens. As every token
sees only those before it, whatever stands after an action cannot change it: shorter histories are simply cut, or
padded at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipole.errors import DipoleError
from dipole.networks.embedding import CondDims, cond_set
from dipole.networks.hooks import BlockHook, branch

NETWORK_TIME_PER_LOG_SIGMA = 250.0
"""`EDM.network_time` is 250 ln(sigma), so that time / 1000 is EDM's c_noise = ln(sigma) / 4."""


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the network; the defaults are BESO's for the kitchen.

    Attributes:
        embed_dim: Width d.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide `embed_dim`.
        attention_dropout: Dropout of attention weights.
        residual_dropout: Dropout of every residual branch.
        embedding_dropout: Dropout of the token embeddings.
    """

    name: ClassVar[str] = "gpt"

    embed_dim: int = 360
    num_layers: int = 6
    num_heads: int = 6
    attention_dropout: float = 0.3
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.0

    def build(self, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> GPT:
        """Return the network for chunks `[B, pred_horizon, action_dim]` and these conditioning sets."""
        return GPT(self, action_dim, pred_horizon, cond_dims)


def sigma_feature(time: Tensor) -> Tensor:
    """Return `[B, 1]`: ln(sigma) / 4 from network times `[B]`.

    Raises:
        DipoleError: The levels differ from position to position, which these networks cannot express.
    """
    if time.dim() != 1:
        raise DipoleError(
            f"this network takes one noise level per row, `[B]`, and got levels of shape {list(time.shape)}: "
            "per-position levels need a U-Net or transformer built with per_position_levels=True"
        )
    return (time / (4 * NETWORK_TIME_PER_LOG_SIGMA)).unsqueeze(-1)


class HeadNorm(nn.RMSNorm):
    """RMS normalisation in the precision of its weight: under autocast queries and keys come in a lower one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` `[..., size]` normalised."""
        return super().forward(x.to(self.weight.dtype))


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it.

    With `qk_norm`, queries and keys are RMS-normalised per head (MoDE).
    """

    def __init__(
        self, dim: int, num_heads: int, attention_dropout: float, residual_dropout: float, qk_norm: bool = False
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise DipoleError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(residual_dropout)
        self.query_norm = HeadNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.key_norm = HeadNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, N, C]` for tokens `[B, N, C]`."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            self.query_norm(q), self.key_norm(k), v, dropout_p=dropout, is_causal=True
        )
        out: Tensor = self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, dim)))
        return out


class Block(nn.Module):
    """Pre-LN transformer block: x + attention(LN x), then x + MLP(LN x); `name` names its branches for hooks."""

    def __init__(self, config: GPTConfig, name: str) -> None:
        super().__init__()
        self.branches = (f"{name}.attention", f"{name}.mlp")
        dim = config.embed_dim
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = CausalSelfAttention(dim, config.num_heads, config.attention_dropout, config.residual_dropout)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(config.residual_dropout)
        )

    def forward(self, x: Tensor, hook: BlockHook | None = None) -> Tensor:
        """Return `[B, N, C]` for tokens `[B, N, C]`."""
        x = x + branch(hook, self.branches[0], lambda x: self.attention(self.norm_attention(x)), x)
        return x + branch(hook, self.branches[1], lambda x: self.mlp(self.norm_mlp(x)), x)


class GPT(nn.Module):
    """`network(x, time, cond)` with one action token per observation.

    Args:
        config: Sizes.
        action_dim: D.
        pred_horizon: Largest number w of observation-action pairs.
        cond_dims: `{"obs": (w, C)}`, and `"goal": (g, C)` for a goal-conditioned network.

    Attributes:
        branches: Names of the residual branches, in the order they are computed.
    """

    def __init__(self, config: GPTConfig, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> None:
        super().__init__()
        window, obs_dim = cond_dims["obs"]
        self.goal_horizon, goal_dim = cond_dims.get("goal", (0, obs_dim))
        if window != pred_horizon:
            raise DipoleError(f"this network pairs observations with actions: To={window} must equal Tp={pred_horizon}")
        if goal_dim != obs_dim:
            raise DipoleError(f"goals are embedded as observations: their sizes {goal_dim} and {obs_dim} must be equal")
        dim = config.embed_dim
        self.window = window
        self.embed_sigma = nn.Linear(1, dim)
        self.embed_obs = nn.Linear(obs_dim, dim)
        self.embed_action = nn.Linear(action_dim, dim)
        self.position = nn.Parameter(torch.empty(self.goal_horizon + window, dim))
        self.dropout = nn.Dropout(config.embedding_dropout)
        blocks = [Block(config, f"block{i}") for i in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.branches = tuple(name for block in blocks for name in block.branches)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, action_dim)
        self.apply(init_normal)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor], hook: BlockHook | None = None) -> Tensor:
        """Return `[B, T, D]`.

        Args:
            x: Noisy actions `[B, T, D]`, T <= w, oldest first.
            time: Network time `[B]`.
            cond: `obs` `[B, T, C]`, one for each action, and `goal` `[B, g, C]` where the network has one.
            hook: Called for every residual branch.
        """
        batch, length, _ = x.shape
        if length > self.window:
            raise DipoleError(f"{length} actions, but the network was built for at most {self.window}")
        first = self.goal_horizon
        position = self.position[first : first + length]
        pairs = torch.stack([self.embed_obs(cond_set(cond, "obs")) + position, self.embed_action(x) + position], dim=2)
        parts = [self.embed_sigma(sigma_feature(time).to(x.dtype)).unsqueeze(1)]
        if self.goal_horizon:
            parts.append(self.dropout(self.embed_obs(cond_set(cond, "goal")) + self.position[:first]))
        parts.append(self.dropout(pairs.flatten(1, 2)))
        h = torch.cat(parts, dim=1)
        for block in self.blocks:
            h = block(h, hook)
        out: Tensor = self.head(self.norm(h[:, 1 + first :].view(batch, length, 2, -1)[:, :, 1]))
        return out


def init_normal(module: nn.Module) -> None:
    """Initialise a linear layer as GPT does: weights N(0, 0.02), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
