"""Block hooks: every residual branch of a network has a stable name and can be intercepted.

A network that supports them takes `hook=None` as a last argument of its call and lists its branch names, in the order
they are computed, in `network.branches`. A hook is called once per branch and decides whether to compute it:

    def without_cross_attention(name, compute):        # an ablation
        return torch.zeros_like(compute()) if name.endswith(".ca") else compute()

It is an argument, not an attribute, so one network can serve calls with different hooks, or none, at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class BlockHook(Protocol):
    """Stands between a residual stream and one branch of it."""

    def __call__(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return what is added to the residual stream: `compute()`, or a stored or changed tensor of its shape."""


def branch(hook: BlockHook | None, name: str, compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return `compute(*args)`, through `hook` if there is one."""
    return compute(*args) if hook is None else hook(name, lambda: compute(*args))
