"""Mixture of denoising experts: a causal transformer whose feed-forward experts are chosen by the noise level alone.

Source: Reuss et al., "Efficient Diffusion Transformer Policies with Mixture of Expert Denoisers for Multitask Learning"
(MoDE, 2024). Tokens are [noise, conditioning tokens, noisy actions]; with c the embedding of ln(sigma)/4, a block is

    x <- x + Attention(RMSNorm(x) + c)                       queries and keys RMS-normalised per head
    x <- x + sum_k p_k Expert_k(RMSNorm(x))                  p = router(c), renormalised over the k chosen experts
    Expert(x) = W2 (u * silu(g)),  [u, g] = W1 x + b1        SwishGLU

Routing does not look at the tokens, so all tokens of a row share their experts, and for a given list of levels the
choice can be made once: `MoDE.prepare` fuses the chosen experts of each level into one (exactly, up to rounding), and
the router is no longer run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dipole.errors import DipoleError
from dipole.networks.embedding import CondDims, cond_set
from dipole.networks.expert_cache import ExpertCache, FusedExpert, PreparedMoDE
from dipole.networks.gpt import CausalSelfAttention, init_normal, sigma_feature
from dipole.networks.hooks import BlockHook, branch
from dipole.networks.routing import Router, Routing


@dataclass(frozen=True)
class MoDEConfig:
    """Sizes and choices; the defaults are the paper's.

    Attributes:
        embed_dim: Width d.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        num_experts: E, experts per block.
        top_k: k, experts used at a time.
        expert_ratio: Hidden size of an expert over d.
        router: `mlp` (d -> 2d -> E with GELU, as published code) or `linear` (one matrix, as the paper writes it).
        residual: `prenorm` (the paper: the branch is added to x) or `code` (the published code: to RMSNorm(x)).
        attention_dropout: Dropout of attention weights.
        residual_dropout: Dropout of the attention branch.
        expert_dropout: Dropout of the experts' output.
        cache_miss: What to do when a prepared network meets a level it was not prepared for: `warn` and route as
            usual, or `raise`.
    """

    name: ClassVar[str] = "mode"

    embed_dim: int = 1024
    num_layers: int = 8
    num_heads: int = 8
    num_experts: int = 4
    top_k: int = 2
    expert_ratio: int = 4
    router: Literal["mlp", "linear"] = "mlp"
    residual: Literal["prenorm", "code"] = "prenorm"
    attention_dropout: float = 0.3
    residual_dropout: float = 0.1
    expert_dropout: float = 0.1
    cache_miss: Literal["warn", "raise"] = "warn"

    def build(self, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> MoDE:
        """Return the network for chunks `[B, pred_horizon, action_dim]` and these conditioning sets."""
        return MoDE(self, action_dim, pred_horizon, cond_dims)


class Experts(nn.Module):
    """E SwishGLU feed-forward networks, their weights stacked: W1 `[E, 2H, C]`, b1 `[E, 2H]`, W2 `[E, C, H]`."""

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__()
        dim, hidden, experts = config.embed_dim, config.expert_ratio * config.embed_dim, config.num_experts
        self.w1 = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.b1 = nn.Parameter(torch.zeros(experts, 2 * hidden))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.dropout = nn.Dropout(config.expert_dropout)
        nn.init.normal_(self.w1, std=0.02)
        nn.init.normal_(self.w2, std=0.02)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """Return the output of one expert, without dropout: `[..., C]`."""
        return swish_glu(x, self.w1[expert], self.b1[expert], self.w2[expert])

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return `[B, N, C]`: each row through its experts, weighted."""
        rows, top_k = routing.selected.shape
        chosen = routing.selected.flatten()
        order = chosen.argsort(stable=True)  # rows of the same expert stand together
        counts = chosen.bincount(minlength=len(self.w1)).tolist()
        # Taken apart at once, as every single `w1[expert]` would have a gradient of the size of all experts.
        weights = zip(self.w1.unbind(), self.b1.unbind(), self.w2.unbind(), strict=True)
        parts = torch.split(x.index_select(0, order // top_k), counts)
        answers = torch.cat([swish_glu(part, *weight) for part, weight in zip(parts, weights, strict=True)])
        answers = answers.index_select(0, order.argsort()).view(rows, top_k, *x.shape[1:])
        mixed = (routing.weights[:, :, None, None] * answers).sum(1)
        dropped: Tensor = self.dropout(mixed)
        return dropped

    def fuse(self, selected: Tensor, weights: Tensor) -> FusedExpert:
        """Return one expert equal to the weighted sum of the chosen ones (`selected`, `weights`: `[k]`).

        The weights go into the linear half u, which makes the sum exact: p W2 (u * silu(g)) = W2 (p u * silu(g)).
        """
        u, g = self.w1[selected].chunk(2, dim=1)
        bu, bg = self.b1[selected].chunk(2, dim=1)
        w1 = torch.cat([(weights[:, None, None] * u).flatten(0, 1), g.flatten(0, 1)])
        b1 = torch.cat([(weights[:, None] * bu).flatten(), bg.flatten()])
        w2 = self.w2[selected].transpose(0, 1).flatten(1)
        return FusedExpert(w1.contiguous(), b1.contiguous(), w2.contiguous())


def swish_glu(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Return W2 (u * silu(g)) with [u, g] = W1 x + b1."""
    # Two products with half of W1 each: the halves of one product would be strided, and joined for its gradient.
    (wu, wg), (bu, bg) = w1.chunk(2), b1.chunk(2)
    return F.linear(F.linear(x, wu, bu) * F.silu(F.linear(x, wg, bg)), w2)


class MoEBlock(nn.Module):
    """One block: noise-conditioned attention, then the experts; `name` names its branches for hooks."""

    def __init__(self, config: MoDEConfig, name: str) -> None:
        super().__init__()
        self.branches = (f"{name}.attention", f"{name}.experts")
        self.residual = config.residual
        self.norm_attention = nn.RMSNorm(config.embed_dim)
        self.attention = CausalSelfAttention(
            config.embed_dim, config.num_heads, config.attention_dropout, config.residual_dropout, qk_norm=True
        )
        self.norm_experts = nn.RMSNorm(config.embed_dim)
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor, noise: Tensor, chosen: Routing | FusedExpert, hook: BlockHook | None = None) -> Tensor:
        """Return `[B, N, C]`.

        Args:
            x: Tokens `[B, N, C]`.
            noise: c, `[B or 1, C]`.
            chosen: Routing of this batch, or one expert fused from it.
            hook: Called for both residual branches.
        """
        x = x + branch(hook, self.branches[0], self._attend, x, noise)
        normed = self.norm_experts(x)
        base = x if self.residual == "prenorm" else normed
        return base + branch(hook, self.branches[1], lambda tokens: self._feed(tokens, chosen), normed)

    def _attend(self, x: Tensor, noise: Tensor) -> Tensor:
        attended: Tensor = self.attention(self.norm_attention(x) + noise.unsqueeze(1))
        return attended

    def _feed(self, x: Tensor, chosen: Routing | FusedExpert) -> Tensor:
        if not isinstance(chosen, Routing):
            return swish_glu(x, *chosen)
        mixed: Tensor = self.experts(x, chosen)
        return mixed


class MoDE(nn.Module):
    """`network(x, time, cond)` with experts chosen by noise level; one level per row.

    Args:
        config: Sizes and choices.
        action_dim: D.
        pred_horizon: Largest number of actions.
        cond_dims: Tokens of the conditioning in order, e.g. `{"goal": (1, G), "obs": (2, C)}`.

    Attributes:
        branches: Names of the residual branches, in the order they are computed.
    """

    def __init__(self, config: MoDEConfig, action_dim: int, pred_horizon: int, cond_dims: CondDims) -> None:
        super().__init__()
        if not 1 <= config.top_k <= config.num_experts:
            raise DipoleError(f"top_k={config.top_k} must be between 1 and num_experts={config.num_experts}")
        dim = config.embed_dim
        self.config = config
        self.num_cond = sum(count for count, _ in cond_dims.values())
        self.embed_noise = nn.Sequential(nn.Linear(1, dim), nn.Linear(dim, dim))
        # a module's name may not hold dots, a feature's does
        self.cond_names = {key: key.replace(".", "/") for key in cond_dims}
        self.embed_cond = nn.ModuleDict(
            {self.cond_names[key]: nn.Linear(size, dim) for key, (_, size) in cond_dims.items()}
        )
        self.embed_action = nn.Linear(action_dim, dim)
        self.position = nn.Parameter(torch.empty(self.num_cond + pred_horizon, dim))
        blocks = [MoEBlock(config, f"block{i}") for i in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.branches = tuple(name for block in blocks for name in block.branches)
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, action_dim)
        self.apply(init_normal)
        nn.init.normal_(self.position, std=0.02)
        self._cache: ExpertCache | None = None

    def forward(self, x: Tensor, time: Tensor, cond: Mapping[str, Tensor], hook: BlockHook | None = None) -> Tensor:
        """Return `[B, T, D]`.

        Args:
            x: Noisy actions `[B, T, D]`.
            time: Network time `[B]`.
            cond: The tokens named in `cond_dims`, each `[B, N, C]`.
            hook: Called for every residual branch.
        """
        return self.route(x, time, cond, hook=hook)[0]

    def route(
        self,
        x: Tensor,
        time: Tensor,
        cond: Mapping[str, Tensor],
        generator: Generator | None = None,
        hook: BlockHook | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Return the output and every block's routing (for `load_balance`); `generator` draws experts in training."""
        noise = self.noise_embedding(time)
        routings = [block.router(noise, generator) for block in self.layers]
        return self.denoise(x, noise, cond, routings, hook), routings

    @property
    def layers(self) -> list[MoEBlock]:
        """Return the blocks."""
        return [block for block in self.blocks if isinstance(block, MoEBlock)]

    def noise_embedding(self, time: Tensor) -> Tensor:
        """Return c `[B, C]` for network times `[B]`."""
        noise: Tensor = self.embed_noise(sigma_feature(time).to(self.position.dtype))
        return noise

    def denoise(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Mapping[str, Tensor],
        chosen: list[Routing] | list[FusedExpert],
        hook: BlockHook | None = None,
    ) -> Tensor:
        """Return `[B, T, D]` with the experts of every block given; `noise` is c, `[B or 1, C]`."""
        batch, length, _ = x.shape
        parts = [self.embed_cond[name](cond_set(cond, key)) for key, name in self.cond_names.items()]
        tokens = torch.cat([*parts, self.embed_action(x)], dim=1)
        tokens = tokens + self.position[: self.num_cond + length]
        h = torch.cat([noise.unsqueeze(1).expand(batch, 1, -1), tokens], dim=1)
        for block, experts in zip(self.blocks, chosen, strict=True):
            h = block(h, noise, experts, hook)
        out: Tensor = self.head(self.norm(h[:, -length:]))
        return out

    def prepare(self, times: Any, cond: Mapping[str, Tensor] | None = None) -> MoDE | PreparedMoDE:
        """Return the network with the experts of these levels fused; called by the sampler before its loop.

        The fused experts are kept for the next call and made anew when any weight or the list of levels has changed
        (see `ExpertCache`). In training mode, where gradients of the weights are wanted, and for levels that differ
        from row to row, returns the network itself.

        Args:
            times: Network times that will be visited, `[K]`.
            cond: Not used: routing depends on the level only.
        """
        wants_gradients = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.training or wants_gradients or not isinstance(times, Tensor) or times.dim() != 1:
            return self
        if self._cache is None or not self._cache.serves(self, times):
            self._cache = ExpertCache(self, times)
        return PreparedMoDE(self, self._cache)

    def clear_cache(self) -> None:
        """Forget the fused experts; the next `prepare` makes them anew."""
        self._cache = None
