"""A server whose policy shows what it did: actions are the observation, the session's call count and a constant.

    python benchmarks/server/stand_in.py --port 0 [--images] [--audit FILE] [--sleep-ms 5]

Used by `faults.py` (whose state was it?) and `overhead.py` (a policy that costs nothing).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import STATE

from dipole.data import Feature
from dipole.policies.policy import State, reset_rows
from dipole.serving.audit import AuditLog
from dipole.serving.config import ServiceConfig
from dipole.serving.limits import Limits
from dipole.serving.models import ModelStore, from_policy
from dipole.serving.server import Server
from dipole.serving.service import Service

CAMERAS = ("observation.images.top", "observation.images.wrist")
PIXELS = 224


class StandIn:
    """Actions `[B, 2, 3]`: the newest observation's two numbers, and how often the session has been answered."""

    obs_horizon, pred_horizon, action_horizon, action_dim = 1, 2, 2, 3

    def __init__(self, images: bool = False, sleep_ms: float = 0.0) -> None:
        features = {STATE: Feature("float32", (2,))}
        if images:
            features |= {name: Feature("image", (PIXELS, PIXELS, 3)) for name in CAMERAS}
        self.config = SimpleNamespace(observation=features, action=Feature("float32", (3,)), fps=10.0, task="stand in")
        self.sleep_s = sleep_ms / 1000

    def initial_state(self, batch: int) -> State:
        """Return counts of zero."""
        return {"count": torch.zeros(batch)}

    def reset(self, state: State, mask: torch.Tensor) -> State:
        """Return the state with some rows at zero."""
        return reset_rows(state, self.initial_state(len(mask)), mask)

    def act(self, obs: Any, state: State, noise: Any = None, generator: Any = None) -> tuple[torch.Tensor, State]:
        """Return the actions, and counts one higher."""
        if self.sleep_s:
            time.sleep(self.sleep_s)
        count = state["count"] + 1
        step = torch.cat([obs[STATE][:, -1], count[:, None]], dim=1)
        return step[:, None].repeat(1, 2, 1), {"count": count}


def limits(**changes: Any) -> Limits:
    return Limits(**{"requests_per_s": 1e6, "burst": 1_000_000, **changes})


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--audit", type=Path)
    parser.add_argument("--sleep-ms", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = ModelStore([from_policy("stand-in", StandIn(args.images, args.sleep_ms))])
    config = ServiceConfig(limits(ping_s=2.0, send_timeout_s=2.0))
    server = Server(Service(store, config, AuditLog(args.audit)), port=args.port)
    await server.run(lambda server: print(f"serving on {server.url}", file=sys.stderr, flush=True))


if __name__ == "__main__":
    asyncio.run(main())
