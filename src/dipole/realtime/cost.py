"""What a network call costs in multiply-accumulate operations, branch by branch, counted while it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dipole.policies.policy import Observation
from dipole.realtime.backends import with_network
from dipole.realtime.block_cache import BlockCacheConfig

REST = ""
"""Name under which everything outside the branches is booked."""


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (width + value[3]))


EXTRA: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""For `FlopCounterMode`, which knows attention on GPUs only."""


class _Ledger(nn.Module):
    """Calls a network; books the multiply-accumulates of the first call by branch, and counts the calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.booked: dict[str, int] = {}
        self.calls = 0

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            out: Tensor = self.network(x, time, cond)
            return out
        return self._book(x, time, cond)

    def _book(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter:

            def hook(name: str, compute: Any) -> Tensor:
                before = counter.get_total_flops()
                out: Tensor = compute()
                self.booked[name] = (counter.get_total_flops() - before) // 2
                return out

            hooked = (hook,) if getattr(self.network, "branches", ()) else ()
            out: Tensor = self.network(x, time, cond, *hooked)
            self.booked[REST] = counter.get_total_flops() // 2 - sum(self.booked.values())
        return out


@dataclass(frozen=True)
class Cost:
    """What one chunk costs.

    Attributes:
        macs: Multiply-accumulates of one network call, by branch and for the `REST`.
        calls: Network calls of a chunk.
    """

    macs: dict[str, int]
    calls: int

    @property
    def call(self) -> int:
        """Return the multiply-accumulates of a whole network call."""
        return sum(self.macs.values())

    @property
    def total(self) -> int:
        """Return the multiply-accumulates of a chunk without a cache."""
        return self.calls * self.call

    def cached(self, config: BlockCacheConfig) -> int:
        """Return those under a schedule: the rest at every call, each branch at the calls at which it is computed."""
        return self.calls * self.macs[REST] + sum(len(steps) * self.macs[name] for name, steps in config.steps.items())

    def equal_calls(self, macs: int) -> int:
        """Return how many whole network calls cost `macs`, rounded to the nearest and at least 1."""
        return max(1, math.floor(macs / self.call + 0.5))


@torch.no_grad()
def chunk_cost(policy: Any, obs: Observation) -> Cost:
    """Count what one chunk costs.

    Counted are matrix products, convolutions and attention; the encoder of the observation is left out.

    Args:
        policy: A policy that runs its `network` eagerly.
        obs: Observations `[B, To, ...]`; the counts are those of the whole batch.
    """
    ledger = _Ledger(policy.network)
    batch = len(next(iter(obs.values())))
    with_network(policy, ledger).act(obs, policy.initial_state(batch), generator=torch.Generator().manual_seed(0))
    return Cost(ledger.booked, ledger.calls)
