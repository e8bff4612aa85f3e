"""Training levels of a streaming policy: every position of the chunk is as noisy as it will be when its turn comes.

Source: Hoeg et al., "Streaming Diffusion Policy" (2024). The chunk is cut into h pieces of Ta actions, the first due
now (with the To - 1 past positions in front), the last one h - 1 calls away. At the start of a call piece c stands on
rung c of a ladder that rises evenly from clean to the noisiest level; a call takes every piece one rung down. With N
levels rung c is N (c + 1) / h - 1, so h must divide N: then the levels met at run time are those of training, always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from dipole.diffusion.objectives import TimeDistribution
from dipole.diffusion.process import EDM, VP, Process
from dipole.errors import DipoleError


def pieces(obs_horizon: int, pred_horizon: int, action_horizon: int) -> Tensor:
    """Return the piece c of each position, int64 `[Tp]`; what is left over at the end joins the last piece."""
    count = num_pieces(obs_horizon, pred_horizon, action_horizon)
    position = torch.arange(pred_horizon) - (obs_horizon - 1)
    return position.clamp(min=0).div(action_horizon, rounding_mode="floor").clamp(max=count - 1)


def num_pieces(obs_horizon: int, pred_horizon: int, action_horizon: int) -> int:
    """Return h, the number of pieces of Ta actions in a chunk."""
    return (pred_horizon - (obs_horizon - 1)) // action_horizon


def rungs(piece: Tensor, count: int, process: Process) -> Tensor:
    """Return the level at which each position starts a call, float64 `[Tp]`.

    Args:
        piece: From `pieces`.
        count: h.
        process: The process; a `VP`'s number of levels must be a multiple of h.

    Raises:
        DipoleError: It is not; or the process is `EDM`, whose levels are not evenly spaced.
    """
    if isinstance(process, EDM):
        raise DipoleError("streaming trains evenly spaced levels, which suit 'flow' and 'vp-*' processes, not 'edm'")
    if isinstance(process, VP):
        check_divides(count, process.num_steps, "noise levels of the process")
        return (process.num_steps * (piece.double() + 1) / count) - 1
    return process.clean + (process.noisiest - process.clean) * (piece.double() + 1) / count


def check_divides(count: int, steps: int, what: str) -> None:
    """Raise DipoleError when `count` pieces do not divide `steps`."""
    if steps % count:
        nearest = max(1, round(steps / count)) * count
        raise DipoleError(
            f"streaming cuts the chunk into h={count} pieces, which must divide the {steps} {what}: take {nearest} of "
            "them, or choose horizons with another h = (Tp - To + 1) // Ta"
        )


@dataclass(frozen=True)
class StreamingTraining:
    """Which levels a streaming policy is trained on: shares of four schemes (they are scaled to sum to 1).

    Attributes:
        chunk_wise: The levels of a call: each piece between two rungs, all equally far below the upper one.
        constant: One level for all positions, from the objective's own distribution: ordinary diffusion.
        linear: Rising evenly along the chunk to a random level.
        independent: Every position for itself.
        scheme_per: Draw the scheme for every `row` of a batch, or once per `batch` as the published code does.
    """

    chunk_wise: float = 0.8
    constant: float = 0.2
    linear: float = 0.0
    independent: float = 0.0
    scheme_per: Literal["row", "batch"] = "row"

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or sum(self.shares) <= 0:
            raise DipoleError(f"shares of the streaming schemes must not be negative or all 0, found {self.shares}")

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Return the four shares."""
        return self.chunk_wise, self.constant, self.linear, self.independent

    def draw(
        self,
        batch: int,
        horizons: tuple[int, int, int],
        process: Process,
        time: TimeDistribution,
        generator: Generator | None = None,
    ) -> Tensor:
        """Return training levels, float64 `[B, Tp]`.

        Args:
            batch: B.
            horizons: To, Tp, Ta.
            process: The process.
            time: Distribution of the `constant` levels.
            generator: Source of randomness.

        Raises:
            DipoleError: The number of pieces does not divide the number of levels.
        """
        device = None if generator is None else generator.device
        piece, count, tp = pieces(*horizons).to(device), num_pieces(*horizons), horizons[1]
        drawn = torch.multinomial(
            torch.tensor(self.shares, device=device),
            batch if self.scheme_per == "row" else 1,
            replacement=True,
            generator=generator,
        )
        ladder = rungs(piece, count, process)
        u = torch.rand(batch, 1, generator=generator, device=device, dtype=torch.float64)
        constant = time.sample((batch, 1), process, generator).expand(-1, tp)
        levels = [
            _below(ladder, u, 1 / count, process),
            constant,
            _linear(tp, u, process),
            _independent(batch, tp, process, generator),
        ]
        scheme = drawn.expand(batch).reshape(1, batch, 1).expand(-1, -1, tp)
        return torch.stack(levels).gather(0, scheme).squeeze(0)


def _below(ladder: Tensor, u: Tensor, share: float, process: Process) -> Tensor:
    """Return the ladder lowered by `u` of a rung: by a whole number of levels from 0 to N/h - 1 for a `VP`."""
    if isinstance(process, VP):
        return ladder - (u * share * process.num_steps + 1e-9).floor()
    return ladder - u * share * (process.noisiest - process.clean)


def _linear(tp: int, u: Tensor, process: Process) -> Tensor:
    slope = torch.arange(1, tp + 1, device=u.device, dtype=torch.float64) / tp
    if isinstance(process, VP):
        return (u * slope * process.num_steps).floor().clamp(max=process.num_steps - 1)
    return process.clean + (1 - u) * slope * (process.noisiest - process.clean)


def _independent(batch: int, tp: int, process: Process, generator: Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    if isinstance(process, VP):
        return torch.randint(0, process.num_steps, (batch, tp), generator=generator, device=device).double()
    u = torch.rand(batch, tp, generator=generator, device=device, dtype=torch.float64)
    return process.clean + (1 - u) * (process.noisiest - process.clean)
