"""Which experts a row uses: chosen by its noise level alone, drawn in training, and kept in balance by a loss.

Source: Reuss et al., "Efficient Diffusion Transformer Policies with Mixture of Expert Denoisers for Multitask Learning"
(MoDE, 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from dipole.networks.moe import MoDEConfig


class Routing(NamedTuple):
    """Which experts a batch uses in one block.

    Attributes:
        probabilities: `[B, E]` softmax over all experts.
        selected: `[B, k]` indices of the chosen ones.
        weights: `[B, k]` their probabilities, renormalised to sum to one.
    """

    probabilities: Tensor
    selected: Tensor
    weights: Tensor


class Router(nn.Module):
    """From the noise embedding to experts: drawn without replacement in training, the k most likely otherwise."""

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__()
        dim, experts = config.embed_dim, config.num_experts
        self.top_k = config.top_k
        if config.router == "mlp":
            self.logits: nn.Module = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, experts))
        else:
            self.logits = nn.Linear(dim, experts, bias=False)

    def forward(self, noise: Tensor, generator: Generator | None = None) -> Routing:
        """Return the routing of rows with noise embedding `[B, C]`."""
        probabilities = self.logits(noise).softmax(-1)
        if self.training:
            selected = torch.multinomial(probabilities.detach(), self.top_k, generator=generator)
        else:
            selected = probabilities.topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, selected)
        return Routing(probabilities, selected, weights / weights.sum(-1, keepdim=True))


def load_balance(routings: list[Routing], kind: Literal["full", "selected"] = "full") -> Tensor:
    """Return the mean over blocks of  E sum_e (share of rows routed to e) (mean probability of e); k when uniform.

    Args:
        routings: From `MoDE.route`.
        kind: `full`: the probability is the softmax over all experts (the paper); `selected`: the renormalised
            probability of the chosen ones, 0 for the others (the published code).
    """
    losses = []
    for routing in routings:
        experts = routing.probabilities.shape[-1]
        chosen = F.one_hot(routing.selected, experts).to(routing.weights.dtype)
        share = chosen.sum(1).mean(0)
        if kind == "full":
            probability = routing.probabilities.mean(0)
        else:
            probability = (chosen * routing.weights.unsqueeze(-1)).sum(1).mean(0)
        losses.append(experts * (share * probability).sum())
    return torch.stack(losses).mean()
